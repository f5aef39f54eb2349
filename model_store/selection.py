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
    # Cholesky root of the whitened means' Gram matrix, on which the basis rests; None when they span all.
    gram_root_KK: Tensor | None
    outer_weight: float  # weight of one outer product r·rᵀ inside S

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
        gram_root_KK, basis_DR = None, eye_DD
        if len(mean_KD) < feature_dim:
            gram_root_KK = _gram_root(whitened_DK)
            basis_DR = torch.linalg.solve_triangular(gram_root_KK, whitened_DK.T, upper=False).T
        return cls(
            offset_KD=offset_KD,
            centre_D=centre_D,
            precision_DD=precision_DD,
            norm_K=(whitened_DK**2).sum(dim=0),
            span_DR=torch.linalg.solve_triangular(root_DD.T, basis_DR, upper=True),
            gram_root_KK=gram_root_KK,
            outer_weight=weight,
        )

    def to(self, device: torch.device) -> "WhitenedCosine":
        return WhitenedCosine(
            self.offset_KD.to(device),
            self.centre_D.to(device),
            self.precision_DD.to(device),
            self.norm_K.to(device),
            self.span_DR.to(device),
            None if self.gram_root_KK is None else self.gram_root_KK.to(device),
            self.outer_weight,
        )

    def scores(self, x_BD: Tensor, classes: slice = ALL_CLASSES) -> Tensor:
        """[B, K] float64 scores of [B, D] CLS vectors, about −1 … 5, of all classes or of some."""
        shifted_BD = x_BD.double() - self.centre_D
        projection_BK = self._project(shifted_BD, classes)
        inside_B = ((shifted_BD @ self.span_DR) ** 2).sum(dim=1)
        whole_B = ((shifted_BD @ self.precision_DD) * shifted_BD).sum(dim=1)
        return whitened_cosine(projection_BK, self.norm_K[classes], inside_B, whole_B)

    def lda_scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] scores of plain LDA, g − q/2: the baseline."""
        return self._project(x_BD.double() - self.centre_D, ALL_CLASSES) - self.norm_K / 2.0

    def _project(self, shifted_BD: Tensor, classes: slice) -> Tensor:
        return (shifted_BD @ self.precision_DD) @ self.offset_KD[classes].T


def whitened_cosine(projection_BK: Tensor, norm_BK: Tensor, inside_B: Tensor, whole_B: Tensor) -> Tensor:
    """[B, K] g/(√q·‖x‖) from g, q, and x's squared norm inside the span of the class means and whole."""
    length_B = (inside_B + OUTSIDE_SHARE * whole_B).clamp_min(1e-30).sqrt()
    return projection_BK / norm_BK.clamp_min(1e-30).sqrt() / length_B[:, None]


def _gram_root(column_DK: Tensor) -> Tensor:
    """[K, K] Cholesky root of the columns' Gram matrix, with a small ridge.

    The columns are always dependent (centred means sum to zero), so an orthonormalisation would add
    directions that are pure rounding noise; the ridge lets them vanish smoothly instead.
    """
    gram_KK = column_DK.T @ column_DK
    gram_KK.diagonal().add_(SPAN_RIDGE * float(gram_KK.diagonal().mean()) + 1e-30)
    root_KK: Tensor = torch.linalg.cholesky(gram_KK)
    return root_KK


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
