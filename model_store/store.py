"""The model store: content-addressed files plus a log of immutable revisions. The directory is the database.

    backbones/<fingerprint>/{manifest.json,weights.safetensors}
    backbones/<fingerprint>/exports/<sha256>.onnx
    backbones/<fingerprint>/tunings/<number>.json
    modules/<sha256>.safetensors
    signatures/<sha256>/<key id>.<sha256 of this file>.json
    revisions/<number>.json
    epochs/<sha256>.safetensors
    listings/<sha256>.safetensors
    replicas/<replica id>.json

Publishing writes the files first and then creates the next revision with put-if-absent, so two writers
cannot lose each other's work, nothing is ever overwritten, and a crash at any byte leaves the previous
revision whole. The records of replicas alone are overwritten and removed, and no answer depends on them.
The same code runs on a local folder and on S3, GCS or Azure, through obstore.

A revision names all its tasks, or how they differ from those of an earlier one that began an epoch
(docs/decisions/0006): then its file grows with the changes since, and not with the tasks.
"""

import contextlib
import getpass
import hashlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from model_store.backbone import BackboneArtefact, BackboneManifest
from model_store.errors import (
    Conflict,
    CorruptStore,
    UnknownBackbone,
    UnknownModule,
    UnknownRevision,
    UnknownTask,
)
from model_store.object_files import Files, ObjectFiles
from model_store.replicas import ReplicaRecords
from model_store.revision import (
    EpochRef,
    Revision,
    RevisionChanges,
    log_file,
    read_log_file,
    unchecked_revision,
)
from model_store.signatures import Signature
from model_store.tuning import HARDWARE_SEPARATOR, Tuning

log = logging.getLogger("tosca.store")
# Share of an epoch's first tasks that may change before the next revision is in no epoch.
MAX_CHANGED_SHARE = 0.25
_DIGITS = 12
_PAGE = 1000  # what one request lists at most


