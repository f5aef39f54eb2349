"""Do all servers compute the same? A peer that computes something else is no comparison."""
# C channels, H height, W width, N pictures

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.servers import Served
from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_loading import load_backbone
from model_store.decoding import ImageLimits
from model_store.measuring import embed_all
from model_store.preprocess import load_pixels
from model_store.store import ModelStore

# Of the ordinary engine's vectors with ours: in int8 each of them is 0.001 from the exact ones.
MIN_MEAN_COSINE = 0.997
SURE = 0.9  # from this confidence on all servers must answer alike


def cosine_with_ours(served: Served, ordinary: Backbone, pictures: Path) -> dict[str, float]:
    """The ordinary engine's CLS vectors against ours on the same pixels. Raises AssertionError where they are
    not the same."""
    store = ModelStore(served.store)
    ours = load_backbone(store, num_threads=served.threads)
    pixels_NCHW = decoded(store.backbone(ours.fingerprint), pictures)
    cosine_N = torch.cosine_similarity(embed_all(ordinary, pixels_NCHW), embed_all(ours, pixels_NCHW))
    found = {"mean_cosine": float(cosine_N.mean()), "min_cosine": float(cosine_N.min())}
    assert found["mean_cosine"] > MIN_MEAN_COSINE, f"the ordinary engine computes something else: {found}"
    return found


def share_of_same_answers(
    server: str, given: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]
) -> float:
    """The share of pictures to which a server gives the task and label that this service `expected`. Raises
    AssertionError where they differ though this service was sure, and where it was sure of no picture."""
    pairs = list(zip(given, expected, strict=True))
    assert any(ours["confidence"] >= SURE for _, ours in pairs), "no picture is clear enough to compare"
    same = [all(own[key] == ours[key] for key in ("task", "label")) for own, ours in pairs]
    for (own, ours), is_same in zip(pairs, same, strict=True):
        assert is_same or ours["confidence"] < SURE, f"{server} answers {own} where this service says {ours}"
    return sum(same) / len(same)


def decoded(artefact: BackboneArtefact, pictures: Path) -> Tensor:
    """[N, 3, H, W] uint8 pixels of a folder's pictures, decoded as this service does it."""
    preprocessing, limits = artefact.manifest.preprocessing, ImageLimits()
    files = sorted(pictures.iterdir())
    return torch.stack([load_pixels(one.read_bytes(), preprocessing, limits) for one in files])
