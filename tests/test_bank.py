"""The module bank: exact search, answers independent of company, and a set that can be taken apart."""
# B batch, K classes, T tasks, D features

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_modules import (
    FEATURE_DIM,
    build_bank,
    random_cls,
    random_module,
    with_calibration,
    without_calibration,
)

from model_store.answers import Answer
from model_store.bank import ModuleBank
from model_store.blend import MIN_VECTORS, Blend
from model_store.errors import InvalidRequest, UnknownTask
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY
from model_store.known_vectors import MAX_VECTORS, sample_evidence
from model_store.selection import OUTSIDE_SHARE, PRIOR_IMAGES, SHRINKAGE
from model_store.task_module import TaskModule

EVERYTHING = 10_000
TASKS = ("ants", "birds", "cars", "dogs", "elms", "figs")


def random_modules(num_tasks: int, seed: int = 0, **options: object) -> list[TaskModule]:
    return [
        random_module(task, seed=100 * seed + t, num_classes=1 + (seed + t) % 4, **options)  # type: ignore[arg-type]
        for t, task in enumerate(TASKS[:num_tasks])
    ]


def near(bank: ModuleBank, num: int, seed: int = 0) -> torch.Tensor:
    """Vectors between the classes of a bank, so that several tasks are plausible."""
    generator = torch.Generator().manual_seed(seed)
    mean_KD = torch.cat([module.statistics.mean_KD for module in bank.modules])
    first, second = (mean_KD[torch.randint(len(mean_KD), (num,), generator=generator)] for _ in range(2))
    return 0.6 * first + 0.4 * second + 0.3 * torch.randn(num, FEATURE_DIM, generator=generator)


# -- an independent version of the answer ------------------------------------------------------------


def numpy_scores(bank: ModuleBank, x: np.ndarray) -> np.ndarray:
    """Whitened cosines to every class mean, from the modules' statistics, with explicit roots and inverses."""
    means = np.concatenate([module.statistics.mean_KD.numpy() for module in bank.modules]).astype(np.float64)
    scatter = np.zeros((FEATURE_DIM, FEATURE_DIM))
    for module in bank.modules:
        packed = np.rint(module.statistics.scatter().numpy() * 2**20) / 2**20
        upper = np.zeros_like(scatter)
        upper[np.triu_indices(FEATURE_DIM)] = packed
        scatter += upper + np.triu(upper, 1).T
    freedom = sum(int(module.statistics.count_K.sum()) for module in bank.modules) - len(means)
    weight = (1 - SHRINKAGE) / (freedom + PRIOR_IMAGES)
    variance = np.trace(scatter) / FEATURE_DIM / freedom
    covariance = weight * scatter + (weight * PRIOR_IMAGES + SHRINKAGE) * variance * np.eye(FEATURE_DIM)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    u, m = (x - means.mean(axis=0)) @ whiten, (means - means.mean(axis=0)) @ whiten
    inside = u @ np.linalg.pinv(m, rcond=1e-9) @ m
    return m @ u / np.linalg.norm(m, axis=1) / np.sqrt(inside @ inside + OUTSIDE_SHARE * u @ u)


def numpy_task_log_probs(bank: ModuleBank, x: np.ndarray) -> np.ndarray:
    """log P(task | x): a softmax over all classes, summed within the tasks."""
    if sum(len(module.labels) for module in bank.modules) == 1:
        return np.zeros(1)
    owner = np.concatenate([[t] * len(module.labels) for t, module in enumerate(bank.modules)])
    score = bank.blend.sharpness * numpy_scores(bank, x)
    weight = np.exp(score - score.max())
    prob = np.array([weight[owner == t].sum() for t in range(len(bank.modules))]) / weight.sum()
    return np.log(np.maximum(prob, 1e-300))


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


def listed(answer: Answer) -> list[tuple[float, str, str]]:
    return [
        (answer.confidence, answer.task, answer.label),
        *((one.probability, one.task, one.label) for one in answer.alternatives),
    ]


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


# -- calibration -------------------------------------------------------------------------------------


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
