"""How often shared work is done: at jittered intervals, and once for all who wait for it."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")
JITTER = 0.2  # of an interval, to either side


def jittered(interval_s: float) -> float:
    """An interval a little shorter or longer, so that replicas started together do not ask together."""
    return interval_s * random.uniform(1.0 - JITTER, 1.0 + JITTER)  # noqa: S311


class SingleFlight(Generic[Result]):
    """Work that is under way at most once; who wants it meanwhile gets what that one run finds.

    Work goes on when those who wait for it leave. Belongs to one event loop.
    """

    def __init__(self, work: Callable[[], Awaitable[Result]], spacing_s: float = 0.0) -> None:
        """`spacing_s`: least seconds from the beginning of one run to that of the next."""
        self._work = work
        self._spacing_s = spacing_s
        self._under_way: asyncio.Task[Result] | None = None
        self._has_begun = False
        self._may_begin_at = 0.0

    async def joined(self) -> Result:
        """The result of the run under way, or of a new one."""
        if self._under_way is None or self._under_way.done():
            self._has_begun = False
            self._under_way = asyncio.create_task(self._run())
            self._under_way.add_done_callback(_retrieve)
        return await asyncio.shield(self._under_way)

    async def fresh(self) -> Result:
        """The result of a run that begins after this call, so that it sees all that happened before."""
        under_way = self._under_way
        if under_way is not None and not under_way.done() and self._has_begun:
            await asyncio.wait([under_way])
        return await self.joined()

    async def _run(self) -> Result:
        await asyncio.sleep(max(0.0, self._may_begin_at - time.monotonic()))
        self._has_begun = True
        self._may_begin_at = time.monotonic() + self._spacing_s
        return await self._work()


def _retrieve(task: "asyncio.Task[object]") -> None:
    """Look at a fault that nobody waits for any more, which asyncio would complain about."""
    if not task.cancelled():
        task.exception()
