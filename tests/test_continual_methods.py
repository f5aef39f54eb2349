"""Baselines against independent formulas, and what they share: label decisions and module methods."""

import math
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
import torch
from random_modules import backbone_manifest
from synthetic import make_features
from torch import Tensor

from training.continual.class_means import SHRINKAGE, Lda, SimpleCil
from training.continual.joint_linear import JointLinear, fit_logistic_regression
from training.continual.mahalanobis import FeCam
from training.continual.method import Columns, Method, Predictions, decide
from training.continual.modules import BatchedTosca, ModuleMethod, ModuleTrainer, Tosca
from training.continual.random_ridge import RIDGES, RanPac, fit_ridge
from training.continual.registry import METHODS, Workshop
from training.continual.streams import Stream, TaskEntry
from training.continual.tasks import ContinualTask, arrange

D = 16
BACKBONE = backbone_manifest(feature_dim=D)


def make_tasks(
    num: int = 3, *, spread: float = 2.0, shared: bool = False, per_class: int = 15
) -> tuple[ContinualTask, ...]:
    names = [f"task{i}" for i in range(num)]
    features = [
        make_features(name, feature_dim=D, seed=i, spread=spread, per_class=per_class, num_test=6)
        for i, name in enumerate(names)
    ]
    setting = f"{spread} {shared} {per_class}"
    features = [replace(one, data_sha256=setting) for one in features]
    if shared:
        features = [replace(one, labels=features[0].labels) for one in features]
    stream = Stream(
        name="x",
        scenario="domain-incremental" if shared else "mixed",
        order="fixed",
        tasks=(TaskEntry(name="a", folder="a"), TaskEntry(name="b", folder="b")),  # not opened here
    )
    return arrange(stream, features, 0)


AnyMethod = TypeVar("AnyMethod", bound=Method)
TASKS = make_tasks()
WORKSHOP = Workshop.open(BACKBONE, ranpac_width=64)  # modules are trained once for all tests


def learnt(method: AnyMethod, tasks: tuple[ContinualTask, ...] = TASKS) -> AnyMethod:
    for task in tasks:
        method.learn(task)
    return method


def training_rows(tasks: tuple[ContinualTask, ...] = TASKS) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([task.train.cls_ND for task in tasks]).double(),
        torch.cat([task.label_K[task.train.label_N] for task in tasks]),
    )


def test_pictures() -> Tensor:
    return torch.cat([task.test_cls_UD for task in TASKS])


test_pictures.__test__ = False  # type: ignore[attr-defined]


# -- decisions ---------------------------------------------------------------------------------------


def test_shared_labels_add_probabilities_and_take_the_nearest() -> None:
    columns = Columns().extended(torch.tensor([0, 1])).extended(torch.tensor([1, 2]))
    score_1C = torch.tensor([[0.4, 0.3, 0.25, 0.05]])
    by_sum = decide(score_1C, columns, "probability")
    assert (by_sum.label_N.item(), by_sum.task_N.item()) == (1, 0)
    assert by_sum.prob_NL is not None and by_sum.prob_NL[0].tolist() == pytest.approx([0.4, 0.55, 0.05])
    assert by_sum.confidence_N is not None and by_sum.confidence_N.item() == pytest.approx(0.55)
    nearest = decide(-score_1C, columns, "nearest")
    assert (nearest.label_N.item(), nearest.task_N.item(), nearest.prob_NL) == (2, 1, None)


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_clusters_and_state_proper_probabilities(name: str) -> None:
    tasks = make_tasks(2, spread=0.3)
    method = METHODS[name].make(WORKSHOP, 0)
    for task in tasks:
        method.learn(task)
    cls_ND = torch.cat([task.test_cls_UD for task in tasks])
    within = Predictions.join([method.predict_within(task.test_cls_UD, j) for j, task in enumerate(tasks)])
    label_N = torch.cat([task.test_label_U for task in tasks])
    for predictions in (method.predict(cls_ND), within):
        if "shuffled" not in name:
            assert float((predictions.label_N == label_N).double().mean()) >= 0.9
        if predictions.prob_NL is not None and predictions.confidence_N is not None:
            ones = torch.ones(len(cls_ND), dtype=torch.float64)
            torch.testing.assert_close(predictions.prob_NL.double().sum(dim=1), ones)
            assert torch.equal(predictions.confidence_N, predictions.prob_NL.max(dim=1).values)
    assert torch.equal(within.task_N, torch.arange(2).repeat_interleave(18)), "the task given is the answer"
    assert method.size_bytes > 0


