"""Calibration of a bank: the blend is fitted on calibration vectors, and those are answered as if unseen."""
# M calibration vectors, D features, K classes

import numpy as np
import pytest
import torch
from random_banks import TASKS, near, numpy_scores, numpy_task_log_probs, random_modules
from random_modules import build_bank, random_cls, random_module, with_calibration, without_calibration

from model_store.bank import ModuleBank
from model_store.blend import MIN_VECTORS, Blend
from model_store.known_vectors import MAX_VECTORS, sample_evidence
from model_store.task_module import TaskModule


def test_one_task_alone_is_certain_of_itself() -> None:
    bank = build_bank(random_modules(1))
    assert all(answer.task_probability == pytest.approx(1.0) for answer in bank.answer(random_cls(3)))


def test_without_enough_calibration_vectors_the_blend_is_the_default() -> None:
    assert build_bank([without_calibration(module) for module in random_modules(3)]).blend == Blend()
    few = [random_module("ants", num_calibration=1), random_module("birds", 1, num_calibration=1)]
    assert build_bank(few).blend == Blend()


def plenty(spread: float = 2.0, num_tasks: int = 3) -> list[TaskModule]:
    """Tasks with enough unseen vectors for a blend to be fitted."""
    size = MIN_VECTORS // num_tasks + 1
    modules = []
    for t, task in enumerate(TASKS[:num_tasks]):
        module = random_module(task, t, num_classes=2 + t, per_class=30, num_calibration=size, spread=spread)
        noise_MK = torch.randn(module.calibration.held_out_logits_MK.shape, generator=torch.Generator())
        truth_MK = torch.nn.functional.one_hot(module.calibration.label_M, 2 + t).float()
        calibrated = with_calibration(
            module,
            held_out_logits_MK=2.0 * truth_MK + noise_MK,
            in_statistics_M=torch.zeros(size, dtype=torch.bool),
        )
        modules.append(calibrated)
    return modules


def evidence(bank: ModuleBank) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """(task, true class over all tasks, scores, held-out logits) of every calibration vector."""
    return [
        (t, bank.first_class[t] + int(k), numpy_scores(bank, x_D.double().numpy()), z_K.double().numpy())
        for t, module in enumerate(bank.modules)
        for x_D, k, z_K in zip(
            module.calibration.cls_MD,
            module.calibration.label_M,
            module.calibration.held_out_logits_MK,
            strict=True,
        )
    ]


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def test_the_fitted_sharpness_makes_the_true_classes_most_likely() -> None:
    bank = build_bank(plenty())
    known = evidence(bank)
    assert 1.01 < bank.blend.sharpness < 299.0, "inside its range, or the comparison says nothing"

    def loss(factor: float) -> float:
        return -np.mean([log_softmax(factor * bank.blend.sharpness * s)[k] for _, k, s, _ in known])

    assert all(loss(1.0) < loss(factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_the_fitted_weights_make_the_true_classes_most_likely_within_their_task() -> None:
    bank = build_bank(plenty())
    known = evidence(bank)

    def loss(module_weight: float, score_weight: float) -> float:
        total = 0.0
        for t, k, s, z in known:
            own = s[bank.first_class[t] : bank.first_class[t] + len(bank.modules[t].labels)]
            joint = module_weight * z + score_weight * bank.blend.sharpness * own
            total -= log_softmax(joint)[k - bank.first_class[t]]
        return total / len(known)

    fitted = loss(bank.blend.module_weight, bank.blend.score_weight)
    assert bank.blend != Blend(bank.blend.sharpness)
    for module_weight in (0.0, 0.3, 0.6, 1.0):
        for score_weight in (0.0, 0.3, 0.6, 1.0):
            assert fitted <= loss(module_weight, score_weight) + 1e-6


def test_useless_modules_get_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    lying = [
        with_calibration(
            module,
            held_out_logits_MK=-5.0
            * torch.nn.functional.one_hot(module.calibration.label_M, len(module.labels)).float()
            + torch.randn(module.calibration.logits_MK.shape, generator=generator),
        )
        for module in plenty(spread=0.5)
    ]
    assert build_bank(lying).blend.module_weight == 0.0


def test_a_task_without_calibration_vectors_leaves_the_blend_to_the_others() -> None:
    first, second, third = plenty()
    bank = build_bank([first, second, without_calibration(third)])
    assert bank.answer_calibration("cars") == []
    assert all(0.0 <= answer.confidence <= 1.0 for answer in bank.answer(near(bank, 10)))


@pytest.mark.parametrize("max_vectors", [1, 2, 7, 20, MAX_VECTORS])
def test_the_blend_is_fitted_on_a_bounded_number_of_vectors(max_vectors: int) -> None:
    bank = build_bank(plenty())
    assert bank.selector is not None
    evidence = sample_evidence(bank.selector, bank.modules, max_vectors)
    size = sum(len(one.label_N) for one in evidence)
    assert 1 <= size <= max_vectors
    assert len(evidence) == min(max_vectors, len(bank)) or max_vectors == 2, "of as many tasks as fit"


def test_unseen_calibration_vectors_are_answered_like_any_other() -> None:
    bank = build_bank(random_modules(3, inside=False))
    cls_MD = bank.module("birds").calibration.cls_MD.float()
    for expected, answer in zip(bank.answer(cls_MD, top_k=1), bank.answer_calibration("birds"), strict=True):
        assert (answer.task, answer.label) == (expected.task, expected.label)
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)


def test_calibration_vectors_inside_the_statistics_do_not_vouch_for_themselves() -> None:
    bank = build_bank(random_modules(3, spread=1.0, inside=True))
    lower = 0
    for t, module in enumerate(bank.modules):
        answers = bank.answer_calibration(module.task)
        for x_D, answer in zip(module.calibration.cls_MD, answers, strict=True):
            if answer.task == module.task:
                seen = np.exp(numpy_task_log_probs(bank, x_D.double().numpy())[t])
                assert answer.task_probability <= seen + 1e-9
                lower += answer.task_probability < seen - 1e-3
    assert lower > 0


def test_calibration_answers_use_the_held_out_logits() -> None:
    module = random_module("ants", num_calibration=12, inside=False)
    wrong_MK = -100.0 * torch.nn.functional.one_hot(module.calibration.label_M, 3).float()
    bank = build_bank([with_calibration(module, held_out_logits_MK=wrong_MK)])
    answers = bank.answer_calibration("ants")
    truth = [f"ants-{k}" for k in module.calibration.label_M.tolist()]
    assert all(answer.label != label for answer, label in zip(answers, truth, strict=True))
