"""Banks of so many classes that a screen says which of them to score: the answers must not change."""
# B batch, K classes, T tasks, D features

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_banks import near
from random_modules import FEATURE_DIM, build_bank, random_cls, random_module

import model_store.impact
import model_store.known_vectors
from model_store.bank import ModuleBank
from model_store.class_means import ClassMeans
from model_store.impact import compare_banks, measure_health
from model_store.known_vectors import unseen_scores
from model_store.screen import ClassScreen, Rounded
from model_store.selection import OUTSIDE_SHARE
from model_store.task_module import TaskModule

EVERYTHING = 10_000


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM)


def many(num_tasks: int = 12, seed: int = 0, space: str | None = None, **options: object) -> list[TaskModule]:
    """Tasks of one to four classes; every third one shares the label space `space`."""
    modules = [
        random_module(f"task{t:02}", seed=100 * seed + t, num_classes=1 + (t + seed) % 4, **options)  # type: ignore[arg-type]
        for t in range(num_tasks)
    ]
    return [
        dataclasses.replace(module, labels=tuple("abcd"[: len(module.labels)]), label_space=space)
        if space and t % 3 == 0
        else module
        for t, module in enumerate(modules)
    ]


def both_ways(
    modules: list[TaskModule], monkeypatch: pytest.MonkeyPatch, sharpness: float | None = None
) -> tuple[ModuleBank, ModuleBank]:
    """The same bank with every class scored exactly, and screened; with one blend, so that only the scoring
    differs."""
    dense = build_bank(modules)
    with monkeypatch.context() as patch:
        patch.setattr("model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM)
        sparse = build_bank(modules)
    assert not dense.is_screened and sparse.is_screened
    blend = dense.blend if sharpness is None else dataclasses.replace(dense.blend, sharpness=sharpness)
    sparse = dataclasses.replace(sparse, blend=blend, true_probability_N=dense.true_probability_N)
    return dataclasses.replace(dense, blend=blend), sparse


@given(
    seed=st.integers(0, 30),
    sharpness=st.sampled_from([1.5, 8.0, 40.0, 300.0]),
    top_k=st.sampled_from([1, 3, EVERYTHING]),
    coverage=st.sampled_from([None, 0.7]),
    space=st.sampled_from([None, "parts"]),
)
@settings(max_examples=60, deadline=None)
def test_a_screened_bank_answers_like_one_that_scores_every_class(
    seed: int, sharpness: float, top_k: int, coverage: float | None, space: str | None
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        dense, sparse = both_ways(many(seed=seed, space=space), monkeypatch, sharpness)
    x_BD = near(dense, 12, seed)
    wanted = dense.answer(x_BD, top_k=top_k, coverage=coverage)
    given_ = sparse.answer(x_BD, top_k=top_k, coverage=coverage)
    assert sparse.selector is not None
    error = float(sparse.selector.screened_scores(x_BD).error_B.max())
    for expected, answer in zip(wanted, given_, strict=True):
        # The screen's share of the sum that probabilities are divided by is all that may differ.
        assert answer.confidence == pytest.approx(expected.confidence, rel=sharpness * error)
        second = max((one.probability for one in expected.alternatives), default=0.0)
        if expected.confidence - second > 1e-3:
            assert (answer.task, answer.label) == (expected.task, expected.label)
            assert answer.p_value == pytest.approx(expected.p_value, abs=1e-9)
        ours = {(one.task, one.label): one.probability for one in answer.alternatives}
        theirs = {(one.task, one.label): one.probability for one in expected.alternatives}
        for key in ours.keys() & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=sharpness * error)
        for key in ours.keys() ^ theirs.keys():  # on the edge of being listed
            assert min((ours | theirs)[key], 1e-3) == pytest.approx(1e-3, rel=0.5) or top_k == 3


@given(seed=st.integers(0, 30), scale=st.sampled_from([1e-3, 1.0, 1e3]), has_integer_products=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_screen_is_never_further_off_than_it_says(
    seed: int, scale: float, has_integer_products: bool
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM)
        monkeypatch.setattr("model_store.screen._HAS_INTEGER_PRODUCTS", has_integer_products)
        selector = build_bank(many(seed=seed)).selector
        assert selector is not None and selector.screen is not None
        x_BD = scale * random_cls(40, seed)
        screened_BK, error_B = selector.screened_scores(x_BD)
        assert torch.equal(selector.screened_error(x_BD), error_B)
    exact_BK = selector.scores(x_BD)
    off_BK = (screened_BK.double() - exact_BK).abs()
    assert bool((off_BK <= error_B[:, None]).all())
    assert float(off_BK.max()) > 0.0, "it does round"
    assert float(exact_BK.abs().max()) <= (1.0 + OUTSIDE_SHARE) ** -0.5 + 1e-6
    assert float(error_B.max()) < 0.03


@pytest.mark.parametrize("seed", range(5))
def test_no_listed_task_escapes_a_screen_that_is_as_far_off_as_it_may_be(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its score is too low by the whole error, and those of all other tasks are too high."""
    error = 0.02
    bank, _ = both_ways(many(seed=seed), monkeypatch, sharpness=40.0)
    x_BD = near(bank, 12, seed)
    assert bank.selector is not None
    exact_BK = bank.selector.scores(x_BD)
    num_listed = 0
    for b, answer in enumerate(bank.answer(x_BD, top_k=EVERYTHING)):
        for task in {answer.task, *(one.task for one in answer.alternatives)}:
            t = bank._find(task)
            off_K = torch.where(bank.task_of_class_K == t, -error, error)
            screened_1K = (exact_BK[b] + off_K)[None].float()
            assert bank._weighing._likely_tasks(screened_1K, torch.tensor([error]))[0, t]
            num_listed += 1
    assert num_listed > len(x_BD), "some pictures list several tasks"


def test_a_picture_along_a_rounding_error_is_as_far_off_as_the_bound_allows() -> None:
    feature_dim = 64
    means = ClassMeans.of([random_cls(30, feature_dim=feature_dim)], ["0" * 64])
    sphere_DD = torch.eye(feature_dim, dtype=torch.float64)
    screen = ClassScreen.fit(means, torch.zeros(feature_dim, dtype=torch.float64), sphere_DD)
    [block] = screen.blocks.values()
    exact_CD = torch.nn.functional.normalize(means.all().float() @ screen.whiten_DD, dim=1)
    rounded_CD = block.direction.number_RD.float() * block.direction.scale_R[:, None]
    off_CD = rounded_CD - exact_CD
    k = int(off_CD.norm(dim=1).argmax())
    picture = screen.rounded((off_CD[k] @ screen.whiten_DD.T)[None])  # whitening only turns here
    cosine = torch.nn.functional.normalize(off_CD[k], dim=0) @ exact_CD[k]
    off = float(screen.cosines(picture)[0, k] - cosine)
    assert 0.8 * block.max_error < off < float(screen.error(picture))
    assert float(screen.error(picture)) > block.max_error + float(picture.error_R)


def test_a_direction_with_few_large_numbers_is_rounded_no_worse() -> None:
    """Turned at random, it has none."""
    feature_dim = 384
    peaked_CD = 0.3 * torch.nn.functional.normalize(random_cls(20, feature_dim=feature_dim), dim=1)
    peaked_CD[:, 7] += 1.0
    means = ClassMeans.of([peaked_CD], ["0" * 64])
    sphere_DD = torch.eye(feature_dim, dtype=torch.float64)
    screen = ClassScreen.fit(means, torch.zeros(feature_dim, dtype=torch.float64), sphere_DD)
    assert max(block.max_error for block in screen.blocks.values()) < 0.012
    unit_CD = torch.nn.functional.normalize(peaked_CD.float(), dim=1)
    assert float(Rounded.of(unit_CD).error_R.max()) > 0.03, "as it is, it would be"


@pytest.mark.usefixtures("screened")
def test_a_picture_is_answered_alike_alone_and_among_others() -> None:
    bank = build_bank(many(20))
    x_BD = near(bank, 30)
    together = bank.answer(x_BD)
    for x_D, expected in zip(x_BD, together, strict=True):
        [alone] = bank.answer(x_D[None])
        assert (alone.task, alone.label) == (expected.task, expected.label)
        assert alone.confidence == pytest.approx(expected.confidence, abs=1e-6)
        assert alone.p_value == expected.p_value


@pytest.mark.usefixtures("screened")
def test_removing_a_task_from_many_restores_the_answers_from_before_it() -> None:
    *old, new = many(20)
    before = build_bank(old)
    after = build_bank(old, previous=build_bank([*old, new], previous=before))
    x_BD = near(before, 40)
    assert after.blend == before.blend
    assert after.answer(x_BD, coverage=0.8) == before.answer(x_BD, coverage=0.8)


def test_a_named_task_answers_as_it_would_unscreened(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = both_ways(many(), monkeypatch)
    x_BD = near(dense, 20)
    for expected, answer in zip(
        dense.answer(x_BD, task="task05"), sparse.answer(x_BD, task="task05"), strict=True
    ):
        assert (answer.label, answer.p_value) == (expected.label, expected.p_value)
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)


def test_calibration_vectors_of_a_screened_bank_do_not_vouch_for_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, sparse = both_ways(many(spread=0.5), monkeypatch)
    for module in dense.modules:
        for expected, answer in zip(
            dense.answer_calibration(module.task), sparse.answer_calibration(module.task), strict=True
        ):
            assert answer.task_probability == pytest.approx(expected.task_probability, abs=0.02)


@pytest.mark.usefixtures("screened")
def test_own_classes_are_scored_without_the_vector_even_where_its_task_is_likely() -> None:
    bank = build_bank(many(spread=1.0))
    assert bank.selector is not None
    for t, module in enumerate(bank.modules):
        score_MK, _ = bank._weighing.weigh_unseen(t, torch.arange(len(module.calibration)))
        own_MC = score_MK[:, bank.selector.classes(t)]
        torch.testing.assert_close(own_MC, unseen_scores(bank.selector, module, t, own_classes=True))
        assert not torch.allclose(own_MC, bank.selector.scores(module.calibration.cls_MD, [t]))


@pytest.mark.usefixtures("screened")
def test_the_blend_of_a_screened_bank_is_about_that_of_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = many(30, num_calibration=12, per_class=12)
    sparse = build_bank(modules)
    monkeypatch.setattr("model_store.bank.MAX_DENSE_CLASSES", EVERYTHING)
    dense = build_bank(modules)
    assert sparse.is_screened and not dense.is_screened
    assert sparse.blend.sharpness == pytest.approx(dense.blend.sharpness, rel=0.05)


@pytest.mark.usefixtures("screened")
def test_a_vector_that_is_no_number_harms_no_other() -> None:
    bank = build_bank(many())
    x_BD = near(bank, 3)
    [first, _, third] = bank.answer(torch.stack([x_BD[0], torch.full_like(x_BD[1], torch.nan), x_BD[2]]))
    assert [first, third] == [bank.answer(x_BD)[i] for i in (0, 2)]


def test_evidence_is_bounded_in_tasks_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store.known_vectors, "MAX_TASKS", 5)
    bank = build_bank(many(20))
    assert bank.selector is not None
    evidence = model_store.known_vectors.sample_evidence(bank.selector, bank.modules)
    assert [one.task for one in evidence] == [0, 4, 8, 12, 16]
    monkeypatch.setattr(model_store.known_vectors, "MIN_VECTORS", 4)
    monkeypatch.setattr(model_store.known_vectors, "MAX_SCORES", 10 * bank.selector.num_classes)
    evidence = model_store.known_vectors.sample_evidence(bank.selector, bank.modules)
    assert sum(len(one.label_N) for one in evidence) == 10


@pytest.mark.parametrize("dense_classes", [FEATURE_DIM, EVERYTHING])
def test_the_report_of_a_large_set_measures_what_changed_and_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, dense_classes: int
) -> None:
    monkeypatch.setattr("model_store.bank.MAX_DENSE_CLASSES", dense_classes)
    monkeypatch.setattr(model_store.impact, "MAX_TASKS", 6)
    modules = many(20)
    twin = dataclasses.replace(modules[7], task="twin", sha256="f" * 64)
    before, after = build_bank(modules), build_bank([*modules, twin])
    report = compare_banks(before, after)
    measured = {one.task for one in report.tasks}
    assert len(measured) == 6 and report.num_unmeasured == 15
    assert {"twin", "task07"} <= measured
    worst = report.worst_loss(ignoring="twin")
    assert worst is not None and worst.task == "task07" and worst.accuracy_loss > 0.05
    back = compare_banks(after, before)
    assert {"twin", "task07"} <= {one.task for one in back.tasks}


def test_the_report_of_a_small_set_measures_all() -> None:
    modules = many(5)
    report = compare_banks(build_bank(modules[:4]), build_bank(modules))
    assert [one.task for one in report.tasks] == [module.task for module in modules]
    assert report.num_unmeasured == 0


def test_health_already_measured_counts_where_it_is_of_as_many_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_store.impact, "MAX_VECTORS", 2)
    modules = many(num_tasks=4)
    before, grown = build_bank(modules), [*modules, random_module("new", seed=77, num_classes=20)]
    known = {one.task: measure_health(before, one.task) for one in before.modules}
    told_apart = {task: dataclasses.replace(health, ece=0.123) for task, health in known.items()}
    dense = compare_banks(before, build_bank(grown), told_apart)
    assert {one.task: one.before for one in dense.tasks} == {**told_apart, "new": None}
    monkeypatch.setattr("model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM)
    screened = build_bank(grown)
    assert screened.is_screened and compare_banks(before, screened, known) == compare_banks(before, screened)