@pytest.mark.parametrize("name", [name for name in METHODS if "batched" not in name])
def test_answers_do_not_depend_on_batch_mates(name: str) -> None:
    method = METHODS[name].make(WORKSHOP, 0)
    for task in TASKS:
        method.learn(task)
    together = method.predict(test_pictures())
    alone = [method.predict(x_1D) for x_1D in test_pictures().split(1)]
    assert torch.equal(together.label_N, torch.cat([one.label_N for one in alone]))


def test_shared_labels_are_answered_across_tasks() -> None:
    tasks = make_tasks(2, shared=True)
    assert torch.equal(tasks[0].label_K, tasks[1].label_K)
    for name in METHODS:
        method = METHODS[name].make(WORKSHOP, 0)
        for task in tasks:
            method.learn(task)
        predictions = method.predict(tasks[1].test_cls_UD)
        assert int(predictions.label_N.max()) <= 2
        assert predictions.prob_NL is None or predictions.prob_NL.shape[1] == 3


# -- formulas ----------------------------------------------------------------------------------------


def test_simplecil_is_the_cosine_to_class_means() -> None:
    x_ND, label_N = (one.numpy() for one in training_rows())
    mean_CD = np.stack([x_ND[label_N == k].mean(axis=0) for k in range(9)])
    z_ND = test_pictures().double().numpy()
    norms = np.linalg.norm(z_ND, axis=1)[:, None] * np.linalg.norm(mean_CD, axis=1)
    actual = learnt(SimpleCil()).scores(test_pictures()).numpy()
    np.testing.assert_allclose(actual, z_ND @ mean_CD.T / norms, atol=1e-5)


