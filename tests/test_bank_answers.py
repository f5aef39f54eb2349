"""Answers of a bank: what they list, with which probabilities, and what naming the task changes."""
# B batch, K classes, M calibration vectors, D features

import numpy as np
import pytest
import torch
from random_banks import TASKS, listed, near, random_modules
from random_modules import FEATURE_DIM, build_bank, random_cls, random_module

from model_store.blend import Blend
from model_store.errors import UnknownTask
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY

EVERYTHING = 10_000


# -- naming the task ---------------------------------------------------------------------------------


def test_a_named_task_answers_within_its_own_classes() -> None:
    bank = build_bank(random_modules(4, spread=0.3))
    for answer in bank.answer(near(bank, 20), task="birds", top_k=EVERYTHING):
        assert answer.task == "birds" and answer.task_probability == 1.0
        assert {one[1] for one in listed(answer)} == {"birds"}
        assert answer.receipt.module_sha256 == bank.module("birds").sha256
        assert sum(one[0] for one in listed(answer)) == pytest.approx(1.0, abs=len(TASKS) * 1e-3)


def test_a_named_task_has_the_probabilities_of_its_module() -> None:
    bank = build_bank(random_modules(4))
    module = bank.module("dogs")
    x_BD = near(bank, 6)
    score_BK = bank.selector.scores(x_BD)  # type: ignore[union-attr]
    start = bank.first_class[3]
    log_class_BK = bank.blend.class_log_probs(
        module.logits(x_BD), score_BK[:, start : start + len(module.labels)]
    )
    for expected_K, answer in zip(log_class_BK.exp(), bank.answer(x_BD, task="dogs"), strict=True):
        assert answer.confidence == pytest.approx(float(expected_K.max()), abs=1e-6)
        assert answer.label == module.labels[int(expected_K.argmax())]


def test_class_probabilities_are_a_softmax_of_module_and_scores() -> None:
    logits_BK, score_BK = torch.randn(5, 3), torch.randn(5, 3, dtype=torch.float64)
    blend = Blend(sharpness=4.0, module_weight=0.7, score_weight=0.3)
    z = 0.7 * logits_BK.numpy().astype(np.float64) + 0.3 * 4.0 * score_BK.numpy()
    expected = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(blend.class_log_probs(logits_BK, score_BK).exp().numpy(), expected)


def test_padding_has_no_probability() -> None:
    logits_BK, score_BK = torch.randn(5, 3), torch.randn(5, 3, dtype=torch.float64)
    absent_BK = torch.tensor([False, False, True]).expand(5, -1)
    log_prob_BK = Blend().class_log_probs(logits_BK, score_BK, absent_BK)
    torch.testing.assert_close(log_prob_BK[:, :2], Blend().class_log_probs(logits_BK[:, :2], score_BK[:, :2]))
    assert (log_prob_BK[:, 2] == -torch.inf).all()


@pytest.mark.parametrize(("luca_weight", "ridge_weight"), [(1.0, 0.0), (0.0, 3.0), (0.5, 2.0)])
def test_module_logits_weigh_both_experts(luca_weight: float, ridge_weight: float) -> None:
    module = random_module("ants", luca_weight=luca_weight, ridge_weight=ridge_weight)
    assert module.standardisation is not None
    x_BD = random_cls(6)
    unit_BD = (x_BD - module.standardisation.mean_D) * module.standardisation.scale_D
    unit_BD = unit_BD / unit_BD.norm(dim=1, keepdim=True)
    landmark_MD = module.standardisation(module.calibration.cls_MD.float())
    luca_BK = module.head(module.luca(unit_BD * FEATURE_DIM**0.5))
    expected_BK = luca_weight * luca_BK + ridge_weight * module.ridge.scores(unit_BD, landmark_MD)
    torch.testing.assert_close(module.logits(x_BD), expected_BK, rtol=1e-4, atol=1e-5)


