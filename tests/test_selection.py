"""Selection scores against discriminants written out with explicit inverses and projections."""
# N vectors, K classes, T tasks, D features

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_store.class_means import ClassMeans
from model_store.errors import InvalidModule
from model_store.leave_one_out import leave_one_out_scores
from model_store.selection import (
    OUTSIDE_SHARE,
    PRIOR_IMAGES,
    Metric,
    WhitenedCosine,
    entropy,
    task_log_probs,
)
from model_store.statistics import SCATTER_RESOLUTION, PooledStatistics

D, K = 7, 4
Array = NDArray[np.float64]


def clusters(
    seed: int = 0, per_class: int = 9, num_classes: int = K, feature_dim: int = D
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters whose spread differs between directions, so that a sphere would not do."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(num_classes).repeat_interleave(per_class)
    mean_KD = 2.0 * torch.randn(num_classes, feature_dim, generator=generator)
    mixing_DD = torch.randn(feature_dim, feature_dim, generator=generator)
    noise_ND = torch.randn(len(label_N), feature_dim, generator=generator) @ mixing_DD
    return mean_KD[label_N] + noise_ND, label_N


def queries(num: int = 8, feature_dim: int = D) -> torch.Tensor:
    return 3.0 * torch.randn(num, feature_dim, generator=torch.Generator().manual_seed(5))


def fit(
    cls_ND: torch.Tensor, label_N: torch.Tensor, shrinkage: float = 0.2, sizes: list[int] | None = None
) -> WhitenedCosine:
    """From the exact scatter, without the rounding of a module file; tasks of `sizes` classes, or one."""
    means, scatter = means_and_scatter(cls_ND.double().numpy(), label_N.numpy())
    upper = scatter[np.triu_indices(len(scatter))]
    pooled = PooledStatistics(
        torch.from_numpy(np.rint(upper / SCATTER_RESOLUTION)).long(), len(label_N), len(means)
    )
    mean_of_task = torch.from_numpy(means).split(sizes or [len(means)])
    sha256s = [f"{t:064x}" for t in range(len(mean_of_task))]
    return WhitenedCosine.fit(
        ClassMeans.of(mean_of_task, sha256s), Metric.fit(pooled, means.shape[1], shrinkage)
    )


def means_and_scatter(x: Array, labels: Array) -> tuple[Array, Array]:
    classes = np.unique(labels)
    means = np.stack([x[labels == k].mean(axis=0) for k in classes])
    scatter = sum((x[labels == k] - means[k]).T @ (x[labels == k] - means[k]) for k in classes)
    return means, scatter


def class_means(cls_ND: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    return torch.stack([cls_ND[label_N == k].mean(dim=0) for k in range(int(label_N.max()) + 1)])


def outer_weight(freedom: int, shrinkage: float) -> float:
    return (1 - shrinkage) / (freedom + PRIOR_IMAGES)


def sphere(scatter: Array, freedom: int, shrinkage: float) -> Array:
    """The part of the covariance that is no scatter: the prior's images and the shrinkage."""
    size = len(scatter)
    variance = np.trace(scatter) / size / freedom
    return (outer_weight(freedom, shrinkage) * PRIOR_IMAGES + shrinkage) * variance * np.eye(size)


def lengths(x: Array, means: Array, centre: Array, covariance: Array) -> Array:
    """√(|P u|² + OUTSIDE_SHARE |u|²) with u = S^(−1/2)(x − c) and P the projection on the class means."""
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    whitened_means = (means - centre) @ whiten
    projection = np.linalg.pinv(whitened_means, rcond=1e-9) @ whitened_means
    u = (x - centre) @ whiten
    return np.sqrt(((u @ projection) ** 2).sum(axis=1) + OUTSIDE_SHARE * (u**2).sum(axis=1))


def cosines(x: Array, means: Array, centre: Array, covariance: Array, length: Array) -> Array:
    inverse = np.linalg.inv(covariance)
    scores = np.zeros((len(x), len(means)))
    for i, row in enumerate(x):
        for k, mean in enumerate(means):
            g = (row - centre) @ inverse @ (mean - centre)
            q = (mean - centre) @ inverse @ (mean - centre)
            scores[i, k] = g / np.sqrt(q) / length[i]
    return scores


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("num_classes", [2, 4, 11])
def test_scores_are_cosines_in_the_metric_of_the_shrunk_covariance(
    shrinkage: float, num_classes: int
) -> None:
    """With fewer and with more classes than features."""
    cls_ND, label_N = clusters(num_classes=num_classes)
    discriminant = fit(cls_ND, label_N, shrinkage)
    means, scatter = means_and_scatter(cls_ND.double().numpy(), label_N.numpy())
    freedom = len(label_N) - num_classes
    covariance = outer_weight(freedom, shrinkage) * scatter + sphere(scatter, freedom, shrinkage)
    x, centre = queries().double().numpy(), means.mean(axis=0)
    expected = cosines(x, means, centre, covariance, lengths(x, means, centre, covariance))
    np.testing.assert_allclose(discriminant.scores(queries()).numpy(), expected, rtol=1e-4, atol=1e-4)


def between_classes(scores: Array) -> Array:
    """LDA scores have meaning only up to a term common to all classes."""
    return scores - scores[:, :1]


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.6, 1.0])
def test_lda_scores_equal_mahalanobis_distances(shrinkage: float) -> None:
    """The baseline: −½ (x − μ)ᵀ S⁻¹ (x − μ)."""
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N, shrinkage)
    means, scatter = means_and_scatter(cls_ND.double().numpy(), label_N.numpy())
    freedom = len(label_N) - K
    covariance = outer_weight(freedom, shrinkage) * scatter + sphere(scatter, freedom, shrinkage)
    inverse = np.linalg.inv(covariance)
    x = queries().double().numpy()
    distances = np.array([[(row - mean) @ inverse @ (row - mean) for mean in means] for row in x])
    np.testing.assert_allclose(
        between_classes(discriminant.lda_scores(queries()).numpy()),
        between_classes(-0.5 * distances),
        rtol=1e-5,
        atol=1e-5,
    )


