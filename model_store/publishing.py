"""Changing what is served: check, build the next bank, measure its impact, publish, switch.

The service and the command line share this path; the service runs it off the request path.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from model_store.backbone import BackboneManifest
from model_store.deferred import DEFAULT_MAX_BYTES, ModuleMemory
from model_store.errors import Conflict, HarmsOtherTasks, InvalidModule, InvalidRequest
from model_store.impact import ImpactReport, TaskHealth, compare_banks
from model_store.module_file import ModuleFile
from model_store.revision import Revision
from model_store.revision_reader import ActiveSet, NewFile, RevisionReader
from model_store.signatures import Signature, Trust
from model_store.store import ModelStore, with_task, without_task

DEFAULT_MARGIN = 0.05
# Classes, and share of the tasks that began it and are others now, from which a new epoch is due.
EPOCH_CLASSES = 1024
EPOCH_SHARE = 0.1
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a change did, or with a dry run what it would do."""

    active: ActiveSet
    impact: ImpactReport
    published: bool
    replaced_sha256: str | None = None
    harmed: tuple[str, ...] = ()


class Publisher:
    """Follows a store's newest revision and publishes changes to it. One thread at a time."""

    def __init__(
        self,
        store: ModelStore,
        device: torch.device | str = "cpu",
        margin: float = DEFAULT_MARGIN,
        revision: int | None = None,
        trust: Trust | None = None,
        module_memory_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """Load the newest revision of `store`, or an old one to look at.

        `margin` is the largest share of right answers, in [0, 1], that a registration may cost another
        task's calibration set before it is refused. Where `trust` requires signatures, no module without
        one is loaded, whoever wrote it into the store. In an epoch, and where all modules together are more
        than `module_memory_bytes`, those beyond are read when their task may answer.
        """
        self.store = store
        self.trust = trust or Trust.nobody()
        self.device = torch.device(device)
        self.margin = margin
        start = store.require_head() if revision is None else store.revision(revision)
        self.backbone: BackboneManifest = store.backbone_manifest(start.backbone_fingerprint)
        self._reader = RevisionReader(store, self.backbone, self.device, self.trust, module_memory_bytes)
        self._health: dict[str, TaskHealth] = {}
        self.newest_known = start.number  # in the store; being loaded while `active` is behind it
        self.active = self._load(start, None)

    @property
    def module_memory(self) -> ModuleMemory:
        """Of the modules that need not stay in memory; none, unless in an epoch."""
        return self._reader.modules.memory

    def refresh(self) -> ActiveSet:
        """Take over revisions that others published. Raises Conflict when the backbone changed."""
        newest = self.newest_known = self.store.head_number(known=self.active.revision.number)
        if newest != self.active.revision.number:
            self._switch(self._load(self.store.revision(newest), self.active))
        return self.active

    def admit(self, data: bytes) -> ModuleFile:
        """Check a module file against the format and this store's backbone, without keeping it."""
        return self._reader.admit(data)

    def register(
        self,
        data: bytes,
        *,
        dry_run: bool = False,
        force: bool = False,
        reason: str = "",
        author: str | None = None,
        signature: Signature | None = None,
    ) -> Outcome:
        """Add or replace the task of a module file.

        A `signature` is kept for a module that is active already, too, and counts for whoever reads it next.
        Raises InvalidModule for a bad file or one that is not signed as it must be, and HarmsOtherTasks
        when another task would lose more than the margin and `force` is not set; in each case nothing has
        changed.
        """
        file = self.admit(data)
        task = file.manifest.task
        given = [signature] if signature is not None else []
        signer = self._reader.signer_of(file.sha256, given)

        def reason_after(parent: Revision) -> str:
            return reason or f"{'replace' if task in parent.tasks else 'add'} {task}"

        def keep_signatures() -> None:
            for one in given:
                self.store.put_signature(one)

        def keep(outcome: Outcome) -> None:
            if outcome.harmed and not force:
                raise HarmsOtherTasks(_harm(task, outcome, self.margin))
            self.store.put_module(data)
            keep_signatures()

        outcome = self._change(
            with_task(task, file.sha256),
            reason_after,
            author,
            task=task,
            new=NewFile(file, signer),
            keep=keep,
            dry_run=dry_run,
        )
        if not outcome.published and not dry_run:
            keep_signatures()
        return outcome

    def remove(self, task: str, *, reason: str = "", author: str | None = None) -> Outcome:
        """Take a task out of the active set; its file stays in the store. Raises UnknownTask."""
        return self._change(without_task(task), lambda _: reason or f"remove {task}", author, task=task)

    def rollback(self, number: int, *, reason: str = "", author: str | None = None) -> Outcome:
        """Publish the tasks of an old revision again, in its epoch. Raises UnknownRevision, Conflict."""
        target = self.store.revision(number)
        if target.backbone_fingerprint != self.backbone.fingerprint:
            raise Conflict(f"revision {number} belongs to backbone {target.backbone_fingerprint[:12]}…")

        reason = reason or f"roll back to revision {number}"
        return self._change(lambda _: target.tasks, lambda _: reason, author, like=target)

    @property
    def epoch_is_due(self) -> bool:
        """Whether registering would be quicker, or truer to the tasks there are, in a new epoch."""
        revision, bank = self.active.revision, self.active.bank
        if len(bank.task_of_class_K) < EPOCH_CLASSES:
            return False
        if bank.epoch is None:
            return True
        new = sum(sha256 not in bank.epoch.sha256s for sha256 in revision.tasks.values())
        gone = len(bank.epoch.sha256s) - (len(revision.tasks) - new)
        return max(new, gone) > EPOCH_SHARE * len(bank.epoch.sha256s)

    def begin_epoch(self, *, reason: str = "", author: str | None = None) -> ActiveSet:
        """Publish the active tasks again as those that begin an epoch, and serve that revision.

        Takes time and memory with the number of tasks, once, so that registering takes little thereafter.
        Raises InvalidRequest without tasks, and Conflict when another writer was faster.
        """
        active = self.refresh()
        if not active.files:
            raise InvalidRequest("no task is active: an epoch begins with some")
        reason = reason or f"begin an epoch with {len(active.files)} tasks"
        self._switch(self._reader.begin_epoch(active, reason, author))
        return self.active

    def _change(
        self,
        change: Callable[[Revision], Mapping[str, str]],
        reason_after: Callable[[Revision], str],
        author: str | None,
        *,
        task: str | None = None,
        new: NewFile | None = None,
        keep: Callable[[Outcome], None] | None = None,
        like: Revision | None = None,
        dry_run: bool = False,
    ) -> Outcome:
        """Build the bank of the changed set and publish it; begin again when another writer was first.

        `keep` puts into the store what the revision needs, or refuses; the epoch is that of `like` if given.
        """
        for _ in range(_ATTEMPTS):
            parent = self.refresh()
            wanted = change(parent.revision)
            replaced = parent.revision.tasks.get(task) if task else None
            epoch = self.store.next_epoch(parent.revision, wanted) if like is None else like.epoch
            if wanted == parent.revision.tasks and epoch == parent.revision.epoch:
                return Outcome(parent, ImpactReport(()), published=False, replaced_sha256=replaced)
            draft = self._reader.draft(wanted, parent.revision.number + 1, epoch, parent, new)
            impact = compare_banks(parent.bank, draft.bank, self._health)
            _check_finite(impact)
            harmed = impact.harmed(self.margin, ignoring=task)
            outcome = Outcome(parent, impact, published=False, replaced_sha256=replaced, harmed=harmed)
            if dry_run:
                return outcome
            if keep is not None:
                keep(outcome)
            reason = reason_after(parent.revision)
            try:
                revision = self.store.publish_after(parent.revision, wanted, epoch, reason, author)
            except Conflict:
                continue
            self._switch(ActiveSet(revision, draft.bank, draft.files))
            if impact.is_among_all:
                self._health = {one.task: one.after for one in impact.tasks if one.after is not None}
            return Outcome(self.active, impact, published=True, replaced_sha256=replaced, harmed=harmed)
        raise Conflict(f"gave up after {_ATTEMPTS} attempts: other writers publish without pause")

    def _switch(self, active: ActiveSet) -> None:
        self.active = active
        self.newest_known = max(self.newest_known, active.revision.number)
        self._health = {}

    def _load(self, revision: Revision, previous: ActiveSet | None) -> ActiveSet:
        if revision.backbone_fingerprint != self.backbone.fingerprint:
            raise Conflict(
                f"revision {revision.number} moved to backbone {revision.backbone_fingerprint[:12]}…: "
                "restart to serve it"
            )
        draft = self._reader.draft(revision.tasks, revision.number, revision.epoch, previous)
        return ActiveSet(revision, draft.bank, draft.files)


def _check_finite(impact: ImpactReport) -> None:
    """Refuse a set whose answers on the calibration sets are not all numbers."""
    for one in impact.tasks:
        if one.after is not None and not math.isfinite(one.after.ece):
            raise InvalidModule(f"task {one.task!r}: answers on its calibration set are not finite")


def _harm(task: str, outcome: Outcome, margin: float) -> str:
    worst = outcome.impact.worst_loss(ignoring=task)
    assert worst is not None and worst.before and worst.after, "something was harmed"
    return (
        f"registering {task!r} would lower the accuracy of task {worst.task!r} on its calibration set from "
        f"{worst.before.accuracy:.3f} to {worst.after.accuracy:.3f}, more than the margin of {margin:g}; "
        "force it to go ahead"
    )
