"""The module bank: answers independent of company, and a set that can be taken apart."""
# B batch, D features, K classes

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_banks import near, random_modules
from random_modules import FEATURE_DIM, build_bank, random_cls, random_module

from model_store.bank import ModuleBank
from model_store.errors import InvalidRequest

# -- answers and their company -----------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_batched_equals_single(selection: str) -> None:
    bank = build_bank(random_modules(5))
    x_BD = near(bank, 33)
    batched = bank.answer(x_BD, selection=selection)  # type: ignore[arg-type]
    for x_D, together in zip(x_BD, batched, strict=True):
        [alone] = bank.answer(x_D[None], selection=selection)  # type: ignore[arg-type]
        assert (alone.task, alone.label, alone.receipt) == (together.task, together.label, together.receipt)
        assert alone.confidence == pytest.approx(together.confidence, abs=1e-5)
        assert alone.task_probability == pytest.approx(together.task_probability, abs=1e-5)


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_permuting_the_batch_permutes_the_answers(selection: str) -> None:
    bank = build_bank(random_modules(5))
    x_BD = near(bank, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    straight = bank.answer(x_BD, selection=selection)  # type: ignore[arg-type]
    permuted = bank.answer(x_BD[order], selection=selection)  # type: ignore[arg-type]
    for i, answer in zip(order.tolist(), permuted, strict=True):
        assert (answer.task, answer.label) == (straight[i].task, straight[i].label)
        assert answer.confidence == pytest.approx(straight[i].confidence, abs=1e-5)


def test_an_empty_batch_has_no_answers() -> None:
    bank = build_bank(random_modules(3))
    assert bank.answer(torch.empty(0, FEATURE_DIM)) == []


# -- the active set ----------------------------------------------------------------------------------


def assert_same_bank(one: ModuleBank, other: ModuleBank) -> None:
    assert [module.sha256 for module in one.modules] == [module.sha256 for module in other.modules]
    assert torch.equal(one.pooled.scatter_P, other.pooled.scatter_P)
    assert (one.pooled.num_images, one.pooled.num_classes) == (
        other.pooled.num_images,
        other.pooled.num_classes,
    )
    assert one.blend == other.blend
    assert one.selector is not None and other.selector is not None
    assert torch.equal(one.selector.metric.precision_DD, other.selector.metric.precision_DD)
    assert torch.equal(one.selector.norm_K, other.selector.norm_K)
    x_BD = near(one, 12)
    assert one.answer(x_BD) == other.answer(x_BD)


def test_the_order_of_registering_does_not_matter() -> None:
    modules = random_modules(4)
    first = build_bank(modules)
    for order in itertools.islice(itertools.permutations(modules), 1, None, 5):
        assert_same_bank(build_bank(list(order)), first)


def test_removing_a_task_restores_the_answers_from_before_it() -> None:
    *old, new = random_modules(4)
    before = build_bank(old)
    with_new = build_bank([*old, new], previous=before)
    after = build_bank(old, previous=with_new)
    x_BD = near(with_new, 40)
    assert before.answer(x_BD) == after.answer(x_BD)
    assert before.answer(x_BD) != with_new.answer(x_BD), "the new task must have mattered"
    assert_same_bank(after, before)


@given(
    seed=st.integers(0, 20), steps=st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6)
)
@settings(max_examples=30, deadline=None)
def test_a_bank_built_from_the_previous_one_equals_one_built_from_nothing(
    seed: int, steps: list[set[int]]
) -> None:
    modules = random_modules(6, seed)
    bank = build_bank([])
    for chosen in steps:
        bank = build_bank([modules[i] for i in chosen], previous=bank)
    assert_same_bank(bank, build_bank([modules[i] for i in steps[-1]]))


def test_replacing_a_task_equals_never_having_had_the_old_version() -> None:
    old, other = random_modules(2)
    new = random_module(old.task, seed=77, num_classes=2)
    replaced = build_bank([new, other], previous=build_bank([old, other]))
    assert_same_bank(replaced, build_bank([new, other]))


def test_a_bank_leaves_its_predecessor_as_it_was() -> None:
    *old, new = random_modules(4)
    before = build_bank(old)
    x_BD = near(before, 10)
    answers = before.answer(x_BD)
    build_bank([*old, new], previous=before)
    assert before.answer(x_BD) == answers


def test_a_bank_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build_bank(random_modules(1)).revision = 8  # type: ignore[misc]


def test_an_empty_bank_refuses_to_answer() -> None:
    bank = build_bank([])
    assert len(bank) == 0
    with pytest.raises(InvalidRequest, match="no task is registered"):
        bank.answer(random_cls(1))


def test_a_bank_knows_its_tasks() -> None:
    bank = build_bank(random_modules(3))
    assert len(bank) == 3 and "birds" in bank and "zebras" not in bank
    assert bank.module("birds").task == "birds"
