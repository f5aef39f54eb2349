"""Headers on every answer: what browsers may do with it, and that a draining server wants no more."""

import asyncio

from starlette.datastructures import MutableHeaders, State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ShuttingDown
from service.problems import problem_of

# FastAPI's /docs page loads Swagger UI from jsDelivr and starts it with an inline script.
_DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'self' 'unsafe-inline' https://cdn.jsdelivr.net; "
    "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_DOCS_PATHS = ("/docs", "/redoc")


class SecureHeaders:
    """ASGI middleware: nothing is sniffed, no page is framed, pages load only what their policy names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                if headers.get("content-type", "").startswith("text/html"):
                    policy = _DOCS_POLICY if scope["path"].startswith(_DOCS_PATHS) else _PAGE_POLICY
                    headers["content-security-policy"] = policy
                    headers["referrer-policy"] = "no-referrer"
                    headers["x-frame-options"] = "DENY"
            await send(message)

        await self._app(scope, receive, secured if scope["type"] == "http" else send)


class CloseWhenDraining:
    """ASGI middleware: while the service drains, every answer closes its connection, so that a client finds
    another replica for its next request instead of this one's closing door. What is cancelled when the time
    of draining is over is refused."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def closing(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start" and self._is_draining():
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, closing)
        except asyncio.CancelledError:
            if has_begun or not self._is_draining():
                raise
            refusal = ShuttingDown("not answered before the server had to end")
            await problem_of(refusal, scope["path"])(scope, receive, closing)

    def _is_draining(self) -> bool:
        service = getattr(self._state, "service", None)
        return service is not None and service.is_draining
