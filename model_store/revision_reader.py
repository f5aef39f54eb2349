"""A revision in memory: its modules read and checked, or listed by its epoch, and the bank they make."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.compute_threads import one_compute_thread, use_one_compute_thread
from model_store.deferred import ListedFile, ModuleCache
from model_store.epoch import Epoch
from model_store.epoch_file import EpochRecord, read_listing, write_listings
from model_store.errors import CorruptStore
from model_store.freed_memory import give_back_memory
from model_store.module_file import ModuleFile, check_module, read_module
from model_store.revision import EpochRef, Revision
from model_store.signatures import Signature, Trust
from model_store.statistics import PooledStatistics
from model_store.store import ModelStore
from model_store.task_module import TaskModule

# So many unknown modules are worth reading what their epoch lists of all of its.
WORTH_LISTINGS = 50
_ADMITTED_TOGETHER = 256

ActiveFile = ModuleFile | ListedFile


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """One revision in memory: the bank that answers, and the files it was made of. Immutable."""

    revision: Revision
    bank: ModuleBank
    files: Mapping[str, ActiveFile]  # by task


@dataclass(frozen=True, slots=True)
class NewFile:
    """A module file on its way in, and the trusted signer who vouches for it."""

    file: ModuleFile
    signer: str | None


@dataclass(frozen=True, slots=True)
class Draft:
    """What a revision would be in memory, before it has been published."""

    files: Mapping[str, ActiveFile]
    bank: ModuleBank


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Files by digest, the signers who vouch for some, and the files' pooled statistics if all are new."""

    files: Mapping[str, ActiveFile]
    signers: Mapping[str, str]
    pooled: PooledStatistics | None


