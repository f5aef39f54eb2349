"""Bounds on request bodies while they arrive: bytes of one, bytes of all together, and time."""

import asyncio
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTimeout, BodyTooLarge, Overloaded


class LimitBodies:
    """ASGI middleware. A body may have `limit_of(path, media type)` bytes and take `timeout_s`; all bodies
    of requests under way may have `max_buffered_bytes` together, for that is the memory they can take."""

    def __init__(
        self, app: ASGIApp, limit_of: Callable[[str, str], int], timeout_s: float, max_buffered_bytes: int
    ) -> None:
        self._app = app
        self._limit_of = limit_of
        self._timeout_s = timeout_s
        self._max_buffered_bytes = max_buffered_bytes
        self._num_buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._limit_of(scope["path"], media_type_of(headers))
        declared = headers.get("content-length", "0")
        deadline = time.monotonic() + self._timeout_s
        num_bytes = 0
        is_whole = False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes now is the end of the connection
                return await receive()
            if declared.isdecimal() and int(declared[:20]) > limit:
                raise BodyTooLarge(f"request body has {declared[:20]} bytes, the limit is {limit}")
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise BodyTimeout(f"the request body did not arrive within {self._timeout_s:g} s") from error
            arrived = len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            num_bytes += arrived
            self._num_buffered += arrived
            if num_bytes > limit:
                raise BodyTooLarge(f"request body exceeds the limit of {limit} bytes")
            if self._num_buffered > self._max_buffered_bytes:
                raise Overloaded(
                    f"bodies of requests under way have {self._num_buffered} bytes, "
                    f"at most {self._max_buffered_bytes} are kept",
                    retry_after_s=1.0,
                )
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._num_buffered -= num_bytes


def media_type_of(headers: Headers) -> str:
    """The content type without its parameters, lower case; empty when there is none."""
    return headers.get("content-type", "").split(";")[0].strip().lower()
