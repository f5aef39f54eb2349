"""Statistics of tasks: right against numpy, and exact under adding and removing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.selection import Metric
from model_store.statistics import (
    MAX_SCATTER,
    SCATTER_RESOLUTION,
    ClassStatistics,
    PooledStatistics,
    fit_class_statistics,
    is_covariance,
    packed_size,
    unpack_symmetric,
)

D = 6


def random_vectors(seed: int, num: int = 40, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters with correlated features of unlike variance."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.cat(
        [torch.arange(num_classes), torch.randint(num_classes, (num - num_classes,), generator=generator)]
    )
    mixing_DD = torch.randn(D, D, generator=generator) * torch.arange(1.0, D + 1)
    cls_ND = torch.randn(num, D, generator=generator) @ mixing_DD + 20.0 * label_N[:, None]
    return cls_ND, label_N


def random_statistics(seed: int, num_classes: int = 4) -> ClassStatistics:
    cls_ND, label_N = random_vectors(seed, num_classes=num_classes)
    return fit_class_statistics(cls_ND, label_N, num_classes)


def numpy_scatter(cls_ND: torch.Tensor, label_N: torch.Tensor) -> np.ndarray:
    """Σ over classes of the outer products of the residuals."""
    x, labels = cls_ND.numpy().astype(np.float64), label_N.numpy()
    total = np.zeros((x.shape[1], x.shape[1]))
    for k in np.unique(labels):
        members = x[labels == k]
        centred = members - members.mean(axis=0)
        total += sum(np.outer(row, row) for row in centred)
    return total


def numpy_decoded(statistics: ClassStatistics) -> np.ndarray:
    """The scatter a file holds: correlations sign(q)·(q/127)², packed row by row, between the deviations."""
    size = len(statistics.variance_D)
    variance = statistics.variance_D.double().numpy()
    level = np.zeros((size, size))
    level[np.triu_indices(size)] = statistics.correlation_P.double().numpy() / 127
    level += np.triu(level, 1).T
    scatter = np.sign(level) * level**2 * np.sqrt(np.outer(variance, variance))
    np.fill_diagonal(scatter, variance)
    return scatter


def correlations(scatter: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(np.diag(scatter))
    return scatter / np.outer(deviation, deviation)


def same(one: PooledStatistics, other: PooledStatistics) -> bool:
    return (
        torch.equal(one.scatter_P, other.scatter_P)
        and one.num_images == other.num_images
        and one.num_classes == other.num_classes
    )


@pytest.mark.parametrize("size", [1, 2, 5, 17])
def test_unpacking_restores_a_packed_symmetric_matrix(size: int) -> None:
    half = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    matrix_DD = half + half.T
    packed_P = torch.tensor([float(matrix_DD[i, j]) for i in range(size) for j in range(i, size)])
    assert packed_P.shape == (packed_size(size),)
    assert torch.equal(unpack_symmetric(packed_P, size), matrix_DD)


def test_means_and_counts_equal_numpy() -> None:
    cls_ND, label_N = random_vectors(0)
    fitted = fit_class_statistics(cls_ND, label_N, 4)
    x, labels = cls_ND.numpy().astype(np.float64), label_N.numpy()
    for k in range(4):
        np.testing.assert_allclose(fitted.mean_KD[k].numpy(), x[labels == k].mean(axis=0), rtol=1e-6)
        assert int(fitted.count_K[k]) == int((labels == k).sum())
    assert (fitted.num_images, fitted.num_classes) == (40, 4)
    assert (fitted.mean_KD.dtype, fitted.count_K.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("seed", range(5))
def test_the_scatter_is_that_of_numpy_to_half_a_level(seed: int) -> None:
    """The diagonal is exact; a correlation is stored as its signed square root on 127 levels."""
    cls_ND, label_N = random_vectors(seed)
    fitted = fit_class_statistics(cls_ND, label_N, 4)
    assert (fitted.variance_D.dtype, fitted.correlation_P.dtype) == (torch.float32, torch.int8)
    stored = unpack_symmetric(fitted.scatter(), D).numpy()
    expected = numpy_scatter(cls_ND, label_N)
    np.testing.assert_allclose(np.diag(stored), np.diag(expected), rtol=1e-6)
    roots = [np.sign(c) * np.sqrt(np.abs(c)) for c in (correlations(stored), correlations(expected))]
    assert np.abs(roots[0] - roots[1]).max() <= 0.5 / 127 + 1e-6


def test_the_stored_scatter_is_decoded_as_documented() -> None:
    one = random_statistics(3)
    np.testing.assert_allclose(unpack_symmetric(one.scatter(), D).numpy(), numpy_decoded(one), rtol=1e-12)


def test_fit_does_not_depend_on_the_order_of_the_pictures() -> None:
    cls_ND, label_N = random_vectors(0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    one, other = (
        fit_class_statistics(cls_ND, label_N, 4),
        fit_class_statistics(cls_ND[order], label_N[order], 4),
    )
    torch.testing.assert_close(one.mean_KD, other.mean_KD)
    torch.testing.assert_close(one.variance_D, other.variance_D)
    assert int((one.correlation_P.int() - other.correlation_P.int()).abs().max()) <= 1


def test_shifting_every_vector_leaves_the_scatter() -> None:
    cls_ND, label_N = random_vectors(0)
    one, other = fit_class_statistics(cls_ND, label_N, 4), fit_class_statistics(cls_ND + 7.0, label_N, 4)
    torch.testing.assert_close(one.variance_D, other.variance_D, rtol=1e-4, atol=1e-3)
    assert int((one.correlation_P.int() - other.correlation_P.int()).abs().max()) <= 1


def test_a_class_with_one_image_has_no_scatter() -> None:
    fitted = fit_class_statistics(torch.randn(2, D), torch.tensor([0, 1]), 2)
    assert not fitted.scatter().any()


def test_a_feature_that_never_varies_has_no_scatter() -> None:
    cls_ND, label_N = random_vectors(0)
    cls_ND[:, 2] = 5.0
    scatter_DD = unpack_symmetric(fit_class_statistics(cls_ND, label_N, 4).scatter(), D)
    assert not scatter_DD[2].any() and scatter_DD.isfinite().all()


@pytest.mark.parametrize("num_images", [4, 12, 60, 400])
@pytest.mark.parametrize("seed", range(3))
def test_an_honest_task_always_has_a_covariance(num_images: int, seed: int) -> None:
    """Rounding must not cost positive definiteness, even with fewer images than features of unlike scale."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.exp(2.0 * torch.randn(192, generator=generator))
    loading_RD = torch.randn(3, 192, generator=generator)
    cls_ND = torch.randn(num_images, 3, generator=generator) @ loading_RD
    cls_ND = (cls_ND + 0.05 * torch.randn(num_images, 192, generator=generator)) * scale_D
    one = fit_class_statistics(cls_ND, torch.arange(num_images) % 2, 2)
    Metric.fit(PooledStatistics.empty(192).add([one]), 192)


