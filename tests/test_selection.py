"""Selection scores against Gaussian discriminants written out with explicit inverses."""
# N vectors, K classes, T tasks, D features

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_store.selection import GaussianDiscriminant, entropy, task_log_probs
from model_store.statistics import ClassStatistics, PooledStatistics, fit_class_statistics

D, K = 5, 4
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


def fit(
    cls_ND: torch.Tensor, label_N: torch.Tensor, shrinkage: float = 0.2, amplitude_variance: float = 0.3
) -> tuple[GaussianDiscriminant, ClassStatistics]:
    statistics = fit_class_statistics(cls_ND, label_N, int(label_N.max()) + 1)
    pooled = PooledStatistics.empty(cls_ND.shape[1]).add([statistics])
    return GaussianDiscriminant.fit(statistics.mean_KD, pooled, shrinkage, amplitude_variance), statistics


def numpy_means_and_scatter(x: Array, labels: Array) -> tuple[Array, Array]:
    classes = np.unique(labels)
    means = np.stack([x[labels == k].mean(axis=0) for k in classes])
    scatter = sum((x[labels == k] - means[k]).T @ (x[labels == k] - means[k]) for k in classes)
    return means, scatter


def log_densities(x: Array, means: Array, centre: Array, covariance: Array, amplitude_variance: float) -> Array:
    """log N(x; μ, S + τ²(μ − c)(μ − c)ᵀ) of every vector and class, without the factor of 2π."""
    scores = np.zeros((len(x), len(means)))
    for k, mean in enumerate(means):
        spread = covariance + amplitude_variance * np.outer(mean - centre, mean - centre)
        _, log_determinant = np.linalg.slogdet(spread)
        inverse = np.linalg.inv(spread)
        scores[:, k] = [-0.5 * ((row - mean) @ inverse @ (row - mean) + log_determinant) for row in x]
    return scores


def shrunk(scatter: Array, freedom: int, shrinkage: float) -> Array:
    covariance = scatter / freedom
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / D * np.eye(D)


