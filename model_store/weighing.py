"""How probable each task is for a picture: the scores of all classes, exact wherever it can matter."""
# B batch, K classes of all tasks, C classes of some, T tasks, S label spaces, M calibration vectors

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.joint import JointModel
from model_store.known_vectors import unseen_scores
from model_store.selection import WhitenedCosine, task_log_probs


@dataclass(frozen=True, slots=True)
class TaskWeighing:
    """P(task | x) of a bank's tasks, and the selection scores that it rests on.

    Scores are exact for all tasks whose labels could be listed. Where classes are screened, the others keep
    the screen's, and only add to the sum that probabilities are divided by.
    """

    selector: WhitenedCosine
    joint: JointModel
    task_of_class_K: Tensor

    def weigh(self, cls_BD: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
        """([B, K] float64 selection scores, [B, T] log P(task | x)). Labels at or above `threshold` will be
        listed, and so must be those of their tasks."""
        if self.selector.screen is None:
            score_BK = self.selector.scores(cls_BD)
        else:
            screened_BK, error_B = self.selector.screened_scores(cls_BD)
            likely_BT = self._likely_tasks(screened_BK, error_B, threshold)
            score_BK = self._score_likely(cls_BD, screened_BK, likely_BT)
        return score_BK, self.log_probs(score_BK)

    def weigh_unseen(self, t: int, row_M: Tensor) -> tuple[Tensor, Tensor]:
        """The same for calibration vectors of task `t`, each as if its own task had never seen it."""
        module = self.joint.modules[t].whole()
        score_MK = unseen_scores(self.selector, module, t, own_classes=False, rows=row_M)
        if self.selector.screen is not None:
            cls_MD = module.calibration.cls_MD[row_M].float()
            likely_MT = self._likely_tasks(score_MK.float(), self.selector.screened_error(cls_MD))
            likely_MT[:, t] = False  # its own scores are those without the vector
            score_MK = self._score_likely(cls_MD, score_MK, likely_MT)
        return score_MK, self.log_probs(score_MK)

    def log_probs(self, score_BK: Tensor) -> Tensor:
        """[B, T] log P(task | x) from selection scores of all classes."""
        sharpness = self.joint.blend.sharpness
        return task_log_probs(sharpness * score_BK, self.task_of_class_K, len(self.joint.modules))

    def scores_of(self, tasks: Sequence[int], cls_BD: Tensor) -> Tensor:
        """[B, K] float64 selection scores, filled for the classes of some tasks."""
        score_BK = cls_BD.new_zeros((len(cls_BD), self.selector.num_classes), dtype=torch.float64)
        score_BK[:, self._classes_of(tasks)] = self.selector.scores(cls_BD, tasks)
        return score_BK

    def neighbours(self, t: int, num: int) -> list[int]:
        """At most `num` other tasks, those first whose classes look most like those of task `t`."""
        mean_CD = self.joint.modules[t].mean_KD.to(self.task_of_class_K.device)
        if self.selector.screen is not None:
            score_CK = self.selector.screened_scores(mean_CD).score_BK
        else:
            score_CK = self.selector.scores(mean_CD)
        best_T = score_CK.new_full((len(self.joint.modules),), -torch.inf)
        best_T.scatter_reduce_(0, self.task_of_class_K, score_CK.amax(dim=0), reduce="amax")
        best_T[t] = -torch.inf
        order: list[int] = best_T.argsort(descending=True, stable=True)[: min(num, len(best_T) - 1)].tolist()
        return order

    def _likely_tasks(self, screened_BK: Tensor, error_B: Tensor, threshold: float | None = None) -> Tensor:
        """[B, T] whether a label of the task could be listed for the picture, given what the screen says."""
        prob_BS = self.joint.space_probs(self.log_probs(screened_BK))
        # A probability is a sum of exp(sharpness · score) divided by another, and so is the bound.
        slack_B = (4.0 * self.joint.blend.sharpness * error_B.double()).exp()
        likely_BS = prob_BS >= (self.joint.least_listed(prob_BS, threshold) / slack_B)[:, None]
        return likely_BS[:, self.joint.spaces.space_of_task_T]

    def _score_likely(self, cls_BD: Tensor, score_BK: Tensor, likely_BT: Tensor) -> Tensor:
        """[B, K] float64: the exact scores of each picture's likely tasks, the given ones of all others."""
        tasks = likely_BT.any(dim=0).nonzero().squeeze(1).tolist()
        classes_C = self._classes_of(tasks)
        exact_BC = self.selector.scores(cls_BD, tasks)
        score_BK = score_BK.double()
        score_BK[:, classes_C] = torch.where(
            likely_BT[:, self.task_of_class_K[classes_C]], exact_BC, score_BK[:, classes_C]
        )
        return score_BK

    def _classes_of(self, tasks: Sequence[int]) -> Tensor:
        """Where the classes of some tasks stand among all, task after task."""
        classes = (self.joint.classes(t) for t in tasks)
        return torch.tensor([k for one in classes for k in range(one.start, one.stop)], dtype=torch.int64)
