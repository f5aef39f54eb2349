"""One task version in memory: the two experts that score its classes, and what its file says of it."""
# B batch, K classes, D features

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.calibration import CalibrationSet
from model_store.landmarks import LandmarkRidge, Standardisation
from model_store.luca import CosineHead, LuCA
from model_store.statistics import ClassStatistics


class ActiveModule(Protocol):
    """What a bank asks of each of its modules, and the way to the rest: a whole module, or one of very many
    whose tensors are read when the task may answer."""

    @property
    def task(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def sha256(self) -> str: ...
    @property
    def label_space(self) -> str | None: ...
    @property
    def abstain_level(self) -> float | None: ...
    @property
    def mean_KD(self) -> Tensor:  # noqa: N802
        """[K, D] float32 class means."""
        ...

    @property
    def num_known(self) -> int:
        """Calibration vectors."""
        ...

    def whole(self) -> "TaskModule":
        """The module with its tensors. Raises StoreUnavailable and CorruptStore where they must be read."""
        ...


@dataclass(frozen=True, slots=True)
class TaskModule:
    """One task version, as its module file holds it. Treat every tensor as read-only.

    Two experts score the task's classes: LuCA with its cosine head, and a closed-form ridge on landmarks.
    The trainer weighs them by how well they did on vectors they had not seen; a weight may be 0.
    """

    task: str
    labels: tuple[str, ...]
    sha256: str
    standardisation: Standardisation | None  # None: LuCA reads the CLS vector as it is
    luca: LuCA
    head: CosineHead
    ridge: LandmarkRidge
    luca_weight: float
    ridge_weight: float
    statistics: ClassStatistics
    calibration: CalibrationSet
    label_space: str | None = None  # tasks that name the same one answer together
    abstain_level: float | None = None  # p-value at or below which it abstains; None: the server's

    @property
    def mean_KD(self) -> Tensor:  # noqa: N802
        return self.statistics.mean_KD

    @property
    def num_known(self) -> int:
        return len(self.calibration)

    def whole(self) -> "TaskModule":
        return self

    @torch.inference_mode()
    def luca_output(self, cls_BD: Tensor) -> Tensor:
        """[B, D] recalibrated features."""
        if self.standardisation is not None:
            cls_BD = self.standardisation.luca_input(cls_BD)
        out_BD: Tensor = self.luca(cls_BD)
        return out_BD

    @torch.inference_mode()
    def directions(self, cls_BD: Tensor) -> Tensor:
        """[B, D] unit vectors of the recalibrated features, which a cosine head compares with its own."""
        return F.normalize(self.luca_output(cls_BD), dim=-1)

    @torch.inference_mode()
    def logits(self, cls_BD: Tensor) -> Tensor:
        """[B, K] float32 logits of [B, D] CLS vectors, on the scale of log-probabilities."""
        logits_BK = cls_BD.new_zeros(cls_BD.shape[0], len(self.labels))
        if self.luca_weight > 0.0:
            logits_BK = logits_BK + self.luca_weight * self.head(self.luca_output(cls_BD))
        if self.ridge_weight > 0.0:
            assert self.standardisation is not None, "the ridge reads standardised vectors"
            landmark_MD = self.standardisation(self.calibration.cls_MD.float())
            ridge_BK = self.ridge.scores(self.standardisation(cls_BD), landmark_MD)
            logits_BK = logits_BK + self.ridge_weight * ridge_BK
        return logits_BK
