"""One process, one or two ports: which application answers on which."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send


class Planes:
    """Hands every request to the application of the port it came in on.

    The port is the local end of the connection, which no client chooses; its address does not count, so no
    two ports may have one number. The lifespan is that of `main`.
    """

    def __init__(self, main: ASGIApp) -> None:
        self._main = main
        self._by_port: Mapping[int, ASGIApp] = {}

    def put(self, port: int, app: ASGIApp) -> None:
        """Let `app` answer on `port`."""
        self._by_port = {**self._by_port, port: app}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server")
        app = self._by_port.get(server[1], self._main) if server else self._main
        await app(scope, receive, send)
