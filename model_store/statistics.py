"""What one task adds to the closed-form classifier: class means, counts, within-class scatter.

The statistics of a set of tasks are sums of the statistics of its tasks, and the sums are exact:
scatters are added as fixed-point integers, so adding and then removing a task restores every bit, in
any order, and every replica that pools the same tasks holds the same numbers.
"""
# N images, K classes, D features, P = D(D+1)/2 entries of the upper triangle, row by row

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# One unit of the fixed-point scatter. An entry of a task's scatter must stay below MAX_SCATTER, so that
# 2**13 of the largest allowed tasks fit 63 bits; a D = 768 CLIP task of 1,000 images has entries near 2**10.
SCATTER_RESOLUTION = 2.0**-20
MAX_SCATTER = 2.0**30
_LEVELS = 127
# How far below zero rounding alone may push an eigenvalue of the correlations (0.13 seen at D = 768).
ROUNDING_EIGENVALUE = 0.25
# With very few pictures it pushes further (0.53 seen with two in each of two classes): variances are raised
# in these steps until it does not. To lower covariances instead would lose what leave-one-out takes out.
_RAISES = tuple(1.1**step for step in range(25))


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """Sufficient statistics of one task, as compactly as its file holds them.

    `mean_KD` (float32), `count_K` (int64, at least 1) and the within-class scatter
    Σ (x − μ_class)(x − μ_class)ᵀ as its diagonal `variance_D` (float32) and its correlations, upper
    triangle, in one byte each: `correlation_P` holds q with c = sign(q)·(q/127)². The square gives small
    correlations, which are the many, small errors; a quarter of the bytes costs no accuracy
    (docs/experiments.md).
    """

    mean_KD: Tensor
    count_K: Tensor
    variance_D: Tensor
    correlation_P: Tensor

    @property
    def num_images(self) -> int:
        return int(self.count_K.sum())

    @property
    def num_classes(self) -> int:
        return self.count_K.shape[0]

    def scatter(self) -> Tensor:
        """The within-class scatter, packed [P] float64."""
        row_P, column_P = _triangle(len(self.variance_D))
        level_P = self.correlation_P.double() / _LEVELS
        deviation_D = self.variance_D.double().sqrt()
        scatter_P = level_P * level_P.abs() * deviation_D[row_P] * deviation_D[column_P]
        return torch.where(row_P == column_P, self.variance_D.double()[row_P], scatter_P)


def packed_size(feature_dim: int) -> int:
    return feature_dim * (feature_dim + 1) // 2


@cache
def _triangle(feature_dim: int) -> tuple[Tensor, Tensor]:
    """Row and column of each entry of the packed upper triangle."""
    row_P, column_P = torch.triu_indices(feature_dim, feature_dim).unbind()
    return row_P, column_P


def unpack_symmetric(packed_P: Tensor, feature_dim: int) -> Tensor:
    """The symmetric [D, D] matrix of a packed upper triangle."""
    row_P, column_P = _triangle(feature_dim)
    matrix_DD = packed_P.new_zeros(feature_dim, feature_dim)
    matrix_DD[row_P, column_P] = packed_P
    matrix_DD[column_P, row_P] = packed_P
    return matrix_DD


def fit_class_statistics(cls_ND: Tensor, label_N: Tensor, num_classes: int) -> ClassStatistics:
    """Statistics of [N, D] CLS vectors with labels 0 … K−1; every class needs at least one image.

    With so few or so like images that the rounded correlations are no covariance, variances are raised.
    """
    x_ND = cls_ND.double()
    count_K = torch.bincount(label_N, minlength=num_classes)
    assert count_K.shape[0] == num_classes and int(count_K.min()) >= 1, "every class needs an image"
    mean_KD = torch.zeros(num_classes, x_ND.shape[1], dtype=torch.float64)
    mean_KD.index_add_(0, label_N, x_ND)
    mean_KD /= count_K[:, None]
    residual_ND = x_ND - mean_KD[label_N]
    scatter_DD = residual_ND.T @ residual_ND
    variance_D = scatter_DD.diagonal().clone()
    for raised in _RAISES:
        scatter_DD.diagonal().copy_(raised * variance_D)
        fitted = ClassStatistics(mean_KD.float(), count_K, *_round_scatter(scatter_DD))
        if is_covariance(fitted):
            break
    return fitted


def _round_scatter(scatter_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(variances, packed correlations) as a file holds them."""
    variance_D = scatter_DD.diagonal()
    deviation_D = variance_D.sqrt().clamp_min(1e-150)
    row_P, column_P = _triangle(len(scatter_DD))
    share_P = (scatter_DD / deviation_D / deviation_D[:, None])[row_P, column_P].clamp(-1.0, 1.0)
    level_P = (share_P.sign() * share_P.abs().sqrt() * _LEVELS).round().to(torch.int8)
    return variance_D.float(), level_P


def is_covariance(statistics: ClassStatistics) -> bool:
    """Whether the correlations could be those of real vectors, given how coarsely they are stored; float32
    is a thousand times finer."""
    feature_dim = len(statistics.variance_D)
    level_P = statistics.correlation_P.float() / _LEVELS
    correlation_DD = unpack_symmetric(level_P * level_P.abs(), feature_dim)
    correlation_DD.diagonal().fill_(1.0 + ROUNDING_EIGENVALUE)
    return is_positive_definite(correlation_DD)


def is_positive_definite(symmetric_DD: Tensor) -> bool:
    return int(torch.linalg.cholesky_ex(symmetric_DD).info) == 0


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
            scatter_P += sign * (one.scatter() / SCATTER_RESOLUTION).round().to(torch.int64)
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
