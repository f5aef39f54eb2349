"""What every training command loads: a store's backbone, and features through the cache."""

import os
from pathlib import Path
from typing import Annotated

import typer

from model_store import backbone_loading
from model_store.backbone import Backbone
from model_store.console import err
from model_store.store import ModelStore
from training.features import FeatureCache, LabelledFeatures, extract_features
from training.sources import PictureSource

CacheOption = Annotated[
    Path, typer.Option("--cache", envvar="TOSCA_CACHE", help="Folder of the CLS feature cache.")
]
DEFAULT_CACHE = Path(".tosca/cache")
DEFAULT_MAX_CORRUPT = 0.05


def load_backbone(store: ModelStore, device: str, runtime: str) -> Backbone:
    """The backbone in use by a store, on a device, in a runtime."""
    return backbone_loading.load_backbone(store, device=device, runtime=runtime)


def load_features(
    source: PictureSource, backbone: Backbone, cache: Path, max_corrupt: float = DEFAULT_MAX_CORRUPT
) -> LabelledFeatures:
    """CLS features of a source, with a progress bar where a person watches."""
    opened = FeatureCache(cache, backbone.fingerprint, backbone.variant, backbone.feature_dim)
    return extract_features(
        source,
        backbone,
        opened,
        max_corrupt_fraction=max_corrupt,
        num_threads=os.cpu_count() or 1,
        show_progress=err.is_terminal,
    )
