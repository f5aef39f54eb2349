"""Tasks of one label space answer together; p-values and prediction sets of a bank."""
# B batch, T tasks

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_banks import near
from random_modules import FEATURE_DIM, build_bank, random_module, with_calibration, without_calibration

from model_store.bank import ModuleBank
from model_store.errors import InvalidRequest
from model_store.impact import compare_banks, measure_health
from model_store.task_module import TaskModule

EVERYTHING = 10_000


def site(
    task: str, seed: int, labels: tuple[str, ...], space: str | None = "parts", **options: object
) -> TaskModule:
    module = random_module(task, seed, num_classes=len(labels), **options)  # type: ignore[arg-type]
    return dataclasses.replace(module, labels=labels, label_space=space)


def sites(seed: int = 0, **options: object) -> list[TaskModule]:
    """Two sites that share most labels, one more site of another space, and a task alone."""
    return [
        site("lyon", seed, ("bolt", "nut", "washer"), **options),
        site("oslo", seed + 1, ("nut", "rivet", "bolt"), **options),
        site("bern", seed + 2, ("bolt", "nut"), "other", **options),
        site("solo", seed + 3, ("bolt", "nut"), None, **options),
    ]


def blunt(bank: ModuleBank) -> ModuleBank:
    """So unsure of the task that every space is in play."""
    return dataclasses.replace(bank, blend=dataclasses.replace(bank.blend, sharpness=1.5))


def expected_probabilities(bank: ModuleBank, x_D: torch.Tensor) -> dict[tuple[str, str], float]:
    """(space or task, label) to probability: every module evaluated, the shares of a label added up."""
    score_1K = bank.selector.scores(x_D[None])  # type: ignore[union-attr]
    weight_K = (bank.blend.sharpness * score_1K[0]).exp()
    total: dict[tuple[str, str], float] = {}
    for t, module in enumerate(bank.modules):
        own = slice(bank.first_class[t], bank.first_class[t] + len(module.labels))
        task_probability = float(weight_K[own].sum() / weight_K.sum())
        log_class_1K = bank.blend.class_log_probs(module.logits(x_D[None]), score_1K[:, own])
        for label, log_prob in zip(module.labels, log_class_1K[0].tolist(), strict=True):
            key = (module.label_space or module.task, label)
            total[key] = total.get(key, 0.0) + task_probability * np.exp(log_prob)
    return total