def test_without_standardisation_luca_reads_the_cls_vector_as_it_is() -> None:
    module = random_module("ants", luca_weight=0.5, standardised=False)
    x_BD = random_cls(6)
    torch.testing.assert_close(module.logits(x_BD), 0.5 * module.head(module.luca(x_BD)))


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(UnknownTask, match="'zebras' is not active in revision 7"):
        build_bank(random_modules(2)).answer(random_cls(1), task="zebras")


# -- what an answer says -----------------------------------------------------------------------------


def test_the_probabilities_of_all_answers_sum_to_at_most_one() -> None:
    bank = build_bank(random_modules(5))
    num_classes = sum(len(module.labels) for module in bank.modules)
    for answer in bank.answer(near(bank, 30), top_k=EVERYTHING):
        total = sum(one[0] for one in listed(answer))
        assert 1.0 - num_classes * MIN_ALTERNATIVE_PROBABILITY <= total <= 1.0 + 1e-9


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_alternatives_are_sorted_distinct_and_above_the_floor(selection: str) -> None:
    bank = build_bank(random_modules(5))
    for answer in bank.answer(near(bank, 30), selection=selection, top_k=6):  # type: ignore[arg-type]
        entries = listed(answer)
        assert len(entries) <= 6
        assert [one[0] for one in entries] == sorted((one[0] for one in entries), reverse=True)
        assert len({one[1:] for one in entries}) == len(entries)
        assert all(one.probability >= MIN_ALTERNATIVE_PROBABILITY for one in answer.alternatives)


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_asking_for_one_gives_the_first_of_many(selection: str) -> None:
    bank = build_bank(random_modules(5))
    x_BD = near(bank, 30)
    ones = bank.answer(x_BD, selection=selection, top_k=1)  # type: ignore[arg-type]
    many = bank.answer(x_BD, selection=selection, top_k=5)  # type: ignore[arg-type]
    for one, all_five in zip(ones, many, strict=True):
        assert one.alternatives == ()
        assert (one.task, one.label) == (all_five.task, all_five.label)
        assert one.confidence == pytest.approx(all_five.confidence, abs=1e-6)


@pytest.mark.parametrize("selection", ["lda", "entropy"])
def test_no_probability_is_above_one(selection: str) -> None:
    for seed in range(20):
        bank = build_bank([random_module("ants", seed, num_classes=7)])  # its classes are all that there are
        for answer in bank.answer(random_cls(50, seed), selection=selection):  # type: ignore[arg-type]
            assert max(answer.task_probability, answer.p_value, *(one[0] for one in listed(answer))) <= 1.0


def test_every_label_of_a_named_task_is_listed_when_asked_for() -> None:
    bank = build_bank([random_module("ants", num_classes=10, spread=0.1), *random_modules(3, seed=1)[1:]])
    x_BD = bank.modules[0].statistics.mean_KD.float()
    some = bank.answer(x_BD, task="ants", top_k=EVERYTHING)
    for short, whole in zip(some, bank.answer(x_BD, task="ants", top_k=1, every_label=True), strict=True):
        assert len(listed(short)) < len(listed(whole)) == 10
        assert listed(whole)[: len(listed(short))] == listed(short)
        assert {one[1:] for one in listed(whole)} == {("ants", f"ants-{k}") for k in range(10)}
        assert sum(one[0] for one in listed(whole)) == pytest.approx(1.0)


def test_the_receipt_names_the_winning_module() -> None:
    bank = build_bank(random_modules(4))
    for answer in bank.answer(near(bank, 20)):
        assert answer.receipt.module_sha256 == bank.module(answer.task).sha256
        assert answer.receipt.revision == 7
        assert answer.receipt.backbone_fingerprint == "b" * 64


def test_the_closed_form_answer_is_the_best_class_of_plain_lda() -> None:
    bank = build_bank(random_modules(4))
    x_BD = near(bank, 20)
    task_B, class_B = bank.closed_form_answer(x_BD)
    best_B = bank.selector.lda_scores(x_BD).argmax(dim=1).tolist()  # type: ignore[union-attr]
    flat = [(t, k) for t, module in enumerate(bank.modules) for k in range(len(module.labels))]
    assert list(zip(task_B.tolist(), class_B.tolist(), strict=True)) == [flat[best] for best in best_B]
