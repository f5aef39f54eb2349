"""Training one task: the same bytes for the same seed, and honest evidence whatever the data looks like."""

import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch
from random_modules import backbone_manifest, module_bytes, random_module
from synthetic import make_features

from model_store.bank import ModuleBank
from model_store.errors import InvalidDataset, InvalidModule, ToscaError
from model_store.landmarks import RidgeFit
from model_store.luca import FLOWS, Flow
from model_store.module_file import MAX_CALIBRATION_VECTORS, ModuleFile, check_module, read_module
from model_store.statistics import fit_class_statistics
from training.features import LabelledFeatures
from training.plans import MAX_SEED
from training.recipes import (
    BY_NAME,
    DEFAULT,
    RECIPES,
    REFERENCE,
    Recipe,
    RecipeName,
    fit_module,
    soft_threshold,
)
from training.trainer import TrainedTask, choose_ridge, cross_fit, train_task

D = 32
BACKBONE = backbone_manifest(feature_dim=D)


def features(**options: Any) -> LabelledFeatures:
    return make_features("shapes", feature_dim=D, **options)


def resplit(given: LabelledFeatures, *splits: tuple[str, int]) -> LabelledFeatures:
    """Deal every class's pictures out to splits in order; `("train", 4), ("val", 3)`, the rest is left out."""
    kept: list[int] = []
    names: list[str] = []
    for k in range(len(given.labels)):
        rows = (given.label_N == k).nonzero().squeeze(1).tolist()
        for split, count in splits:
            taken, rows = rows[:count], rows[count:]
            kept += taken
            names += [split] * len(taken)
    return dataclasses.replace(
        given, cls_ND=given.cls_ND[kept], label_N=given.label_N[kept], splits=tuple(names)
    )


def only(given: LabelledFeatures, rows: list[int]) -> LabelledFeatures:
    return dataclasses.replace(
        given,
        cls_ND=given.cls_ND[rows],
        label_N=given.label_N[rows],
        splits=tuple(given.splits[i] for i in rows),
    )


def train(given: LabelledFeatures, **options: Any) -> TrainedTask:
    return train_task("shapes", given, BACKBONE, **options)


def checked(trained: TrainedTask) -> ModuleFile:
    """The file as a server reads it: format, fingerprint and golden check."""
    file = read_module(trained.data)
    check_module(file, BACKBONE)
    return file


def accuracy(file: ModuleFile, given: LabelledFeatures, rows: torch.Tensor) -> float:
    bank = ModuleBank.build(
        [file.module],
        revision=1,
        backbone_fingerprint=file.manifest.backbone_fingerprint,
        feature_dim=file.manifest.feature_dim,
    )
    answers = bank.answer(given.cls_ND[rows], top_k=1)
    truth = [given.labels[k] for k in given.label_N[rows].tolist()]
    return sum(answer.label == label for answer, label in zip(answers, truth, strict=True)) / len(rows)


# -- determinism -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_seed_gives_the_same_module(recipe: RecipeName) -> None:
    one, other = (read_module(train(features(), recipe=recipe, seed=3).data) for _ in range(2))
    assert one.manifest == other.manifest
    for part in ("luca", "head"):
        mine, theirs = getattr(one.module, part).state_dict(), getattr(other.module, part).state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_same_seed_gives_the_same_bytes() -> None:
    given = features(per_class=4, num_test=1)
    assert len({train(given, seed=3).data for _ in range(12)}) == 1


def test_the_largest_seed_trains() -> None:
    assert train(features(per_class=4, num_test=1), seed=MAX_SEED).manifest.training["seed"] == MAX_SEED


@pytest.mark.parametrize("recipe", RECIPES)
def test_another_seed_gives_another_module(recipe: RecipeName) -> None:
    one, other = (safetensors.torch.load(train(features(), recipe=recipe, seed=seed).data) for seed in (3, 4))
    assert not torch.equal(one["luca.w1.values"], other["luca.w1.values"])
    assert torch.equal(one["statistics.mean"], other["statistics.mean"]), "statistics need no seed"


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    train(features())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_leaves_its_features_alone() -> None:
    given = features()
    before = given.cls_ND.clone()
    train(given)
    assert torch.equal(given.cls_ND, before)


# -- weighing ----------------------------------------------------------------------------------------


