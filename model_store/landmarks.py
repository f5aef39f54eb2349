"""The closed-form half of a module: ridge regression on similarities to a few stored vectors.

The calibration set of a module file doubles as landmarks, so this expert costs K·(M + D) numbers. It is
there from the first picture on, has exact leave-one-out predictions, and LuCA has to improve on it.
"""
# N pictures, B batch, M landmarks, K classes, D features, F = M + D

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SHARPNESS = 0.5  # similarity exp(SHARPNESS · (cos − 1))
RIDGES = (0.1, 0.2, 0.5, 1.0, 2.0)  # penalties to choose from, by vectors left out
_JITTER = 1e-4


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Bring a task's CLS vectors to unit vectors: (x − mean) · scale, then L2-normalised.

    The scale is σ^(−1/2) per feature, half-way to whitening; whitening wholly is worse, and so is the full
    within-class covariance of so few pictures (docs/experiments.md).
    """

    mean_D: Tensor
    scale_D: Tensor

    @classmethod
    def fit(cls, cls_ND: Tensor) -> "Standardisation":
        deviation_D = cls_ND.std(dim=0, correction=0)
        floor = float(deviation_D.mean()) * 1e-3 + 1e-12
        return cls(cls_ND.mean(dim=0), deviation_D.clamp_min(floor).rsqrt())

    def __call__(self, cls_BD: Tensor) -> Tensor:
        return F.normalize((cls_BD - self.mean_D) * self.scale_D, dim=-1)

    def luca_input(self, cls_BD: Tensor) -> Tensor:
        """What LuCA reads: the unit vectors times √D, so that entries are of order 1."""
        root: float = cls_BD.shape[1] ** 0.5
        return self(cls_BD) * root


@dataclass(frozen=True, slots=True)
class LandmarkRidge:
    """Scores of unit vectors: similarities to the landmarks and the vector itself, linearly combined."""

    kernel_weight_MK: Tensor
    linear_weight_DK: Tensor

    def scores(self, unit_BD: Tensor, landmark_MD: Tensor) -> Tensor:
        """[B, K] float32; about 1 − 1/K for the right class and −1/K for the others. All rows are unit."""
        similarity_BM = ((unit_BD @ landmark_MD.T - 1.0) * SHARPNESS).exp()
        return similarity_BM @ self.kernel_weight_MK.float() + unit_BD @ self.linear_weight_DK.float()


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """The expert with one penalty, and its exact leave-one-out scores `left_out_NK`."""

    penalty: float
    expert: LandmarkRidge
    left_out_NK: Tensor


def fit_landmark_ridges(
    unit_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    landmark_MD: Tensor,
    penalties: Sequence[float] = RIDGES,
) -> list[RidgeFit]:
    """The expert with each of `penalties`.

    Ridge regression onto centred one-hot targets in the features [k(x, landmarks) · k(landmarks)^(−1/2), x];
    leaving one out follows from the hat matrix. One decomposition of the features' Gram matrix serves all.
    """
    unit_ND, landmark_MD = unit_ND.double(), landmark_MD.double()
    value_M, vector_MM = torch.linalg.eigh(((landmark_MD @ landmark_MD.T - 1.0) * SHARPNESS).exp())
    whiten_MM = vector_MM * (value_M.clamp_min(0.0) + _JITTER).rsqrt()
    similarity_NM = ((unit_ND @ landmark_MD.T - 1.0) * SHARPNESS).exp()
    feature_NF = torch.cat([similarity_NM @ whiten_MM, unit_ND], dim=1)
    target_NK = F.one_hot(label_N, num_classes).double() - 1.0 / num_classes
    square_F, direction_FF = torch.linalg.eigh(feature_NF.T @ feature_NF)
    square_F = square_F.clamp_min(0.0)
    turned_NF = feature_NF @ direction_FF
    product_FK = turned_NF.T @ target_NK
    num_landmarks = len(landmark_MD)
    fits = []
    for penalty in penalties:
        weight_FK = direction_FF @ (product_FK / (square_F + penalty)[:, None])
        leverage_N = (turned_NF**2) @ (square_F + penalty).reciprocal()
        residual_NK = (target_NK - feature_NF @ weight_FK) / (1.0 - leverage_N).clamp_min(1e-9)[:, None]
        expert = LandmarkRidge(
            (whiten_MM @ weight_FK[:num_landmarks]).float(),
            weight_FK[num_landmarks:].float(),
        )
        fits.append(RidgeFit(penalty, expert, (target_NK - residual_NK).float()))
    return fits
