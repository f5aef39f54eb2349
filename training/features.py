"""CLS features of pictures, computed once and kept.

The backbone is frozen, so a picture's CLS vector never changes: it is cached under the SHA-256 of the
file and the backbone's fingerprint, and no epoch and no later training run computes it again.
"""
# N pictures, D features

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model_store.backbone import Backbone
from model_store.decoding import ImageLimits
from model_store.errors import InvalidDataset, InvalidImage
from training.embedding import Embedding, Item, LocalEmbedding
from training.feature_cache import FeatureCache
from training.pictures import (
    SPLITS,
    LabelledPicture,
    PicturePath,
    PictureSource,
    Split,
    check_counts,
)

_Hashed = tuple[LabelledPicture, str]  # a picture and its SHA-256

# No thread hurries further ahead of another: sources that read forward need not go back.
_HASHED_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """CLS vectors `cls_ND` (float32) with labels `label_N` into `labels`, and where they came from."""

    name: str
    labels: tuple[str, ...]
    cls_ND: Tensor
    label_N: Tensor
    splits: tuple[Split, ...]
    data_sha256: str  # over the picture hashes, labels and splits, in order
    skipped: tuple[str, ...]  # pictures left out, with the reason; repeats of a kind in one line
    num_computed: int  # pictures the backbone had to run for

    def rows(self, split: Split) -> Tensor:
        """Indices of one split."""
        return torch.tensor([i for i, one in enumerate(self.splits) if one == split], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class HashedSource:
    """A source and the SHA-256 of each of its pictures, empty where one cannot be opened."""

    source: PictureSource
    digests: tuple[str, ...]
    faults: tuple[str, ...]  # why not, of each; empty where it can
    # To train from: every picture once and under one label, and so many of each class.
    min_images_per_class: int | None = None

    @property
    def data_sha256(self) -> str:
        """What `LabelledFeatures` will say when every picture that opens can be decoded and none repeats."""
        return _data_sha256(
            [pair for pair in zip(self.source.pictures, self.digests, strict=True) if pair[1]]
        )


def hash_source(source: PictureSource, num_threads: int = 2) -> HashedSource:
    """Read every picture of a source once, in its order."""
    with ThreadPoolExecutor(num_threads) as pool:
        paths = [one.path for one in source.pictures]
        found = [
            one
            for start in range(0, len(paths), _HASHED_TOGETHER)
            for one in pool.map(_hash_picture, paths[start : start + _HASHED_TOGETHER])
        ]
    return HashedSource(source, tuple(digest for digest, _ in found), tuple(fault for _, fault in found))


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
    return the_only(
        extract_each(
            [hash_source(source, num_threads)],
            backbone,
            cache,
            max_corrupt_fraction=max_corrupt_fraction,
            limits=limits,
            num_threads=num_threads,
            show_progress=show_progress,
        )
    )


def the_only(found: Iterable[LabelledFeatures | InvalidDataset]) -> LabelledFeatures:
    """The features of a single source that was asked for; raises its fault."""
    (features,) = found
    if isinstance(features, InvalidDataset):
        raise features
    return features


def extract_each(
    sources: Iterable[HashedSource],
    backbone: Backbone,
    cache: FeatureCache,
    *,
    max_corrupt_fraction: float = 0.05,
    limits: ImageLimits | None = None,
    num_threads: int = 2,
    show_progress: bool = True,
) -> Iterator[LabelledFeatures | InvalidDataset]:
    """The features of many sources in one pass, in order, each as soon as its last picture is embedded.

    While one source ends the next is already being decoded, and a picture that several hold is computed
    once. No batch mixes sources: the vectors of a source are, bit for bit, those of reading it alone. The
    fault of a source takes its place, and the others go on.
    """
    embedding = LocalEmbedding(backbone, limits or ImageLimits(), num_threads)
    yield from extract_with(
        embedding, sources, cache, max_corrupt_fraction=max_corrupt_fraction, show_progress=show_progress
    )


def extract_with(
    embedding: Embedding,
    sources: Iterable[HashedSource],
    cache: FeatureCache,
    *,
    max_corrupt_fraction: float = 0.05,
    show_progress: bool = True,
) -> Iterator[LabelledFeatures | InvalidDataset]:
    """`extract_each`, wherever the backbone runs."""
    faults: dict[str, str] = {}
    with _progress(show_progress) as progress:
        bar = progress.add_task("features", total=0)
        for batch, embedded in embedding.embed_ahead(_plan_batches(sources, cache, embedding.batch_size)):
            wanted = batch.source
            progress.update(
                bar, description=f"features of {wanted.hashed.source.name}", total=wanted.num_planned
            )
            faults |= {sha256: one for sha256, one in embedded.items() if isinstance(one, str)}
            fresh = {sha256: one for sha256, one in embedded.items() if isinstance(one, Tensor)}
            if fresh:
                cache.put(fresh)
                wanted.known |= fresh
                wanted.num_computed += len(fresh)
            progress.advance(bar, len(embedded))
            if batch.is_last:
                # What an earlier source was about to compute when this one was planned is there by now.
                wanted.known |= cache.get(one for one in wanted.hashed.digests if one not in wanted.known)
                try:
                    yield _assemble(wanted, faults, max_corrupt_fraction)
                except InvalidDataset as error:
                    yield error


@dataclass(slots=True)
class _WantedSource:
    """A source under way: the vectors at hand, how many were computed, and pictures planned so far."""

    hashed: HashedSource
    known: dict[str, Tensor]
    num_planned: int  # of this source and those before it
    num_computed: int = 0


class _Planned(NamedTuple):
    """A batch that is to be decoded; an empty one ends a source that needs nothing."""

    source: _WantedSource
    items: list[Item]
    is_last: bool


def _plan_batches(
    sources: Iterable[HashedSource], cache: FeatureCache, batch_size: int
) -> Iterator[_Planned]:
    claimed: set[str] = set()
    num_planned = 0
    for hashed in sources:
        known = cache.get(digest for digest in hashed.digests if digest)
        to_compute: dict[str, PicturePath] = {}
        for one, digest in zip(hashed.source.pictures, hashed.digests, strict=True):
            if digest and digest not in known and digest not in claimed:
                to_compute.setdefault(digest, one.path)
        claimed |= to_compute.keys()
        num_planned += len(to_compute)
        wanted = _WantedSource(hashed, known, num_planned)
        items = list(to_compute.items())
        starts = range(0, len(items), batch_size) or range(1)
        for start in starts:
            yield _Planned(wanted, items[start : start + batch_size], start == starts[-1])


def _assemble(wanted: _WantedSource, faults: dict[str, str], max_corrupt_fraction: float) -> LabelledFeatures:
    source, vectors = wanted.hashed.source, wanted.known
    pairs = list(zip(source.pictures, wanted.hashed.digests, strict=True))
    kept = [(one, digest) for one, digest in pairs if digest in vectors]
    skipped = tuple(
        f"{one.path}: {fault or faults[digest]}"
        for (one, digest), fault in zip(pairs, wanted.hashed.faults, strict=True)
        if digest not in vectors
    )
    if len(skipped) > max_corrupt_fraction * len(source.pictures):
        raise InvalidDataset(
            f"{source.name}: {len(skipped)} of {len(source.pictures)} pictures cannot be read, more than the "
            f"{max_corrupt_fraction:.0%} allowed; first: {skipped[0]}"
        )
    if not kept:
        raise InvalidDataset(f"{source.name}: not one picture can be read; first: {skipped[0]}")
    if (least := wanted.hashed.min_images_per_class) is not None:
        kept, repeats = _leave_out_repeats(source.name, kept)
        skipped += repeats
        check_counts(source.name, [one for one, _ in kept], source.labels, least)
    index = {label: i for i, label in enumerate(source.labels)}
    return LabelledFeatures(
        name=source.name,
        labels=source.labels,
        cls_ND=torch.stack([vectors[digest] for _, digest in kept]),
        label_N=torch.tensor([index[one.label] for one, _ in kept]),
        splits=tuple(one.split for one, _ in kept),
        data_sha256=_data_sha256(kept),
        skipped=skipped,
        num_computed=wanted.num_computed,
    )


def _leave_out_repeats(name: str, pictures: Sequence[_Hashed]) -> tuple[list[_Hashed], tuple[str, ...]]:
    """(each picture once, what was left out); a picture of several splits stays in the first of them.

    A copy would be evidence about a picture that was learnt. Raises InvalidDataset when a picture has two
    labels, and when a split has none of its own.
    """
    first: dict[str, LabelledPicture] = {}
    clashes = []
    for one, digest in sorted(pictures, key=lambda hashed: SPLITS.index(hashed[0].split)):
        same = first.setdefault(digest, one)
        if same.label != one.label:
            clashes.append(f"{same.path} is {same.label!r}, {one.path} {one.label!r}")
    if clashes:
        raise InvalidDataset(f"{name}: {len(clashes)} picture(s) have two labels; first: {clashes[0]}")
    kept = [(one, digest) for one, digest in pictures if first[digest] is one]
    repeats: dict[str, list[str]] = {}
    for one, digest in pictures:
        same = first[digest]
        if same is not one:
            kind = "repeated" if one.split == same.split else f"of {one.split} also in {same.split}"
            repeats.setdefault(kind, []).append(f"{one.path} is {same.path}")
    lost = {one.split for one, _ in pictures} - {one.split for one, _ in kept}
    lines = tuple(f"{len(found)} picture(s) {kind}; first: {found[0]}" for kind, found in repeats.items())
    if lost:
        raise InvalidDataset(
            f"{name}: {', '.join(sorted(lost))} has no pictures of its own: {', '.join(lines)}"
        )
    return kept, lines


def _data_sha256(pictures: Iterable[_Hashed]) -> str:
    listing = "\n".join(f"{digest} {one.split} {one.label}" for one, digest in pictures)
    return hashlib.sha256(listing.encode()).hexdigest()


def _hash_picture(path: PicturePath) -> tuple[str, str]:
    """(SHA-256 of a picture's bytes, empty when they cannot be had; the reason)"""
    try:
        if not isinstance(path, Path):
            return hashlib.sha256(path.read_bytes()).hexdigest(), ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    except (OSError, ValueError):  # a path may hold what no file name can
        return "", "cannot be opened"
    except InvalidImage as error:
        return "", str(error)


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)