def test_the_penalty_is_the_one_whose_unseen_scores_are_most_truthful() -> None:
    label_U = torch.arange(30) % 3
    truth_UK = torch.nn.functional.one_hot(label_U, 3).float()
    noise_UK = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    ridge = random_module("birds").ridge
    fits = [
        RidgeFit(penalty, ridge, truth_UK + share * noise_UK)
        for penalty, share in ((0.1, 2.0), (1.0, 0.3), (2.0, 1.0))
    ]
    assert choose_ridge(fits, label_U).penalty == 1.0
    few = [dataclasses.replace(fit, left_out_NK=fit.left_out_NK[:3]) for fit in fits]
    assert choose_ridge(few, label_U[:3]).penalty == 0.1, "the nearest to the default where evidence is noise"


# -- sparsity ----------------------------------------------------------------------------------------


def test_soft_thresholding_shrinks_and_cuts_to_exact_zero() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[-3.0, -0.2, 0.0], [0.1, 0.5, 2.0]]))
    soft_threshold([parameter], 0.5)
    assert parameter.tolist() == [[-2.5, 0.0, 0.0], [0.0, 0.0, 1.5]]


def test_a_proximal_penalty_gives_exact_zeros_and_the_published_one_none() -> None:
    given = make_features("shapes", feature_dim=192, per_class=16, spread=1.0)
    rows = given.rows("train")
    x_ND, label_N = given.cls_ND[rows], given.label_N[rows]

    def share_of_zeros(recipe: Recipe) -> float:
        luca, _ = fit_module(x_ND, label_N, 3, recipe, torch.Generator().manual_seed(0))
        matrices = [luca.w1, luca.w2, luca.v1, luca.v2]
        return float(torch.cat([(one == 0).flatten() for one in matrices]).double().mean())

    strengths = [
        share_of_zeros(dataclasses.replace(DEFAULT, epochs=10, proximal_l1=one)) for one in (0.0, 3.0, 10.0)
    ]
    assert strengths[0] + 0.01 < strengths[1] < strengths[2] - 0.01
    assert share_of_zeros(dataclasses.replace(REFERENCE, epochs=2)) == 0.0


def test_zeros_take_no_bytes_but_their_bit() -> None:
    module = random_module("birds", feature_dim=64)
    dense = len(module_bytes(module))
    with torch.no_grad():
        module.luca.w1.zero_()
    saved = dense - len(module_bytes(module))
    assert saved == pytest.approx(2 * module.luca.w1.numel(), abs=16), (
        "but for digits and padding of the header"
    )


# -- learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_separable_clusters_are_learnt_wholly(flow: Flow, recipe: RecipeName) -> None:
    backbone = backbone_manifest(feature_dim=192)
    given = make_features("shapes", feature_dim=192, per_class=16, num_test=8, spread=0.2)
    trained = train_task("shapes", given, backbone, flow=flow, recipe=recipe)
    file = read_module(trained.data)
    check_module(file, backbone)
    assert file.manifest.flow == file.module.luca.flow == flow
    assert file.manifest.training["name"] == recipe
    assert trained.held_out.accuracy == 1.0
    assert accuracy(file, given, given.rows("test")) == 1.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_pure_noise_is_not_learnt(recipe: RecipeName) -> None:
    """The held-out figures must not be those of pictures the module has seen."""
    given = features(num_classes=4, per_class=20, num_test=0)
    noise = dataclasses.replace(given, cls_ND=torch.randn(80, D, generator=torch.Generator().manual_seed(1)))
    trained = train(noise, recipe=recipe)
    assert trained.held_out.accuracy < 0.55
    confidence = trained.held_out.prob_NK.max(dim=1).values
    assert float(confidence.mean()) < 0.7, "nor may it be sure of itself"


@pytest.mark.parametrize("recipe", RECIPES)
def test_fitting_lowers_the_loss_of_its_start(recipe: RecipeName) -> None:
    given = features(per_class=20, spread=2.0)
    rows = given.rows("train")
    cls_ND, label_N = given.cls_ND[rows], given.label_N[rows]
    chosen = BY_NAME[recipe]
    fitted, start = (
        fit_module(
            cls_ND,
            label_N,
            3,
            dataclasses.replace(chosen, epochs=epochs),
            torch.Generator().manual_seed(0),
        )
        for epochs in (chosen.epochs, 0)
    )

    def loss(module: Any) -> float:
        luca, head = module
        return float(torch.nn.functional.cross_entropy(head(luca(cls_ND)), label_N))

    assert loss(fitted) < loss(start)


