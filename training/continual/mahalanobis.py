"""FeCAM: Mahalanobis distance under a covariance of each class's own.

Goswami, Liu, Twardowski, van de Weijer, "FeCAM: Exploiting the heterogeneity of class distributions in
exemplar-free continual learning" (NeurIPS 2023, arXiv 2309.14062).
"""
# N pictures, C columns, D features

import torch
from torch import Tensor

from training.continual.method import ScoringMethod
from training.continual.tasks import ContinualTask

TUKEY_POWER = 0.5
DIAGONAL_SHRINKAGE = 1.0  # γ₁ of the paper
OFF_DIAGONAL_SHRINKAGE = 1.0  # γ₂


class FeCam(ScoringMethod):
    """−(x − μ)ᵀ R⁻¹ (x − μ) with R the correlation matrix of the shrunk class covariance.

    Features are power-transformed first; CLS vectors have both signs, so the sign is kept. All constants
    are the paper's for classes with many pictures.
    """

    kind = "nearest"

    def __init__(self) -> None:
        super().__init__()
        self._mean: list[Tensor] = []
        self._root: list[Tensor] = []  # Cholesky factors of R, [D, D] float32 each

    def add(self, task: ContinualTask) -> None:
        x_ND = tukey(task.train.cls_ND)
        for k in range(len(task.label_K)):
            of_class_ND = x_ND[task.train.label_N == k].double()
            self._mean.append(of_class_ND.mean(dim=0))
            self._root.append(torch.linalg.cholesky(shrunk_correlation(of_class_ND)).float())

    def scores(self, cls_ND: Tensor) -> Tensor:
        x_DN = tukey(cls_ND).double().T
        distances = [
            (torch.linalg.solve_triangular(root_DD, (x_DN - mean_D[:, None]).float(), upper=False) ** 2).sum(
                0
            )
            for mean_D, root_DD in zip(self._mean, self._root, strict=True)
        ]
        return -torch.stack(distances, dim=1)

    @property
    def size_bytes(self) -> int:
        return 4 * sum(mean_D.numel() * (mean_D.numel() + 3) // 2 for mean_D in self._mean)


def tukey(x_ND: Tensor) -> Tensor:
    return x_ND.sign() * x_ND.abs() ** TUKEY_POWER


def shrunk_correlation(x_ND: Tensor) -> Tensor:
    """[D, D]: the covariance plus γ₁ times its mean variance on the diagonal and γ₂ times its mean
    covariance off it, scaled to a unit diagonal (the paper's shrinkage and normalisation)."""
    size = x_ND.shape[1]
    if len(x_ND) < 2:
        return torch.eye(size, dtype=x_ND.dtype)
    covariance_DD = torch.cov(x_ND.T)
    variance = covariance_DD.diagonal().mean()
    off_diagonal = (covariance_DD.sum() - covariance_DD.diagonal().sum()) / (size * (size - 1))
    covariance_DD = covariance_DD + OFF_DIAGONAL_SHRINKAGE * off_diagonal
    covariance_DD.diagonal().add_(DIAGONAL_SHRINKAGE * variance - OFF_DIAGONAL_SHRINKAGE * off_diagonal)
    deviation_D = covariance_DD.diagonal().clamp_min(1e-12).sqrt()
    return covariance_DD / deviation_D[:, None] / deviation_D
