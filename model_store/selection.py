"""Choosing the task of an image.

`lda` (default): discriminant analysis over the classes of all active tasks, from their pooled
within-class covariance. It needs no training, adds up over tasks and can be taken apart again.
`entropy`: the published rule — the module whose output is least uncertain — for one image at a time.
"""
# B batch, N vectors, K all classes, C classes of one task, T tasks, D features

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from model_store.class_means import ALL_CLASSES, ClassMeans
from model_store.errors import InvalidModule
from model_store.screen import ClassScreen
from model_store.statistics import ROUNDING_EIGENVALUE, PooledStatistics, is_positive_definite

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
# With more classes than this (and than features) a CPU screens them before it scores any exactly. A GPU
# reads them all faster than it could choose.
MAX_DENSE_CLASSES = 2048


class ScreenedScores(NamedTuple):
    """[B, K] float32 scores, and [B] how far those of a picture may be from the exact ones."""

    score_BK: Tensor
    error_B: Tensor


@dataclass(frozen=True, slots=True)
class ClassSpan:
    """The span of fewer whitened class means than features: S^(−1/2) times a basis of it, and the Cholesky
    root of the means' Gram matrix, on which the basis rests."""

    basis_DK: Tensor
    gram_root_KK: Tensor

    @classmethod
    def fit(cls, whitened_DK: Tensor, root_DD: Tensor) -> "ClassSpan":
        """From whitened class means and the Cholesky root of the covariance S."""
        gram_root_KK = _gram_root(whitened_DK)
        basis_DK = torch.linalg.solve_triangular(gram_root_KK, whitened_DK.T, upper=False).T
        return cls(torch.linalg.solve_triangular(root_DD.T, basis_DK, upper=True), gram_root_KK)

    def to(self, device: torch.device) -> "ClassSpan":
        return ClassSpan(self.basis_DK.to(device), self.gram_root_KK.to(device))


@dataclass(frozen=True, slots=True)
class Metric:
    """The pooled within-class covariance S as angles need it, float64, and what it was pooled over."""

    root_DD: Tensor  # Cholesky root of S
    precision_DD: Tensor  # S⁻¹
    outer_weight: float  # weight of one outer product r·rᵀ inside S
    num_classes: int
    sha256s: frozenset[str] | None  # of the tasks' modules; None: all tasks there are

    @classmethod
    def fit(
        cls,
        pooled: PooledStatistics,
        feature_dim: int,
        shrinkage: float = SHRINKAGE,
        sha256s: frozenset[str] | None = None,
    ) -> "Metric":
        """From exact sums over tasks. Raises InvalidModule when the pooled scatter is no covariance."""
        eye_DD = torch.eye(feature_dim, dtype=torch.float64)
        freedom = pooled.degrees_of_freedom
        scatter_DD = pooled.scatter(feature_dim)
        variance = float(scatter_DD.diagonal().mean()) / max(freedom, 1)
        if variance <= 0.0:  # one image a class: no spread is known, and angles need no scale
            scatter_DD, variance = torch.zeros_like(eye_DD), 1.0
        weight = (1.0 - shrinkage) / (freedom + PRIOR_IMAGES)
        sphere = weight * PRIOR_IMAGES * variance + shrinkage * variance
        covariance_DD = weight * scatter_DD + sphere * eye_DD
        if not is_positive_definite(covariance_DD - sphere / 2.0 * eye_DD):
            covariance_DD = weight * _without_rounding(scatter_DD) + sphere * eye_DD
        root_DD = torch.linalg.cholesky(covariance_DD)
        return cls(root_DD, torch.cholesky_inverse(root_DD), weight, pooled.num_classes, sha256s)

    @property
    def spans_all(self) -> bool:
        """Whether the classes it was fitted on are as many as features. Of fewer the span counts, which every
        further class changes, and with it the scores of all."""
        return self.num_classes >= len(self.root_DD)

    def knows(self, sha256: str) -> bool:
        """Whether the task of a module is one of those that S was pooled over."""
        return self.sha256s is None or sha256 in self.sha256s

    def to(self, device: torch.device) -> "Metric":
        if self.root_DD.device == device:
            return self
        return replace(self, root_DD=self.root_DD.to(device), precision_DD=self.precision_DD.to(device))


