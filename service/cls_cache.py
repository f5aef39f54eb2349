"""CLS vectors of pictures answered before. Tasks come and go, the backbone stays: none grows stale."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

# What an entry weighs beside its vector: the key, the tensor's own record, the places in the dictionary.
ENTRY_OVERHEAD_BYTES = 512


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    num_hits: int
    num_misses: int
    num_entries: int
    size_bytes: int


class ClsCache:
    """The vectors used last, within a number of bytes. Safe to use from several threads."""

    def __init__(self, max_bytes: int, fingerprint: str, variant: str) -> None:
        """For one backbone in one runtime, which both go into every key; 0 bytes keep nothing."""
        self._max_bytes = max_bytes
        self._identity = f"{fingerprint}/{variant}/".encode()
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()
        self._size_bytes = 0
        self._num_hits = 0
        self._num_misses = 0
        self._lock = threading.Lock()

    def key(self, data: bytes) -> bytes:
        """SHA-256 over the backbone, its runtime and the bytes of an encoded picture."""
        digest = hashlib.sha256(self._identity)
        digest.update(data)
        return digest.digest()

    def get(self, key: bytes) -> Tensor | None:
        """The [D] vector of a picture, and a hit or a miss counted."""
        with self._lock:
            vector_D = self._vectors.get(key)
            if vector_D is None:
                self._num_misses += 1
                return None
            self._vectors.move_to_end(key)
            self._num_hits += 1
            return vector_D

    def peek(self, key: bytes) -> Tensor | None:
        """The vector of a picture that was missed before: it may have come meanwhile."""
        with self._lock:
            return self._vectors.get(key)

    def put(self, key: bytes, vector_D: Tensor) -> None:
        """Keep a vector, and let those used longest ago go until all fit."""
        size_bytes = _size_bytes(vector_D)
        if size_bytes > self._max_bytes:
            return
        vector_D = vector_D.clone()  # a row of a batch would keep the whole batch in memory
        with self._lock:
            if key in self._vectors:
                return
            self._vectors[key] = vector_D
            self._size_bytes += size_bytes
            while self._size_bytes > self._max_bytes:
                _, oldest_D = self._vectors.popitem(last=False)
                self._size_bytes -= _size_bytes(oldest_D)

    @property
    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(self._num_hits, self._num_misses, len(self._vectors), self._size_bytes)


def _size_bytes(vector_D: Tensor) -> int:
    return vector_D.numel() * vector_D.element_size() + ENTRY_OVERHEAD_BYTES