def pairs(feature_dim: int, per_class: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of vectors whose spread falls off as that of real CLS vectors."""
    generator = torch.Generator().manual_seed(0)
    basis_RD = torch.randn(24, feature_dim, generator=generator) / torch.arange(1.0, 25.0)[:, None]
    cls_ND = torch.randn(2 * per_class, 24, generator=generator) @ basis_RD
    return cls_ND, torch.arange(2).repeat_interleave(per_class)


@pytest.mark.parametrize("feature_dim", [768, 1664])
def test_two_pictures_a_class_have_a_covariance_that_holds_them(feature_dim: int) -> None:
    """Off the diagonal it is exact to the rounding, so a picture can still be taken out of it."""
    cls_ND, label_N = pairs(feature_dim)
    fitted = fit_class_statistics(cls_ND, label_N, 2)
    assert is_covariance(fitted)
    Metric.fit(PooledStatistics.empty(feature_dim).add([fitted]), feature_dim)
    stored = unpack_symmetric(fitted.scatter(), feature_dim).numpy()
    exact = numpy_scatter(cls_ND, label_N)
    raised = np.diag(stored) / np.diag(exact)
    np.testing.assert_allclose(raised, raised[0], rtol=1e-5)
    assert 1.05 < raised[0] < 2.0, "the data must need it for this test to mean anything"
    np.fill_diagonal(stored, np.diag(exact))
    error = np.abs(stored - exact) / np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert error.max() < raised[0] * 1.01 / 127


# -- pooling -----------------------------------------------------------------------------------------


def test_pooling_tasks_equals_the_sum_of_their_scatters() -> None:
    tasks = [random_statistics(seed) for seed in range(3)]
    pooled = PooledStatistics.empty(D).add(tasks)
    np.testing.assert_allclose(
        pooled.scatter(D).numpy(),
        sum(numpy_decoded(one) for one in tasks),
        rtol=0,
        atol=len(tasks) * SCATTER_RESOLUTION / 2,
    )
    assert (pooled.num_images, pooled.num_classes, pooled.degrees_of_freedom) == (120, 12, 120 - 12)


def test_pooling_tasks_equals_the_scatter_of_their_union() -> None:
    """To the rounding of each task's correlations."""
    vectors = [random_vectors(seed) for seed in range(3)]
    pooled = PooledStatistics.empty(D).add(fit_class_statistics(x, y, 4) for x, y in vectors)
    union_ND = torch.cat([x for x, _ in vectors])
    union_label_N = torch.cat([y + 4 * t for t, (_, y) in enumerate(vectors)])
    expected = numpy_scatter(union_ND, union_label_N)
    deviation = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(np.diag(pooled.scatter(D).numpy()), np.diag(expected), rtol=1e-6)
    assert (np.abs(pooled.scatter(D).numpy() - expected) <= np.outer(deviation, deviation) / 127).all()


@given(data=st.data(), num_tasks=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_adding_and_removing_in_any_order_restores_every_bit(data: st.DataObject, num_tasks: int) -> None:
    tasks = [random_statistics(seed, num_classes=2 + seed % 3) for seed in range(num_tasks)]
    arriving = data.draw(st.permutations(tasks))
    leaving = data.draw(st.permutations(tasks))[: data.draw(st.integers(0, num_tasks))]
    staying = [one for one in tasks if not any(one is gone for gone in leaving)]
    empty = PooledStatistics.empty(D)
    pooled = empty
    for one in arriving:
        pooled = pooled.add([one])
    for one in leaving:
        pooled = pooled.remove([one])
    assert same(pooled, empty.add(staying))
    assert same(empty.add(reversed(arriving)).remove(leaving), pooled)


def test_pooling_leaves_its_operands_alone() -> None:
    empty, one = PooledStatistics.empty(D), random_statistics(0)
    before = one.scatter()
    pooled = empty.add([one])
    pooled.add([one])
    assert torch.equal(one.scatter(), before)
    assert not empty.scatter_P.any() and empty.num_images == 0
    assert same(pooled, empty.add([one]))


def test_thousands_of_the_largest_tasks_do_not_overflow() -> None:
    largest = float(np.nextafter(np.float32(MAX_SCATTER), np.float32(0)))
    one = ClassStatistics(
        mean_KD=torch.zeros(1, 1),
        count_K=torch.tensor([2]),
        variance_D=torch.tensor([largest]),
        correlation_P=torch.tensor([127], dtype=torch.int8),
    )
    pooled = PooledStatistics.empty(1).add([one] * 2**13)
    assert float(pooled.scatter(1)) == 2**13 * largest


def test_removing_a_task_that_was_never_added_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="never added"):
        PooledStatistics.empty(D).remove([random_statistics(0)])
