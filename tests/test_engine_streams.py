"""An engine on several streams of one device: passes side by side, warmed together, dead together."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from gated import GatedBackbone
from gated_engine import bank, entered, picture, settings, start
from torch import Tensor

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from service.cls_cache import ClsCache
from service.engine import Engine
from service.errors import EngineStopped
from service.inference import Inference
from service.metrics import Metrics
from service.questions import Question

__all__ = ["bank"]  # a fixture


class StreamedBackbone(GatedBackbone):
    """Three streams; notes on which of them each pass runs, None for the whole device."""

    num_streams = 3

    def __init__(self, inner: Backbone) -> None:
        super().__init__(inner)
        self.streams: list[int | None] = []

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        self.streams.append(None)
        return super().embed(pixels_BCHW)

    def embed_on(self, stream: int, pixels_BCHW: Tensor) -> Tensor:
        self.streams.append(stream)
        return super().embed(pixels_BCHW)


@pytest.fixture
def streamed(tiny_backbone: Backbone) -> Iterator[StreamedBackbone]:
    backbone = StreamedBackbone(tiny_backbone)
    yield backbone
    backbone.gate.set()


async def test_passes_run_side_by_side_on_all_streams(streamed: StreamedBackbone, bank: ModuleBank) -> None:
    pictures = [picture(20 * i) for i in range(3)]
    with Engine(streamed, settings(cls_cache_bytes=0)) as engine:
        start(engine)
        streamed.streams.clear()
        streamed.gate.clear()
        together = asyncio.create_task(engine.answer(pictures, Question(bank)))
        for _ in range(3):
            await entered(streamed)
        assert set(streamed.streams) == {0, 1, 2}
        streamed.gate.set()
        answers = await together
        alone = [(await engine.answer([one], Question(bank)))[0] for one in pictures]
    for one, other in zip(answers, alone, strict=True):
        assert one.answer.label == other.answer.label
        torch.testing.assert_close(one.cls_D, other.cls_D, rtol=0, atol=1e-4)


async def test_a_picture_that_comes_alone_has_the_whole_device(
    streamed: StreamedBackbone, bank: ModuleBank
) -> None:
    with Engine(streamed, settings()) as engine:
        streamed.streams.clear()
        await engine.answer([picture(1)], Question(bank))
    assert streamed.streams == [None]


async def test_answers_are_given_beside_the_next_pass(streamed: StreamedBackbone, bank: ModuleBank) -> None:
    go_on = threading.Event()

    class SlowBank:
        def __getattr__(self, name: str) -> object:
            return getattr(bank, name)

        def answer(self, *args: object, **kwargs: object) -> object:
            assert go_on.wait(60.0)
            return bank.answer(*args, **kwargs)

    with Engine(streamed, settings()) as engine:
        start(engine)
        streamed.streams.clear()
        slow = asyncio.create_task(engine.answer([picture(1)], Question(SlowBank())))
        await entered(streamed)
        assert await engine.answer([picture(2)], Question(bank))
        assert not slow.done()
        go_on.set()
        await slow


class MeetingRuntime:
    """A stream whose passes wait for one on each of the others; notes how many pictures each had, and when
    it ended."""

    device = torch.device("cpu")
    batch_buckets = ()

    def __init__(self, meeting: threading.Barrier, feature_dim: int) -> None:
        self.passes: list[tuple[int, float]] = []
        self._meeting = meeting
        self._feature_dim = feature_dim

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        self._meeting.wait(60.0)
        self.passes.append((len(pixels_BCHW), time.monotonic()))
        return torch.zeros(len(pixels_BCHW), self._feature_dim)


def test_streams_are_warmed_side_by_side_as_they_will_serve(tiny_backbone: Backbone) -> None:
    """So the first estimate of how long a picture takes is not that of one stream after another."""
    dim = tiny_backbone.feature_dim
    whole, meeting = MeetingRuntime(threading.Barrier(1), dim), threading.Barrier(3)
    streams = [MeetingRuntime(meeting, dim) for _ in range(3)]
    backbone = Backbone(tiny_backbone.manifest, whole, "openvino-float32", streams=streams)
    cache = ClsCache(0, backbone.fingerprint, backbone.variant)
    warming = Inference(backbone, cache, Metrics(), max_batch_size=4, max_wait_s=0.0, drain_s=lambda: 0.0)
    seconds_each = warming.warm_up()
    ended_at = time.monotonic()
    assert [size for size, _ in whole.passes] == [1]
    assert [[size for size, _ in one.passes] for one in streams] == [[1, 2, 4]] * 3
    largest_began_at = max(one.passes[1][1] for one in streams)  # at the earliest
    assert 0.0 < 3 * 4 * seconds_each <= ended_at - largest_began_at


async def test_one_dead_stream_ends_all(
    streamed: StreamedBackbone, bank: ModuleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ThreadDeath(BaseException):
        pass

    def die(*_: object) -> Tensor:
        raise ThreadDeath

    with Engine(streamed, settings(cls_cache_bytes=0)) as engine:
        start(engine)
        monkeypatch.setattr(streamed, "embed_on", die)
        results = await asyncio.gather(
            *(engine.answer([picture(i)] * 2, Question(bank)) for i in range(9)), return_exceptions=True
        )
        assert {type(one) for one in results} == {EngineStopped}
        assert not engine.is_alive
        assert engine.num_admitted == 0