def test_lda_is_the_gaussian_posterior() -> None:
    x_ND, label_N = training_rows()
    mean_CD = torch.stack([x_ND[label_N == k].mean(dim=0) for k in range(9)])
    residual_ND = x_ND - mean_CD[label_N]
    covariance_DD = residual_ND.T @ residual_ND / (len(x_ND) - 9)
    sphere_DD = torch.eye(D, dtype=torch.float64) * covariance_DD.trace() / D
    shrunk_DD = (1 - SHRINKAGE) * covariance_DD + SHRINKAGE * sphere_DD
    log_density_NC = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean_D, shrunk_DD).log_prob(test_pictures().double())
            for mean_D in mean_CD
        ],
        dim=1,
    )
    actual = learnt(Lda()).scores(test_pictures())
    torch.testing.assert_close(actual, torch.softmax(log_density_NC, dim=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [SimpleCil, Lda, FeCam])
def test_closed_forms_do_not_depend_on_the_order_of_tasks(method: type[SimpleCil | Lda | FeCam]) -> None:
    forward, backward = learnt(method()), learnt(method(), TASKS[::-1])
    of_forward, of_backward = forward.predict(test_pictures()), backward.predict(test_pictures())
    assert torch.equal(of_forward.label_N, of_backward.label_N)


@pytest.mark.parametrize("width", [24, 400])  # fewer and more than the 135 training pictures
def test_ranpac_is_the_explicit_ridge_solution(width: int) -> None:
    method = learnt(RanPac(width, seed=5))
    actual = method.scores(test_pictures())
    x_ND, label_N = training_rows()
    feature_NM = method.random_features(x_ND.float()).double()
    target_NC = torch.nn.functional.one_hot(label_N, 9).double()
    assert method.ridge is not None
    gram_MM = feature_NM.T @ feature_NM + method.ridge * torch.eye(width, dtype=torch.float64)
    weight_MC = torch.linalg.solve(gram_MM, feature_NM.T @ target_NC)
    expected = method.random_features(test_pictures()).double() @ weight_MC
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [8, 40])
def test_the_ridge_is_chosen_by_leaving_each_picture_out(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(4).repeat(6)
    mean_CM = torch.randn(4, width, generator=generator)
    feature_NM = (mean_CM[label_N] + 1.5 * torch.randn(24, width, generator=generator)).double()
    target_NC = torch.nn.functional.one_hot(label_N, 4).double()
    eye_MM = torch.eye(width, dtype=torch.float64)

    def left_out_accuracy(ridge: float) -> float:
        right = 0
        for n in range(24):
            others = torch.arange(24) != n
            h_RM, y_RC = feature_NM[others], target_NC[others]
            weight_MC = torch.linalg.solve(h_RM.T @ h_RM + ridge * eye_MM, h_RM.T @ y_RC)
            right += int((feature_NM[n] @ weight_MC).argmax() == label_N[n])
        return right / 24

    ridges = (0.1, 1.0, 10.0, 100.0, 1000.0)
    accuracies = {ridge: left_out_accuracy(ridge) for ridge in ridges}
    chosen, _ = fit_ridge(feature_NM, label_N, 4, ridges)
    assert accuracies[chosen] == max(accuracies.values())
    assert len(set(accuracies.values())) > 1, "the test must be able to fail"


def test_ranpac_features_are_those_of_its_seed_alone() -> None:
    def scores(seed: int, tasks: tuple[ContinualTask, ...]) -> Tensor:
        return learnt(RanPac(50, seed), tasks).scores(test_pictures())

    assert torch.equal(scores(1, TASKS), scores(1, TASKS))
    assert not torch.equal(scores(1, TASKS), scores(2, TASKS))
    backward = scores(1, TASKS[::-1])[:, [6, 7, 8, 3, 4, 5, 0, 1, 2]]
    torch.testing.assert_close(scores(1, TASKS), backward, rtol=0, atol=2e-3)
    assert tuple(sorted(RIDGES)) == RIDGES


def test_fecam_is_the_explicit_mahalanobis_distance() -> None:
    def tukey(x: np.ndarray) -> np.ndarray:
        return np.sign(x) * np.sqrt(np.abs(x))

    x_ND, label_N = (one.numpy() for one in training_rows())
    z_ND = tukey(test_pictures().double().numpy())
    expected = np.zeros((len(z_ND), 9))
    off = 1.0 - np.eye(D)
    for k in range(9):
        x_KD = tukey(x_ND[label_N == k])
        covariance = np.cov(x_KD, rowvar=False)
        v1, v2 = np.trace(covariance) / D, (covariance * off).sum() / (D * (D - 1))
        shrunk = covariance + v1 * np.eye(D) + v2 * off
        correlation = shrunk / np.sqrt(np.outer(np.diag(shrunk), np.diag(shrunk)))
        difference = z_ND - x_KD.mean(axis=0)
        expected[:, k] = -np.einsum("nd,de,ne->n", difference, np.linalg.inv(correlation), difference)
    np.testing.assert_allclose(learnt(FeCam()).scores(test_pictures()).numpy(), expected, rtol=1e-3)


def test_one_picture_a_class_is_enough_for_finite_scores() -> None:
    (single,) = make_tasks(1, per_class=1)
    for method in (FeCam(), Lda(), SimpleCil(), RanPac(32, seed=0)):
        method.learn(single)
        assert bool(torch.isfinite(method.scores(single.test_cls_UD)).all())


def test_logistic_regression_ends_where_the_gradient_vanishes() -> None:
    """The loss is strictly convex in the weights, so this is the one optimum."""
    x_ND, label_N = training_rows()
    penalty = 0.03
    weight_CD, bias_C = fit_logistic_regression(x_ND, label_N, 9, penalty)
    error_NC = torch.softmax(x_ND @ weight_CD.T + bias_C, dim=1)
    error_NC[torch.arange(len(x_ND)), label_N] -= 1.0
    gradient_CD = error_NC.T @ x_ND / len(x_ND) + penalty * weight_CD
    assert float(gradient_CD.abs().max()) < 1e-4 and float(error_NC.mean(dim=0).abs().max()) < 1e-4
    assert float(weight_CD.abs().max()) > 0.05


def test_joint_linear_chooses_its_penalty_without_test_pictures() -> None:
    method = learnt(JointLinear(seed=0))
    first = method.scores(test_pictures())
    again = learnt(JointLinear(seed=0))
    again.scores(torch.zeros(1, D))
    assert method.penalty == again.penalty
    assert torch.equal(first, again.scores(test_pictures()))


# -- modules -----------------------------------------------------------------------------------------


@pytest.fixture
def trainer() -> ModuleTrainer:
    return WORKSHOP.trainer


def batched(trainer: ModuleTrainer, order: str, size: int) -> BatchedTosca:
    return learnt(BatchedTosca(trainer, "reference", "entropy", 0, order, size))  # type: ignore[arg-type]


def test_batches_of_one_are_the_rule_of_the_bank(trainer: ModuleTrainer) -> None:
    of_bank = learnt(Tosca(trainer, "reference", "entropy", 0)).predict(test_pictures())
    for order in ("sorted", "shuffled"):
        alone = batched(trainer, order, 1).predict(test_pictures())
        assert torch.equal(alone.label_N, of_bank.label_N) and torch.equal(alone.task_N, of_bank.task_N)
        assert alone.prob_NL is not None and of_bank.prob_NL is not None
        torch.testing.assert_close(alone.prob_NL, of_bank.prob_NL, rtol=0, atol=2e-3)


def test_with_the_task_given_luca_and_its_head_answer_alone(trainer: ModuleTrainer) -> None:
    method = learnt(Tosca(trainer, "reference", "entropy", 0))
    for j, task in enumerate(TASKS):
        module = method.bank.module(task.name)
        out_UD = module.luca_output(task.test_cls_UD)
        cosine_UK = torch.nn.functional.cosine_similarity(
            out_UD[:, None], module.head.directions()[None], dim=2
        )
        predictions = method.predict_within(task.test_cls_UD, j)
        assert torch.equal(predictions.label_N, task.label_K[cosine_UK.argmax(dim=1)])
        expected_UK = torch.softmax(float(module.head.scale) * cosine_UK, dim=1).double()
        torch.testing.assert_close(predictions.prob_NL[:, task.label_K], expected_UK, rtol=0, atol=1e-5)


def test_batched_entropy_differs_from_per_image_in_the_batch_rule_alone(trainer: ModuleTrainer) -> None:
    pictures_ND = test_pictures()
    method = batched(trainer, "sorted", 18)
    per_image, whole = batched(trainer, "sorted", 1), batched(trainer, "sorted", len(pictures_ND))
    for rows in torch.arange(len(pictures_ND)).split(18):
        one = method.predict(pictures_ND[rows])
        assert torch.equal(one.label_N, method.predict(pictures_ND).label_N[rows]), "a batch answers alone"
    assert not torch.equal(whole.predict(pictures_ND).label_N, per_image.predict(pictures_ND).label_N)
    repeated = pictures_ND[:1].expand(7, -1)
    of_batch, of_one = whole.predict(repeated), per_image.predict(repeated)
    assert torch.equal(of_batch.label_N, of_one.label_N), "equal pictures have one entropy"


def test_shuffled_batches_answer_in_the_order_asked(trainer: ModuleTrainer) -> None:
    shuffled = batched(trainer, "shuffled", len(test_pictures())).predict(test_pictures())
    plain = batched(trainer, "sorted", len(test_pictures())).predict(test_pictures())
    assert torch.equal(shuffled.label_N, plain.label_N), "one batch of all is the same batch in any order"


def test_the_product_method_answers_as_its_bank(trainer: ModuleTrainer) -> None:
    method = learnt(ModuleMethod(trainer, "default", "lda", 0))
    answers = method.bank.answer(test_pictures(), top_k=1)
    predictions = method.predict(test_pictures())
    labels = [f"{task.name}/{label}" for task in TASKS for label in task.train.labels]
    assert [labels[k] for k in predictions.label_N.tolist()] == [f"{a.task}/{a.label}" for a in answers]
    assert predictions.confidence_N is not None
    assert predictions.confidence_N.tolist() == pytest.approx([answer.confidence for answer in answers])
    assert [TASKS[t].name for t in predictions.task_N.tolist()] == [answer.task for answer in answers]


def test_a_module_is_trained_once_for_all_methods_that_read_it(trainer: ModuleTrainer) -> None:
    one, other = (learnt(Tosca(trainer, "reference", "entropy", 0)) for _ in range(2))
    assert one.bank.modules[0] is other.bank.modules[0]
    assert other.saved_s > 0.0 and math.isfinite(other.saved_s)