def test_the_reference_head_is_the_mean_output_of_each_class() -> None:
    given = features(per_class=10)
    rows = given.rows("train")
    cls_ND, label_N = given.cls_ND[rows], given.label_N[rows]
    luca, head = fit_module(cls_ND, label_N, 3, BY_NAME["reference"], torch.Generator().manual_seed(0))
    for k in range(3):
        torch.testing.assert_close(head.weight_KD[k], luca(cls_ND[label_N == k]).mean(dim=0))


def test_the_reference_recipe_is_the_published_one() -> None:
    chosen = BY_NAME["reference"]
    assert (chosen.optimiser, chosen.learning_rate, chosen.epochs, chosen.batch_size, chosen.l1) == (
        "sgd",
        0.025,
        20,
        48,
        5e-4,
    )


# -- evidence ----------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_training_pictures() -> None:
    given = features(per_class=9, num_test=5)
    statistics = checked(train(given)).module.statistics
    rows = given.rows("train")
    assert statistics.count_K.tolist() == [9, 9, 9]
    for k in range(3):
        expected_D = given.cls_ND[rows][given.label_N[rows] == k].double().mean(dim=0).float()
        torch.testing.assert_close(statistics.mean_KD[k], expected_D)


def test_with_a_test_split_the_figures_are_the_test_pictures() -> None:
    trained = train(features(num_test=5))
    assert trained.held_out.evidence == "test split"
    assert len(trained.held_out.label_N) == 15
    assert trained.manifest.metrics["num_held_out"] == 15
    assert trained.manifest.metrics["accuracy"] == trained.held_out.accuracy


def test_a_val_split_becomes_the_calibration_set() -> None:
    given = resplit(features(per_class=20), ("train", 10), ("val", 6))
    trained = train(given)
    module = checked(trained).module
    assert trained.held_out.evidence == "val split"
    assert len(trained.held_out.label_N) == len(module.calibration) == 18
    assert not module.calibration.in_statistics_M.any()
    val = {tuple(row) for row in given.cls_ND[given.rows("val")].half().tolist()}
    assert {tuple(row) for row in module.calibration.cls_MD.tolist()} == val
    assert module.statistics.count_K.tolist() == [10, 10, 10], "validation pictures are no training pictures"
    torch.testing.assert_close(
        module.calibration.held_out_logits_MK, module.calibration.logits_MK, rtol=1e-2, atol=2e-2
    )


def test_without_other_splits_the_evidence_is_from_training_pictures_left_out() -> None:
    given = resplit(features(per_class=20, spread=2.5), ("train", 12))
    trained = train(given)
    calibration = checked(trained).module.calibration
    assert "training pictures" in trained.held_out.evidence
    assert len(trained.held_out.label_N) == len(calibration) == 36
    assert calibration.in_statistics_M.all()
    assert not torch.allclose(calibration.held_out_logits_MK, calibration.logits_MK, atol=1e-2)


def test_held_out_logits_know_less_than_the_finished_module() -> None:
    given = resplit(features(per_class=30, spread=4.0), ("train", 25))
    calibration = checked(train(given)).module.calibration

    def loss(logits_MK: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits_MK, calibration.label_M))

    assert loss(calibration.held_out_logits_MK) > loss(calibration.logits_MK)


def test_cross_fitted_logits_do_not_depend_on_their_own_label() -> None:
    """Every picture's logits come from a module that never saw it: lying about it changes nothing there."""
    given = features(per_class=6, num_test=0, spread=2.0)
    lied = given.label_N.clone()
    chosen = dataclasses.replace(BY_NAME["reference"], epochs=3)
    honest_NK = cross_fit(given.cls_ND, given.label_N, 3, chosen, 0, "tosca")
    moved_ND = given.cls_ND.clone()
    moved_ND[4] = 100.0 * torch.randn(D, generator=torch.Generator().manual_seed(0))
    moved_NK = cross_fit(moved_ND, lied, 3, chosen, 0, "tosca")
    # Pictures of the moved one's own fold were judged without it, and so are as before.
    unchanged = [i for i in range(18) if torch.equal(honest_NK[i], moved_NK[i])]
    assert 4 not in unchanged and 2 <= len(unchanged) <= 9


