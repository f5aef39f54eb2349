"""Refusing predictions while the queue is full, as cheaply as can be: it happens most when time is short."""

import re

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Refused
from service.problems import problem_of

_PREDICTION_PATH = re.compile(r"/predict|/v2/models/.*/infer")


class ShedLoad:
    """ASGI middleware. A prediction that the engine has no room for is refused before it is routed, its key
    looked up, its parameters parsed or its body asked for: a client that waits for `100 Continue` never
    sends one, and what others have sent already is read past, so that the connection can be used again.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_prediction(scope):
            try:
                self._state.service.engine.check_room()
            except Refused as refusal:
                await problem_of(refusal, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_prediction(scope: Scope) -> bool:
    is_post = scope["type"] == "http" and scope["method"] == "POST"
    return is_post and _PREDICTION_PATH.fullmatch(scope["path"]) is not None
