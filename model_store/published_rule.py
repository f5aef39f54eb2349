"""Task selection as published, for one image at a time: the module whose output is least uncertain answers.

Source: Yildirim, Gok Yildirim, Vanschoren (TMLR 2026, arXiv 2502.14762), without the average over a batch.
"""
# B batch, K classes of all tasks, T tasks, G modules of a block, D features

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.selection import entropy
from model_store.task_module import ActiveModule


@dataclass(frozen=True, slots=True)
class LeastUncertain:
    """For each image the module that answers, and its probabilities over the classes of all tasks."""

    module_B: Tensor
    prob_BK: Tensor


# Log-probabilities held at a time, 32 MiB: as many modules share one product with the heads as fit.
_BLOCK_SCORES = 2**22


def least_uncertain(modules: Sequence[ActiveModule], cls_BD: Tensor) -> LeastUncertain:
    """Every module scores the classes of all tasks on its own output; the least entropy wins, of equals the
    first."""
    head_KD = torch.cat([module.whole().head.directions() for module in modules])
    best_entropy_B = cls_BD.new_full((len(cls_BD),), torch.inf, dtype=torch.float64)
    best_prob_BK = cls_BD.new_zeros((len(cls_BD), len(head_KD)), dtype=torch.float64)
    module_B = torch.zeros(len(cls_BD), dtype=torch.int64, device=cls_BD.device)
    size = max(1, _BLOCK_SCORES // max(1, best_prob_BK.numel()))
    for start in range(0, len(modules), size):
        block = [module.whole() for module in modules[start : start + size]]
        out_GBD = torch.stack([module.directions(cls_BD) for module in block])
        scale_G11 = torch.stack([module.head.scale for module in block])[:, None, None]
        log_prob_GBK = torch.log_softmax(scale_G11 * (out_GBD @ head_KD.T).double(), dim=2)
        entropy_B, first_B = entropy(log_prob_GBK).min(dim=0)
        better_B = entropy_B < best_entropy_B
        best_entropy_B = torch.where(better_B, entropy_B, best_entropy_B)
        prob_BK = log_prob_GBK[first_B, torch.arange(len(cls_BD))].exp()
        best_prob_BK = torch.where(better_B[:, None], prob_BK, best_prob_BK)
        module_B = torch.where(better_B, start + first_B, module_B)
    return LeastUncertain(module_B, best_prob_BK)
