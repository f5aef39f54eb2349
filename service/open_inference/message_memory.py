"""Memory for gRPC messages: one is received only when there is room for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from model_store.errors import InvalidRequest
from service.errors import DeadlineExceeded, Overloaded

Kind = TypeVar("Kind", bound=Message)


class Incoming(Protocol):
    """What brings a message, as grpc.aio.ServicerContext does: no bytes where none comes."""

    async def read(self) -> object: ...


class MessageMemory:
    """Keeps the messages of all calls under way within `max_bytes`.

    How large a message is shows only when it is there, so until then it counts as one of `largest_bytes`:
    few arrive at a time, and the others wait in flow-control windows of some KiB.
    """

    def __init__(self, largest_bytes: int, max_bytes: int, timeout_s: float) -> None:
        """`timeout_s`: how long a call may wait for room, and then for its message."""
        self._largest_bytes = min(largest_bytes, max_bytes)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._num_bytes = 0
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def receive(self, call: Incoming, kind: type[Kind]) -> AsyncIterator[Kind]:
        """The message of a call, of that kind, which has its place in memory while the block runs.

        Raises Overloaded, DeadlineExceeded, and InvalidRequest when there is none or it cannot be read.
        """
        size = self._largest_bytes
        await self._take(size)
        try:
            raw = await self._read(call)
            self._num_bytes += len(raw) - size
            size = len(raw)
            self._freed.set()
            if self._num_bytes > self._max_bytes:  # where one may have more bytes than all together
                raise Overloaded(
                    f"messages of calls under way have {self._num_bytes} bytes, "
                    f"at most {self._max_bytes} are kept",
                    retry_after_s=1.0,
                )
            message = _parse(raw, kind)
            del raw  # the message has its own copy
            yield message
        finally:
            self._num_bytes -= size
            self._freed.set()

    async def _take(self, num_bytes: int) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._num_bytes + num_bytes > self._max_bytes:
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError as error:
            raise Overloaded(f"no room for a message within {self._timeout_s:g} s") from error
        self._num_bytes += num_bytes

    async def _read(self, call: Incoming) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                raw = await call.read()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the message did not arrive within {self._timeout_s:g} s") from error
        if not isinstance(raw, bytes):
            raise InvalidRequest("the call has no message")
        return raw


def _parse(raw: bytes, kind: type[Kind]) -> Kind:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no {kind.DESCRIPTOR.name}") from error
