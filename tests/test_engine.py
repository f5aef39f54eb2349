"""The engine: batching, bounds, deadlines, cancellation and isolation, over a backbone that waits."""

import asyncio
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gated import GatedBackbone
from PIL import Image
from torch import Tensor

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.errors import InvalidImage, UnknownTask
from model_store.module_file import read_module
from model_store.preprocess import to_pixels
from service.cls_cache import ClsCache
from service.engine import Engine
from service.errors import DeadlineExceeded, EngineStopped, Overloaded, ShuttingDown
from service.inference import Inference
from service.metrics import Metrics
from service.questions import Question
from service.settings import Settings


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bank(tiny_backbone: Backbone, make_module: Callable[..., bytes]) -> ModuleBank:
    return ModuleBank.build(
        [read_module(make_module(task, seed=seed)).module for task, seed in (("birds", 1), ("cars", 2))],
        revision=3,
        backbone_fingerprint=tiny_backbone.fingerprint,
        feature_dim=tiny_backbone.feature_dim,
    )


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> Iterator[GatedBackbone]:
    gated = GatedBackbone(tiny_backbone)
    yield gated
    gated.gate.set()


def settings(**changes: object) -> Settings:
    return Settings(max_batch_size=4, **changes)


async def entered(backbone: GatedBackbone) -> None:
    """Wait until one more pass has begun."""
    await asyncio.to_thread(backbone.entered.acquire)


def start(engine: Engine) -> None:
    """Forget the warm-up's passes."""
    while engine.backbone.entered.acquire(blocking=False):
        pass
    engine.backbone.batch_sizes.clear()