def test_full_shrinkage_is_the_euclidean_nearest_mean() -> None:
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N, shrinkage=1.0)
    nearest = torch.cdist(cls_ND, class_means(cls_ND, label_N)).argmin(dim=1)
    assert torch.equal(discriminant.lda_scores(cls_ND).argmax(dim=1), nearest)


def test_one_image_a_class_falls_back_to_euclidean_geometry() -> None:
    cls_KD = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
    discriminant = fit(cls_KD, torch.arange(K))
    nearest = torch.cdist(queries(), cls_KD).argmin(dim=1)
    assert torch.equal(discriminant.lda_scores(queries()).argmax(dim=1), nearest)
    means, x = cls_KD.double().numpy(), queries().double().numpy()
    centre = means.mean(axis=0)
    expected = cosines(x, means, centre, np.eye(D), lengths(x, means, centre, np.eye(D)))
    np.testing.assert_allclose(discriminant.scores(queries()).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_scores_do_not_depend_on_the_rest_of_the_batch() -> None:
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N)
    alone_NK = torch.cat([discriminant.scores(row[None]) for row in cls_ND])
    torch.testing.assert_close(discriminant.scores(cls_ND), alone_NK, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strength", [0.01, 0.5, 30.0])
def test_scores_ignore_how_strongly_a_picture_shows_its_class(strength: float) -> None:
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N)
    centre_D = class_means(cls_ND, label_N).double().mean(dim=0)
    scaled_BD = centre_D + strength * (queries() - centre_D)
    torch.testing.assert_close(
        discriminant.scores(scaled_BD), discriminant.scores(queries()), rtol=0, atol=1e-5
    )


def test_moving_every_vector_moves_no_score() -> None:
    cls_ND, label_N = clusters()
    near = fit(cls_ND, label_N)
    far = fit(cls_ND + 50.0, label_N)
    torch.testing.assert_close(near.scores(cls_ND), far.scores(cls_ND + 50.0), rtol=1e-3, atol=1e-3)


def test_every_class_mean_scores_best_for_its_own_class() -> None:
    cls_ND, label_N = clusters(num_classes=6)
    discriminant = fit(cls_ND, label_N)
    assert discriminant.scores(class_means(cls_ND, label_N)).argmax(dim=1).tolist() == list(range(6))


@pytest.mark.parametrize("num_classes", [1, 2])
def test_one_and_two_classes_have_finite_scores(num_classes: int) -> None:
    cls_ND, label_N = clusters(num_classes=num_classes)
    discriminant = fit(cls_ND, label_N)
    at_the_centre_1D = class_means(cls_ND, label_N).mean(dim=0, keepdim=True)
    for x_BD in (queries(), cls_ND, at_the_centre_1D):
        assert discriminant.scores(x_BD).isfinite().all()


