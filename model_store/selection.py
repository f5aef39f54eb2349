"""Choosing the task of an image.

`lda` (default): linear discriminant analysis over the classes of all active tasks, from their pooled
within-class covariance. It needs no training, adds up over tasks and can be taken apart again.
`entropy`: the published rule — the module whose output is least uncertain — for one image at a time.
"""
# B batch, N vectors, K all classes, T tasks, D features

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from model_store.statistics import PooledStatistics

Selection = Literal["lda", "entropy"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

# Share of the covariance replaced by a sphere of the same trace. Results hardly depend on it between
# 0.05 and 0.6 (docs/experiments.md).
SHRINKAGE = 0.2


@dataclass(frozen=True, slots=True)
class LinearDiscriminant:
    """log p(x | class) up to a term common to all classes, with S the shrunk pooled covariance:

        score_k(x) = μ_kᵀ S⁻¹ x − ½ μ_kᵀ S⁻¹ μ_k

    float64 throughout, so that rounding never depends visibly on the batch. The solve is on the
    query's side: S⁻¹x costs D² once per image, and a new task leaves other tasks' means untouched.
    """

    mean_KD: Tensor
    precision_DD: Tensor
    bias_K: Tensor
    # Weight of one outer product r·rᵀ inside S; leave_one_out takes a vector's own share out with it.
    outer_weight: float

    @classmethod
    def fit(
        cls, mean_KD: Tensor, pooled: PooledStatistics, shrinkage: float = SHRINKAGE
    ) -> "LinearDiscriminant":
        """From [K, D] class means and the exact pooled statistics of the same tasks."""
        feature_dim = mean_KD.shape[1]
        freedom = max(pooled.degrees_of_freedom, 1)
        covariance_DD = pooled.scatter(feature_dim) / freedom
        variance = float(covariance_DD.diagonal().mean())
        if variance <= 0.0:  # one image a class: no spread is known, so distances are Euclidean
            covariance_DD, variance = torch.eye(feature_dim, dtype=torch.float64), 1.0
        covariance_DD = (1.0 - shrinkage) * covariance_DD
        covariance_DD.diagonal().add_(shrinkage * variance)
        precision_DD = torch.cholesky_inverse(torch.linalg.cholesky(covariance_DD))
        mean_KD = mean_KD.double()
        bias_K = -0.5 * ((mean_KD @ precision_DD) * mean_KD).sum(dim=1)
        return cls(mean_KD, precision_DD, bias_K, (1.0 - shrinkage) / freedom)

    def to(self, device: torch.device) -> "LinearDiscriminant":
        return LinearDiscriminant(
            self.mean_KD.to(device), self.precision_DD.to(device), self.bias_K.to(device), self.outer_weight
        )

    def scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] float64 scores of [B, D] CLS vectors."""
        return (x_BD.double() @ self.precision_DD) @ self.mean_KD.T + self.bias_K

    def leave_one_out_scores(self, x_ND: Tensor, class_N: Tensor, count_N: Tensor) -> Tensor:
        """[N, K] scores of vectors that are part of the statistics, each as if it were not.

        `class_N` is the vector's own class and `count_N` that class's image count (at least 2). Taking x
        out moves its class mean to μ − r/(n−1) and lowers the scatter by n/(n−1)·r·rᵀ with r = x − μ;
        the inverse follows by Sherman–Morrison. Terms common to all classes are kept, so only
        differences between classes have meaning. The spherical part of S is left as it is.
        """
        x_ND = x_ND.double()
        residual_ND = x_ND - self.mean_KD[class_N]
        count_N = count_N.double()
        weight_N = self.outer_weight * count_N / (count_N - 1.0)
        solved_ND = residual_ND @ self.precision_DD
        gain_N = weight_N / (1.0 - weight_N * (residual_ND * solved_ND).sum(dim=1)).clamp_min(1e-6)
        # Squared Mahalanobis distance to every mean = −2·score + xᵀS⁻¹x, then the rank-one correction.
        square_N = ((x_ND @ self.precision_DD) * x_ND).sum(dim=1)
        distance_NK = square_N[:, None] - 2.0 * self.scores(x_ND)
        along_NK = (x_ND * solved_ND).sum(dim=1)[:, None] - solved_ND @ self.mean_KD.T
        # The own class's mean has moved away from x by r/(n−1): x − μ' = r·n/(n−1).
        stretch_N = count_N / (count_N - 1.0)
        own_N = torch.arange(x_ND.shape[0], device=x_ND.device)
        distance_NK[own_N, class_N] *= stretch_N**2
        along_NK[own_N, class_N] *= stretch_N
        return -0.5 * (distance_NK + gain_N[:, None] * along_NK**2)


def task_log_probs(score_BK: Tensor, task_K: Tensor, num_tasks: int) -> Tensor:
    """[B, T] log P(task | x): the probability of a task is the sum over its classes."""
    index_BK = task_K.expand_as(score_BK)
    top_BT = score_BK.new_full((score_BK.shape[0], num_tasks), -torch.inf)
    top_BT = top_BT.scatter_reduce(1, index_BK, score_BK, reduce="amax")
    mass_BT = torch.zeros_like(top_BT).scatter_add(1, index_BK, (score_BK - top_BT.gather(1, index_BK)).exp())
    return torch.log_softmax(top_BT + mass_BT.log(), dim=1)


def entropy(log_prob_BK: Tensor) -> Tensor:
    """[B] entropy in nats, −Σ p log p; log K for the uniform distribution."""
    return -(log_prob_BK.exp() * log_prob_BK).nan_to_num(nan=0.0).sum(dim=-1)
