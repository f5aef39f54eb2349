"""CLS vectors kept between runs: one SQLite file for each backbone and runtime."""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LOOKUP_CHUNK = 500


class FeatureCache:
    """CLS vectors by picture hash for one backbone and runtime, in one SQLite file."""

    def __init__(self, folder: Path, fingerprint: str, variant: str, feature_dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"cls-{fingerprint[:16]}-{variant}.sqlite"
        self._feature_dim = feature_dim
        with self._connect() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE IF NOT EXISTS cls (sha256 TEXT PRIMARY KEY, vector BLOB NOT NULL)")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60.0)

    def get(self, digests: Iterable[str]) -> dict[str, Tensor]:
        wanted = sorted(set(digests))
        found: dict[str, Tensor] = {}
        with closing(self._connect()) as database:
            for start in range(0, len(wanted), _LOOKUP_CHUNK):
                chunk = wanted[start : start + _LOOKUP_CHUNK]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT sha256, vector FROM cls WHERE sha256 IN ({marks})"  # noqa: S608  (only marks)
                for sha256, blob in database.execute(query, chunk):
                    vector = np.frombuffer(blob, dtype=np.float32)
                    if vector.shape == (self._feature_dim,):
                        found[sha256] = torch.from_numpy(vector.copy())
        return found

    def put(self, vectors: dict[str, Tensor]) -> None:
        with closing(self._connect()) as database, database:
            database.executemany(
                "INSERT OR REPLACE INTO cls VALUES (?, ?)",
                [(sha256, vector.numpy().tobytes()) for sha256, vector in vectors.items()],
            )
