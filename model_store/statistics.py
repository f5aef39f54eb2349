"""What one task adds to the closed-form classifier: class means, counts, within-class scatter.

The statistics of a set of tasks are sums of the statistics of its tasks, and the sums are exact:
scatters are added as fixed-point integers, so adding and then removing a task restores every bit, in
any order, and every replica that pools the same tasks holds the same numbers.
"""
# N images, K classes, D features, P = D(D+1)/2 entries of the upper triangle, row by row

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.errors import InvalidModule

# One unit of the fixed-point scatter. An entry of a task's scatter must stay below MAX_SCATTER, so that
# 2**13 of the largest allowed tasks fit 63 bits; a D = 768 CLIP task of 1,000 images has entries near 2**10.
SCATTER_RESOLUTION = 2.0**-20
MAX_SCATTER = 2.0**30


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """Sufficient statistics of one task: `mean_KD` (float32), `count_K` (int64, at least 1) and
    `scatter_P` (float32): Σ (x − μ_class)(x − μ_class)ᵀ over the task's images, upper triangle."""

    mean_KD: Tensor
    count_K: Tensor
    scatter_P: Tensor

    @property
    def num_images(self) -> int:
        return int(self.count_K.sum())

    @property
    def num_classes(self) -> int:
        return self.count_K.shape[0]


def packed_size(feature_dim: int) -> int:
    return feature_dim * (feature_dim + 1) // 2


def pack_symmetric(matrix_DD: Tensor) -> Tensor:
    row, column = torch.triu_indices(*matrix_DD.shape).unbind()
    return matrix_DD[row, column].contiguous()


def unpack_symmetric(packed_P: Tensor, feature_dim: int) -> Tensor:
    row, column = torch.triu_indices(feature_dim, feature_dim).unbind()
    matrix_DD = packed_P.new_zeros(feature_dim, feature_dim)
    matrix_DD[row, column] = packed_P
    matrix_DD[column, row] = packed_P
    return matrix_DD


def fit_class_statistics(cls_ND: Tensor, label_N: Tensor, num_classes: int) -> ClassStatistics:
    """Statistics of [N, D] CLS vectors with labels 0 … K−1; every class needs at least one image."""
    x_ND = cls_ND.double()
    count_K = torch.bincount(label_N, minlength=num_classes)
    assert count_K.shape[0] == num_classes and int(count_K.min()) >= 1, "every class needs an image"
    mean_KD = torch.zeros(num_classes, x_ND.shape[1], dtype=torch.float64)
    mean_KD.index_add_(0, label_N, x_ND)
    mean_KD /= count_K[:, None]
    residual_ND = x_ND - mean_KD[label_N]
    scatter_P = pack_symmetric(residual_ND.T @ residual_ND)
    return ClassStatistics(mean_KD.float(), count_K, scatter_P.float())


@dataclass(frozen=True, slots=True)
class PooledStatistics:
    """Exact sums over a set of tasks; `scatter_P` counts units of SCATTER_RESOLUTION (int64)."""

    scatter_P: Tensor
    num_images: int
    num_classes: int

    @classmethod
    def empty(cls, feature_dim: int) -> "PooledStatistics":
        return cls(torch.zeros(packed_size(feature_dim), dtype=torch.int64), 0, 0)

    def add(self, statistics: Iterable[ClassStatistics]) -> "PooledStatistics":
        return self._combine(statistics, sign=1)

    def remove(self, statistics: Iterable[ClassStatistics]) -> "PooledStatistics":
        return self._combine(statistics, sign=-1)

    def _combine(self, statistics: Iterable[ClassStatistics], sign: int) -> "PooledStatistics":
        scatter_P = self.scatter_P.clone()
        num_images, num_classes = self.num_images, self.num_classes
        for one in statistics:
            scatter_P += sign * _fixed_point(one.scatter_P)
            num_images += sign * one.num_images
            num_classes += sign * one.num_classes
        assert num_images >= 0 and num_classes >= 0, "removed a task that was never added"
        return PooledStatistics(scatter_P, num_images, num_classes)

    @property
    def degrees_of_freedom(self) -> int:
        return self.num_images - self.num_classes

    def scatter(self, feature_dim: int) -> Tensor:
        """The pooled within-class scatter, [D, D] float64."""
        return unpack_symmetric(self.scatter_P.double() * SCATTER_RESOLUTION, feature_dim)


def _fixed_point(scatter_P: Tensor) -> Tensor:
    if not bool((scatter_P.abs() < MAX_SCATTER).all()):
        raise InvalidModule(f"within-class scatter must be finite and below {MAX_SCATTER:.0e} in every entry")
    return (scatter_P.double() / SCATTER_RESOLUTION).round().to(torch.int64)
