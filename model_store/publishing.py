"""Changing what is served: check, build the next bank, measure its impact, publish, switch.

The service and the command line share this path; the service runs it off the request path.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.errors import Conflict, CorruptStore, HarmsOtherTasks, InvalidModule
from model_store.impact import ImpactReport, TaskHealth, compare_banks
from model_store.module_file import ModuleFile, check_module, read_module
from model_store.signatures import Signature, Trust
from model_store.store import ModelStore, Revision, with_task, without_task

DEFAULT_MARGIN = 0.05
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """One revision in memory: the bank that answers, and the files it was made of. Immutable."""

    revision: Revision
    bank: ModuleBank
    files: Mapping[str, ModuleFile]  # by task


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
    ) -> None:
        """Load the newest revision of `store`, or an old one to look at.

        `margin` is the largest share of right answers, in [0, 1], that a registration may cost another
        task's calibration set before it is refused. Where `trust` requires signatures, no module without
        one is loaded, whoever wrote it into the store.
        """
        self.store = store
        self.trust = trust or Trust.nobody()
        self.device = torch.device(device)
        self.margin = margin
        start = store.require_head() if revision is None else store.revision(revision)
        self.backbone: BackboneManifest = store.backbone_manifest(start.backbone_fingerprint)
        self._health: dict[str, TaskHealth] = {}
        self.newest_known = start.number  # in the store; being loaded while `active` is behind it
        self.active = self._load(start, None)

    def refresh(self) -> ActiveSet:
        """Take over revisions that others published. Raises Conflict when the backbone changed."""
        newest = self.newest_known = self.store.head_number(known=self.active.revision.number)
        if newest != self.active.revision.number:
            self._switch(self._load(self.store.revision(newest), self.active))
        return self.active

    def admit(self, data: bytes) -> ModuleFile:
        """Check a module file against the format and this store's backbone, without keeping it."""
        file = read_module(data, self.device)
        check_module(file, self.backbone)
        return file

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

        Raises InvalidModule for a bad file or one that is not signed as it must be, and HarmsOtherTasks
        when another task would lose more than the margin and `force` is not set; in each case nothing has
        changed.
        """
        file = self.admit(data)
        task = file.manifest.task
        given = [signature] if signature is not None else []
        signer = self._signer_of(file.sha256, given)

        change = with_task(task, file.sha256)

        def publish(parent: ActiveSet, outcome: Outcome) -> Revision:
            if outcome.harmed and not force:
                raise HarmsOtherTasks(_harm(task, outcome, self.margin))
            self.store.put_module(data)
            for one in given:
                self.store.put_signature(one)
            verb = "replace" if task in parent.files else "add"
            return self.store.publish(
                change, reason or f"{verb} {task}", parent=parent.revision, author=author
            )

        new = _NewFile(file, signer)
        return self._change(change, publish, task=task, new=new, dry_run=dry_run)

    def remove(self, task: str, *, reason: str = "", author: str | None = None) -> Outcome:
        """Take a task out of the active set; its file stays in the store. Raises UnknownTask."""
        change = without_task(task)

        def publish(parent: ActiveSet, _: Outcome) -> Revision:
            return self.store.publish(
                change, reason or f"remove {task}", parent=parent.revision, author=author
            )

        return self._change(change, publish, task=task)

    def rollback(self, number: int, *, reason: str = "", author: str | None = None) -> Outcome:
        """Publish the task set of an old revision as a new one. Raises UnknownRevision, Conflict."""
        target = self.store.revision(number)
        if target.backbone_fingerprint != self.backbone.fingerprint:
            raise Conflict(f"revision {number} belongs to backbone {target.backbone_fingerprint[:12]}…")

        def publish(parent: ActiveSet, _: Outcome) -> Revision:
            return self.store.publish(
                lambda _: target.tasks,
                reason or f"roll back to revision {number}",
                parent=parent.revision,
                author=author,
            )

        return self._change(lambda _: target.tasks, publish)

    def _change(
        self,
        change: Callable[[Revision], Mapping[str, str]],
        publish: Callable[[ActiveSet, Outcome], Revision],
        *,
        task: str | None = None,
        new: "_NewFile | None" = None,
        dry_run: bool = False,
    ) -> Outcome:
        """Build the bank of the changed set and publish it; begin again when another writer was first."""
        for _ in range(_ATTEMPTS):
            parent = self.refresh()
            wanted = change(parent.revision)
            replaced = parent.revision.tasks.get(task) if task else None
            if wanted == parent.revision.tasks:
                return Outcome(parent, ImpactReport(()), published=False, replaced_sha256=replaced)
            files, bank = self._build(wanted, parent.revision.number + 1, parent, new)
            impact = compare_banks(parent.bank, bank, self._health)
            _check_finite(impact)
            harmed = tuple(
                one.task for one in impact.tasks if one.task != task and one.accuracy_loss > self.margin
            )
            outcome = Outcome(parent, impact, published=False, replaced_sha256=replaced, harmed=harmed)
            if dry_run:
                return outcome
            try:
                revision = publish(parent, outcome)
            except HarmsOtherTasks:
                raise
            except Conflict:
                continue
            self._switch(ActiveSet(revision, bank, files))
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
        files, bank = self._build(revision.tasks, revision.number, previous)
        return ActiveSet(revision, bank, files)

    def _admit_stored(self, sha256: str) -> tuple[ModuleFile, str | None]:
        """A module of the store, checked, and the trusted signer who vouches for it."""
        signer = self._signer_of(sha256)
        return self.admit(self.store.module(sha256)), signer

    def _signer_of(self, sha256: str, given: Sequence[Signature] = ()) -> str | None:
        if not self.trust.key_of and not self.trust.is_required:
            return None
        return self.trust.signer_of(sha256, [*given, *self.store.signatures(sha256)])

    def _build(
        self,
        tasks: Mapping[str, str],
        number: int,
        previous: ActiveSet | None,
        new: "_NewFile | None" = None,
    ) -> tuple[dict[str, ModuleFile], ModuleBank]:
        known = {file.sha256: file for file in previous.files.values()} if previous else {}
        signers = dict(previous.bank.signers) if previous else {}
        if new is not None:
            known[new.file.sha256] = new.file
            signers |= {new.file.sha256: new.signer} if new.signer else {}
        missing = [sha256 for sha256 in tasks.values() if sha256 not in known]
        with ThreadPoolExecutor(thread_name_prefix="admit") as pool:
            for file, signer in pool.map(self._admit_stored, missing):
                known[file.sha256] = file
                signers |= {file.sha256: signer} if signer is not None else {}
        files = {task: known[sha256] for task, sha256 in tasks.items()}
        for task, file in files.items():
            if file.manifest.task != task:
                raise CorruptStore(
                    f"revision {number} lists the module of {file.manifest.task!r} as {task!r}"
                )
        active = set(tasks.values())
        bank = ModuleBank.build(
            (file.module for file in files.values()),
            revision=number,
            backbone_fingerprint=self.backbone.fingerprint,
            feature_dim=self.backbone.feature_dim,
            device=self.device,
            previous=previous.bank if previous else None,
            signers={sha256: name for sha256, name in signers.items() if sha256 in active},
        )
        return files, bank


@dataclass(frozen=True, slots=True)
class _NewFile:
    """A module file on its way in, and the trusted signer who vouches for it."""

    file: ModuleFile
    signer: str | None


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
