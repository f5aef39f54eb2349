"""Modules of very many tasks: what weighs a task stays in memory, the rest is read when it may answer."""
# K classes, D features

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, fields

import cachetools
import torch
from torch import Tensor

from model_store.errors import CorruptStore
from model_store.freed_memory import give_back_memory
from model_store.manifest import ModuleManifest
from model_store.task_module import TaskModule

DEFAULT_MAX_BYTES = 2 * 2**30
# What a module weighs beside its tensors' contents: some twenty tensor objects and the module's own.
_OVERHEAD_BYTES = 16 * 2**10
# Share of the memory after whose eviction freed memory is given back.
_UNTIDY_SHARE = 0.25


_may_read: ContextVar[bool] = ContextVar("may_read", default=True)


class NotInMemory(Exception):
    """A module must be read first, by somebody who may take the time."""


@contextlib.contextmanager
def from_memory_alone() -> Iterator[None]:
    """Within, a module that must be read raises NotInMemory instead."""
    token = _may_read.set(False)
    try:
        yield
    finally:
        _may_read.reset(token)


@dataclass(frozen=True, slots=True)
class ModuleMemory:
    """What a `ModuleCache` holds, and how often it was asked."""

    num_modules: int
    size_bytes: int
    num_hits: int
    num_reads: int


class _Modules(cachetools.LRUCache[str, TaskModule]):
    """Counts what had to make room."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, module_bytes)
        self.evicted_bytes = 0

    def popitem(self) -> tuple[str, TaskModule]:
        sha256, module = super().popitem()
        self.evicted_bytes += module_bytes(module)
        return sha256, module


class ModuleCache:
    """Whole modules by digest, those used last, within a number of bytes. Safe to use from several threads.

    A module that several ask for at once is read once. One that is evicted while in use lives until its last
    user is done.
    """

    def __init__(self, load: Callable[[str], TaskModule], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """`load` reads and checks the module with a SHA-256; its faults reach whoever asks."""
        self._load = load
        self._modules = _Modules(max_bytes)
        self._reading: dict[str, Future[TaskModule]] = {}
        self._lock = threading.Lock()
        self._num_hits = 0
        self._num_reads = 0

    @property
    def max_bytes(self) -> int:
        return int(self._modules.maxsize)

    def get(self, sha256: str) -> TaskModule:
        """Raises what `load` raises, and NotInMemory within `from_memory_alone`."""
        with self._lock:
            module = self._modules.get(sha256)
            if module is not None:
                self._num_hits += 1
                return module
            if not _may_read.get():
                raise NotInMemory(sha256)
            reading = self._reading.get(sha256)
            is_mine = reading is None
            if reading is None:
                self._num_reads += 1
                reading = self._reading[sha256] = Future()
        if not is_mine:
            return reading.result()
        try:
            module = self._load(sha256)
        except BaseException as error:
            reading.set_exception(error)
            raise
        else:
            reading.set_result(module)
            self.put(module)
            return module
        finally:
            with self._lock:
                del self._reading[sha256]

    def put(self, module: TaskModule) -> None:
        """Keep a module that is at hand, unless it alone is more than all may be."""
        with self._lock:
            if module_bytes(module) <= self._modules.maxsize:
                self._modules[module.sha256] = module
            is_untidy = self._modules.evicted_bytes > _UNTIDY_SHARE * self._modules.maxsize
            if is_untidy:
                self._modules.evicted_bytes = 0
        if is_untidy:
            give_back_memory()

    @property
    def memory(self) -> ModuleMemory:
        with self._lock:
            size_bytes = int(self._modules.currsize)
            return ModuleMemory(len(self._modules), size_bytes, self._num_hits, self._num_reads)


@dataclass(frozen=True, slots=True)
class DeferredModule:
    """A module of which only this is in memory; treat the tensor as read-only."""

    task: str
    labels: tuple[str, ...]
    sha256: str
    label_space: str | None
    abstain_level: float | None
    mean_KD: Tensor  # float32
    num_known: int
    cache: ModuleCache

    def whole(self) -> TaskModule:
        """Raises StoreUnavailable, UnknownModule, InvalidModule, and CorruptStore when the file has other
        class means than were listed."""
        module = self.cache.get(self.sha256)
        if not torch.equal(module.mean_KD, self.mean_KD):
            raise CorruptStore(f"task {self.task!r}: the listed class means are not those of its module")
        return module


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A module file of which only the manifest is in memory."""

    manifest: ModuleManifest
    module: DeferredModule
    size_bytes: int

    @property
    def sha256(self) -> str:
        return self.module.sha256

    @classmethod
    def of(
        cls,
        manifest: ModuleManifest,
        *,
        sha256: str,
        mean_KD: Tensor,
        num_known: int,
        size_bytes: int,
        cache: ModuleCache,
    ) -> "ListedFile":
        module = DeferredModule(
            task=manifest.task,
            labels=manifest.labels,
            sha256=sha256,
            label_space=manifest.label_space,
            abstain_level=manifest.abstain_level,
            mean_KD=mean_KD,
            num_known=num_known,
            cache=cache,
        )
        return cls(manifest, module, size_bytes)


def module_bytes(module: TaskModule) -> int:
    """About what a module takes in memory."""
    tensors = [*module.luca.parameters(), *module.luca.buffers(), *module.head.parameters()]
    for part in (module.standardisation, module.ridge, module.statistics, module.calibration):
        if part is not None:
            tensors += [getattr(part, field.name) for field in fields(part)]
    return sum(tensor.nbytes for tensor in tensors) + _OVERHEAD_BYTES
