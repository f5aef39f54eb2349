"""The engine: batching, bounds, deadlines, cancellation and isolation, over a backbone that waits."""

import asyncio
import os
import sys
import threading
from typing import Any

import pytest
import torch
from gated import GatedBackbone
from gated_engine import backbone, bank, entered, picture, settings, start
from torch import Tensor

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.errors import InvalidImage, UnknownTask
from model_store.preprocess import to_pixels
from service.engine import Engine
from service.errors import DeadlineExceeded, Overloaded, ShuttingDown
from service.questions import Question

__all__ = ["backbone", "bank"]  # fixtures


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


@pytest.mark.parametrize(
    ("buckets", "warmed"), [((), [1, 2, 4]), ((1, 3, 64), [1, 3, 4]), ((4, 8), [4])], ids=str
)
def test_every_batch_bucket_is_warmed(
    buckets: tuple[int, ...], warmed: list[int], backbone: GatedBackbone
) -> None:
    backbone.batch_buckets = buckets
    with Engine(backbone, settings()):
        assert backbone.batch_sizes == warmed
