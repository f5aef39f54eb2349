"""What tests of epochs share: a dozen tasks, a store of them, and limits so low that few classes are many."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from random_modules import FEATURE_DIM, backbone_manifest, module_bytes, random_cls, random_module

import model_store.publishing
import model_store.revision_reader
from model_store.answers import Answer
from model_store.backbone import BackboneArtefact
from model_store.bank import ModuleBank
from model_store.publishing import Publisher
from model_store.revision_reader import ActiveSet
from model_store.store import ModelStore
from model_store.task_module import TaskModule

NUM_TASKS = 12
WEIGHTS = b"weights that nobody loads"


@pytest.fixture(autouse=True, params=["screened", "dense"])
def classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Epochs begin with very many classes; here with few, screened as many are or not as on a GPU."""
    monkeypatch.setattr(
        "model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM if request.param == "screened" else 10_000
    )
    monkeypatch.setattr(model_store.publishing, "EPOCH_CLASSES", 20)
    monkeypatch.setattr(model_store.revision_reader, "WORTH_LISTINGS", 3)
    monkeypatch.setattr("model_store.class_means.BLOCK_CLASSES", 6)
    monkeypatch.setattr("model_store.screen._BLOCKS_A_PART", 2)
    monkeypatch.setattr("model_store.epoch_file.LISTED_TASKS", 5)
    return str(request.param)


@pytest.fixture(autouse=True)
def _real_fingerprint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backbone artefact whose weights nobody checks."""
    monkeypatch.setattr(BackboneArtefact, "verify", lambda _: None)
    yield


def tasks(num: int = NUM_TASKS, seed: int = 0, **options: object) -> list[TaskModule]:
    return [random_module(f"task{t:02}", seed=100 * seed + t, **options) for t in range(num)]  # type: ignore[arg-type]


def answers(bank: ModuleBank, coverage: float | None = 0.8) -> list[Answer]:
    return bank.answer(2.0 * random_cls(30), top_k=3, coverage=coverage)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    store.publish_first(store.put_backbone(BackboneArtefact(backbone_manifest(), WEIGHTS)))
    files = {module.task: store.put_module(module_bytes(module)) for module in tasks()}
    store.publish(lambda _: files, "a dozen tasks")
    return store


def begun(store: ModelStore) -> Publisher:
    publisher = Publisher(store)
    assert publisher.epoch_is_due
    publisher.begin_epoch()
    return publisher


def register(publisher: Publisher, task: str, seed: int) -> ActiveSet:
    return publisher.register(module_bytes(random_module(task, seed=seed)), force=True).active