@dataclass(frozen=True, slots=True)
class WhitenedCosine:
    """Discriminant analysis by angle: cos(x − c, μ_k − c) in the metric of the pooled within-class
    covariance S, with c the mean of all class means.

        score_k(x) = g_k / (√q_k · ‖x‖)    g_k = (x − c)ᵀ S⁻¹ (μ_k − c)    q_k = (μ_k − c)ᵀ S⁻¹ (μ_k − c)

    ‖x‖² is the squared norm of S^(−1/2)(x − c) inside the span of the class means plus OUTSIDE_SHARE of the
    whole. Plain LDA scores g_k − q_k/2 grow with how strongly a picture shows its class, so that no single
    temperature makes them true; angles do not (docs/experiments.md). float64 throughout, so that rounding
    never depends visibly on the batch. The solve is on the query's side: D² once per image.

    Of very many classes the offsets μ_k − c are not kept but computed when asked for, and a screen tells
    which to ask for.
    """

    means: ClassMeans
    metric: Metric
    centre_D: Tensor
    offset_KD: Tensor | None  # μ_k − c
    screen: ClassScreen | None
    norm_K: Tensor  # q_k
    span: ClassSpan | None  # None when the whitened class means span everything

    @classmethod
    def fit(
        cls,
        means: ClassMeans,
        metric: Metric,
        centre_D: Tensor | None = None,
        max_dense_classes: int | None = MAX_DENSE_CLASSES,
        previous: "WhitenedCosine | None" = None,
    ) -> "WhitenedCosine":
        """From class means, on the CPU; their mean is the centre unless another is named.

        More than `max_dense_classes` classes (and than features) are screened; None never screens. Whether
        the classes span everything is asked of those that the metric was fitted on.
        `previous` only saves work, where it has the same metric and centre.
        """
        if max_dense_classes is not None and len(means) > max(max_dense_classes, means.feature_dim):
            if previous is not None and previous.screen is not None and previous.metric is metric:
                screen = previous.screen.over(means)
            else:
                centre_D = _mean(means) if centre_D is None else centre_D
                screen = ClassScreen.fit(means, centre_D, metric.root_DD)
            return cls(means, metric, screen.centre_D, None, screen, screen.norm_K, None)
        mean_KD = means.all()
        if centre_D is None:
            centre_D = mean_KD.mean(dim=0)
        offset_KD = mean_KD - centre_D
        whitened_DK = torch.linalg.solve_triangular(metric.root_DD, offset_KD.T, upper=False)
        span = None if metric.spans_all else ClassSpan.fit(whitened_DK, metric.root_DD)
        return cls(means, metric, centre_D, offset_KD, None, (whitened_DK**2).sum(dim=0), span)

    def to(self, device: torch.device) -> "WhitenedCosine":
        if self.offset_KD is None or device.type == "cpu":
            return self
        return replace(
            self,
            metric=self.metric.to(device),
            offset_KD=self.offset_KD.to(device),
            centre_D=self.centre_D.to(device),
            norm_K=self.norm_K.to(device),
            span=None if self.span is None else self.span.to(device),
        )

    @property
    def num_classes(self) -> int:
        return len(self.norm_K)

    def offsets(self, t: int | None = None) -> Tensor:
        """[C, D] float64 offsets μ − c of the classes of task `t`, or of all."""
        if self.offset_KD is not None:
            return self.offset_KD[self.classes(t)]
        return (self.means.all() if t is None else self.means.of_task(t)) - self.centre_D

    def classes(self, t: int | None) -> slice:
        """Where the classes of task `t` stand among all; all without a task."""
        return ALL_CLASSES if t is None else self.means.classes(t)

    def scores(self, x_BD: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """[B, K] float64 scores of [B, D] CLS vectors, about −1 … 5, over all classes or over those of some
        tasks, one task after another."""
        shifted_BD = x_BD.double() - self.centre_D
        query_BD = shifted_BD @ self.metric.precision_DD
        whole_B = (query_BD * shifted_BD).sum(dim=1)
        inside_B = whole_B
        if self.span is not None:
            inside_B = ((shifted_BD @ self.span.basis_DK) ** 2).sum(dim=1)
        if tasks is None:
            return whitened_cosine(query_BD @ self.offsets().T, self.norm_K, inside_B, whole_B)
        offset_CD = torch.cat([self.centre_D.new_empty(0, len(self.centre_D)), *map(self.offsets, tasks)])
        norm_C = torch.cat([self.norm_K[:0], *(self.norm_K[self.classes(t)] for t in tasks)])
        return whitened_cosine(query_BD @ offset_CD.T, norm_C, inside_B, whole_B)

    def screened_scores(self, x_BD: Tensor) -> ScreenedScores:
        """Scores of all classes, and how far off they may be, where classes are screened."""
        assert self.screen is not None, "only very many classes are screened"
        picture = self.screen.rounded(x_BD.double() - self.centre_D)
        return ScreenedScores(
            self.screen.cosines(picture).div_(_FULL_LENGTH), self.screen.error(picture) / _FULL_LENGTH
        )

    def screened_error(self, x_BD: Tensor) -> Tensor:
        """[B] how far off the screened scores of [B, D] CLS vectors may be."""
        assert self.screen is not None, "only very many classes are screened"
        return self.screen.error(self.screen.rounded(x_BD.double() - self.centre_D)) / _FULL_LENGTH

    def lda_scores(self, x_BD: Tensor) -> Tensor:
        """[B, K] scores of plain LDA, g − q/2: the baseline."""
        query_BD = (x_BD.double() - self.centre_D) @ self.metric.precision_DD
        score_BK: Tensor = query_BD @ self.offsets().T - self.norm_K / 2.0
        return score_BK


# Screened classes span all features, so that nothing lies outside and the score is the cosine by this.
_FULL_LENGTH = math.sqrt(1.0 + OUTSIDE_SHARE)


def whitened_cosine(projection_BK: Tensor, norm_BK: Tensor, inside_B: Tensor, whole_B: Tensor) -> Tensor:
    """[B, K] g/(√q·‖x‖) from g, q, and x's squared norm inside the span of the class means and whole."""
    length_B = (inside_B + OUTSIDE_SHARE * whole_B).clamp_min(1e-30).sqrt()
    return projection_BK / norm_BK.clamp_min(1e-30).sqrt() / length_B[:, None]


def _mean(means: ClassMeans) -> Tensor:
    """[D] float64 mean of very many class means."""
    sums = [means.of_block(block).sum(dim=0, dtype=torch.float64) for block in means.blocks()]
    return torch.stack(sums).sum(dim=0) / len(means)


def _without_rounding(scatter_DD: Tensor) -> Tensor:
    """The nearest matrix without negative eigenvalues. The bytes that correlations are stored in may leave
    some, and the rounding of like tasks adds up.

    Raises InvalidModule when rounding does not explain them.
    """
    deviation_D = scatter_DD.diagonal().clamp_min(1e-300).sqrt()
    correlation_DD = scatter_DD / deviation_D / deviation_D[:, None]
    if not is_positive_definite(correlation_DD + ROUNDING_EIGENVALUE * torch.eye(len(scatter_DD))):
        raise InvalidModule("the within-class scatter is no covariance: pooled, it is not positive definite")
    value_D, vector_DD = torch.linalg.eigh(scatter_DD)
    positive_DD: Tensor = (vector_DD * value_D.clamp_min(0.0)) @ vector_DD.T
    return positive_DD


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
    prob_BK = torch.softmax(score_BK, dim=1)
    prob_BT = prob_BK.new_zeros(len(score_BK), num_tasks)
    prob_BT.scatter_add_(1, task_K.expand_as(prob_BK), prob_BK)
    return prob_BT.clamp_(max=1.0).log()  # the sum may round to more


def entropy(log_prob_BK: Tensor) -> Tensor:
    """[B] entropy in nats, −Σ p log p; log K for the uniform distribution."""
    return -(log_prob_BK.exp() * log_prob_BK).nan_to_num(nan=0.0).sum(dim=-1)
