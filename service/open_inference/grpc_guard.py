"""What every gRPC call goes through: who asks, faults as codes, a line in the log."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from starlette.datastructures import Headers

from model_store.errors import InvalidRequest, ToscaError
from service.access import Caller
from service.errors import Refused, RevisionBehind
from service.keys import Scope
from service.open_inference.message_memory import MessageMemory
from service.problems import status_of
from service.request_context import RequestContext, context_of, current_request
from service.routes.state import ServiceState

log = logging.getLogger("tosca.request")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Call: TypeAlias = Callable[[Any, "Context", Caller], Awaitable[Message]]

# gRPC's codes for the statuses of service.problems; what is not here is ours.
CODE_OF = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    412: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def guarded(
    path: str,
    call: Call,
    scope: Scope | None,
    asked: type[Message],
    memory: MessageMemory,
    state: ServiceState,
) -> Callable[[object, Context], Awaitable[Message]]:
    """`call` for callers that may act under `scope`, whose message is received once that is known.

    Without a scope it is for all, and gets an empty message: theirs stays with them.
    """

    async def admitted(context: Context, metadata: dict[str, str], told: RequestContext) -> Message:
        if scope is None:
            return await call(asked(), context, Caller("anonymous", frozenset()))
        caller = state.access.identify(_authorization(metadata))
        told.caller = caller.name
        state.access.check(caller, scope)
        with state.quota.place(caller.key_id, state.engine.drain_s):
            await _catch_up(metadata.get("x-minimum-revision"), context, state)
            async with memory.receive(context, asked) as request:
                return await call(request, context, caller)

    async def answer(_: object, context: Context) -> Message:
        metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        told = context_of(Headers(metadata))
        current_request.set(told)  # each call runs in a context of its own: nothing to undo
        context.set_trailing_metadata((("x-request-id", told.request_id),))
        started = time.monotonic()
        code = grpc.StatusCode.INTERNAL
        try:
            answered = await admitted(context, metadata, told)
            code = grpc.StatusCode.OK
            return answered
        except ToscaError as error:
            code = CODE_OF.get(status_of(error), grpc.StatusCode.INTERNAL)
            # Its frames hold the message, and futures there hold the fault: a circle of megabytes.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            await context.abort(code, str(error)[:1000], _trailing_metadata(error, told))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:  # delivered to the client, without what it says
            log.exception("gRPC %s failed", path)
            await context.abort(code, "This is a bug; the log has the details.")
        finally:
            fields = {
                "method": "gRPC",
                "path": path,
                "status": code.name,
                "duration_ms": round(1e3 * (time.monotonic() - started), 2),
                "client": context.peer()[:100],
                "caller": told.caller,
            }
            level = logging.DEBUG if scope is None else logging.INFO
            log.log(level, "gRPC %s %s", path, code.name, extra={"fields": fields})

    return answer


async def _catch_up(minimum: str | None, context: Context, state: ServiceState) -> None:
    """Serve the revision that a call asks for. Raises InvalidRequest and RevisionBehind."""
    if minimum is None:
        return
    if not (minimum.isascii() and minimum.isdecimal() and 0 < len(minimum) <= 12):
        raise InvalidRequest(f"x-minimum-revision is {minimum[:32]!r}: expected a revision's number")
    left_s, timeout_s = context.time_remaining(), state.settings.catch_up_timeout_s
    await state.registry.catch_up(int(minimum), timeout_s if left_s is None else min(left_s, timeout_s))


def _authorization(metadata: dict[str, str]) -> str | None:
    """The Authorization of a call; `x-api-key` may carry the key alone."""
    if (given := metadata.get("authorization")) is not None:
        return given
    key = metadata.get("x-api-key")
    return None if key is None else f"Bearer {key}"


def _trailing_metadata(error: ToscaError, told: RequestContext) -> tuple[tuple[str, str], ...]:
    """What comes after a refusal: the id of the request, and when to come back."""
    found = [("x-request-id", told.request_id)]
    if isinstance(error, Refused):
        found.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
    if isinstance(error, RevisionBehind):
        found.append(("x-revision", str(error.served)))
    return tuple(found)
