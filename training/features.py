"""CLS features of pictures, computed once and kept.

The backbone is frozen, so a picture's CLS vector never changes: it is cached under the SHA-256 of the
file and the backbone's fingerprint, and no epoch and no later training run computes it again.
"""
# N pictures, D features

import hashlib
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model_store.backbone import Backbone
from model_store.decoding import ImageLimits
from model_store.errors import InvalidDataset, InvalidImage
from model_store.preprocess import load_pixels
from training.sources import PictureSource, Split

BATCH_SIZE = 16  # on the CPU, where larger batches gain nothing
CUDA_BATCH_SIZE = 128
# Batches being decoded while one is embedded: a run of large pictures then starves no pass.
_BATCHES_AHEAD = 2
_LOOKUP_CHUNK = 500


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """CLS vectors `cls_ND` (float32) with labels `label_N` into `labels`, and where they came from."""

    name: str
    labels: tuple[str, ...]
    cls_ND: Tensor
    label_N: Tensor
    splits: tuple[Split, ...]
    data_sha256: str  # over the picture hashes, labels and splits, in order
    skipped: tuple[str, ...]  # pictures that could not be read, with the reason
    num_computed: int  # pictures the backbone had to run for

    def rows(self, split: Split) -> Tensor:
        """Indices of one split."""
        return torch.tensor([i for i, one in enumerate(self.splits) if one == split], dtype=torch.int64)


class _Picture(NamedTuple):
    """A picture on its way: its hash, and once decoded its pixels or the reason it has none."""

    sha256: str
    pixels: Tensor | None
    fault: str | None


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


def extract_features(
    source: PictureSource,
    backbone: Backbone,
    cache: FeatureCache,
    *,
    max_corrupt_fraction: float = 0.05,
    limits: ImageLimits | None = None,
    num_threads: int = 2,
    show_progress: bool = True,
) -> LabelledFeatures:
    """CLS vectors of every readable picture of a source.

    Unreadable pictures are listed and left out; more than `max_corrupt_fraction` of them raises
    InvalidDataset.
    """
    limits = limits or ImageLimits()
    with ThreadPoolExecutor(num_threads) as pool:
        digests = list(pool.map(_hash_file, [one.path for one in source.pictures]))
        known = cache.get(digest for digest in digests if digest)
        to_compute: dict[str, Path] = {}
        for one, digest in zip(source.pictures, digests, strict=True):
            if digest and digest not in known:
                to_compute.setdefault(digest, one.path)

        def decode(item: tuple[str, Path]) -> _Picture:
            sha256, path = item
            try:
                return _Picture(sha256, load_pixels(path.read_bytes(), backbone.preprocessing, limits), None)
            except (InvalidImage, OSError) as error:
                return _Picture(sha256, None, str(error))

        faults: dict[str, str] = {}
        with _progress(show_progress) as progress:
            bar = progress.add_task(f"features of {source.name}", total=len(to_compute))
            batch_size = CUDA_BATCH_SIZE if backbone.device.type == "cuda" else BATCH_SIZE
            for batch in _batched(pool, decode, list(to_compute.items()), batch_size):
                faults |= {one.sha256: one.fault for one in batch if one.fault is not None}
                good = [(one.sha256, one.pixels) for one in batch if one.pixels is not None]
                if good:
                    cls_BD = backbone.embed(torch.stack([pixels for _, pixels in good])).cpu()
                    fresh = dict(zip([sha256 for sha256, _ in good], cls_BD, strict=True))
                    cache.put(fresh)
                    known |= fresh
                progress.advance(bar, len(batch))
    return _assemble(source, digests, known, faults, max_corrupt_fraction, len(to_compute) - len(faults))


def _batched(
    pool: ThreadPoolExecutor,
    decode: Callable[[tuple[str, Path]], _Picture],
    items: Sequence[tuple[str, Path]],
    batch_size: int,
) -> Iterator[list[_Picture]]:
    """Decoded batches, with the next ones already being decoded while this one is embedded."""
    ahead: deque[list[Future[_Picture]]] = deque()
    for start in range(0, len(items), batch_size):
        ahead.append([pool.submit(decode, item) for item in items[start : start + batch_size]])
        if len(ahead) > _BATCHES_AHEAD:
            yield [future.result() for future in ahead.popleft()]
    while ahead:
        yield [future.result() for future in ahead.popleft()]


def _assemble(
    source: PictureSource,
    digests: list[str],
    vectors: dict[str, Tensor],
    faults: dict[str, str],
    max_corrupt_fraction: float,
    num_computed: int,
) -> LabelledFeatures:
    kept = [(one, digest) for one, digest in zip(source.pictures, digests, strict=True) if digest in vectors]
    skipped = tuple(
        f"{one.path}: {faults.get(digest, 'cannot be opened')}"
        for one, digest in zip(source.pictures, digests, strict=True)
        if digest not in vectors
    )
    if len(skipped) > max_corrupt_fraction * len(source.pictures):
        raise InvalidDataset(
            f"{source.name}: {len(skipped)} of {len(source.pictures)} pictures cannot be read, more than the "
            f"{max_corrupt_fraction:.0%} allowed; first: {skipped[0]}"
        )
    if not kept:
        raise InvalidDataset(f"{source.name}: not one picture can be read; first: {skipped[0]}")
    index = {label: i for i, label in enumerate(source.labels)}
    listing = "\n".join(f"{digest} {one.split} {one.label}" for one, digest in kept)
    return LabelledFeatures(
        name=source.name,
        labels=source.labels,
        cls_ND=torch.stack([vectors[digest] for _, digest in kept]),
        label_N=torch.tensor([index[one.label] for one, _ in kept]),
        splits=tuple(one.split for one, _ in kept),
        data_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        skipped=skipped,
        num_computed=num_computed,
    )


def _hash_file(path: Path) -> str:
    """SHA-256 of a file, or an empty string when it cannot be opened."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)
