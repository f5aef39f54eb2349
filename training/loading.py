"""What every training command loads: a store's backbone, and features through the cache."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from model_store import backbone_loading
from model_store.backbone import Backbone
from model_store.console import err
from model_store.errors import InvalidDataset
from model_store.ray_session import room_for_workers
from model_store.store import ModelStore
from training.feature_cache import FeatureCache
from training.features import (
    HashedSource,
    LabelledFeatures,
    extract_each,
    extract_with,
    hash_source,
    the_only,
)
from training.pictures import PictureSource

CacheOption = Annotated[
    Path, typer.Option("--cache", envvar="TOSCA_CACHE", help="Folder of the CLS feature cache.")
]
CorruptOption = Annotated[
    float, typer.Option("--max-corrupt", min=0.0, max=1.0, help="Share of unreadable pictures tolerated.")
]
DEFAULT_CACHE = Path(".tosca/cache")
DEFAULT_MAX_CORRUPT = 0.05


RayOption = Annotated[
    bool, typer.Option("--ray", help="Work on the Ray cluster of RAY_ADDRESS, or one of its own here.")
]


def load_backbone(store: ModelStore, device: str, runtime: str) -> Backbone:
    """The backbone in use by a store, on a device, in a runtime."""
    return backbone_loading.load_backbone(store, device=device, runtime=runtime)


def load_features(
    source: PictureSource, backbone: Backbone, cache: Path, max_corrupt: float = DEFAULT_MAX_CORRUPT
) -> LabelledFeatures:
    """CLS features of a source, with a progress bar where a person watches."""
    return the_only(load_features_of_each([load_hashes(source)], backbone, cache, max_corrupt))


def load_features_of_each(
    sources: Iterable[HashedSource],
    backbone: Backbone,
    cache: Path,
    max_corrupt: float = DEFAULT_MAX_CORRUPT,
) -> Iterator[LabelledFeatures | InvalidDataset]:
    """CLS features of many sources in one pass, as `load_features` gives them one by one."""
    return extract_each(
        sources,
        backbone,
        FeatureCache(cache, backbone.fingerprint, backbone.variant, backbone.feature_dim),
        max_corrupt_fraction=max_corrupt,
        num_threads=num_threads(),
        show_progress=err.is_terminal,
    )


def load_features_on_ray(
    sources: Iterable[HashedSource],
    store: ModelStore,
    device: str,
    runtime: str,
    cache: Path,
    max_corrupt: float = DEFAULT_MAX_CORRUPT,
) -> Iterator[LabelledFeatures | InvalidDataset]:
    """The same from the workers of a Ray cluster. To be used inside `ray_session`."""
    from training.ray_embedding import RayEmbedding

    num_workers, num_gpus_each = room_for_workers(device)
    url = store.url if "://" in store.url else str(Path(store.url).absolute())
    embedding = RayEmbedding(
        url, device=device, runtime=runtime, num_workers=num_workers, num_gpus_each=num_gpus_each
    )
    kind = embedding.kind
    return extract_with(
        embedding,
        sources,
        FeatureCache(cache, kind.fingerprint, kind.variant, kind.feature_dim),
        max_corrupt_fraction=max_corrupt,
        show_progress=err.is_terminal,
    )


def load_hashes(source: PictureSource) -> HashedSource:
    return hash_source(source, num_threads())


def num_threads() -> int:
    """How many cores there are to decode or to train on."""
    return os.cpu_count() or 1
