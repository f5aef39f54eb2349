"""The tasks a running service answers with: one reference, changed by one thread off the request path."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from model_store.errors import ToscaError
from model_store.publishing import ActiveSet, Outcome, Publisher

log = logging.getLogger("tosca.registry")
Result = TypeVar("Result")


class TaskRegistry:
    """Holds the active set. Changes run one after another on the loader thread and end in one reference
    assignment inside the publisher, so a reader sees the set before or the set after, never a mixture."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._seen_at = time.monotonic()

    @property
    def active(self) -> ActiveSet:
        return self._publisher.active

    @property
    def staleness_s(self) -> float:
        """Seconds since the store was last read."""
        return time.monotonic() - self._seen_at

    async def register(self, data: bytes, *, dry_run: bool, force: bool, reason: str) -> Outcome:
        """Publish a module file; see Publisher.register for the faults."""
        return await self._run(
            lambda: self._publisher.register(data, dry_run=dry_run, force=force, reason=reason)
        )

    async def register_stored(self, sha256: str, *, dry_run: bool, force: bool, reason: str) -> Outcome:
        """Register a module that lies in the store already. Raises UnknownModule."""
        data = await self._run(lambda: self._publisher.store.module(sha256))
        return await self.register(data, dry_run=dry_run, force=force, reason=reason)

    async def remove(self, task: str, *, reason: str) -> Outcome:
        return await self._run(lambda: self._publisher.remove(task, reason=reason))

    async def rollback(self, number: int, *, reason: str) -> Outcome:
        return await self._run(lambda: self._publisher.rollback(number, reason=reason))

    async def read(self, question: Callable[[Publisher], Result]) -> Result:
        """Ask the store something, off the event loop."""
        return await self._run(lambda: question(self._publisher))

    async def follow(self, poll_s: float) -> None:
        """Take over revisions that others publish, for ever. A store that fails is tried again."""
        while True:
            await asyncio.sleep(poll_s)
            try:
                await self._run(self._publisher.refresh)
            except ToscaError as error:
                log.warning("serving revision %d, stale: %s", self.active.revision.number, error)

    async def _run(self, work: Callable[[], Result]) -> Result:
        result = await asyncio.get_running_loop().run_in_executor(self._loader, work)
        self._seen_at = time.monotonic()
        return result

    def close(self) -> None:
        self._loader.shutdown()