def between_classes(scores: Array) -> Array:
    """Scores have meaning only up to a term common to all classes."""
    return scores - scores[:, :1]


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("amplitude_variance", [0.0, 0.3, 2.0])
def test_scores_equal_the_log_densities_of_the_model(shrinkage: float, amplitude_variance: float) -> None:
    cls_ND, label_N = clusters()
    query_BD = 3.0 * torch.randn(8, D, generator=torch.Generator().manual_seed(5))
    discriminant, _ = fit(cls_ND, label_N, shrinkage, amplitude_variance)
    means, scatter = numpy_means_and_scatter(cls_ND.double().numpy(), label_N.numpy())
    covariance = shrunk(scatter, len(label_N) - K, shrinkage)
    centre = means.mean(axis=0)
    expected = log_densities(query_BD.double().numpy(), means, centre, covariance, amplitude_variance)
    np.testing.assert_allclose(
        between_classes(discriminant.scores(query_BD).numpy()), between_classes(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("amplitude_variance", [0.0, 0.3])
def test_linear_scores_equal_mahalanobis_distances(amplitude_variance: float) -> None:
    """Plain LDA, (x − μ)ᵀ S⁻¹ (x − μ), whatever the amplitude variance of the other scores."""
    cls_ND, label_N = clusters()
    query_BD = 3.0 * torch.randn(8, D, generator=torch.Generator().manual_seed(5))
    discriminant, _ = fit(cls_ND, label_N, 0.2, amplitude_variance)
    means, scatter = numpy_means_and_scatter(cls_ND.double().numpy(), label_N.numpy())
    inverse = np.linalg.inv(shrunk(scatter, len(label_N) - K, 0.2))
    x = query_BD.double().numpy()
    distances = np.array([[(row - mean) @ inverse @ (row - mean) for mean in means] for row in x])
    np.testing.assert_allclose(
        between_classes(discriminant.linear_scores(query_BD).numpy()),
        between_classes(-0.5 * distances),
        rtol=1e-5,
        atol=1e-5,
    )


def test_without_amplitude_the_scores_are_the_linear_ones() -> None:
    cls_ND, label_N = clusters()
    discriminant, _ = fit(cls_ND, label_N, amplitude_variance=0.0)
    torch.testing.assert_close(discriminant.scores(cls_ND), discriminant.linear_scores(cls_ND))


def test_moving_every_vector_moves_no_score() -> None:
    cls_ND, label_N = clusters()
    near, _ = fit(cls_ND, label_N)
    far, _ = fit(cls_ND + 50.0, label_N)
    torch.testing.assert_close(near.scores(cls_ND), far.scores(cls_ND + 50.0), rtol=1e-3, atol=1e-3)


def test_full_shrinkage_chooses_the_nearest_mean() -> None:
    cls_ND, label_N = clusters()
    discriminant, statistics = fit(cls_ND, label_N, shrinkage=1.0, amplitude_variance=0.0)
    nearest = torch.cdist(cls_ND, statistics.mean_KD).argmin(dim=1)
    assert torch.equal(discriminant.scores(cls_ND).argmax(dim=1), nearest)


def test_one_image_a_class_falls_back_to_euclidean_distance() -> None:
    cls_KD = torch.randn(K, D, generator=torch.Generator().manual_seed(3))
    query_BD = torch.randn(6, D, generator=torch.Generator().manual_seed(4))
    discriminant, _ = fit(cls_KD, torch.arange(K), amplitude_variance=0.0)
    expected = -0.5 * torch.cdist(query_BD.double(), cls_KD.double()) ** 2
    np.testing.assert_allclose(
        between_classes(discriminant.scores(query_BD).numpy()), between_classes(expected.numpy()), atol=1e-5
    )


def test_scores_do_not_depend_on_the_rest_of_the_batch() -> None:
    cls_ND, label_N = clusters()
    discriminant, _ = fit(cls_ND, label_N)
    alone_NK = torch.cat([discriminant.scores(row[None]) for row in cls_ND])
    torch.testing.assert_close(discriminant.scores(cls_ND), alone_NK, rtol=0, atol=1e-10)


@pytest.mark.parametrize("amplitude_variance", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("per_class", [2, 5])
def test_removing_a_vector_equals_fitting_without_it(amplitude_variance: float, per_class: int) -> None:
    """As documented: centre, degrees of freedom and spherical part stay as they were with the vector."""
    shrinkage = 0.3
    cls_ND, label_N = clusters(per_class=per_class)
    discriminant, statistics = fit(cls_ND, label_N, shrinkage, amplitude_variance)
    x, labels = cls_ND.double().numpy(), label_N.numpy()
    freedom = len(labels) - K
    means_with, scatter_with = numpy_means_and_scatter(x, labels)
    centre = means_with.mean(axis=0)
    sphere = shrinkage * np.trace(scatter_with) / freedom / D * np.eye(D)
    expected = []
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        means, scatter = numpy_means_and_scatter(x[others], labels[others])
        covariance = (1 - shrinkage) * scatter / freedom + sphere
        expected.append(log_densities(x[i : i + 1], means, centre, covariance, amplitude_variance)[0])
    scores_NK = discriminant.leave_one_out_scores(cls_ND, label_N, statistics.count_K[label_N])
    np.testing.assert_allclose(
        between_classes(scores_NK.numpy()), between_classes(np.array(expected)), rtol=1e-4, atol=1e-4
    )


def test_vectors_support_their_own_class_less_once_they_are_left_out() -> None:
    cls_ND, label_N = clusters()
    discriminant, statistics = fit(cls_ND, label_N)
    inside = torch.softmax(discriminant.scores(cls_ND), dim=1).gather(1, label_N[:, None])
    left_out = torch.softmax(
        discriminant.leave_one_out_scores(cls_ND, label_N, statistics.count_K[label_N]), dim=1
    ).gather(1, label_N[:, None])
    assert left_out.mean() < inside.mean()


def test_leaving_out_one_of_two_images_stays_finite() -> None:
    cls_ND, label_N = clusters(per_class=2, feature_dim=12)
    discriminant, statistics = fit(cls_ND, label_N)
    scores_NK = discriminant.leave_one_out_scores(cls_ND, label_N, statistics.count_K[label_N])
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
    score_BK = scale * torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    log_prob_BT = task_log_probs(score_BK, torch.tensor([0, 0, 0, 1, 2, 2]), 3)
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
