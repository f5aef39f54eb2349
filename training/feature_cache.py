"""CLS vectors kept between runs: one SQLite file for each backbone and runtime."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_store.errors import ToscaError

_LOOKUP_CHUNK = 500


class FeatureCache:
    """CLS vectors by picture hash for one backbone and runtime, in one SQLite file.

    Everything raises ToscaError when the file cannot be read or written.
    """

    def __init__(self, folder: Path, fingerprint: str, variant: str, feature_dim: int) -> None:
        self.path = folder / f"cls-{fingerprint[:16]}-{variant}.sqlite"
        self._feature_dim = feature_dim
        with self._opened() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE IF NOT EXISTS cls (sha256 TEXT PRIMARY KEY, vector BLOB NOT NULL)")

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The database; what a whole block writes is kept."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60.0)) as database, database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise ToscaError(
                f"feature cache {self.path}: {error}. It is only a cache: delete it, or name another folder "
                "with --cache"
            ) from error

    def get(self, digests: Iterable[str]) -> dict[str, Tensor]:
        wanted = sorted(set(digests))
        found: dict[str, Tensor] = {}
        with self._opened() as database:
            for start in range(0, len(wanted), _LOOKUP_CHUNK):
                chunk = wanted[start : start + _LOOKUP_CHUNK]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT sha256, vector FROM cls WHERE sha256 IN ({marks})"  # noqa: S608  (only marks)
                for sha256, blob in database.execute(query, chunk):
                    if len(blob) == 4 * self._feature_dim:
                        found[sha256] = torch.from_numpy(np.frombuffer(blob, dtype=np.float32).copy())
        return found

    def put(self, vectors: dict[str, Tensor]) -> None:
        with self._opened() as database:
            database.executemany(
                "INSERT OR REPLACE INTO cls VALUES (?, ?)",
                [(sha256, vector.numpy().tobytes()) for sha256, vector in vectors.items()],
            )
