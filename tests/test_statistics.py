"""Statistics of tasks: right against numpy, and exact under adding and removing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.errors import InvalidModule
from model_store.statistics import (
    MAX_SCATTER,
    SCATTER_RESOLUTION,
    ClassStatistics,
    PooledStatistics,
    fit_class_statistics,
    pack_symmetric,
    packed_size,
    unpack_symmetric,
)

D = 6


def random_vectors(seed: int, num: int = 40, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.cat(
        [torch.arange(num_classes), torch.randint(num_classes, (num - num_classes,), generator=generator)]
    )
    cls_ND = 5.0 * torch.randn(num, D, generator=generator) + 20.0 * label_N[:, None]
    return cls_ND, label_N


def random_statistics(seed: int, num_classes: int = 4) -> ClassStatistics:
    cls_ND, label_N = random_vectors(seed, num_classes=num_classes)
    return fit_class_statistics(cls_ND, label_N, num_classes)


def numpy_scatter(cls_ND: torch.Tensor, label_N: torch.Tensor) -> np.ndarray:
    """Σ over classes of (n − 1) times the sample covariance."""
    x, labels = cls_ND.numpy().astype(np.float64), label_N.numpy()
    total = np.zeros((x.shape[1], x.shape[1]))
    for k in np.unique(labels):
        members = x[labels == k]
        centred = members - members.mean(axis=0)
        total += sum(np.outer(row, row) for row in centred)
    return total


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
    packed_P = pack_symmetric(matrix_DD)
    assert packed_P.shape == (packed_size(size),) == (size * (size + 1) // 2,)
    assert torch.equal(unpack_symmetric(packed_P, size), matrix_DD)


def test_packing_goes_row_by_row_along_the_upper_triangle() -> None:
    matrix_DD = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    assert pack_symmetric(matrix_DD).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_fit_equals_numpy() -> None:
    cls_ND, label_N = random_vectors(0)
    fitted = fit_class_statistics(cls_ND, label_N, 4)
    x, labels = cls_ND.numpy().astype(np.float64), label_N.numpy()
    for k in range(4):
        np.testing.assert_allclose(fitted.mean_KD[k].numpy(), x[labels == k].mean(axis=0), rtol=1e-6)
        assert int(fitted.count_K[k]) == int((labels == k).sum())
    np.testing.assert_allclose(
        unpack_symmetric(fitted.scatter_P, D).numpy(), numpy_scatter(cls_ND, label_N), rtol=1e-5, atol=1e-3
    )
    assert (fitted.num_images, fitted.num_classes) == (40, 4)
    assert (fitted.mean_KD.dtype, fitted.count_K.dtype) == (torch.float32, torch.int64)
    assert fitted.scatter_P.dtype == torch.float32


def test_fit_does_not_depend_on_the_order_of_the_pictures() -> None:
    cls_ND, label_N = random_vectors(0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    one, other = (
        fit_class_statistics(cls_ND, label_N, 4),
        fit_class_statistics(cls_ND[order], label_N[order], 4),
    )
    torch.testing.assert_close(one.mean_KD, other.mean_KD)
    torch.testing.assert_close(one.scatter_P, other.scatter_P)


def test_shifting_every_vector_leaves_the_scatter() -> None:
    cls_ND, label_N = random_vectors(0)
    one, other = fit_class_statistics(cls_ND, label_N, 4), fit_class_statistics(cls_ND + 7.0, label_N, 4)
    torch.testing.assert_close(one.scatter_P, other.scatter_P, rtol=1e-4, atol=1e-3)


def test_a_class_with_one_image_has_no_scatter() -> None:
    fitted = fit_class_statistics(torch.randn(2, D), torch.tensor([0, 1]), 2)
    assert not fitted.scatter_P.any()


def test_pooling_tasks_equals_the_scatter_of_the_union() -> None:
    vectors = [random_vectors(seed) for seed in range(3)]
    pooled = PooledStatistics.empty(D).add(fit_class_statistics(x, y, 4) for x, y in vectors)
    union_ND = torch.cat([x for x, _ in vectors])
    union_label_N = torch.cat([y + 4 * t for t, (_, y) in enumerate(vectors)])
    direct = fit_class_statistics(union_ND, union_label_N, 12)
    expected = numpy_scatter(union_ND, union_label_N)
    # Each task's entry is rounded to float32 once and to the fixed-point grid once.
    allowed = 3 * (SCATTER_RESOLUTION / 2 + 2.0**-24 * np.abs(expected).max())
    np.testing.assert_allclose(pooled.scatter(D).numpy(), expected, rtol=0, atol=allowed)
    assert (pooled.num_images, pooled.num_classes) == (direct.num_images, 12)
    assert pooled.degrees_of_freedom == 120 - 12


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
    before = one.scatter_P.clone()
    pooled = empty.add([one])
    pooled.add([one])
    assert torch.equal(one.scatter_P, before)
    assert not empty.scatter_P.any() and empty.num_images == 0
    assert same(pooled, empty.add([one]))


@pytest.mark.parametrize("entry", [MAX_SCATTER, -MAX_SCATTER, 1e38, torch.inf, -torch.inf, torch.nan])
def test_an_oversized_scatter_is_refused(entry: float) -> None:
    one = random_statistics(0)
    one.scatter_P[3] = entry
    with pytest.raises(InvalidModule, match="scatter must be finite and below"):
        PooledStatistics.empty(D).add([one])


def test_thousands_of_the_largest_tasks_do_not_overflow() -> None:
    largest = float(np.nextafter(np.float32(MAX_SCATTER), np.float32(0)))
    one = ClassStatistics(torch.zeros(1, 1), torch.tensor([2]), torch.tensor([largest]))
    pooled = PooledStatistics.empty(1).add([one] * 2**13)
    assert float(pooled.scatter(1)) == 2**13 * largest


def test_removing_a_task_that_was_never_added_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="never added"):
        PooledStatistics.empty(D).remove([random_statistics(0)])
