"""RanPAC, phase 2: ridge regression on many random features of the frozen CLS vector.

McDonnell, Gong, Parvaneh, Abbasnejad, van den Hengel, "RanPAC: Random projections and pre-trained models
for continual learning" (NeurIPS 2023, arXiv 2307.02251).
"""
# N training pictures, B batch, M random features, C columns, D features, R = min(N, M)

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.continual.method import ScoringMethod, TrainingRows
from training.continual.tasks import ContinualTask

PUBLISHED_WIDTH = 10_000
RIDGES = tuple(10.0 ** (k / 2.0) for k in range(0, 19))  # 1 … 1e9, half a decade apart
_EIGENVALUE_FLOOR = 1e-9  # of the largest; smaller ones are rounding noise


class RanPac(ScoringMethod):
    """h = ReLU(x·W) with a fixed Gaussian W [D, M], then (HᵀH + λI)⁻¹HᵀY.

    λ is the one with the best leave-one-out accuracy over everything seen (the paper holds out a fifth of
    each task). Training vectors are kept for that alone; the sums HᵀH and HᵀY are what the method
    publishes, and `size_bytes` counts those.
    """

    kind = "additive"

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.width = width
        self.ridge: float | None = None
        self._seed = seed
        self._projection_DM: Tensor | None = None
        self._rows = TrainingRows()
        self._weight_MC: Tensor | None = None

    def add(self, task: ContinualTask) -> None:
        if self._projection_DM is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._projection_DM = torch.randn(task.train.cls_ND.shape[1], self.width, generator=generator)
        self._rows.add(task)
        self._weight_MC = None

    def random_features(self, cls_BD: Tensor) -> Tensor:
        assert self._projection_DM is not None, "a task was learnt"
        return torch.relu(cls_BD @ self._projection_DM)

    def scores(self, cls_ND: Tensor) -> Tensor:
        if self._weight_MC is None:
            feature_NM = self.random_features(self._rows.vectors)
            self.ridge, self._weight_MC = fit_ridge(feature_NM, self._rows.columns, len(self.columns.label_C))
        return self.random_features(cls_ND).double() @ self._weight_MC

    @property
    def size_bytes(self) -> int:
        return 4 * self.width * (self.width + len(self.columns.label_C))


def fit_ridge(
    feature_NM: Tensor, class_N: Tensor, num_classes: int, ridges: tuple[float, ...] = RIDGES
) -> tuple[float, Tensor]:
    """(λ, weights [M, C]) of ridge regression onto one-hot targets, λ by exact leave-one-out accuracy.

    With H = U·diag(σ)·Vᵀ the fitted values are U·diag(σ²/(σ²+λ))·UᵀY and the leverage of row n is
    Σ_r U²_nr·σ²_r/(σ²_r+λ), so that one decomposition of the smaller Gram matrix serves every λ.
    """
    target_NC = F.one_hot(class_N, num_classes).double()
    left_NR, square_R = _left_singular(feature_NM)
    projected_RC = left_NR.T @ target_NC
    best_accuracy, best_ridge = -1.0, ridges[0]
    for ridge in ridges:
        keep_R = square_R / (square_R + ridge)
        leverage_N = (left_NR**2) @ keep_R
        residual_NC = target_NC - left_NR @ (keep_R[:, None] * projected_RC)
        left_out_NC = target_NC - residual_NC / (1.0 - leverage_N).clamp_min(1e-9)[:, None]
        accuracy = float((left_out_NC.argmax(dim=1) == class_N).double().mean())
        if accuracy >= best_accuracy:  # of equals the strongest
            best_accuracy, best_ridge = accuracy, ridge
    dual_NC = left_NR @ (projected_RC / (square_R + best_ridge)[:, None])
    return best_ridge, (feature_NM.T @ dual_NC.to(feature_NM.dtype)).double()


def _left_singular(feature_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(left singular vectors [N, R], squared singular values [R]), float64, without the null space."""
    rows, columns = feature_NM.shape
    if rows <= columns:
        square_R, left_NR = torch.linalg.eigh((feature_NM @ feature_NM.T).double())
        kept_R = square_R > _EIGENVALUE_FLOOR * square_R[-1]
        return left_NR[:, kept_R], square_R[kept_R]
    square_R, right_MR = torch.linalg.eigh((feature_NM.T @ feature_NM).double())
    kept_R = square_R > _EIGENVALUE_FLOOR * square_R[-1]
    square_R = square_R[kept_R]
    scaled_MR = right_MR[:, kept_R] * square_R.rsqrt()
    return feature_NM.double() @ scaled_MR, square_R
