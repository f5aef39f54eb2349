"""Choosing the task of an image.

`lda` (default): discriminant analysis over the classes of all active tasks, from their pooled
within-class covariance. It needs no training, adds up over tasks and can be taken apart again.
`entropy`: the published rule — the module whose output is least uncertain — for one image at a time.
"""
# B batch, N vectors, K all classes, T tasks, D features, R rank of the class means

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from model_store.errors import InvalidModule
from model_store.statistics import PooledStatistics

Selection = Literal["lda", "entropy"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

# Share of the covariance replaced by a sphere of the same trace. Results hardly depend on it between 0.05
# and 0.6 (docs/experiments.md).
SHRINKAGE = 0.1
# The sphere also counts as this many images, so that a handful of pictures does not pass for a covariance.
PRIOR_IMAGES = 128
# How much of the part of an image's norm that lies outside the span of the class means is kept.
OUTSIDE_SHARE = 0.05
SPAN_RIDGE = 1e-6
ALL_CLASSES = slice(None)


@dataclass(frozen=True, slots=True)
class WhitenedCosine:
    """Discriminant analysis by angle: cos(x − c, μ_k − c) in the metric of the pooled within-class
    covariance S, with c the mean of all class means.

        score_k(x) = g_k / (√q_k · ‖x‖)    g_k = (x − c)ᵀ S⁻¹ (μ_k − c)    q_k = (μ_k − c)ᵀ S⁻¹ (μ_k − c)

    ‖x‖² is the squared norm of S^(−1/2)(x − c) inside the span of the class means plus OUTSIDE_SHARE of the
    whole. Plain LDA scores g_k − q_k/2 grow with how strongly a picture shows its class, so that no single
    temperature makes them true; angles do not (docs/experiments.md). float64 throughout, so that rounding
    never depends visibly on the batch. The solve is on the query's side: D² once per image.
    """

    offset_KD: Tensor  # μ_k − c
    centre_D: Tensor
    precision_DD: Tensor
    norm_K: Tensor  # q_k
    span_DR: Tensor  # S^(−1/2) times a basis of the span of the whitened class means; R = min(D, K)
    # Weight of one outer product r·rᵀ inside S; leave_one_out_scores takes a vector's own share out with it.
    outer_weight: float

    @classmethod
    def fit(cls, mean_KD: Tensor, pooled: PooledStatistics, shrinkage: float = SHRINKAGE) -> "WhitenedCosine":
        """From [K, D] class means and the exact pooled statistics of the same tasks.

        Raises InvalidModule when the pooled scatter is no covariance.
        """
        feature_dim = mean_KD.shape[1]
        eye_DD = torch.eye(feature_dim, dtype=torch.float64)
        freedom = pooled.degrees_of_freedom
        scatter_DD = pooled.scatter(feature_dim)
        variance = float(scatter_DD.diagonal().mean()) / max(freedom, 1)
        if variance <= 0.0:  # one image a class: no spread is known, and angles need no scale
            scatter_DD, variance = torch.zeros_like(eye_DD), 1.0
        weight = (1.0 - shrinkage) / (freedom + PRIOR_IMAGES)
        sphere = weight * PRIOR_IMAGES * variance + shrinkage * variance
        covariance_DD = weight * scatter_DD + sphere * eye_DD
        root_DD, fault = torch.linalg.cholesky_ex(covariance_DD)
        if int(fault) != 0:
            raise InvalidModule(
                "the within-class scatter is no covariance: pooled, it is not positive definite"
            )
        precision_DD = torch.cholesky_inverse(root_DD)
        mean_KD = mean_KD.double()
        centre_D = mean_KD.mean(dim=0)
        offset_KD = mean_KD - centre_D
        whitened_DK = torch.linalg.solve_triangular(root_DD, offset_KD.T, upper=False)
        basis_DR = _span(whitened_DK) if len(mean_KD) < feature_dim else eye_DD
        return cls(
            offset_KD=offset_KD,
            centre_D=centre_D,
            precision_DD=precision_DD,
            norm_K=(whitened_DK**2).sum(dim=0),
            span_DR=torch.linalg.solve_triangular(root_DD.T, basis_DR, upper=True),
            outer_weight=weight,
        )

    def to(self, device: torch.device) -> "WhitenedCosine":
        return WhitenedCosine(
            self.offset_KD.to(device),
            self.centre_D.to(device),
            self.precision_DD.to(device),
            self.norm_K.to(device),
            self.span_DR.to(device),
            self.outer_weight,
        )

    def scores(self, x_BD: Tensor, classes: slice = ALL_CLASSES) -> Tensor:
        """[B, K] float64 scores of [B, D] CLS vectors, about −1 … 5, of all classes or of some."""
        shifted_BD = x_BD.double() - self.centre_D
        projection_BK = self._project(shifted_BD, classes)
        return self._cosine(projection_BK, self.norm_K[classes], self._norm(shifted_BD))

    def lda_scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] scores of plain LDA, g − q/2: the baseline."""
        return self._project(x_BD.double() - self.centre_D, ALL_CLASSES) - self.norm_K / 2.0

    def leave_one_out_scores(
        self, x_ND: Tensor, class_N: Tensor, count_N: Tensor, classes: slice = ALL_CLASSES
    ) -> Tensor:
        """[N, K] scores of vectors that are part of the statistics, each as if it were not.

        `class_N` is the vector's own class, which `classes` must include, and `count_N` that class's image
        count (at least 2). Taking x out moves its class mean to μ − r/(n−1) and lowers the scatter by
        n/(n−1)·r·rᵀ with r = x − μ; the inverse follows by Sherman–Morrison. The centre, the sphere inside
        S, the degrees of freedom and the image's norm, which is common to all classes, are left as they are.
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
        along_NK = solved_ND @ self.offset_KD[classes].T
        projection_NK = self._project(shifted_ND, classes) + (gain_N * along_x_N)[:, None] * along_NK
        norm_NK = self.norm_K[classes] + gain_N[:, None] * along_NK**2
        # The own class's offset is now m − r/(n−1).
        step_N = 1.0 / (count_N - 1.0)
        column_N = class_N - (classes.start or 0)
        along_own_N = along_NK[own_N, column_N]
        projection_NK[own_N, column_N] -= step_N * along_x_N * stretch_N
        norm_NK[own_N, column_N] += stretch_N * (step_N**2 * spread_N - 2.0 * step_N * along_own_N)
        return self._cosine(projection_NK, norm_NK, self._norm(shifted_ND))

    def _project(self, shifted_BD: Tensor, classes: slice) -> Tensor:
        return (shifted_BD @ self.precision_DD) @ self.offset_KD[classes].T

    def _norm(self, shifted_BD: Tensor) -> Tensor:
        inside_B = ((shifted_BD @ self.span_DR) ** 2).sum(dim=1)
        whole_B = ((shifted_BD @ self.precision_DD) * shifted_BD).sum(dim=1)
        return (inside_B + OUTSIDE_SHARE * whole_B).clamp_min(1e-30).sqrt()

    def _cosine(self, projection_BK: Tensor, norm_BK: Tensor, length_B: Tensor) -> Tensor:
        return projection_BK / norm_BK.clamp_min(1e-30).sqrt() / length_B[:, None]


def _span(column_DK: Tensor) -> Tensor:
    """[D, K] matrix B with BBᵀ the projection onto the span of the columns.

    The columns are always dependent (centred means sum to zero), so an orthonormalisation would add
    directions that are pure rounding noise; the small ridge lets them vanish smoothly instead.
    """
    gram_KK = column_DK.T @ column_DK
    gram_KK.diagonal().add_(SPAN_RIDGE * float(gram_KK.diagonal().mean()) + 1e-30)
    basis_KD: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(gram_KK), column_DK.T, upper=False)
    return basis_KD.T


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
