"""Nearest class mean and linear discriminant analysis: class statistics of the frozen features, added up.

Sums are kept in float64, unlike those of module files, so that the baselines owe nothing to the product.
"""
# N pictures, K classes of one task, C columns, D features

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.continual.method import ScoringMethod
from training.continual.tasks import ContinualTask

SHRINKAGE = 0.1


class SimpleCil(ScoringMethod):
    """Cosine similarity to the class means. Zhou, Cai, Ye, Zhan, Liu, "Revisiting class-incremental learning
    with pre-trained models" (IJCV 2024, arXiv 2303.07338)."""

    kind = "nearest"

    def __init__(self) -> None:
        super().__init__()
        self._means: list[Tensor] = []  # [K, D] of each task

    def add(self, task: ContinualTask) -> None:
        self._means.append(_class_means(task))

    def scores(self, cls_ND: Tensor) -> Tensor:
        return F.normalize(cls_ND.double(), dim=1) @ F.normalize(torch.cat(self._means), dim=1).T

    @property
    def size_bytes(self) -> int:
        return 4 * sum(mean_KD.numel() for mean_KD in self._means)


class Lda(ScoringMethod):
    """log P(class | x) = xᵀS⁻¹μ − ½μᵀS⁻¹μ + const with S the pooled within-class covariance, SHRINKAGE of it
    replaced by a sphere of the same trace; equal priors. Streaming form: Hayes, Kanan, "Lifelong machine
    learning with deep streaming linear discriminant analysis" (CVPR-W 2020, arXiv 1909.01520)."""

    kind = "probability"

    def __init__(self) -> None:
        super().__init__()
        self._means: list[Tensor] = []  # [K, D] of each task
        self._scatter_DD = torch.zeros(())
        self._freedom = 0

    def add(self, task: ContinualTask) -> None:
        mean_KD = _class_means(task)
        residual_ND = task.train.cls_ND.double() - mean_KD[task.train.label_N]
        self._means.append(mean_KD)
        self._scatter_DD = self._scatter_DD + residual_ND.T @ residual_ND
        self._freedom += residual_ND.shape[0] - mean_KD.shape[0]

    def scores(self, cls_ND: Tensor) -> Tensor:
        mean_CD = torch.cat(self._means)
        covariance_DD = self._scatter_DD / max(self._freedom, 1)
        variance = float(covariance_DD.diagonal().mean()) or 1.0  # one picture a class shows no spread
        covariance_DD = (1.0 - SHRINKAGE) * covariance_DD
        covariance_DD.diagonal().add_(SHRINKAGE * variance)
        weight_DC = torch.cholesky_solve(mean_CD.T, torch.linalg.cholesky(covariance_DD))
        offset_C = (mean_CD.T * weight_DC).sum(dim=0) / 2.0
        return torch.softmax(cls_ND.double() @ weight_DC - offset_C, dim=1)

    @property
    def size_bytes(self) -> int:
        size = self._scatter_DD.shape[-1]
        return 4 * (sum(mean_KD.numel() for mean_KD in self._means) + size * (size + 1) // 2)


def _class_means(task: ContinualTask) -> Tensor:
    """[K, D] float64"""
    cls_ND, label_N = task.train.cls_ND.double(), task.train.label_N
    sum_KD = cls_ND.new_zeros(len(task.label_K), cls_ND.shape[1]).index_add_(0, label_N, cls_ND)
    return sum_KD / torch.bincount(label_N, minlength=len(task.label_K))[:, None]
