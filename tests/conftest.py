"""Shared fixtures: a tiny random backbone for speed, the demo store for real pictures and weights, and `tosca` in
this process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pictures import encoded, noise, write_splits
from synthetic import DEMO_STORE, make_features
from tosca_command import TINY, Result, Tosca, call_tosca

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


@pytest.fixture
def tosca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tosca:
    """Run `tosca ARGS` in this process, in an empty folder; faults other than its own come through."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TOSCA_DEVICE", "cpu")
    for name in ("TOSCA_STORE", "TOSCA_SERVER", "TOSCA_CACHE", "TOSCA_RUNTIME"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = call_tosca(*arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `tosca` has put a backbone, trained `colours` and `shades`; copied for every test."""
    root = tmp_path_factory.mktemp("trained")
    write_splits(root / "colours", train=6, test=3)
    for i, label in enumerate(("dark", "light")):
        for split, seeds in (("train", range(6)), ("test", range(6, 9))):
            (root / "shades" / split / label).mkdir(parents=True)
            for j in seeds:
                grey = noise(0, 50 * i + j).convert("L").point(lambda v, i=i: v // 4 + 190 * i).convert("RGB")
                (root / "shades" / split / label / f"{j}.png").write_bytes(encoded(grey))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("TOSCA_DEVICE", "cpu")
        for arguments in (
            ["backbone", "add", TINY, "--random-weights", "--image-size", "32"],
            ["train", "--task", "colours", "--data", "colours"],
            ["train", "--task", "shades", "--data", "shades"],
        ):
            assert call_tosca(*arguments) == 0, arguments
    return root


@pytest.fixture
def trained(tosca: Tosca, trained_store: Path, tmp_path: Path) -> Tosca:
    """`tosca` in a folder of its own with a trained store: revision 3, tasks colours and shades."""
    shutil.copytree(trained_store, tmp_path, dirs_exist_ok=True)
    return tosca
