"""Calibration vectors of active tasks, scored as if they had not been seen: the evidence of a bank."""
# N vectors, K classes of all tasks, C classes asked for

from collections.abc import Sequence

import torch
from torch import Tensor

from model_store.blend import Evidence
from model_store.leave_one_out import leave_one_out_scores
from model_store.selection import WhitenedCosine
from model_store.task_module import TaskModule


def unseen_scores(
    selector: WhitenedCosine,
    module: TaskModule,
    first_class: int,
    classes: slice,
    rows: Tensor | None = None,
) -> Tensor:
    """[N, C] float64 selection scores of a task's calibration vectors (or some `rows` of them) without
    their own contribution. `first_class` is where the task's classes begin among all; `classes` must
    include them."""
    calibration = module.calibration
    device = calibration.label_M.device
    rows = torch.arange(len(calibration), device=device) if rows is None else rows
    x_ND, label_N = calibration.cls_MD[rows], calibration.label_M[rows]
    count_N = module.statistics.count_K.to(device)[label_N]
    inside_N = calibration.in_statistics_M[rows] & (count_N >= 2)
    score_NC = x_ND.new_empty((len(rows), classes.stop - classes.start), dtype=torch.float64)
    score_NC[~inside_N] = selector.scores(x_ND[~inside_N], classes)
    score_NC[inside_N] = leave_one_out_scores(
        selector, x_ND[inside_N], label_N[inside_N] + first_class, count_N[inside_N], classes
    )
    return score_NC


def sample_evidence(
    selector: WhitenedCosine,
    modules: Sequence[TaskModule],
    first_class: Sequence[int],
    num_classes: int,
    max_vectors: int,
) -> list[Evidence]:
    """Calibration vectors of all tasks as if unseen, at most `max_vectors` together and evenly over the
    tasks; with more tasks than that, of every so-manieth task."""
    quota = max(1, max_vectors // len(modules))
    return [
        _sample(selector, t, modules[t], first_class[t], num_classes, quota)
        for t in range(0, len(modules), -(-len(modules) // max_vectors))
    ]


def _sample(
    selector: WhitenedCosine, t: int, module: TaskModule, first_class: int, num_classes: int, quota: int
) -> Evidence:
    calibration = module.calibration
    size = len(calibration)
    rows = torch.linspace(0, max(0, size - 1), min(quota, size)).round().long()
    rows = rows.to(calibration.label_M.device)
    return Evidence(
        task=t,
        row_N=rows,
        label_N=calibration.label_M[rows],
        score_NK=unseen_scores(selector, module, first_class, slice(0, num_classes), rows),
        logits_NC=calibration.held_out_logits_MK[rows],
        first_class=first_class,
    )
