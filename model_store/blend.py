"""How a bank combines closed-form scores and module logits, fitted on calibration sets."""
# B batch, N vectors, K all classes, C classes of one task, W classes of the widest task

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.calibration import minimise_over_log_scale, negative_log_likelihood

MIN_VECTORS = 50  # with fewer, the defaults below stand
SHARPNESS_RANGE = (1.0, 300.0)
_WEIGHTS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0, 1.2)


@dataclass(frozen=True, slots=True)
class Blend:
    """How a bank combines its two sources, fitted on the calibration sets of its tasks:

    P(task | x)        ∝ Σ over its classes of exp(sharpness · score)
    P(class | task, x) ∝ exp(module_weight · logit + score_weight · sharpness · score)
    """

    sharpness: float = 15.0
    module_weight: float = 0.5
    score_weight: float = 0.5

    def class_log_probs(self, logits_BK: Tensor, score_BK: Tensor, absent_BK: Tensor | None = None) -> Tensor:
        """[B, K] float64 log P(class | task, x) over one task's classes; `absent_BK` marks padding."""
        closed_form_BK = self.score_weight * self.sharpness * score_BK
        sum_BK = self.module_weight * logits_BK.double() + closed_form_BK
        if absent_BK is not None:
            sum_BK = sum_BK.masked_fill(absent_BK, -torch.inf)
        return torch.log_softmax(sum_BK, dim=1)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Calibration vectors `row_N` of a task (its index in the bank) as if unseen: classes `label_N` within
    the task, selection scores over all classes, held-out module logits, and where the task's classes begin
    among all."""

    task: int
    row_N: Tensor
    label_N: Tensor
    score_NK: Tensor
    logits_NC: Tensor
    first_class: int


def fit_blend(evidence: Sequence[Evidence], number_K: Tensor) -> Blend:
    """The blend that makes the joint probabilities of known pictures most truthful. `number_K` is the
    number of each class's label, equal where tasks of one label space know the same label.

    log P(task, class) is the sum of log P(task) and log P(class | task), so they are fitted apart: the
    sharpness on the scores over all classes, the two weights within the tasks.
    """
    score_NK = torch.cat([one.score_NK for one in evidence])
    if len(score_NK) < MIN_VECTORS:
        return Blend()
    class_N = torch.cat([one.label_N + one.first_class for one in evidence])

    num_labels = int(number_K.max()) + 1

    def selection_loss(sharpness: float) -> float:
        log_prob_NK = torch.log_softmax(sharpness * score_NK, dim=1)
        if num_labels == len(number_K):
            return negative_log_likelihood(log_prob_NK, class_N)
        prob_NL = score_NK.new_zeros(len(score_NK), num_labels).index_add(1, number_K, log_prob_NK.exp())
        return negative_log_likelihood(prob_NL.log(), number_K[class_N])

    sharpness = minimise_over_log_scale(selection_loss, *SHARPNESS_RANGE, steps=20)
    width = max(one.logits_NC.shape[1] for one in evidence)
    label_N = torch.cat([one.label_N for one in evidence])
    logits_NW = torch.cat([_widen(one.logits_NC.double(), width) for one in evidence])
    own_NW = torch.cat([_widen(_own_scores(one), width) for one in evidence])
    absent_NW = torch.cat(
        [
            (torch.arange(width, device=label_N.device) >= one.logits_NC.shape[1]).expand(
                len(one.label_N), -1
            )
            for one in evidence
        ]
    )
    candidates = [
        Blend(sharpness, module_weight, score_weight)
        for module_weight in _WEIGHTS
        for score_weight in _WEIGHTS
        if module_weight > 0.0 or score_weight > 0.0
    ]

    def class_loss(blend: Blend) -> float:
        return negative_log_likelihood(blend.class_log_probs(logits_NW, own_NW, absent_NW), label_N)

    return min(candidates, key=class_loss)


def _own_scores(one: Evidence) -> Tensor:
    return one.score_NK[:, one.first_class : one.first_class + one.logits_NC.shape[1]].double()


def _widen(value_NC: Tensor, width: int) -> Tensor:
    return F.pad(value_NC, (0, width - value_NC.shape[1]))
