"""Shared fixtures: a tiny random backbone for speed, the demo store for real pictures and weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pictures import write_splits
from synthetic import DEMO_STORE, make_features

from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_sources import from_timm
from model_store.measuring import Plan, Tuned, tune
from model_store.parity import LabelledPixels, read_labelled
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from training.trainer import train_task

TINY_SIZE = 32


@pytest.fixture(scope="session", autouse=True)
def _limit_threads() -> None:
    torch.set_num_threads(1)  # on tensors this small, threads cost more than they save


@pytest.fixture(scope="session")
def tiny_artefact() -> BackboneArtefact:
    """An untrained ViT-Tiny for 32-pixel pictures: the real code path in milliseconds."""
    return from_timm("vit_tiny_patch16_224", pretrained=False, image_size=TINY_SIZE)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_artefact: BackboneArtefact) -> Backbone:
    return Backbone.load(tiny_artefact, device="cpu")


@pytest.fixture(scope="session")
def labelled_pixels(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> LabelledPixels:
    """Twelve pictures of the task "birds" in three classes."""
    folder = write_splits(tmp_path_factory.mktemp("birds"), train=4)
    return read_labelled({"birds": folder}, tiny_backbone.preprocessing, 12)


@pytest.fixture(scope="session")
def tiny_tuned(tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels) -> Tuned:
    """The tiny backbone with ONNX Runtime measured alone, and so chosen; the export takes seconds."""
    return tune(tiny_artefact, labelled_pixels, Plan(("onnxruntime-float32",), "cpu", (1, 2), num_rounds=1))


@pytest.fixture
def tiny_store(tmp_path: Path, tiny_artefact: BackboneArtefact) -> ModelStore:
    """A fresh store whose backbone is the tiny one, at revision 1 without tasks."""
    store = ModelStore(tmp_path / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    return store


@pytest.fixture(scope="session")
def demo_store() -> ModelStore:
    """The store that `make demo` filled: CLIP ViT-B/16 and two tasks trained on real pictures."""
    store = ModelStore(DEMO_STORE)
    assert store.head() is not None, "run `make demo` first"
    return store


@pytest.fixture(scope="session")
def clip_backbone(demo_store: ModelStore) -> Backbone:
    return Backbone.load(demo_store.backbone(demo_store.require_head().backbone_fingerprint), device="cpu")


@pytest.fixture(scope="session")
def make_module(tiny_artefact: BackboneArtefact) -> Callable[..., bytes]:
    """`make_module("birds", seed=1)`: the bytes of a small trained module file for the tiny backbone."""
    made: dict[tuple[object, ...], bytes] = {}

    def make(
        task: str = "shapes", *, seed: int = 0, num_classes: int = 3, per_class: int = 8, **options: Any
    ) -> bytes:
        key = (task, seed, num_classes, per_class, *sorted(options.items()))
        if key not in made:
            features = make_features(task, seed=seed, num_classes=num_classes, per_class=per_class)
            made[key] = train_task(task, features, tiny_artefact.manifest, seed=seed, **options).data
        return made[key]

    return make


@pytest.fixture
def client(
    settings: Settings, tiny_backbone: Backbone, make_module: Callable[..., bytes]
) -> Iterator[TestClient]:
    """A service with the tasks "birds" and "cars", as a file's own `settings` want it."""
    with TestClient(create_app(settings, tiny_backbone), raise_server_exceptions=False) as client:
        for task, seed in (("birds", 1), ("cars", 2)):
            assert client.post("/tasks", content=make_module(task, seed=seed)).status_code == 201
        yield client
