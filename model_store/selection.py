"""Choosing the task of an image.

`lda` (default): a Gaussian discriminant over the classes of all active tasks, from their pooled
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

# Share of the covariance replaced by a sphere of the same trace, and the variance of a class's amplitude.
# Results hardly depend on either between 0.05 and 0.6 and between 0.1 and 1 (docs/experiments.md).
SHRINKAGE = 0.1
AMPLITUDE_VARIANCE = 0.3


@dataclass(frozen=True, slots=True)
class GaussianDiscriminant:
    """log p(x | class) up to a term common to all classes, in closed form from additive statistics.

    A picture shows its class more or less strongly: x = c + s·(μ_k − c) + noise, with c the mean of all
    class means, s ~ N(1, τ²) and noise ~ N(0, S), S the shrunk pooled within-class covariance. With
    g = (x − c)ᵀ S⁻¹ (μ_k − c) and q = (μ_k − c)ᵀ S⁻¹ (μ_k − c), integrating s out gives

        score_k(x) = g − q/2 + τ²/2 · (g − q)² / (1 + τ² q) − log(1 + τ² q) / 2

    τ² = 0 is linear discriminant analysis. float64 throughout, so that rounding never depends visibly on
    the batch. The solve is on the query's side: S⁻¹(x − c) costs D² once per image.
    """

    offset_KD: Tensor  # μ_k − c
    centre_D: Tensor
    precision_DD: Tensor
    norm_K: Tensor  # q
    amplitude_variance: float
    # Weight of one outer product r·rᵀ inside S; leave_one_out_scores takes a vector's own share out with it.
    outer_weight: float

    @classmethod
    def fit(
        cls,
        mean_KD: Tensor,
        pooled: PooledStatistics,
        shrinkage: float = SHRINKAGE,
        amplitude_variance: float = AMPLITUDE_VARIANCE,
    ) -> "GaussianDiscriminant":
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
        centre_D = mean_KD.mean(dim=0)
        offset_KD = mean_KD - centre_D
        norm_K = ((offset_KD @ precision_DD) * offset_KD).sum(dim=1)
        return cls(offset_KD, centre_D, precision_DD, norm_K, amplitude_variance, (1.0 - shrinkage) / freedom)

    def to(self, device: torch.device) -> "GaussianDiscriminant":
        return GaussianDiscriminant(
            self.offset_KD.to(device),
            self.centre_D.to(device),
            self.precision_DD.to(device),
            self.norm_K.to(device),
            self.amplitude_variance,
            self.outer_weight,
        )

    def scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] float64 scores of [B, D] CLS vectors."""
        return self._score(self._projections(x_BD), self.norm_K)

    def linear_scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] scores of plain LDA (τ² = 0), the baseline."""
        return self._projections(x_BD) - self.norm_K / 2.0

    def leave_one_out_scores(self, x_ND: Tensor, class_N: Tensor, count_N: Tensor) -> Tensor:
        """[N, K] scores of vectors that are part of the statistics, each as if it were not.

        `class_N` is the vector's own class and `count_N` that class's image count (at least 2). Taking x
        out moves its class mean to μ − r/(n−1) and lowers the scatter by n/(n−1)·r·rᵀ with r = x − μ;
        the inverse follows by Sherman–Morrison. The centre c, the spherical part of S and its degrees of
        freedom are left as they are.
        """
        own_N = torch.arange(x_ND.shape[0], device=x_ND.device)
        shifted_ND = x_ND.double() - self.centre_D
        residual_ND = shifted_ND - self.offset_KD[class_N]
        count_N = count_N.double()
        solved_ND = residual_ND @ self.precision_DD
        spread_N = (residual_ND * solved_ND).sum(dim=1)
        weight_N = self.outer_weight * count_N / (count_N - 1.0)
        gain_N = weight_N / (1.0 - weight_N * spread_N).clamp_min(1e-6)
        # With P' = P + gain·(P r)(P r)ᵀ, every product with r gains the factor below.
        stretch_N = 1.0 + gain_N * spread_N
        along_x_N = (shifted_ND * solved_ND).sum(dim=1)
        along_NK = solved_ND @ self.offset_KD.T
        projection_NK = self._projections(x_ND) + (gain_N * along_x_N)[:, None] * along_NK
        norm_NK = self.norm_K + gain_N[:, None] * along_NK**2
        # The own class's offset is now m − r/(n−1).
        step_N = 1.0 / (count_N - 1.0)
        along_own_N = along_NK[own_N, class_N]
        projection_NK[own_N, class_N] -= step_N * along_x_N * stretch_N
        norm_NK[own_N, class_N] += stretch_N * (step_N**2 * spread_N - 2.0 * step_N * along_own_N)
        return self._score(projection_NK, norm_NK)

    def _projections(self, x_BD: Tensor) -> Tensor:
        return ((x_BD.double() - self.centre_D) @ self.precision_DD) @ self.offset_KD.T

    def _score(self, projection_BK: Tensor, norm_BK: Tensor) -> Tensor:
        scaled_BK = 1.0 + self.amplitude_variance * norm_BK
        bent_BK = self.amplitude_variance * (projection_BK - norm_BK) ** 2 / scaled_BK
        return projection_BK - 0.5 * (norm_BK - bent_BK + scaled_BK.log())


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
