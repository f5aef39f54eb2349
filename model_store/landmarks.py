"""The closed-form half of a module: ridge regression on similarities to a few stored vectors.

The calibration set of a module file doubles as landmarks, so this expert costs K·(M + D) numbers. It is
there from the first picture on, has exact leave-one-out predictions, and LuCA has to improve on it.
"""
# N pictures, B batch, M landmarks, K classes, D features, F = M + D

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SHARPNESS = 2.0  # similarity exp(SHARPNESS · (cos − 1))
LINEAR_SHARE = 0.5  # scale of the linear features beside the similarities
RIDGE = 0.1
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

    landmark_MD: Tensor  # unit rows
    kernel_weight_MK: Tensor
    linear_weight_DK: Tensor

    def scores(self, unit_BD: Tensor) -> Tensor:
        """[B, K] float32; about 1 − 1/K for the right class and −1/K for the others."""
        similarity_BM = ((unit_BD @ self.landmark_MD.T - 1.0) * SHARPNESS).exp()
        return similarity_BM @ self.kernel_weight_MK + unit_BD @ self.linear_weight_DK


def fit_landmark_ridge(
    unit_ND: Tensor, label_N: Tensor, num_classes: int, landmark_MD: Tensor
) -> tuple[LandmarkRidge, Tensor]:
    """The expert and its exact leave-one-out scores [N, K].

    Ridge regression onto centred one-hot targets in the features [k(x, landmarks) · k(landmarks)^(−1/2),
    LINEAR_SHARE · x]; leaving one out follows from the hat matrix.
    """
    unit_ND, landmark_MD = unit_ND.double(), landmark_MD.double()
    value_M, vector_MM = torch.linalg.eigh(((landmark_MD @ landmark_MD.T - 1.0) * SHARPNESS).exp())
    whiten_MM = vector_MM * (value_M.clamp_min(0.0) + _JITTER).rsqrt()
    similarity_NM = ((unit_ND @ landmark_MD.T - 1.0) * SHARPNESS).exp()
    feature_NF = torch.cat([similarity_NM @ whiten_MM, LINEAR_SHARE * unit_ND], dim=1)
    target_NK = F.one_hot(label_N, num_classes).double() - 1.0 / num_classes
    gram_FF = feature_NF.T @ feature_NF
    gram_FF.diagonal().add_(RIDGE)
    root_FF = torch.linalg.cholesky(gram_FF)
    weight_FK = torch.cholesky_solve(feature_NF.T @ target_NK, root_FF)
    leverage_N = (torch.linalg.solve_triangular(root_FF, feature_NF.T, upper=False) ** 2).sum(dim=0)
    residual_NK = (target_NK - feature_NF @ weight_FK) / (1.0 - leverage_N).clamp_min(1e-9)[:, None]
    num_landmarks = len(landmark_MD)
    ridge = LandmarkRidge(
        landmark_MD.float(),
        (whiten_MM @ weight_FK[:num_landmarks]).float(),
        (LINEAR_SHARE * weight_FK[num_landmarks:]).float(),
    )
    return ridge, (target_NK - residual_NK).float()