def hold_decoding(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """From now on decoding tells by the first event that it has begun, and waits for the second."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(*given: Any) -> Tensor:
        inside.set()
        assert go_on.wait(60.0)
        return to_pixels(*given)

    monkeypatch.setattr("model_store.preprocess.to_pixels", slow)
    return inside, go_on


@pytest.mark.parametrize(("runtime", "num_threads"), [("torch-float32", 2), ("onnxruntime-float32", 1)])
def test_torch_has_threads_only_where_it_runs_the_passes(
    tiny_backbone: Backbone, runtime: str, num_threads: int
) -> None:
    before = torch.get_num_threads()
    backbone = GatedBackbone(tiny_backbone)
    backbone.runtime_name = runtime
    try:
        with Engine(backbone, settings(torch_threads=2)):
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


async def test_waiting_pictures_share_one_pass(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await entered(backbone)
        others = [asyncio.create_task(engine.answer([picture(i)], Question(bank))) for i in range(1, 6)]
        while engine.num_queued < 5:
            await asyncio.sleep(0)
        backbone.gate.set()
        await asyncio.gather(first, *others)
    assert backbone.batch_sizes == [1, 4, 1]


async def test_answer_does_not_depend_on_batch_mates(backbone: GatedBackbone, bank: ModuleBank) -> None:
    pictures = [picture(20 * i) for i in range(10)]
    with Engine(backbone, settings()) as engine:
        together = await engine.answer(pictures, Question(bank))
        alone = [(await engine.answer([one], Question(bank)))[0] for one in pictures]
    for one, other in zip(alone, together, strict=True):
        assert (one.answer.task, one.answer.label) == (other.answer.task, other.answer.label)
        assert one.answer.confidence == pytest.approx(other.answer.confidence, abs=1e-5)


async def test_one_poisoned_picture_fails_alone(tiny_backbone: Backbone, bank: ModuleBank) -> None:
    backbone = GatedBackbone(tiny_backbone, poison=77)
    with Engine(backbone, settings()) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(1)], Question(bank)))
        await entered(backbone)
        values = (2, 77, 3)
        tasks = [asyncio.create_task(engine.answer([picture(value)], Question(bank))) for value in values]
        while engine.num_queued < 3:
            await asyncio.sleep(0)
        backbone.gate.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert isinstance(results[2], RuntimeError)
        assert [isinstance(one, list) for one in results] == [True, True, False, True]
        assert await engine.answer([picture(9)], Question(bank))


async def test_full_queue_refuses_with_a_time_to_retry(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings(max_queued_images=2)) as engine:
        start(engine)
        backbone.gate.clear()
        tasks = [asyncio.create_task(engine.answer([picture(i)], Question(bank))) for i in range(2)]
        await entered(backbone)
        with pytest.raises(Overloaded) as refusal:
            await engine.answer([picture(3)], Question(bank))
        assert refusal.value.retry_after_s > 0.0
        backbone.gate.set()
        await asyncio.gather(*tasks)
        assert engine.num_admitted == 0
        assert await engine.answer([picture(3)], Question(bank))


async def test_the_bound_of_the_queue_counts_pictures(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings(max_queued_images=2)) as engine:
        with pytest.raises(Overloaded):
            await engine.answer([picture(i) for i in range(3)], Question(bank))
        assert engine.num_admitted == 0
        assert len(await engine.answer([picture(i) for i in range(2)], Question(bank))) == 2


async def test_deadline_frees_the_place_in_the_queue(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings(request_timeout_s=0.05)) as engine:
        backbone.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await engine.answer([picture(1)], Question(bank))
        assert engine.num_admitted == 0
        backbone.gate.set()


async def test_cancelled_request_costs_no_pass(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await entered(backbone)
        gone = asyncio.create_task(engine.answer([picture(1)], Question(bank)))
        while engine.num_queued < 1:
            await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        backbone.gate.set()
        await first
        await engine.answer([picture(2)], Question(bank))
    assert backbone.batch_sizes == [1, 1]


async def test_pixels_of_a_cancelled_request_are_freed_before_their_turn(
    backbone: GatedBackbone, bank: ModuleBank
) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await entered(backbone)
        gone = asyncio.create_task(engine.answer([picture(1)], Question(bank)))
        while engine.num_queued < 1:
            await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        (waiting,) = engine._inference._queue.clear()
        backbone.gate.set()
        await first
        assert waiting.pixels.numel() == 0


async def test_a_picture_given_up_amid_its_decoding_never_waits_for_the_device(
    backbone: GatedBackbone, bank: ModuleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(backbone, settings(decode_threads=1)) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await entered(backbone)
        inside, go_on = hold_decoding(monkeypatch)
        gone = asyncio.create_task(engine.answer([picture(1)], Question(bank)))
        await asyncio.to_thread(inside.wait, 60.0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        go_on.set()
        await asyncio.wrap_future(
            engine._decoders._threads.submit(lambda: None)
        )  # its only thread is through
        assert engine.num_queued == 0
        backbone.gate.set()
        await first


async def test_a_picture_whose_client_left_before_its_decoding_is_freed(
    backbone: GatedBackbone, bank: ModuleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come and go while the decoding threads are busy."""
    data = picture(1)
    with Engine(backbone, settings(decode_threads=1)) as engine:
        inside, go_on = hold_decoding(monkeypatch)
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await asyncio.to_thread(inside.wait, 60.0)
        before = sys.getrefcount(data)
        gone = asyncio.create_task(engine.answer([data], Question(bank)))
        await asyncio.sleep(0.01)
        assert sys.getrefcount(data) > before
        gone.cancel()
        await asyncio.wait([gone])
        del gone
        assert sys.getrefcount(data) == before
        go_on.set()
        await first


@pytest.mark.skipif(sys.platform != "linux", reason="threads have policies of their own on Linux alone")
@pytest.mark.parametrize("is_sandboxed", [False, True])
async def test_decoding_threads_wait_for_their_turn_where_they_may(
    backbone: GatedBackbone, bank: ModuleBank, monkeypatch: pytest.MonkeyPatch, *, is_sandboxed: bool
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    if is_sandboxed:
        monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    before = os.sched_getscheduler(0)
    with Engine(backbone, settings(decode_threads=1)) as engine:
        assert len(await engine.answer([picture(1)], Question(bank))) == 1
        policy = engine._decoders._threads.submit(os.sched_getscheduler, 0).result()
    assert policy == (before if is_sandboxed else os.SCHED_BATCH)
    assert os.sched_getscheduler(0) == before


async def test_bad_picture_names_its_place(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine:
        with pytest.raises(InvalidImage, match="picture 1"):
            await engine.answer([picture(1), b"junk"], Question(bank))
        assert engine.num_admitted == 0


async def test_unknown_task_is_refused_before_decoding(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine, pytest.raises(UnknownTask):
        await engine.answer([b"junk"], Question(bank, task="nobody"))


async def test_requests_with_different_banks_share_a_pass_but_not_an_answer(
    backbone: GatedBackbone, bank: ModuleBank
) -> None:
    smaller = ModuleBank.build(
        bank.modules[:1], revision=4, backbone_fingerprint="f" * 64, feature_dim=bank.feature_dim
    )
    with Engine(backbone, settings()) as engine:
        start(engine)
        backbone.gate.clear()
        first = asyncio.create_task(engine.answer([picture(0)], Question(bank)))
        await entered(backbone)
        tasks = [
            asyncio.create_task(engine.answer([picture(9 + i)], Question(one)))
            for i, one in enumerate((bank, smaller))
        ]
        while engine.num_queued < 2:
            await asyncio.sleep(0)
        backbone.gate.set()
        await first
        answers = [(await one)[0].answer for one in tasks]
    assert backbone.batch_sizes == [1, 2]
    assert [one.receipt.revision for one in answers] == [3, 4]


async def test_stopping_answers_what_was_admitted(backbone: GatedBackbone, bank: ModuleBank) -> None:
    engine = Engine(backbone, settings())
    with engine:
        tasks = [asyncio.create_task(engine.answer([picture(i)], Question(bank))) for i in range(9)]
        while engine.num_admitted < 9:
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks)
    assert len(answers) == 9
    assert not engine.is_alive
    with pytest.raises(ShuttingDown):
        await engine.answer([picture(1)], Question(bank))


def test_a_pass_that_hangs_fails_the_liveness_check(backbone: GatedBackbone, bank: ModuleBank) -> None:
    async def ask(engine: Engine) -> None:
        task = asyncio.create_task(engine.answer([picture(1)], Question(bank)))
        await entered(backbone)
        assert not engine.is_alive
        backbone.gate.set()
        await task

    with Engine(backbone, settings(stall_after_s=1e-9)) as engine:
        start(engine)
        backbone.gate.clear()
        asyncio.run(ask(engine))
        torch.manual_seed(0)


# -- streams -----------------------------------------------------------------------------------------


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


# -- the CLS cache -----------------------------------------------------------------------------------


async def test_a_picture_seen_before_costs_no_pass(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        first = (await engine.answer([picture(5)], Question(bank)))[0]
        again = (await engine.answer([picture(5)], Question(bank)))[0]
        assert backbone.batch_sizes == [1]
        assert first.answer == again.answer and torch.equal(first.cls_D, again.cls_D)
        assert (first.timings.batch_size, again.timings.batch_size) == (1, 0)
        assert (engine.cache.statistics.num_hits, engine.cache.statistics.num_misses) == (1, 1)


async def test_cached_vectors_survive_a_registration(backbone: GatedBackbone, bank: ModuleBank) -> None:
    smaller = ModuleBank.build(
        bank.modules[:1],
        revision=4,
        backbone_fingerprint=bank.backbone_fingerprint,
        feature_dim=bank.feature_dim,
    )
    with Engine(backbone, settings()) as engine:
        start(engine)
        await engine.answer([picture(5)], Question(bank))
        answer = (await engine.answer([picture(5)], Question(smaller)))[0].answer
    assert backbone.batch_sizes == [1]
    assert (answer.receipt.revision, answer.task) == (4, smaller.modules[0].task)


async def test_known_and_new_pictures_keep_their_order(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings()) as engine:
        alone = [(await engine.answer([picture(40 * i)], Question(bank)))[0].cls_D for i in range(6)]
    with Engine(backbone, settings()) as engine:
        start(engine)
        await engine.answer([picture(40), picture(120)], Question(bank))
        together = await engine.answer([picture(40 * i) for i in range(6)], Question(bank))
    assert sum(backbone.batch_sizes) == 6
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other.cls_D, rtol=0, atol=1e-4)


async def test_the_same_picture_waiting_twice_shares_a_place_in_the_pass(
    backbone: GatedBackbone, bank: ModuleBank
) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        answers = await engine.answer([picture(7)] * 3, Question(bank))
    assert sum(backbone.batch_sizes) == 1
    assert answers[0].answer == answers[1].answer == answers[2].answer


async def test_a_known_picture_does_not_wait_for_the_device(
    backbone: GatedBackbone, bank: ModuleBank
) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        await engine.answer([picture(5)], Question(bank))
        await entered(backbone)
        backbone.gate.clear()
        busy = asyncio.create_task(engine.answer([picture(6)], Question(bank)))
        await entered(backbone)
        assert await engine.answer([picture(5)], Question(bank))
        assert not busy.done()
        backbone.gate.set()
        await busy


async def test_without_memory_every_picture_costs_a_pass(backbone: GatedBackbone, bank: ModuleBank) -> None:
    with Engine(backbone, settings(cls_cache_bytes=0)) as engine:
        start(engine)
        for _ in range(2):
            await engine.answer([picture(5)], Question(bank))
    assert backbone.batch_sizes == [1, 1]


async def test_vectors_in_place_of_pictures_get_the_same_answer(
    backbone: GatedBackbone, bank: ModuleBank
) -> None:
    with Engine(backbone, settings()) as engine:
        start(engine)
        seen = await engine.answer([picture(5), picture(90)], Question(bank))
        backbone.batch_sizes.clear()
        again = await engine.answer(torch.stack([one.cls_D for one in seen]), Question(bank))
    assert backbone.batch_sizes == []
    assert [one.answer.label for one in again] == [one.answer.label for one in seen]
    for one, other in zip(seen, again, strict=True):
        assert one.answer.confidence == pytest.approx(other.answer.confidence, abs=1e-6)


@pytest.mark.parametrize(
    ("buckets", "warmed"), [((), [1, 2, 4]), ((1, 3, 64), [1, 3, 4]), ((4, 8), [4])], ids=str
)
def test_every_batch_bucket_is_warmed(
    buckets: tuple[int, ...], warmed: list[int], backbone: GatedBackbone
) -> None:
    backbone.batch_buckets = buckets
    with Engine(backbone, settings()):
        assert backbone.batch_sizes == warmed


async def test_a_known_picture_is_answered_as_it_was_asked(backbone: GatedBackbone, bank: ModuleBank) -> None:
    """Every part of a question counts on the short way, too."""
    with Engine(backbone, settings()) as engine:
        await engine.answer([picture(5)], Question(bank))
        for question in (
            Question(bank, task="cars", top_k=2),
            Question(bank, selection="entropy", top_k=3),
            Question(bank, coverage=0.9, abstain_level=0.5),
        ):
            known = (await engine.answer([picture(5)], question))[0]
            assert known.timings.batch_size == 0
            with Engine(backbone, settings(cls_cache_bytes=0)) as fresh:
                assert known.answer == (await fresh.answer([picture(5)], question))[0].answer
