"""The CLS cache: bounded by bytes, the least used goes first, no foreign key fits, known pictures cost no pass."""

import asyncio

import pytest
import torch
from gated import GatedBackbone
from gated_engine import backbone, bank, entered, picture, settings, start

from model_store.bank import ModuleBank
from service.cls_cache import ENTRY_OVERHEAD_BYTES, ClsCache
from service.engine import Engine
from service.questions import Question

__all__ = ["backbone", "bank"]  # fixtures
D = 8
ENTRY_BYTES = 4 * D + ENTRY_OVERHEAD_BYTES


def cache(num_entries: int = 3, fingerprint: str = "a" * 64, variant: str = "torch-float32") -> ClsCache:
    return ClsCache(num_entries * ENTRY_BYTES, fingerprint, variant)


def vector(value: float) -> torch.Tensor:
    return torch.full((D,), value, dtype=torch.float32)


# -- by itself ---------------------------------------------------------------------------------------


def test_it_gives_back_what_was_put() -> None:
    opened = cache()
    opened.put(opened.key(b"picture"), vector(1.0))
    found = opened.get(opened.key(b"picture"))
    assert found is not None and torch.equal(found, vector(1.0))
    assert opened.get(opened.key(b"another")) is None
    assert (opened.statistics.num_hits, opened.statistics.num_misses) == (1, 1)


def test_the_least_used_goes_first_and_the_bound_holds() -> None:
    opened = cache(3)
    for i in range(3):
        opened.put(bytes([i]), vector(i))
    opened.get(bytes([0]))
    opened.put(bytes([3]), vector(3))
    assert [opened.peek(bytes([i])) is not None for i in range(4)] == [True, False, True, True]
    for i in range(100):
        opened.put(bytes([i]), vector(i))
        assert opened.statistics.size_bytes <= 3 * ENTRY_BYTES
    assert opened.statistics.num_entries == 3


def test_the_same_picture_twice_is_kept_once() -> None:
    opened = cache()
    for _ in range(5):
        opened.put(b"key", vector(1.0))
    assert (opened.statistics.num_entries, opened.statistics.size_bytes) == (1, ENTRY_BYTES)


def test_nothing_is_kept_in_no_bytes() -> None:
    opened = cache(0)
    opened.put(b"key", vector(1.0))
    assert opened.get(b"key") is None
    assert opened.statistics.size_bytes == 0


def test_keys_differ_by_picture_backbone_and_runtime() -> None:
    keys = {
        cache().key(b"picture"),
        cache().key(b"picturf"),
        cache(fingerprint="b" * 64).key(b"picture"),
        cache(variant="openvino-int8-0123456789ab").key(b"picture"),
    }
    assert len(keys) == 4 and all(len(key) == 32 for key in keys)


def test_a_kept_vector_does_not_hold_its_batch_in_memory() -> None:
    opened, batch_BD = cache(), torch.zeros(64, D)
    opened.put(b"key", batch_BD[3])
    found = opened.get(b"key")
    assert found is not None and found.untyped_storage().nbytes() == 4 * D
    batch_BD += 1.0
    assert torch.equal(found, vector(0.0))


# -- in an engine ------------------------------------------------------------------------------------


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
