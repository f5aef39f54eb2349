"""Nearest class mean and linear discriminant analysis: class statistics of the frozen features, added up."""
# N pictures, C columns, D features

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.statistics import PooledStatistics, fit_class_statistics
from training.continual.method import ScoringMethod
from training.continual.tasks import ContinualTask

SHRINKAGE = 0.1


class SimpleCil(ScoringMethod):
    """Cosine similarity to the class means. Zhou, Cai, Ye, Zhan, Liu, "Revisiting class-incremental learning
    with pre-trained models" (IJCV 2024, arXiv 2303.07338)."""

    kind = "nearest"

    def __init__(self) -> None:
        super().__init__()
        self._mean_CD: Tensor | None = None

    def add(self, task: ContinualTask) -> None:
        statistics = fit_class_statistics(task.train.cls_ND, task.train.label_N, len(task.label_K))
        known = [] if self._mean_CD is None else [self._mean_CD]
        self._mean_CD = torch.cat([*known, statistics.mean_KD])

    def scores(self, cls_ND: Tensor) -> Tensor:
        assert self._mean_CD is not None, "a task was learnt"
        return F.normalize(cls_ND, dim=1) @ F.normalize(self._mean_CD, dim=1).T

    @property
    def size_bytes(self) -> int:
        return 0 if self._mean_CD is None else self._mean_CD.numel() * 4


class Lda(ScoringMethod):
    """log P(class | x) = xᵀS⁻¹μ − ½μᵀS⁻¹μ + const with S the pooled within-class covariance, SHRINKAGE of it
    replaced by a sphere of the same trace; equal priors. Streaming form: Hayes, Kanan, "Lifelong machine
    learning with deep streaming linear discriminant analysis" (CVPR-W 2020, arXiv 1909.01520)."""

    kind = "probability"

    def __init__(self) -> None:
        super().__init__()
        self._mean_CD: Tensor | None = None
        self._pooled: PooledStatistics | None = None

    def add(self, task: ContinualTask) -> None:
        statistics = fit_class_statistics(task.train.cls_ND, task.train.label_N, len(task.label_K))
        known = [] if self._mean_CD is None else [self._mean_CD]
        self._mean_CD = torch.cat([*known, statistics.mean_KD.double()])
        pooled = self._pooled or PooledStatistics.empty(task.train.cls_ND.shape[1])
        self._pooled = pooled.add([statistics])

    def scores(self, cls_ND: Tensor) -> Tensor:
        assert self._mean_CD is not None and self._pooled is not None, "a task was learnt"
        covariance_DD = self._pooled.scatter(cls_ND.shape[1]) / max(self._pooled.degrees_of_freedom, 1)
        variance = float(covariance_DD.diagonal().mean()) or 1.0  # one picture a class shows no spread
        covariance_DD = (1.0 - SHRINKAGE) * covariance_DD
        covariance_DD.diagonal().add_(SHRINKAGE * variance)
        weight_DC = torch.cholesky_solve(self._mean_CD.T, torch.linalg.cholesky(covariance_DD))
        offset_C = (self._mean_CD.T * weight_DC).sum(dim=0) / 2.0
        return torch.softmax(cls_ND.double() @ weight_DC - offset_C, dim=1)

    @property
    def size_bytes(self) -> int:
        if self._mean_CD is None or self._pooled is None:
            return 0
        return self._mean_CD.numel() * 4 + self._pooled.scatter_P.numel() * 4