@pytest.mark.parametrize("per_class", [2, 5])
@pytest.mark.parametrize("num_classes", [4, 11])
def test_removing_a_vector_equals_fitting_without_it(per_class: int, num_classes: int) -> None:
    """As documented: only the sphere inside the covariance stays as it was with it."""
    shrinkage = 0.3
    cls_ND, label_N = clusters(per_class=per_class, num_classes=num_classes)
    discriminant = fit(cls_ND, label_N, shrinkage)
    x, labels = cls_ND.double().numpy(), label_N.numpy()
    freedom = len(labels) - num_classes
    weight = outer_weight(freedom, shrinkage)
    _, scatter_with = means_and_scatter(x, labels)
    round_part = sphere(scatter_with, freedom, shrinkage)
    expected = []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        means, scatter = means_and_scatter(x[others], labels[others])
        centre, covariance = means.mean(axis=0), weight * scatter + round_part
        length = lengths(x[i : i + 1], means, centre, covariance)
        expected.append(cosines(x[i : i + 1], means, centre, covariance, length)[0])
    scores_NK = leave_one_out_scores(discriminant, cls_ND, label_N, torch.bincount(label_N)[label_N])
    np.testing.assert_allclose(scores_NK.numpy(), np.array(expected), rtol=1e-4, atol=1e-4)


def test_scores_of_some_tasks_are_those_of_all() -> None:
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N, sizes=[1, 2, 1])
    rows = (label_N >= 1) & (label_N < 3)
    given = cls_ND[rows], label_N[rows], torch.bincount(label_N)[label_N[rows]]
    all_NK = leave_one_out_scores(discriminant, *given)
    torch.testing.assert_close(leave_one_out_scores(discriminant, *given, task=1), all_NK[:, 1:3])
    all_NK = discriminant.scores(cls_ND)
    torch.testing.assert_close(discriminant.scores(cls_ND, [1]), all_NK[:, 1:3])
    torch.testing.assert_close(discriminant.scores(cls_ND, [2, 0]), all_NK[:, [3, 0]])


def test_vectors_support_their_own_class_less_once_they_are_left_out() -> None:
    cls_ND, label_N = clusters()
    discriminant = fit(cls_ND, label_N)
    inside_NK = discriminant.scores(cls_ND)
    left_out_NK = leave_one_out_scores(discriminant, cls_ND, label_N, torch.bincount(label_N)[label_N])
    own_N1 = label_N[:, None]
    assert left_out_NK.gather(1, own_N1).mean() < inside_NK.gather(1, own_N1).mean()


def test_a_scatter_that_is_no_covariance_is_refused() -> None:
    packed_P = torch.tensor([1, 500, 1]) * 2**20
    with pytest.raises(InvalidModule, match="scatter is no covariance"):
        Metric.fit(PooledStatistics(packed_P, 10, 2), 2)


def test_leaving_out_one_of_two_images_stays_finite() -> None:
    cls_ND, label_N = clusters(per_class=2, feature_dim=12)
    discriminant = fit(cls_ND, label_N)
    scores_NK = leave_one_out_scores(discriminant, cls_ND, label_N, torch.bincount(label_N)[label_N])
    assert scores_NK.isfinite().all()


def test_task_probability_is_the_sum_over_its_classes() -> None:
    score_BK = 4.0 * torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task_K = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    log_prob_BT = task_log_probs(score_BK, task_K, 4)
    prob = np.exp(score_BK.numpy())
    prob /= prob.sum(axis=1, keepdims=True)
    expected = np.stack([prob[:, task_K.numpy() == t].sum(axis=1) for t in range(4)], axis=1)
    np.testing.assert_allclose(log_prob_BT.exp().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(log_prob_BT.exp().sum(dim=1).numpy(), 1.0, rtol=1e-12)


@given(scale=st.floats(0.0, 1e6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_task_probabilities_sum_to_one_at_any_scale(scale: float, seed: int) -> None:
    score_BK = scale * torch.randn(9, 43, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    score_BK[:3, :40] += 50.0  # one task is all but certain
    log_prob_BT = task_log_probs(score_BK, torch.tensor([*[0] * 40, 1, 2, 2]), 3)
    assert not log_prob_BT.isnan().any() and (log_prob_BT <= 0).all()
    np.testing.assert_allclose(log_prob_BT.exp().sum(dim=1).numpy(), 1.0, rtol=1e-9)


def test_tasks_of_one_class_have_the_softmax_of_the_scores() -> None:
    score_BK = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        task_log_probs(score_BK, torch.arange(5), 5), torch.log_softmax(score_BK, dim=1)
    )


@pytest.mark.parametrize("num_classes", [1, 2, 10, 1000])
def test_uniform_distribution_has_entropy_log_k(num_classes: int) -> None:
    log_prob_BK = torch.log_softmax(torch.zeros(2, num_classes, dtype=torch.float64), dim=1)
    np.testing.assert_allclose(entropy(log_prob_BK).numpy(), math.log(num_classes), atol=1e-12)


def test_entropy_of_a_certain_answer_is_zero() -> None:
    assert entropy(torch.tensor([[0.0, -torch.inf, -torch.inf]])).tolist() == [0.0]


def test_entropy_equals_its_definition() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
    expected = [-sum(v * math.log(v) for v in row) for row in p]
    np.testing.assert_allclose(entropy(torch.tensor(p).log()).numpy(), expected)
