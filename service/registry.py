"""The tasks a running service answers with: one reference, changed by one thread off the request path."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from model_store.bank import ModuleBank
from model_store.deferred import ModuleMemory, NotInMemory, from_memory_alone
from model_store.errors import Conflict, ToscaError
from model_store.freed_memory import give_back_memory
from model_store.publishing import Outcome, Publisher
from model_store.revision_reader import ActiveSet
from model_store.signatures import Signature
from model_store.store import ModelStore
from service.audit import AuditLog
from service.errors import RevisionBehind
from service.loader import make_loader
from service.pacing import SingleFlight, jittered
from service.request_context import current_request

log = logging.getLogger("tosca.registry")
Result = TypeVar("Result")
_PREPARED_TOGETHER = 8


class TaskRegistry:
    """Holds the active set. Changes run one after another on the loader thread and end in one reference
    assignment inside the publisher, so a reader sees the set before or the set after, never a mixture."""

    def __init__(
        self,
        publisher: Publisher,
        audit: AuditLog,
        loader_niceness: int = 0,
        least_between_reads_s: float = 0.0,
        *,
        begins_epochs: bool = True,
    ) -> None:
        """`least_between_reads_s`: from one look for newer revisions to the next, whoever asks for them. With
        `begins_epochs` a change after which an epoch is due is followed by one."""
        self._begins_epochs = begins_epochs
        self._publisher = publisher
        self._audit = audit
        self._loader = make_loader(loader_niceness)
        give_back_memory()  # of the start
        self._seen_at = time.monotonic()
        self._fault: str | None = None
        self._refreshing = SingleFlight(self._refresh, least_between_reads_s)
        self._switched = asyncio.Event()  # set, and replaced by another, when the active set changes
        self._is_closed = False
        self._loader.submit(self._prepare, self.active.bank)

    @property
    def active(self) -> ActiveSet:
        return self._publisher.active

    @property
    def module_memory(self) -> ModuleMemory:
        return self._publisher.module_memory

    @property
    def store(self) -> ModelStore:
        return self._publisher.store

    @property
    def revision_lag(self) -> int:
        """Revisions known to be in the store and not served yet."""
        return self._publisher.newest_known - self.active.revision.number

    @property
    def staleness_s(self) -> float:
        """Seconds since the newest revision was last asked for, with an answer."""
        return time.monotonic() - self._seen_at

    @property
    def fault(self) -> str | None:
        """Why the store could not be followed the last time; None when it could."""
        return self._fault

    async def register(
        self,
        data: bytes,
        *,
        dry_run: bool,
        force: bool,
        reason: str,
        author: str | None = None,
        signature: Signature | None = None,
    ) -> Outcome:
        """Publish a module file; see Publisher.register for the faults."""
        if dry_run:
            return await self._run(
                lambda: self._publisher.register(data, dry_run=True, force=force, signature=signature),
                sees_head=True,
            )
        sha256 = hashlib.sha256(data).hexdigest()
        return await self._change(
            lambda: self._publisher.register(
                data, force=force, reason=reason, author=author, signature=signature
            ),
            "register",
            author=author,
            reason=reason,
            module_sha256=sha256,
            force=force,
        )

    async def register_stored(
        self,
        sha256: str,
        *,
        dry_run: bool,
        force: bool,
        reason: str,
        author: str | None = None,
        signature: Signature | None = None,
    ) -> Outcome:
        """Register a module that lies in the store already. Raises UnknownModule."""
        data = await self._run(lambda: self._publisher.store.module(sha256))
        return await self.register(
            data, dry_run=dry_run, force=force, reason=reason, author=author, signature=signature
        )

    async def remove(self, task: str, *, reason: str, author: str | None = None) -> Outcome:
        return await self._change(
            lambda: self._publisher.remove(task, reason=reason, author=author),
            "remove",
            author=author,
            reason=reason,
            task=task,
        )

    async def rollback(self, number: int, *, reason: str, author: str | None = None) -> Outcome:
        return await self._change(
            lambda: self._publisher.rollback(number, reason=reason, author=author),
            "roll back",
            author=author,
            reason=reason,
            to_revision=number,
        )

    async def read(self, question: Callable[[Publisher], Result]) -> Result:
        """Ask the store something, off the event loop."""
        return await self._run(lambda: question(self._publisher))

    async def follow(self, poll_s: float) -> None:
        """Take over revisions that others publish, for ever, at jittered intervals."""
        while True:
            await asyncio.sleep(jittered(poll_s))
            await self._refreshing.joined()

    async def look(self) -> None:
        """Take over what is in the store now."""
        await self._refreshing.fresh()

    async def catch_up(self, minimum: int, timeout_s: float) -> None:
        """Serve revision `minimum` or a later one, reading the store at once where need be.

        However many ask, the store is read once for all of them. Raises RevisionBehind.
        """
        if self.active.revision.number >= minimum:
            return
        why = "it is not in the store"
        try:
            async with asyncio.timeout(timeout_s):
                await self._refreshing.fresh()
            why = self._fault or why
        except TimeoutError:
            why = f"the store was not read and loaded within {timeout_s:.3g} s"
        served = self.active.revision.number
        if served < minimum:
            raise RevisionBehind(minimum, served, why)

    async def beyond(self, number: int) -> None:
        """Wait until a later revision than `number` is served."""
        while self.active.revision.number <= number:
            await self._switched.wait()

    async def _refresh(self) -> None:
        """Read the store. A fault is kept for all to see, and the next time is another try."""
        try:
            await self._run(self._publisher.refresh, sees_head=True)
        except Exception as error:  # the follower must outlive any fault: a silent end would be worse
            if self._fault is None:
                is_ours = not isinstance(error, ToscaError)
                log.warning(
                    "serving revision %d, stale: %s",
                    self.active.revision.number,
                    error,
                    exc_info=is_ours,
                )
            self._fault = str(error)[:500] or type(error).__name__

    async def _change(
        self, work: Callable[[], Outcome], action: str, *, author: str | None, **what: object
    ) -> Outcome:
        """Make a change on the loader thread, between the two lines that the audit log has of it."""
        context = current_request.get()
        author = author or self._publisher.store.author
        what |= {"author": author, "request_id": context.request_id if context else None}

        def audited() -> Outcome:
            with self._audit.change(action, **what) as tell:
                outcome = work()
                tell(
                    revision=outcome.active.revision.number,
                    published=outcome.published,
                    tasks=len(outcome.active.files),
                    replaced_sha256=outcome.replaced_sha256,
                )
                return outcome

        outcome = await self._run(audited, sees_head=True)
        if outcome.published and self._begins_epochs:
            self._loader.submit(self._begin_epoch_if_due, asyncio.get_running_loop())
        return outcome

    def _begin_epoch_if_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the loader thread, after a change was answered."""
        if not self._publisher.epoch_is_due:
            return
        try:
            with self._audit.change("begin an epoch", author=self._publisher.store.author) as tell:
                active = self._publisher.begin_epoch()
                tell(revision=active.revision.number, tasks=len(active.files))
        except Conflict:
            log.info("another writer was faster than a new epoch")
        except Exception:  # nobody waits for it; the next change tries again
            log.exception("no epoch could begin")
        else:
            loop.call_soon_threadsafe(self._tell_switch)

    def _prepare(self, bank: ModuleBank, first: int = 0) -> None:
        """Spare first answers their wait, a few tasks at a time so that a change need not wait for them all.
        Modules that would have to be read are left for their first answer."""
        if bank is not self.active.bank or self._is_closed:
            return
        for module in bank.modules[first : first + _PREPARED_TOGETHER]:
            with from_memory_alone(), contextlib.suppress(NotInMemory):
                bank.prepare(module.task)
        if first + _PREPARED_TOGETHER < len(bank) and not self._is_closed:
            self._loader.submit(self._prepare, bank, first + _PREPARED_TOGETHER)

    async def _run(self, work: Callable[[], Result], *, sees_head: bool = False) -> Result:
        """Do work on the loader thread; `sees_head`: it asks the store for its newest revision."""
        loop = asyncio.get_running_loop()
        began_at = 0.0

        def told() -> Result:
            nonlocal began_at
            before, began_at = self.active, time.monotonic()
            try:
                return work()
            finally:
                if self.active is not before:  # also where nobody waits for it any more
                    loop.call_soon_threadsafe(self._tell_switch)

        result = await loop.run_in_executor(self._loader, told)
        if sees_head:
            self._seen_at = began_at
            if self._fault is not None:
                log.info("the store answers again")
                self._fault = None
        return result

    def _tell_switch(self) -> None:
        self._switched.set()
        self._switched = asyncio.Event()
        if not self._is_closed:
            self._loader.submit(give_back_memory)
            self._loader.submit(self._prepare, self.active.bank)

    def close(self) -> None:
        self._is_closed = True
        self._loader.shutdown()