class ModelStore:
    """A store URL opened for reading and publishing. Safe to use from several threads and processes."""

    def __init__(self, url: str | Path, author: str | None = None, files: Files | None = None) -> None:
        """Open a folder (a path or file:// URL, created when first written to) or s3://, gs://, az:// URL.

        Credentials and endpoints of object stores come from their usual environment variables. `files`
        takes the place of what the URL names.
        """
        self.url = str(url)
        self.author = author or _default_author()
        self._files = files or ObjectFiles(self.url)
        self._began: Revision | None = None
        self.replicas = ReplicaRecords(self._files)

    def __repr__(self) -> str:
        return f"ModelStore({self.url!r})"

    # -- backbones -----------------------------------------------------------------------------------

    def put_backbone(self, artefact: BackboneArtefact) -> str:
        """Keep a backbone (idempotent) and return its fingerprint. Its manifest is written last."""
        artefact.verify()
        fingerprint = artefact.manifest.fingerprint
        self._files.put_new(f"backbones/{fingerprint}/weights.safetensors", artefact.weights)
        self._files.put_new(
            f"backbones/{fingerprint}/manifest.json", artefact.manifest.model_dump_json(indent=2).encode()
        )
        return fingerprint

    def backbone_manifest(self, fingerprint: str) -> BackboneManifest:
        path = f"backbones/{fingerprint}/manifest.json"
        data = self._files.get(path)
        if data is None:
            raise UnknownBackbone(f"store {self.url} holds no backbone {fingerprint}")
        try:
            manifest = BackboneManifest.model_validate_json(data)
        except ValidationError as error:
            raise CorruptStore(f"{path} is no backbone manifest: {error}") from error
        if manifest.fingerprint != fingerprint:
            raise CorruptStore(f"{path} describes backbone {manifest.fingerprint}")
        return manifest

    def backbone(self, fingerprint: str) -> BackboneArtefact:
        manifest = self.backbone_manifest(fingerprint)
        weights = self._files.get(f"backbones/{fingerprint}/weights.safetensors")
        if weights is None:
            raise CorruptStore(f"backbone {fingerprint} has a manifest but no weights")
        artefact = BackboneArtefact(manifest, weights)
        artefact.verify()
        return artefact

    def backbones(self) -> list[BackboneManifest]:
        found = []
        for fingerprint in sorted(self._files.folders("backbones")):
            with contextlib.suppress(UnknownBackbone):  # weights written, manifest not yet
                found.append(self.backbone_manifest(fingerprint))
        return found

    # -- runtimes ------------------------------------------------------------------------------------

    def put_tuning(self, tuning: Tuning, export: bytes | None) -> int:
        """Keep what was measured of a backbone's runtimes, after the exported form it chose; its number.

        Tunings are a log, as revisions are: the newest of a kind of hardware counts.
        """
        folder = f"backbones/{tuning.backbone_fingerprint}"
        if export is not None:
            self._files.put_new(f"{folder}/exports/{hashlib.sha256(export).hexdigest()}.onnx", export)
        data = tuning.model_dump_json(indent=2).encode()
        number = max(self._numbers(f"{folder}/tunings"), default=0) + 1
        while not self._files.put_new(_numbered(f"{folder}/tunings", number), data):
            number += 1  # another machine tuned meanwhile; both records stay
        return number

    def tuning(self, fingerprint: str, hardware: str) -> Tuning | None:
        """The newest tuning of a backbone on a kind of hardware; unreadable ones are passed over.

        Where there is none, the newest of an earlier version, which said less of the processor.
        """
        folder = f"backbones/{fingerprint}/tunings"
        said_less = None
        for number in range(max(self._numbers(folder), default=0), 0, -1):
            path = _numbered(folder, number)
            try:
                tuning = Tuning.model_validate_json(self._files.get(path) or b"")
            except ValidationError as error:
                log.warning("%s is passed over, it is no tuning: %s", path, error)
                continue
            if tuning.hardware == hardware:
                return tuning
            if said_less is None and hardware.startswith(f"{tuning.hardware}{HARDWARE_SEPARATOR}"):
                said_less = tuning
        return said_less

    def export(self, fingerprint: str, sha256: str) -> bytes:
        """An exported form of a backbone, verified against its name."""
        data = self._files.get(f"backbones/{fingerprint}/exports/{sha256}.onnx")
        if data is None:
            raise UnknownBackbone(f"store {self.url} holds no export {sha256} of backbone {fingerprint}")
        _check_digest(f"export {sha256}", data, sha256)
        return data

    # -- modules -------------------------------------------------------------------------------------

    def put_module(self, data: bytes) -> str:
        """Keep the bytes of a module file (idempotent) and return their SHA-256, the file's name."""
        return self._put_by_digest("modules", data)

    def module(self, sha256: str) -> bytes:
        """The bytes of a module file, verified against its name."""
        data = self._files.get(f"modules/{sha256}.safetensors")
        if data is None:
            raise UnknownModule(f"store {self.url} holds no module {sha256}")
        _check_digest(f"module {sha256}", data, sha256)
        return data

    # -- signatures ----------------------------------------------------------------------------------

    def put_signature(self, signature: Signature) -> None:
        """Keep a signature beside its module (idempotent), and beside others that name the same key: anybody
        may name it."""
        data = signature.model_dump_json().encode()
        name = f"{signature.key_id}.{hashlib.sha256(data).hexdigest()}"
        self._files.put_new(f"signatures/{signature.module_sha256}/{name}.json", data)

    def signatures(self, sha256: str) -> list[Signature]:
        """The signatures that lie beside a module, none of them judged; unreadable ones are left out."""
        found = []
        for name in sorted(self._files.names(f"signatures/{sha256}")):
            data = self._files.get(f"signatures/{sha256}/{name}")
            with contextlib.suppress(ValidationError):
                found.append(Signature.model_validate_json(data or b""))
        return found

    # -- epochs --------------------------------------------------------------------------------------

    def put_epoch(self, data: bytes) -> str:
        """Keep the record of an epoch (idempotent) and return its SHA-256."""
        return self._put_by_digest("epochs", data)

    def epoch(self, sha256: str) -> bytes:
        return self._by_digest("epochs", sha256)

    def put_listing(self, data: bytes) -> str:
        """Keep what an epoch lists of some of its tasks (idempotent) and return its SHA-256."""
        return self._put_by_digest("listings", data)

    def listing(self, sha256: str) -> bytes:
        return self._by_digest("listings", sha256)

    def _put_by_digest(self, folder: str, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self._files.put_new(f"{folder}/{sha256}.safetensors", data)
        return sha256

    def _by_digest(self, folder: str, sha256: str) -> bytes:
        path = f"{folder}/{sha256}.safetensors"
        data = self._files.get(path)
        if data is None:
            raise CorruptStore(f"store {self.url} has no {path}")
        _check_digest(path, data, sha256)
        return data

    # -- revisions -----------------------------------------------------------------------------------

    def head(self, known: int = 0) -> Revision | None:
        """The newest revision, or None in a fresh store. `known` is a revision number known to exist."""
        number = self.head_number(known)
        return self.revision(number) if number else None

    def head_number(self, known: int = 0) -> int:
        """The number of the newest revision, 0 in a fresh store.

        Numbers have no gaps, so behind `known`, or behind the first page of a long log, the newest is found
        by steps that double and halve again, a small request each; where nothing is new, one says so.
        """
        if not known:
            page = list(islice(self._numbers("revisions"), _PAGE))
            known = max(page, default=0)
            if len(page) < _PAGE:
                return known
        newest, step = known, 1
        while self._files.exists(_revision_path(newest + step)):
            newest += step
            step *= 2
        while step > 1:
            step //= 2
            if self._files.exists(_revision_path(newest + step)):
                newest += step
        return newest

    def _numbers(self, folder: str) -> Iterator[int]:
        """The numbers of a log's files, in any order."""
        for name in self._files.names(folder):
            stem, _, suffix = name.partition(".")
            if suffix == "json" and stem.isdecimal() and stem.isascii():
                yield int(stem)

    def revision(self, number: int) -> Revision:
        found = self._log_file(number)
        return found if isinstance(found, Revision) else found.revision(self._tasks_that_began(found.epoch))

    def _log_file(self, number: int) -> Revision | RevisionChanges:
        data = self._files.get(_revision_path(number)) if number >= 1 else None
        if data is None:
            raise UnknownRevision(f"store {self.url} has no revision {number}")
        try:
            found = read_log_file(data)
        except ValueError as error:
            raise CorruptStore(f"revision {number} cannot be read: {error}") from error
        if found.number != number:
            raise CorruptStore(f"revision {number} calls itself {found.number}")
        return found

    def _tasks_that_began(self, epoch: EpochRef) -> Mapping[str, str]:
        """The tasks of the revision that began an epoch; those asked for last stay in memory."""
        began = self._began  # once: another thread may put that of another epoch in its place
        if began is None or began.epoch != epoch:
            found = self._log_file(epoch.number)
            if not isinstance(found, Revision) or found.epoch != epoch:
                raise CorruptStore(f"revision {epoch.number} did not begin epoch {epoch.sha256[:12]}…")
            self._began = began = found
        return began.tasks

    def next_epoch(self, parent: Revision, tasks: Mapping[str, str]) -> EpochRef | None:
        """The epoch of a revision of `tasks` after `parent`: the same, until MAX_CHANGED_SHARE of the tasks
        that began it have changed."""
        if parent.epoch is None:
            return None
        began = self._tasks_that_began(parent.epoch)
        num_kept = sum(began.get(task) == sha256 for task, sha256 in tasks.items())
        num_changed = max(len(tasks), len(began)) - num_kept
        return parent.epoch if num_changed <= MAX_CHANGED_SHARE * len(began) else None

    def revisions(self, limit: int = 100) -> list[Revision]:
        """The newest `limit` revisions, newest first."""
        newest = self.head_number()
        return [self.revision(number) for number in range(newest, max(0, newest - limit), -1)]

    def publish(
        self,
        change: Callable[[Revision], Mapping[str, str]],
        reason: str,
        *,
        author: str | None = None,
        attempts: int = 50,
    ) -> Revision:
        """Publish the task set `change(head)` as the next revision; its author is the store's unless named.

        A writer that loses the race applies its change to the new head and tries again.
        """
        for _ in range(attempts):
            head = self.require_head()
            tasks = change(head)
            with contextlib.suppress(Conflict):
                return self.publish_after(head, tasks, self.next_epoch(head, tasks), reason, author)
        raise Conflict(f"gave up after {attempts} attempts: other writers publish without pause")

    def publish_after(
        self,
        parent: Revision,
        tasks: Mapping[str, str],
        epoch: EpochRef | None,
        reason: str,
        author: str | None = None,
    ) -> Revision:
        """Publish `tasks`, in an epoch or in none, for callers who judged just that against `parent`.

        Raises Conflict when another revision came after `parent` meanwhile.
        """
        fingerprint = parent.backbone_fingerprint
        return self._put_revision(self._draft(parent.number + 1, fingerprint, tasks, reason, author, epoch))

    def begin_epoch(self, parent: Revision, sha256: str, reason: str, author: str | None = None) -> Revision:
        """Publish the tasks of `parent` again, as those that begin the epoch with the record `sha256`.

        Raises Conflict when another revision came meanwhile.
        """
        epoch = EpochRef(number=parent.number + 1, sha256=sha256)
        return self.publish_after(parent, parent.tasks, epoch, reason, author)

    def publish_first(self, backbone_fingerprint: str) -> Revision:
        """Make `backbone_fingerprint` the store's backbone.

        A fresh store gets revision 1 without tasks. Otherwise the backbone may change only while no task is
        active, because module files belong to one backbone. Raises Conflict.
        """
        self.backbone_manifest(backbone_fingerprint)
        head = self.head()
        if head is not None and head.backbone_fingerprint == backbone_fingerprint:
            return head
        if head is not None and head.tasks:
            raise Conflict(
                f"the {len(head.tasks)} active tasks of {self.url} belong to backbone "
                f"{head.backbone_fingerprint[:12]}…: remove them first, or use another store"
            )
        number = head.number + 1 if head else 1
        reason = f"backbone {backbone_fingerprint[:12]}"
        return self._put_revision(self._draft(number, backbone_fingerprint, {}, reason))

    def require_head(self) -> Revision:
        head = self.head()
        if head is None:
            raise UnknownRevision(f"store {self.url} has no backbone yet: run `tosca backbone add`")
        return head

    def _draft(
        self,
        number: int,
        fingerprint: str,
        tasks: Mapping[str, str],
        reason: str,
        author: str | None = None,
        epoch: EpochRef | None = None,
    ) -> Revision:
        return unchecked_revision(
            dict(sorted(tasks.items())),
            epoch,
            number=number,
            backbone_fingerprint=fingerprint,
            reason=reason,
            author=author or self.author,
            created_at=datetime.now(UTC),
        )

    def _put_revision(self, revision: Revision) -> Revision:
        """Raises Conflict when there is one of this number already."""
        epoch = revision.epoch
        began = None
        if epoch is not None and epoch.number < revision.number:
            began = self._tasks_that_began(epoch)
        if not self._files.put_new(_revision_path(revision.number), log_file(revision, began)):
            raise Conflict(f"revision {revision.number} was published by another writer meanwhile")
        return revision


def with_task(task: str, sha256: str) -> Callable[[Revision], Mapping[str, str]]:
    """The change that adds or replaces one task."""
    return lambda revision: {**revision.tasks, task: sha256}


def without_task(task: str) -> Callable[[Revision], Mapping[str, str]]:
    """The change that removes one task; UnknownTask when it is not active."""

    def change(revision: Revision) -> Mapping[str, str]:
        if task not in revision.tasks:
            raise UnknownTask(f"task {task!r} is not active in revision {revision.number}")
        return {name: sha256 for name, sha256 in revision.tasks.items() if name != task}

    return change


def _revision_path(number: int) -> str:
    return _numbered("revisions", number)


def _numbered(folder: str, number: int) -> str:
    return f"{folder}/{number:0{_DIGITS}d}.json"


def _check_digest(name: str, data: bytes, sha256: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise CorruptStore(f"{name} reads back with SHA-256 {digest}")


def _default_author() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # no such user in a container
        return "unknown"
