"""A server of very many tasks: modules are read beside the device, and epochs begin by themselves."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient
from pictures import encoded, noise

import model_store.publishing
from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.deferred import ListedFile, ModuleCache, NotInMemory, from_memory_alone
from model_store.errors import StoreUnavailable
from model_store.module_file import ModuleFile, read_module
from model_store.store import ModelStore
from model_store.task_module import TaskModule
from service.app import create_app
from service.engine import Engine
from service.questions import Question
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour=i % 5, seed=i, size=(32, 32))) for i in range(4)]


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0)


@pytest.fixture(scope="module")
def files(make_module: MakeModule) -> list[ModuleFile]:
    return [read_module(make_module(task, seed=seed)) for task, seed in (("birds", 1), ("cars", 2))]


def bank_of(files: list[ModuleFile], load: Callable[[str], TaskModule] | None = None) -> ModuleBank:
    """Of whole modules, or of modules that `load` reads."""
    modules = [file.module for file in files]
    whole = ModuleBank.build(
        modules,
        revision=3,
        backbone_fingerprint=files[0].manifest.backbone_fingerprint,
        feature_dim=files[0].manifest.feature_dim,
    )
    if load is None:
        return whole
    cache = ModuleCache(load)
    listed = [
        ListedFile.of(
            file.manifest,
            sha256=file.sha256,
            mean_KD=file.module.mean_KD,
            num_known=file.module.num_known,
            size_bytes=file.size_bytes,
            cache=cache,
        )
        for file in files
    ]
    return ModuleBank.build(
        (file.module for file in listed),
        revision=3,
        backbone_fingerprint=whole.backbone_fingerprint,
        feature_dim=whole.feature_dim,
        epoch=whole.begin_epoch(),
    )


async def test_a_module_that_is_being_read_holds_up_its_own_pictures_alone(
    tiny_backbone: Backbone, files: list[ModuleFile]
) -> None:
    birds, cars = files
    gate, is_reading = threading.Event(), threading.Event()

    def load(sha256: str) -> TaskModule:
        if sha256 == cars.sha256:
            return cars.module
        is_reading.set()
        assert gate.wait(60.0)
        return birds.module

    slow, whole = bank_of(files, load), bank_of(files)
    with Engine(tiny_backbone, Settings(cls_cache_bytes=0)) as engine:
        waiting = asyncio.create_task(engine.answer(PICTURES[:1], Question(slow, task="birds")))
        assert await asyncio.to_thread(is_reading.wait, 60.0)
        for _ in range(3):
            [answer] = await engine.answer(PICTURES[:1], Question(slow, task="cars"))
        [expected] = await engine.answer(PICTURES[:1], Question(whole, task="cars"))
        assert replace(answer.answer, confidence=0.0) == replace(expected.answer, confidence=0.0)
        assert not waiting.done()
        gate.set()
        [answer] = await waiting
        [expected] = await engine.answer(PICTURES[:1], Question(whole, task="birds"))
        assert answer.answer.label == expected.answer.label
        assert answer.answer.confidence == pytest.approx(expected.answer.confidence, abs=1e-6)


async def test_known_pictures_whose_module_is_being_read_leave_decoding_to_others(
    tiny_backbone: Backbone, files: list[ModuleFile]
) -> None:
    """More of them than there are threads for decoding; vectors in place of pictures, too."""
    birds, cars = files
    gate = threading.Event()

    def load(sha256: str) -> TaskModule:
        if sha256 == birds.sha256:
            assert gate.wait(60.0)
        return birds.module if sha256 == birds.sha256 else cars.module

    slow, whole = bank_of(files, load), bank_of(files)
    with Engine(tiny_backbone, Settings(decode_threads=1)) as engine:
        known = await engine.answer(PICTURES, Question(slow, task="cars"))
        waiting = [
            asyncio.create_task(engine.answer([one], Question(slow, task="birds"))) for one in PICTURES
        ]
        vectors = torch.stack([one.cls_D for one in known])
        waiting.append(asyncio.create_task(engine.answer(vectors, Question(slow, task="birds"))))
        async with asyncio.timeout(30.0):
            assert await engine.answer([encoded(noise(4, seed=4))], Question(slow, task="cars"))
            assert await engine.answer(vectors, Question(slow, task="cars"))
        assert not any(one.done() for one in waiting)
        gate.set()
        given = [answer.answer for one in waiting for answer in await one]
        expected = [one.answer for one in await engine.answer(PICTURES, Question(whole, task="birds"))]
        assert [one.label for one in given] == 2 * [one.label for one in expected]


async def test_a_module_that_cannot_be_read_is_told_to_those_who_wait_for_it(
    tiny_backbone: Backbone, files: list[ModuleFile]
) -> None:
    cars = files[1]

    def load(sha256: str) -> TaskModule:
        if sha256 == cars.sha256:
            return cars.module
        raise StoreUnavailable("the store does not answer")

    bank = bank_of(files, load)
    with Engine(tiny_backbone, Settings()) as engine:
        with pytest.raises(StoreUnavailable):
            await engine.answer(PICTURES, Question(bank, task="birds"))
        assert len(await engine.answer(PICTURES, Question(bank, task="cars"))) == len(PICTURES)
        assert engine.is_alive and engine.num_admitted == 0


@pytest.mark.parametrize("begins", [True, False])
def test_a_change_after_which_an_epoch_is_due_is_followed_by_one(
    begins: bool,
    settings: Settings,
    tiny_backbone: Backbone,
    make_module: MakeModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_store.publishing, "EPOCH_CLASSES", 6)
    app = create_app(settings.model_copy(update={"begin_epochs": begins}), tiny_backbone)
    with TestClient(app) as client:
        for task, seed in (("birds", 1), ("cars", 2)):
            changed = client.post("/tasks", content=make_module(task, seed=seed)).json()["revision"]
        deadline = time.monotonic() + 60.0
        while begins and client.get("/tasks").json()["revision"] == changed and time.monotonic() < deadline:
            time.sleep(0.01)
        served = client.get("/tasks").json()
        assert served["revision"] == changed + begins
        assert [one["task"] for one in served["tasks"]] == ["birds", "cars"]
        answer = client.post("/predict", content=PICTURES[0]).json()["predictions"][0]
        assert answer["receipt"]["revision"] == served["revision"]
        assert "tosca_deferred_modules" in client.get("/metrics").text
    assert (ModelStore(settings.store).require_head().epoch is not None) == begins


def test_first_answers_are_prepared_after_the_start_and_after_every_change(
    settings: Settings, tiny_backbone: Backbone, make_module: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.registry._PREPARED_TOGETHER", 1)
    app = create_app(settings, tiny_backbone)
    with TestClient(app) as client:
        for task, seed in (("birds", 1), ("cars", 2), ("dogs", 3)):
            assert client.post("/tasks", content=make_module(task, seed=seed)).status_code == 201
        bank = app.state.service.registry.active.bank
        deadline = time.monotonic() + 60.0
        while len(bank._known_vectors) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(bank._known_vectors) == 3
    with TestClient(create_app(settings, tiny_backbone)) as client:
        registry = client.app.state.service.registry  # type: ignore[attr-defined]
        while len(registry.active.bank._known_vectors) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(registry.active.bank._known_vectors) == 3


def test_preparing_reads_no_module(files: list[ModuleFile]) -> None:
    def load(sha256: str) -> TaskModule:
        raise AssertionError("nothing was asked yet")

    with from_memory_alone(), pytest.raises(NotInMemory):
        bank_of(files, load).prepare("birds")
