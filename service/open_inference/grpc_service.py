"""inference.GRPCInferenceService: the calls, and what every call goes through."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from starlette.datastructures import Headers

from model_store.errors import NotFound, ToscaError
from service.access import Caller
from service.errors import Forbidden, Overloaded, Refused
from service.keys import Scope
from service.open_inference import inference_pb2 as pb
from service.open_inference.answering import infer, max_listed
from service.open_inference.grpc_messages import infer_message, read_choices, read_infer_message
from service.open_inference.models import EXTENSIONS, PLATFORM, TensorSpec, find_model, inputs_of
from service.prediction import Inquiry
from service.problems import status_of
from service.request_context import context_of, current_request
from service.routes.state import ServiceState

log = logging.getLogger("tosca.request")

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Call: TypeAlias = Callable[[Any, "Context", Caller], Awaitable[Message]]

# gRPC's codes for the statuses of service.problems; what is not here is ours.
CODE_OF = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class InferenceService:
    """Answers the protocol's calls with the running parts of the service."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._num_buffered = 0  # bytes of the requests under way

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server needs to answer all calls."""
        calls: dict[str, tuple[Call, Scope | None, type[Any], type[Any]]] = {
            "ServerLive": (self._live, None, pb.ServerLiveRequest, pb.ServerLiveResponse),
            "ServerReady": (self._ready, None, pb.ServerReadyRequest, pb.ServerReadyResponse),
            "ServerMetadata": (self._server, "read", pb.ServerMetadataRequest, pb.ServerMetadataResponse),
            "ModelReady": (self._model_ready, "read", pb.ModelReadyRequest, pb.ModelReadyResponse),
            "ModelMetadata": (self._model, "read", pb.ModelMetadataRequest, pb.ModelMetadataResponse),
            "ModelInfer": (self._infer, "predict", pb.ModelInferRequest, pb.ModelInferResponse),
            "RepositoryIndex": (self._index, "read", pb.RepositoryIndexRequest, pb.RepositoryIndexResponse),
            "RepositoryModelLoad": (
                self._load,
                "admin",
                pb.RepositoryModelLoadRequest,
                pb.RepositoryModelLoadResponse,
            ),
            "RepositoryModelUnload": (
                self._unload,
                "admin",
                pb.RepositoryModelUnloadRequest,
                pb.RepositoryModelUnloadResponse,
            ),
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    self._guarded(name, call, scope),
                    request_deserializer=asked.FromString,
                    response_serializer=answered.SerializeToString,
                )
                for name, (call, scope, asked, answered) in calls.items()
            },
        )

    def _guarded(
        self, name: str, call: Call, scope: Scope | None
    ) -> Callable[[Any, Context], Awaitable[Message]]:
        """`call` for those who may, its faults as gRPC codes, and a line in the log. No scope: for all."""

        async def guarded(request: Any, context: Context) -> Message:
            metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
            told = context_of(Headers(metadata))
            current_request.set(told)  # each call runs in a context of its own: nothing to undo
            started = time.monotonic()
            code = grpc.StatusCode.INTERNAL
            try:
                if scope is None:
                    answer = await call(request, context, Caller("anonymous", frozenset()))
                else:
                    caller = self._state.access.identify(_authorization(metadata))
                    told.caller = caller.name
                    self._state.access.check(caller, scope)
                    with self._state.quota.place(caller.key_id, self._state.engine.drain_s):
                        answer = await call(request, context, caller)
                code = grpc.StatusCode.OK
                return answer
            except ToscaError as error:
                code = CODE_OF.get(status_of(error), grpc.StatusCode.INTERNAL)
                trailing = [("x-request-id", told.request_id)]
                if isinstance(error, Refused):
                    trailing.append(("retry-after", str(max(1, round(error.retry_after_s)))))
                await context.abort(code, str(error)[:1000], tuple(trailing))
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception:  # delivered to the client, without what it says
                log.exception("gRPC %s failed", name)
                await context.abort(code, "This is a bug; the log has the details.")
            finally:
                self._log(name, code, time.monotonic() - started, context.peer(), told.caller, scope)

        return guarded

    def _log(
        self,
        name: str,
        code: grpc.StatusCode,
        duration_s: float,
        peer: str,
        caller: str | None,
        scope: Scope | None,
    ) -> None:
        fields = {
            "method": "gRPC",
            "path": f"/{SERVICE}/{name}",
            "status": code.name,
            "duration_ms": round(1e3 * duration_s, 2),
            "client": peer[:100],
            "caller": caller,
        }
        level = logging.DEBUG if scope is None else logging.INFO
        log.log(level, "gRPC %s %s", name, code.name, extra={"fields": fields})

    # -- the calls -----------------------------------------------------------------------------------

    async def _live(self, _: pb.ServerLiveRequest, __: Context, ___: Caller) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=self._state.engine.is_alive)

    async def _ready(self, _: pb.ServerReadyRequest, __: Context, ___: Caller) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._state.accepts)

    async def _server(
        self, _: pb.ServerMetadataRequest, __: Context, ___: Caller
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="tosca-serving", version=installed_version("tosca-serving"), extensions=EXTENSIONS
        )

    async def _model_ready(
        self, request: pb.ModelReadyRequest, _: Context, __: Caller
    ) -> pb.ModelReadyResponse:
        try:
            find_model(self._state.registry.active, request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._state.accepts)

    async def _model(
        self, request: pb.ModelMetadataRequest, _: Context, __: Caller
    ) -> pb.ModelMetadataResponse:
        model = find_model(self._state.registry.active, request.name, request.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=PLATFORM,
            inputs=[_tensor(one) for one in inputs_of(self._state.engine.backbone.manifest)],
            outputs=[_tensor(one) for one in model.outputs],
        )

    async def _infer(
        self, request: pb.ModelInferRequest, context: Context, _: Caller
    ) -> pb.ModelInferResponse:
        state = self._state
        size = request.ByteSize()
        limit = state.settings.max_buffered_bytes
        if self._num_buffered + size > limit:
            raise Overloaded(
                f"requests under way would have {self._num_buffered + size} bytes, at most {limit} are kept",
                1.0,
            )
        self._num_buffered += size
        try:
            active = state.registry.active
            model = find_model(active, request.model_name, request.model_version)
            left_s, settings = context.time_remaining(), state.settings
            timeout_s = (
                settings.request_timeout_s if left_s is None else min(left_s, settings.max_request_timeout_s)
            )
            inquiry = Inquiry.admit(state.engine, settings, active.bank, timeout_s)
            max_elements = max_listed(state.engine.backbone, settings.max_images_per_request)
            asked = read_infer_message(request, max_elements)
            outputs = await infer(inquiry, model, asked, state.engine.backbone)
            return infer_message(model, asked.request_id, outputs)
        finally:
            self._num_buffered -= size

    async def _index(
        self, request: pb.RepositoryIndexRequest, _: Context, __: Caller
    ) -> pb.RepositoryIndexResponse:
        models = await self._state.repository.index(ready_only=request.ready)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=one.name, version=one.version, state=one.state, reason=one.reason
                )
                for one in models
            ]
        )

    async def _load(
        self, request: pb.RepositoryModelLoadRequest, _: Context, caller: Caller
    ) -> pb.RepositoryModelLoadResponse:
        self._check_plane()
        parameters = read_choices(request.parameters)
        await self._state.repository.load(request.model_name, author=caller.author, parameters=parameters)
        return pb.RepositoryModelLoadResponse()

    async def _unload(
        self, request: pb.RepositoryModelUnloadRequest, _: Context, caller: Caller
    ) -> pb.RepositoryModelUnloadResponse:
        self._check_plane()
        await self._state.repository.unload(request.model_name, author=caller.author)
        return pb.RepositoryModelUnloadResponse()

    def _check_plane(self) -> None:
        """Raises Forbidden where changes of the tasks have a port of their own, which gRPC is not on."""
        if self._state.settings.admin_port is not None:
            raise Forbidden("tasks are changed on the admin port, over HTTP", scope=None)


def _authorization(metadata: dict[str, str]) -> str | None:
    """The Authorization of a call; `x-api-key` may carry the key alone."""
    if (given := metadata.get("authorization")) is not None:
        return given
    key = metadata.get("x-api-key")
    return None if key is None else f"Bearer {key}"


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
