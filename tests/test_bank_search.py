"""The search of a bank: what evaluating every module would find, and the published rule by its definition."""
# B batch, K classes, D features

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_banks import listed, near, numpy_task_log_probs, random_modules
from random_modules import build_bank

from model_store.bank import ModuleBank
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY

# -- every module evaluated --------------------------------------------------------------------------


def exhaustive(bank: ModuleBank, x_D: torch.Tensor) -> list[tuple[float, str, str]]:
    """Every (task, label) with its joint probability, best first, from every module of the bank."""
    log_task = numpy_task_log_probs(bank, x_D.numpy().astype(np.float64))
    score_1K = bank.selector.scores(x_D[None])  # type: ignore[union-attr]
    entries = []
    for t, module in enumerate(bank.modules):
        own = slice(bank.first_class[t], bank.first_class[t] + len(module.labels))
        log_class = bank.blend.class_log_probs(module.logits(x_D[None]), score_1K[:, own])[0].numpy()
        entries += [
            (float(np.exp(log_task[t] + log_class[k])), module.task, label)
            for k, label in enumerate(module.labels)
        ]
    return sorted(entries, key=lambda entry: -entry[0])


def doubtful(bank: ModuleBank, sharpness: float = 2.0) -> ModuleBank:
    """The bank with such blunt task probabilities that many modules have to be asked."""
    return dataclasses.replace(bank, blend=dataclasses.replace(bank.blend, sharpness=sharpness))


@given(
    num_tasks=st.integers(1, 6),
    seed=st.integers(0, 40),
    top_k=st.integers(1, 6),
    spread=st.sampled_from([0.2, 1.0, 3.0]),
    standardised=st.booleans(),
    sharpness=st.sampled_from([2.0, 6.0, 20.0]),
)
@settings(max_examples=100, deadline=None)
def test_early_termination_equals_evaluating_every_module(
    num_tasks: int, seed: int, top_k: int, spread: float, standardised: bool, sharpness: float
) -> None:
    bank = build_bank(random_modules(num_tasks, seed, spread=spread, standardised=standardised))
    bank = doubtful(bank, sharpness)
    x_BD = near(bank, 4, seed)
    for x_D, answer in zip(x_BD, bank.answer(x_BD, top_k=top_k), strict=True):
        expected = exhaustive(bank, x_D)[: top_k + 1]
        gaps = [one[0] - other[0] for one, other in itertools.pairwise(expected)]
        assume(all(gap > 1e-5 for gap in gaps))  # ties within rounding have no right order
        assume(all(abs(one[0] - MIN_ALTERNATIVE_PROBABILITY) > 1e-6 for one in expected))
        wanted = [
            one for i, one in enumerate(expected[:top_k]) if i == 0 or one[0] >= MIN_ALTERNATIVE_PROBABILITY
        ]
        assert [one[1:] for one in listed(answer)] == [one[1:] for one in wanted]
        np.testing.assert_allclose(
            [one[0] for one in listed(answer)], [one[0] for one in wanted], rtol=0, atol=1e-5
        )
        log_task = numpy_task_log_probs(bank, x_D.numpy().astype(np.float64))
        t = [module.task for module in bank.modules].index(answer.task)
        assert answer.task_probability == pytest.approx(np.exp(log_task[t]), abs=1e-5)


def test_a_clear_image_needs_one_module_and_a_doubtful_one_more() -> None:
    bank = build_bank(random_modules(6, spread=0.3))
    clear_D = bank.modules[2].statistics.mean_KD[0]
    [clear] = bank.answer(clear_D[None], top_k=1)
    assert (clear.task, clear.num_modules_evaluated) == ("cars", 1)
    vague = doubtful(build_bank(random_modules(6, spread=2.0)), sharpness=4.0)
    numbers = [one.num_modules_evaluated for one in vague.answer(near(vague, 50), top_k=5)]
    assert max(numbers) > 1 and min(numbers) < len(vague)


def test_a_module_beyond_the_second_can_win() -> None:
    """The search must not stop after the favourite: a vague favourite loses to a certain outsider."""
    for seed in range(50):
        bank = doubtful(build_bank(random_modules(6, seed, spread=3.0)))
        x_BD = near(bank, 8, seed)
        for x_D, answer in zip(x_BD, bank.answer(x_BD, top_k=1), strict=True):
            order = np.argsort(-numpy_task_log_probs(bank, x_D.numpy().astype(np.float64)))
            if bank.modules[order[0]].task != answer.task and bank.modules[order[1]].task != answer.task:
                assert exhaustive(bank, x_D)[0][1] == answer.task
                return
    pytest.fail("no such image among the random banks")


# -- the published rule ------------------------------------------------------------------------------


def test_entropy_selection_equals_its_definition() -> None:
    """The module with the least entropy over the classes of all tasks answers over all of them."""
    bank = build_bank(random_modules(4))
    x_BD = near(bank, 25)
    heads = np.concatenate([module.head.weight_KD.numpy() for module in bank.modules]).astype(np.float64)
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    names = [(module.task, label) for module in bank.modules for label in module.labels]
    for x_D, answer in zip(x_BD, bank.answer(x_BD, selection="entropy"), strict=True):
        candidates = []
        for module in bank.modules:
            out = module.luca_output(x_D[None])[0].numpy().astype(np.float64)
            z = float(module.head.scale) * heads @ (out / np.linalg.norm(out))
            prob = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            candidates.append((-(prob * np.log(prob)).sum(), module.sha256, prob))
        _, winner, prob = min(candidates, key=lambda candidate: candidate[0])
        assert answer.receipt.module_sha256 == winner
        assert (answer.task, answer.label) == names[int(prob.argmax())]
        assert answer.confidence == pytest.approx(prob.max(), abs=1e-5)
        own = sum(p for p, (task, _) in zip(prob, names, strict=True) if task == answer.task)
        assert answer.task_probability == pytest.approx(own, abs=1e-5)
        assert answer.num_modules_evaluated == 4
