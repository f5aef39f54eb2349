"""What is known of the request being answered: its ids, its caller; and the line it leaves in the log."""

import logging
import os
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics

ASKED_BY_MACHINES = ("/health", "/metrics")  # every few seconds
log = logging.getLogger("tosca.request")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# W3C Trace Context: version, trace id, parent id, flags; no id is all zeros, version ff is forbidden.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


@dataclass(slots=True)
class RequestContext:
    request_id: str
    trace_id: str | None = None
    caller: str | None = None
    refusal: str | None = None  # kind of the problem document that answers it


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


class TrackRequests:
    """ASGI middleware: every request gets its ids, is measured and leaves one line in the log.

    `x-request-id` is echoed: an id that came with the request when it is harmless, else a new one. What the
    line holds is chosen: no header, no query, no body, so that no secret can be in it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(Headers(scope=scope))
        current_request.set(context)  # each request runs in a context of its own: nothing to undo
        started = time.monotonic()
        status = 500  # what an exception becomes further out

        async def tracked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, tracked)
        except Exception:
            context.refusal = "internal"
            raise
        finally:
            duration_s = time.monotonic() - started
            route = getattr(scope.get("route"), "path", None)
            self._metrics.count_request(scope["method"], route, status, duration_s, context.refusal)
            level = logging.DEBUG if scope["path"].startswith(ASKED_BY_MACHINES) else logging.INFO
            fields = {
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "duration_ms": round(1e3 * duration_s, 2),
                "client": scope["client"][0] if scope.get("client") else None,
                "caller": context.caller,
            }
            log.log(level, "%s %s %d", fields["method"], fields["path"], status, extra={"fields": fields})


def context_of(headers: Headers) -> RequestContext:
    """The ids of a request: its own where they are well-formed."""
    given = headers.get("x-request-id", "")
    trace = _TRACEPARENT.fullmatch(headers.get("traceparent", "")[:512])
    return RequestContext(
        request_id=given if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex(),
        trace_id=trace.group(1) if trace else None,
    )