class RevisionReader:
    """Makes banks of a store's revisions, for one backbone on one device. One thread at a time, but for
    the modules that its banks read later."""

    def __init__(
        self,
        store: ModelStore,
        backbone: BackboneManifest,
        device: torch.device,
        trust: Trust,
        module_memory_bytes: int,
    ) -> None:
        """In an epoch, and where all modules together are more than `module_memory_bytes`, those beyond are
        read when their task may answer."""
        self.modules = ModuleCache(self._read_whole, module_memory_bytes)
        self._store = store
        self._backbone = backbone
        self._device = device
        self._trust = trust
        self._epoch: tuple[EpochRef, EpochRecord] | None = None

    def admit(self, data: bytes) -> ModuleFile:
        """Check a module file against the format and the backbone, without keeping it."""
        file = read_module(data, self._device)
        check_module(file, self._backbone)
        return file

    def signer_of(self, sha256: str, given: Sequence[Signature] = ()) -> str | None:
        """The trusted signer who vouches for a module, by signatures `given` or in the store."""
        if not self._trust.key_of and not self._trust.is_required:
            return None
        return self._trust.signer_of(sha256, [*given, *self._store.signatures(sha256)])

    def draft(
        self,
        tasks: Mapping[str, str],
        number: int,
        epoch: EpochRef | None,
        previous: ActiveSet | None,
        new: NewFile | None = None,
    ) -> Draft:
        """What revision `number` would be with `tasks`, in an epoch or in none. `previous` saves work."""
        record = self._record_of(epoch)
        gathered = self._gather(tasks, record, previous, new)
        files = {task: gathered.files[sha256] for task, sha256 in tasks.items()}
        for task, file in files.items():
            if file.manifest.task != task:
                raise CorruptStore(
                    f"revision {number} lists the module of {file.manifest.task!r} as {task!r}"
                )
        active = set(tasks.values())
        signers = {sha256: name for sha256, name in gathered.signers.items() if sha256 in active}
        epoch_known = record.epoch if record else None
        return Draft(files, self._bank(files, number, epoch_known, previous, signers, gathered.pooled))

    def _gather(
        self,
        tasks: Mapping[str, str],
        record: EpochRecord | None,
        previous: ActiveSet | None,
        new: NewFile | None,
    ) -> "_Gathered":
        """The files of all tasks, and perhaps of more: known from before, listed, or read and checked."""
        files: dict[str, ActiveFile] = {}
        signers: dict[str, str] = {}
        if previous is not None:
            files = {file.sha256: file for file in previous.files.values()}
            signers = dict(previous.bank.signers)
        if new is not None:
            files[new.file.sha256] = new.file
            signers |= {new.file.sha256: new.signer} if new.signer else {}
        if record is not None:
            files |= self._worthwhile_listings(record, tasks.values(), files)
        size_bytes = sum(file.size_bytes for file in files.values())
        is_deferred = record is not None or size_bytes > self.modules.max_bytes
        pooled = PooledStatistics.empty(self._backbone.feature_dim)
        for admitted, signer in self._admitted([one for one in tasks.values() if one not in files]):
            size_bytes += admitted.size_bytes
            if not is_deferred and size_bytes > self.modules.max_bytes:
                is_deferred = True
                files = self._all_listed(files, new)
            if record is None and previous is None:
                pooled = pooled.add([admitted.module.statistics])
            files[admitted.sha256] = self._listed(admitted) if is_deferred else admitted
            signers |= {admitted.sha256: signer} if signer is not None else {}
        if is_deferred:
            files = self._all_listed(files, new)
        return _Gathered(files, signers, pooled if previous is None else None)

    def _all_listed(self, files: Mapping[str, ActiveFile], new: NewFile | None) -> dict[str, ActiveFile]:
        """Of each only what must stay in memory, but for a new one, which cannot be read from the store."""
        unpublished = new.file if new is not None else None
        return {sha256: file if file is unpublished else self._listed(file) for sha256, file in files.items()}

    def begin_epoch(self, active: ActiveSet, reason: str, author: str | None) -> ActiveSet:
        """Publish the tasks of `active` as those that begin an epoch. Raises Conflict."""
        bank, number = active.bank, active.revision.number
        if bank.epoch is not None:
            bank = self._bank(active.files, number, None, active, bank.signers)
        listed = [self._listed(file) for file in active.files.values()]
        listings = tuple(self._store.put_listing(data) for data in write_listings(listed))
        files = {file.manifest.task: file for file in listed}
        record = EpochRecord(bank.begin_epoch(), listings)
        sha256 = self._store.put_epoch(record.to_bytes())
        revision = self._store.begin_epoch(active.revision, sha256, reason, author)
        assert revision.epoch is not None, "it begins one"
        self._epoch = (revision.epoch, record)
        return ActiveSet(
            revision, self._bank(files, revision.number, record.epoch, None, bank.signers), files
        )

    def _admitted(self, sha256s: Sequence[str]) -> Iterator[tuple[ModuleFile, str | None]]:
        """Modules of the store, checked, and the trusted signer who vouches for each; some at a time, since
        all of them may be more than fit into memory."""
        with ThreadPoolExecutor(None, "admit", use_one_compute_thread) as pool:
            for start in range(0, len(sha256s), _ADMITTED_TOGETHER):
                yield from pool.map(self._admit_stored, sha256s[start : start + _ADMITTED_TOGETHER])
                give_back_memory()  # else several times what is kept

    def _admit_stored(self, sha256: str) -> tuple[ModuleFile, str | None]:
        """A module of the store, checked, and the trusted signer who vouches for it."""
        signer = self.signer_of(sha256)
        return self.admit(self._store.module(sha256)), signer

    def _read_whole(self, sha256: str) -> TaskModule:
        return self.admit(self._store.module(sha256)).module

    def _bank(
        self,
        files: Mapping[str, ActiveFile],
        number: int,
        epoch: Epoch | None,
        previous: ActiveSet | None,
        signers: Mapping[str, str],
        pooled: PooledStatistics | None = None,
    ) -> ModuleBank:
        with one_compute_thread():  # so that every replica has the same bits
            return ModuleBank.build(
                (file.module for file in files.values()),
                revision=number,
                backbone_fingerprint=self._backbone.fingerprint,
                feature_dim=self._backbone.feature_dim,
                device=self._device,
                epoch=epoch,
                pooled=pooled,
                previous=previous.bank if previous else None,
                recall=self.modules.get,
                signers=signers,
            )

    def _record_of(self, ref: EpochRef | None) -> EpochRecord | None:
        """The record of an epoch; the last one stays in memory."""
        if ref is None:
            return None
        if self._epoch is None or self._epoch[0] != ref:
            began = self._store.revision(ref.number)
            data = self._store.epoch(ref.sha256)
            record = EpochRecord.from_bytes(data, self._backbone.feature_dim, began.tasks.values())
            self._epoch = (ref, record)
        return self._epoch[1]

    def _worthwhile_listings(
        self, record: EpochRecord, wanted: Iterable[str], known: Mapping[str, ActiveFile]
    ) -> dict[str, ActiveFile]:
        """What an epoch lists of its tasks, by digest, where many of them are wanted and unknown.

        Nothing where signers are asked for: whoever wrote a listing has signed none of its modules.
        """
        num_missing = sum(sha256 in record.epoch.sha256s and sha256 not in known for sha256 in wanted)
        if num_missing < WORTH_LISTINGS or self._trust.key_of or self._trust.is_required:
            return {}
        with ThreadPoolExecutor(thread_name_prefix="listing") as pool:
            listings = pool.map(
                lambda one: read_listing(self._store.listing(one), self.modules), record.listings
            )
            return {file.sha256: file for files in listings for file in files if file.sha256 not in known}

    def _listed(self, file: ActiveFile) -> ListedFile:
        """What stays in memory of a file in an epoch; its module may have to make room."""
        if isinstance(file, ListedFile):
            return file
        self.modules.put(file.module)
        return ListedFile.of(
            file.manifest,
            sha256=file.sha256,
            mean_KD=file.module.mean_KD.clone(),  # not the whole file's memory
            num_known=file.module.num_known,
            size_bytes=file.size_bytes,
            cache=self.modules,
        )
