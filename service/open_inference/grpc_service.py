"""inference.GRPCInferenceService: its calls."""

from importlib.metadata import version as installed_version
from typing import Any

import grpc

from model_store.errors import NotFound
from service.access import Caller
from service.errors import Forbidden
from service.keys import Scope
from service.open_inference import inference_pb2 as pb
from service.open_inference.answering import infer, max_listed
from service.open_inference.grpc_guard import Call, Context, guarded
from service.open_inference.grpc_messages import infer_message, read_choices, read_infer_message
from service.open_inference.message_memory import MessageMemory
from service.open_inference.models import EXTENSIONS, PLATFORM, TensorSpec, find_model, inputs_of
from service.prediction import Inquiry
from service.routes.state import ServiceState

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
# Messages without pictures that may arrive at once. They are small, but how small shows when they are there.
_NAMES_AT_ONCE = 4


class InferenceService:
    """Answers the protocol's calls with the running parts of the service."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        settings = state.settings
        self._pictures = MessageMemory(
            settings.max_body_bytes, settings.max_buffered_bytes, settings.body_timeout_s
        )
        # Of its own, so that probes do not wait for pictures that are long in coming.
        self._names = MessageMemory(
            settings.max_body_bytes, _NAMES_AT_ONCE * settings.max_body_bytes, settings.header_timeout_s
        )

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server needs to answer all calls.

        To gRPC each is a stream with one message, which is the same on the wire: the message of a unary call
        is received before anything of ours runs, interceptors that refuse the call included.
        """
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
                name: grpc.stream_unary_rpc_method_handler(
                    guarded(f"/{SERVICE}/{name}", call, scope, asked, self._memory_of(name), self._state),
                    response_serializer=answered.SerializeToString,
                )
                for name, (call, scope, asked, answered) in calls.items()
            },
        )

    def _memory_of(self, name: str) -> MessageMemory:
        return self._pictures if name == "ModelInfer" else self._names

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


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