@given(st.integers(0, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_probabilities_of_a_shared_label_are_added(seed: int, top_k: int) -> None:
    bank = blunt(build_bank(sites(seed, spread=2.0)))
    space_of = {module.task: module.label_space or module.task for module in bank.modules}
    x_BD = near(bank, 5, seed)
    for x_D, answer in zip(x_BD, bank.answer(x_BD, top_k=top_k), strict=True):
        expected = expected_probabilities(bank, x_D)
        listed = [(answer.task, answer.label, answer.confidence)]
        listed += [(one.task, one.label, one.probability) for one in answer.alternatives]
        assert len({(space_of[task], label) for task, label, _ in listed}) == len(listed), "each label once"
        best = sorted(expected.values(), reverse=True)[: len(listed)]
        np.testing.assert_allclose([one[2] for one in listed], best, atol=1e-6)
        for task, label, probability in listed:
            assert expected[space_of[task], label] == pytest.approx(probability, abs=1e-6)


def test_the_named_task_is_the_one_that_contributes_most() -> None:
    bank = build_bank(sites(spread=0.2))
    for module in bank.modules[1:3]:  # lyon and oslo
        answers = bank.answer(module.statistics.mean_KD)
        assert [one.task for one in answers] == [module.task] * len(module.labels)
        assert {one.receipt.module_sha256 for one in answers} == {module.sha256}


def test_a_task_named_by_the_client_answers_alone_whatever_its_space() -> None:
    bank = build_bank(sites(spread=2.0))
    for answer in bank.answer(near(bank, 10), task="oslo", top_k=EVERYTHING):
        assert {answer.task, *(one.task for one in answer.alternatives)} == {"oslo"}
        assert answer.confidence + sum(one.probability for one in answer.alternatives) == pytest.approx(
            1.0, abs=0.01
        )


def test_a_space_of_one_changes_nothing() -> None:
    alone = sites()[-1]
    with_space = dataclasses.replace(alone, label_space="lonely")
    others = sites()[:3]
    bank, other = build_bank([*others, alone]), build_bank([*others, with_space])
    x_BD = near(bank, 20)
    assert bank.answer(x_BD) == other.answer(x_BD)


def test_a_second_site_with_the_same_pictures_harms_only_outside_the_space() -> None:
    first = site("lyon", 3, ("bolt", "nut", "washer"), per_class=30, num_calibration=60, spread=1.5)
    twin = dataclasses.replace(first, task="oslo", sha256="f" * 64)
    stranger = dataclasses.replace(twin, label_space=None)
    before = build_bank([first])
    together = compare_banks(before, build_bank([first, twin])).worst_loss(ignoring="oslo")
    apart = compare_banks(before, build_bank([first, stranger])).worst_loss(ignoring="oslo")
    assert together is not None and apart is not None
    assert together.accuracy_loss <= 0.0 < apart.accuracy_loss
    assert measure_health(build_bank([first, twin]), "lyon").selection_accuracy == 1.0


def test_removing_a_site_restores_the_answers_of_the_others() -> None:
    modules = sites(spread=2.0)
    before = build_bank(modules[1:])
    after = build_bank(modules[1:], previous=build_bank(modules, previous=before))
    x_BD = near(before, 30)
    assert before.answer(x_BD, coverage=0.5) == after.answer(x_BD, coverage=0.5)


# -- p-values and abstention -------------------------------------------------------------------------


SIZES = (2, 3)  # classes of the two tasks of a cautious bank


def cautious_bank(seed: int = 0, **options: object) -> ModuleBank:
    """Two tasks of clusters around means that `true_means(seed)` draws again."""
    return build_bank(
        [
            site(task, 10 * seed + t, tuple("xyz"[:size]), None, per_class=40, num_calibration=100, **options)
            for t, (task, size) in enumerate(zip("ab", SIZES, strict=True))
        ]
    )


def true_means(seed: int) -> torch.Tensor:
    return torch.cat(
        [
            torch.randn(size, FEATURE_DIM, generator=torch.Generator().manual_seed(10 * seed + t))
            for t, size in enumerate(SIZES)
        ]
    )


def test_p_values_rank_the_best_own_score_among_those_of_known_pictures() -> None:
    bank = cautious_bank(inside=False)
    x_BD = near(bank, 20)
    score_BK = bank.selector.scores(x_BD)  # type: ignore[union-attr]
    for b, answer in enumerate(bank.answer(x_BD)):
        t = [module.task for module in bank.modules].index(answer.task)
        own = slice(bank.first_class[t], bank.first_class[t] + len(bank.modules[t].labels))
        known_MK = bank.selector.scores(bank.modules[t].calibration.cls_MD)[:, own]  # type: ignore[union-attr]
        no_higher = int((known_MK.amax(dim=1) <= score_BK[b, own].max()).sum())
        assert answer.p_value == pytest.approx((1 + no_higher) / (len(known_MK) + 1))


def test_new_pictures_are_as_typical_as_chance_says_and_foreign_ones_are_not() -> None:
    """Vectors inside the statistics are judged as if they were not, or all new ones would look unusual."""
    fresh, foreign = [], []
    for seed in range(12):
        bank = cautious_bank(seed, inside=True, spread=0.7)
        generator = torch.Generator().manual_seed(900 + seed)
        mean_KD = true_means(seed).repeat(20, 1)
        fresh += bank.answer(mean_KD + 0.7 * torch.randn(mean_KD.shape, generator=generator))
        foreign += bank.answer(8.0 * torch.randn(40, FEATURE_DIM, generator=generator))
    for level in (0.1, 0.5):
        assert np.mean([one.p_value <= level for one in fresh]) == pytest.approx(level, abs=0.03)
    assert np.mean([one.p_value <= 0.1 for one in foreign]) > 0.6


def test_a_picture_is_abstained_on_at_or_below_the_level() -> None:
    bank = cautious_bank()
    x_BD = near(bank, 50)
    p_values = [one.p_value for one in bank.answer(x_BD)]
    assert not any(one.abstained for one in bank.answer(x_BD)), "level 0 never abstains"
    level = sorted(p_values)[10]
    answers = bank.answer(x_BD, abstain_level=level)
    assert [one.abstained for one in answers] == [p_value <= level for p_value in p_values]


def test_a_task_may_state_its_own_level() -> None:
    bank = cautious_bank()
    modules = [
        dataclasses.replace(one, abstain_level=1.0 if one.task == "a" else None) for one in bank.modules
    ]
    for answer in build_bank(modules).answer(near(bank, 50)):
        assert answer.abstained == (answer.task == "a")


def test_a_task_without_calibration_vectors_never_abstains() -> None:
    bank = build_bank([without_calibration(module) for module in sites()])
    assert {one.p_value for one in bank.answer(near(bank, 10), abstain_level=0.5)} == {1.0}


# -- prediction sets ---------------------------------------------------------------------------------


def vague_sites() -> list[TaskModule]:
    """Enough calibration vectors for high coverages, and modules that are unsure."""
    return [
        with_calibration(module, in_statistics_M=torch.zeros(len(module.calibration), dtype=torch.bool))
        for module in sites(spread=3.0, per_class=40, num_calibration=60)
    ]


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_a_prediction_set_holds_every_label_above_the_threshold(coverage: float) -> None:
    bank = build_bank(vague_sites())
    space_of = {module.task: module.label_space or module.task for module in bank.modules}
    threshold = float(
        bank.true_probability_N[int((1 - coverage) * (len(bank.true_probability_N) + 1) + 1e-9) - 1]
    )
    x_BD = near(bank, 20)
    sizes = []
    for x_D, answer in zip(x_BD, bank.answer(x_BD, top_k=1, coverage=coverage), strict=True):
        expected = {key for key, value in expected_probabilities(bank, x_D).items() if value >= threshold}
        assert answer.prediction_set is not None
        assert {(space_of[one.task], one.label) for one in answer.prediction_set} == expected
        probabilities = [one.probability for one in answer.prediction_set]
        assert probabilities == sorted(probabilities, reverse=True)
        sizes.append(len(expected))
    assert coverage < 0.9 or max(sizes) > 1, "more than the best label somewhere, or nothing was tested"


def test_the_evidence_is_what_the_bank_gives_the_true_labels_of_unseen_vectors() -> None:
    bank = build_bank(vague_sites())
    expected = []
    for module in bank.modules:
        for x_D, k in zip(
            module.calibration.cls_MD.float(), module.calibration.label_M.tolist(), strict=True
        ):
            known = expected_probabilities(bank, x_D)
            expected.append(known[module.label_space or module.task, module.labels[k]])
    np.testing.assert_allclose(bank.true_probability_N, sorted(expected), atol=1e-6)


def test_with_the_task_named_the_set_is_calibrated_on_that_task() -> None:
    bank = build_bank(vague_sites())
    module = bank.module("solo")
    given = bank.answer(module.calibration.cls_MD.float(), task="solo", coverage=0.9)
    truths = [module.labels[k] for k in module.calibration.label_M.tolist()]
    sets = [{one.label for one in answer.prediction_set or ()} for answer in given]
    covered = np.mean([truth in one for truth, one in zip(truths, sets, strict=True)])
    assert 0.9 <= covered <= 0.93


def test_no_set_is_given_unless_asked_for_and_none_without_evidence() -> None:
    bank = build_bank(sites())
    assert all(one.prediction_set is None for one in bank.answer(near(bank, 3)))
    with pytest.raises(InvalidRequest, match="needs at least 99 calibration vectors"):
        bank.answer(near(bank, 3), coverage=0.99)
    with pytest.raises(InvalidRequest, match="calibrated for selection 'lda'"):
        bank.answer(near(bank, 3), coverage=0.5, selection="entropy")