def test_the_calibration_set_is_small_and_spread_over_the_classes() -> None:
    given = resplit(features(num_classes=10, per_class=40), ("train", 30))
    calibration = checked(train(given)).module.calibration
    assert len(calibration) == MAX_CALIBRATION_VECTORS
    counts = torch.bincount(calibration.label_M, minlength=10)
    assert int(counts.max()) - int(counts.min()) <= 1


def test_the_manifest_says_what_was_done() -> None:
    trained = train(features(), seed=7)
    manifest = checked(trained).manifest
    assert manifest == trained.manifest
    assert manifest.training["seed"] == 7 and manifest.training["num_images"] == 36
    assert manifest.provenance["data"] == "shapes" and manifest.provenance["data_sha256"] == "0" * 64
    assert manifest.backbone_fingerprint == BACKBONE.fingerprint
    assert manifest.labels == ("shapes-0", "shapes-1", "shapes-2")


# -- little data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_a_few_pictures_a_class_are_enough_for_a_module(recipe: RecipeName, per_class: int) -> None:
    given = features(per_class=per_class, num_test=6, spread=0.2)
    file = checked(train(given, recipe=recipe))
    assert accuracy(file, given, given.rows("test")) == 1.0


@pytest.mark.parametrize("feature_dim", [768, 1664])
def test_two_pictures_a_class_make_a_module_that_a_store_takes(feature_dim: int) -> None:
    """The least that `--min-images` asks for, at the widths of real backbones."""
    backbone = backbone_manifest(feature_dim=feature_dim)
    given = make_features(num_classes=2, per_class=2, num_test=0, feature_dim=feature_dim)
    trained = train_task("shapes", given, backbone, recipe=dataclasses.replace(DEFAULT, epochs=1))
    check_module(read_module(trained.data), backbone)


def test_a_module_that_no_store_would_take_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "training.trainer.fit_class_statistics",
        lambda *given: dataclasses.replace(
            fit := fit_class_statistics(*given), correlation_P=torch.full_like(fit.correlation_P, -127)
        ),
    )
    with pytest.raises(InvalidModule, match="scatter is no covariance"):
        train(features())


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_class_with_a_single_picture_is_learnt_beside_others(recipe: RecipeName) -> None:
    given = features(per_class=8, num_test=4, spread=0.2)
    rows = [
        i for i in range(len(given.splits)) if not (int(given.label_N[i]) == 1 and given.splits[i] == "train")
    ]
    first = next(i for i in range(len(given.splits)) if int(given.label_N[i]) == 1)
    lonely = only(given, sorted([*rows, first]))
    file = checked(train(lonely, recipe=recipe))
    assert file.module.statistics.count_K.tolist() == [8, 1, 8]
    assert accuracy(file, lonely, lonely.rows("test")) == 1.0
    assert file.module.calibration.label_M.unique().tolist() == [0, 2], "it cannot be left out of itself"


@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_but_single_pictures_is_no_crash(recipe: RecipeName) -> None:
    """No picture can be left out, so there is no evidence; the module is made, or refused by name."""
    given = resplit(features(per_class=4), ("train", 1))
    try:
        trained = train(given, recipe=recipe)
    except ToscaError:
        return
    assert len(checked(trained).module.calibration) == 0


def test_a_class_without_readable_training_pictures_is_named() -> None:
    given = features()
    rows = [i for i in range(len(given.splits)) if int(given.label_N[i]) != 2 or given.splits[i] == "test"]
    with pytest.raises(InvalidDataset, match="no training picture of class 'shapes-2' can be read"):
        train(only(given, rows))


def test_equal_vectors_in_every_class_are_no_crash() -> None:
    given = features(per_class=4, num_test=0)
    same = dataclasses.replace(given, cls_ND=torch.ones(12, D))
    assert train(same).held_out.accuracy <= 1.0


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65])
def test_a_task_name_that_no_file_may_have_is_refused_by_name(name: str) -> None:
    with pytest.raises(ToscaError, match="task"):
        train_task(name, features(), BACKBONE)


@pytest.mark.parametrize("label", [" cat", "a\nb", "x" * 257])
def test_a_label_that_no_file_may_have_is_refused_by_name(label: str) -> None:
    given = features()
    with pytest.raises(ToscaError, match="label"):
        train(dataclasses.replace(given, labels=("a", "b", label)))
