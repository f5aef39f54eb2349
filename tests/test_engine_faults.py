"""Faults inside the process: a device out of memory, a thread that dies, answers that are no numbers."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pictures import encoded, noise
from serving import serving_process
from torch import Tensor

from model_store.answers import Answer
from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.module_file import read_module
from model_store.store import ModelStore
from service.engine import Engine
from service.errors import DeviceOutOfMemory, EngineStopped, NotFinite
from service.questions import Question
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour=i % 5, seed=i, size=(32, 32))) for i in range(8)]


class FaultyBackbone:
    """A backbone whose passes raise what `fault` returns for them, once `fault` is set."""

    def __init__(self, inner: Backbone) -> None:
        self.inner = inner
        self.fault: Callable[[Tensor], BaseException | None] = lambda _: None
        self.batch_sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        self.batch_sizes.append(len(pixels_BCHW))
        if (fault := self.fault(pixels_BCHW)) is not None:
            raise fault
        return self.inner.embed(pixels_BCHW)


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> FaultyBackbone:
    return FaultyBackbone(tiny_backbone)


@pytest.fixture(scope="module")
def bank(tiny_backbone: Backbone, make_module: MakeModule) -> ModuleBank:
    return ModuleBank.build(
        [read_module(make_module(task, seed=seed)).module for task, seed in (("birds", 1), ("cars", 2))],
        revision=3,
        backbone_fingerprint=tiny_backbone.fingerprint,
        feature_dim=tiny_backbone.feature_dim,
    )


def engine_of(backbone: FaultyBackbone) -> Engine:
    # A device that waits a second for its batch takes all pictures of one request into one pass.
    return Engine(backbone, Settings(max_batch_size=8, max_wait_s=1.0, cls_cache_bytes=0))


# -- out of memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fits", "sizes"), [(4, [8, 4, 4]), (3, [8, 4, 2, 2, 4, 2, 2]), (7, [8, 4, 4])])
async def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    fits: int, sizes: list[int], backbone: FaultyBackbone, bank: ModuleBank
) -> None:
    with engine_of(backbone) as engine:
        expected = [one.answer for one in await engine.answer(PICTURES, Question(bank))]
        backbone.batch_sizes.clear()
        backbone.fault = lambda pixels: torch.OutOfMemoryError("full") if len(pixels) > fits else None
        answers = [one.answer for one in await engine.answer(PICTURES, Question(bank))]
    assert backbone.batch_sizes == sizes
    for one, other in zip(answers, expected, strict=True):
        assert (one.task, one.label) == (other.task, other.label)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


async def test_one_picture_that_does_not_fit_is_refused_for_later_and_alone(
    backbone: FaultyBackbone, bank: ModuleBank
) -> None:
    with engine_of(backbone) as engine:
        backbone.fault = lambda pixels: torch.OutOfMemoryError("full")
        with pytest.raises(DeviceOutOfMemory, match="out of memory") as refusal:
            await engine.answer(PICTURES[:1], Question(bank))
        assert refusal.value.retry_after_s >= 0.0
        backbone.fault = lambda _: None
        assert await engine.answer(PICTURES, Question(bank))
        assert engine.num_admitted == 0


# -- a thread that dies ----------------------------------------------------------------------------------


class ThreadDeath(BaseException):
    """What no handler of ordinary faults catches."""


async def test_when_the_thread_dies_nobody_waits_for_it(
    backbone: FaultyBackbone, bank: ModuleBank, caplog: pytest.LogCaptureFixture
) -> None:
    with engine_of(backbone) as engine:
        assert engine.is_alive
        backbone.fault = lambda _: ThreadDeath()
        waiting = [asyncio.create_task(engine.answer([one], Question(bank))) for one in PICTURES * 4]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(one) for one in results} == {EngineStopped}
        assert not engine.is_alive
        assert engine.num_admitted == 0
        with pytest.raises(EngineStopped):
            await engine.answer(PICTURES[:1], Question(bank))
    assert "an inference thread has died" in caplog.text


@pytest.mark.slow
def test_a_process_that_can_answer_no_more_says_so_and_ends(tiny_store: ModelStore, tmp_path: Path) -> None:
    script = [sys.executable, str(Path(__file__).with_name("dying_server.py"))]
    with serving_process(script, tiny_store.url, tmp_path / "log") as server:
        with httpx.Client(base_url=server.url, timeout=20.0) as client:
            assert client.get("/health/live").status_code == 200
            refused = client.post("/predict", content=PICTURES[0])
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:tosca:problem:engine-stopped"
            assert client.get("/health/live").status_code == 503
        assert server.process.wait(20.0) == 70
    assert "ending with status 70" in (tmp_path / "log").read_text()


# -- no numbers ------------------------------------------------------------------------------------------


class NanBank:
    """A bank whose answers to some rows of a batch are no numbers."""

    def __init__(self, inner: ModuleBank, field: str, bad: Callable[[int], bool]) -> None:
        self.inner = inner
        self.field = field
        self.bad = bad

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def answer(self, cls_BD: Tensor, **how: Any) -> list[Answer]:
        answers: Sequence[Answer] = self.inner.answer(cls_BD, **how)
        return [
            replace(one, **{self.field: float("nan")}) if self.bad(b) else one
            for b, one in enumerate(answers)
        ]


@pytest.mark.parametrize("field", ["confidence", "task_probability"])
async def test_an_answer_that_is_no_number_is_an_error_and_hurts_nobody_else(
    field: str, backbone: FaultyBackbone, bank: ModuleBank
) -> None:
    with engine_of(backbone) as engine:
        question = Question(NanBank(bank, field, lambda b: b == 1))
        waiting = [asyncio.create_task(engine.answer([one], question)) for one in PICTURES]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        faults = [one for one in results if isinstance(one, NotFinite)]
        assert len(faults) == 1
        assert "gives no number" in str(faults[0])
        assert sum(isinstance(one, list) for one in results) == 7
