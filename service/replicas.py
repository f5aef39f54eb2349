"""This replica among those that serve the same store: its record, and what the others' records say."""

import asyncio
import contextlib
import logging
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from model_store.errors import StoreUnavailable, ToscaError
from model_store.replicas import Replica
from service.pacing import SingleFlight, jittered
from service.registry import TaskRegistry
from service.settings import Settings

log = logging.getLogger("tosca.replicas")
_LIFETIMES = 3  # heartbeats that may be missed before a replica counts as gone
_LEAST_SECONDS_BETWEEN_LOOKS = 0.25  # at the others' records, however many ask or wait
_THREADS = 2  # one writes, one reads
_LONGEST_FAREWELL_S = 2.0
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Standing:
    """Which live replicas serve a revision or a later one, and which do not yet.

    `fault`: why the records could not be read, and others than this replica are not known.
    """

    serving: tuple[Replica, ...]
    behind: tuple[Replica, ...]
    fault: str | None = None

    @property
    def all_serve(self) -> bool:
        return not self.behind and self.fault is None


class Replicas:
    """Writes this replica's record while it is `present`, and reads those of all."""

    def __init__(self, registry: TaskRegistry, settings: Settings) -> None:
        self.own_id = f"{_host_name()}-{uuid.uuid4().hex[:8]}"
        self._registry = registry
        self._records = registry.store.replicas
        self._heartbeat_s = settings.heartbeat_s
        self._address = settings.replica_address
        self._keep_s = settings.replica_keep_s
        self._default_wait = settings.default_wait
        self._longest_wait_s = settings.replica_wait_s
        self._longest_look_s = settings.request_timeout_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="replicas")
        self._looking = SingleFlight(self._look, _LEAST_SECONDS_BETWEEN_LOOKS)
        self._fault: str | None = None
        self._told = 0  # the revision in the record
        self._collect_at = 0.0

    @property
    def are_known(self) -> bool:
        """Whether this replica writes a record; only then does it know the others by the storage's clock."""
        return self._heartbeat_s > 0.0

    @property
    def fault(self) -> str | None:
        """Why this replica's record could not be written the last time; None when it could, or need not."""
        return self._fault

    async def all(self) -> list[Replica]:
        """Every replica that has a record, live or not. Raises StoreUnavailable, also where it hangs."""
        try:
            async with asyncio.timeout(self._longest_look_s):
                return await self._looking.fresh()
        except TimeoutError as error:
            raise StoreUnavailable(
                f"the records of replicas were not read within {self._longest_look_s:.3g} s"
            ) from error

    async def wait_for(self, revision: int, timeout_s: float) -> Standing:
        """Wait until every live replica serves `revision` or a later one; how it stands then, or in the end.

        Never raises for a store that fails: what is waited for has happened already.
        """
        ends_at = time.monotonic() + timeout_s
        standing = Standing((), (), f"the records of replicas were not read within {timeout_s:.3g} s")
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ends_at - time.monotonic()):
                    standing = await self._standing(revision)
            if standing.all_serve or time.monotonic() >= ends_at:
                return standing

    async def settle(self, revision: int) -> None:
        """What a change waits for whose client cannot say: nothing, or all where processes share a port."""
        if self._default_wait == "all":
            await self.wait_for(revision, self._longest_wait_s)

    async def _standing(self, revision: int) -> Standing:
        try:
            live = [one for one in await self.all() if one.is_live]
        except ToscaError as error:
            return Standing((), (), str(error)[:500])
        serving = tuple(one for one in live if one.record.revision >= revision)
        return Standing(serving, tuple(one for one in live if one not in serving))

    @contextlib.asynccontextmanager
    async def present(self) -> AsyncIterator[None]:
        """Keep this replica's record while the block runs, and remove it in the end."""
        try:
            if not self.are_known:
                yield
                return
            # In this order: wait=all of another replica sees the record, or has published what is read here.
            await self._say()
            await self._registry.look()
            beating = asyncio.create_task(self._beat())
            try:
                yield
            finally:
                beating.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await beating
                await self._leave()
        finally:
            self._threads.shutdown(wait=False)

    async def _beat(self) -> None:
        """Write the record at every heartbeat, and at once when another revision is served; for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(jittered(self._heartbeat_s)):
                    await self._registry.beyond(self._told)
            await self._say()

    async def _say(self) -> None:
        """Write the record. A store that takes none leaves everything else as it is."""
        self._told = self._registry.active.revision.number
        try:
            await self._in_thread(self._write)
        except Exception as error:  # as the follower: it must outlive any fault
            if self._fault is None:
                log.warning(
                    "other replicas do not know of this one: %s",
                    error,
                    exc_info=not isinstance(error, ToscaError),
                )
            self._fault = str(error)[:500] or type(error).__name__
        else:
            if self._fault is not None:
                log.info("other replicas know of this one again")
            self._fault = None

    def _write(self) -> None:
        self._records.write(self.own_id, self._told, _LIFETIMES * self._heartbeat_s, self._address)
        if time.monotonic() >= self._collect_at:
            self._collect_at = time.monotonic() + self._keep_s
            self._collect()

    def _collect(self) -> None:
        """Tidy up after replicas that are gone; where that may not be done, their records stay."""
        try:
            num = self._records.collect(self._keep_s)
        except ToscaError as error:
            log.warning("the records of replicas that are gone stay: %s", error)
        else:
            log.log(logging.INFO if num else logging.DEBUG, "removed the records of %d dead replicas", num)

    async def _leave(self) -> None:
        """Remove the record; where the store does not answer, it lapses by itself."""
        if self._fault is None:
            with contextlib.suppress(TimeoutError, ToscaError):
                async with asyncio.timeout(_LONGEST_FAREWELL_S):
                    await self._in_thread(lambda: self._records.remove(self.own_id))

    async def _look(self) -> list[Replica]:
        found = await self._in_thread(self._records.all)
        return [self._at_first_hand(one) if one.record.replica_id == self.own_id else one for one in found]

    def _at_first_hand(self, own: Replica) -> Replica:
        """This replica as it is now, which its record may not say yet."""
        served = {"revision": self._registry.active.revision.number}
        return replace(own, record=own.record.model_copy(update=served))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Off the event loop, and not on the loader thread, which may be at work on a bank for long."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _host_name() -> str:
    """The host's name, as far as it can stand in a record's."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "replica"
