"""Task selection as published, for one image at a time: the module whose output is least uncertain answers.

Source: Yildirim, Gok Yildirim, Vanschoren (TMLR 2026, arXiv 2502.14762), without the average over a batch.
"""
# B batch, K classes of all tasks, T tasks

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.selection import entropy
from model_store.task_module import TaskModule


@dataclass(frozen=True, slots=True)
class LeastUncertain:
    """For each image the module that answers, and its probabilities over the classes of all tasks."""

    module_B: Tensor
    prob_BK: Tensor


def least_uncertain(modules: Sequence[TaskModule], cls_BD: Tensor) -> LeastUncertain:
    """Every module scores the classes of all tasks on its own output; the least entropy wins, of equals the
    first."""
    head_KD = torch.cat([F.normalize(module.head.weight_KD, dim=-1) for module in modules])
    best_entropy_B = cls_BD.new_full((len(cls_BD),), torch.inf, dtype=torch.float64)
    best_prob_BK = cls_BD.new_zeros((len(cls_BD), len(head_KD)), dtype=torch.float64)
    module_B = torch.zeros(len(cls_BD), dtype=torch.int64, device=cls_BD.device)
    for t, module in enumerate(modules):
        log_prob_BK = module.log_probs_over(cls_BD, head_KD)
        entropy_B = entropy(log_prob_BK)
        better_B = entropy_B < best_entropy_B
        best_entropy_B = torch.where(better_B, entropy_B, best_entropy_B)
        best_prob_BK = torch.where(better_B[:, None], log_prob_BK.exp(), best_prob_BK)
        module_B = torch.where(better_B, t, module_B)
    return LeastUncertain(module_B, best_prob_BK)
