"""Calibration vectors of active tasks, scored as if they had not been seen: the evidence of a bank."""
# N vectors, K classes of all tasks, C classes of one task, D features

from collections.abc import Sequence

import torch
from torch import Tensor

from model_store.blend import Evidence
from model_store.leave_one_out import leave_one_out_scores
from model_store.selection import WhitenedCosine
from model_store.task_module import ActiveModule, TaskModule

# Evidence is bounded, so that a further task costs the same however many there are: vectors, tasks they are
# taken from, and scores (vectors times classes). A few hundred vectors' worth of scores are always taken, but
# for sets so large that those would not fit into memory.
MAX_VECTORS = 4096
MAX_TASKS = 64
MAX_SCORES = 2**22
MIN_VECTORS = 256
MEMORY_SCORES = 2**26


def unseen_scores(
    selector: WhitenedCosine,
    module: TaskModule,
    t: int,
    *,
    own_classes: bool,
    rows: Tensor | None = None,
) -> Tensor:
    """[N, K] or, with `own_classes`, [N, C] float64 selection scores of the calibration vectors of task `t`
    (or some `rows` of them) without their own contribution.

    Where classes are screened, those of other tasks get the screen's scores: one picture of thousands moves
    them less than the screen's error.
    """
    calibration = module.calibration
    device = calibration.label_M.device
    rows = torch.arange(len(calibration), device=device) if rows is None else rows
    x_ND, label_N = calibration.cls_MD[rows], calibration.label_M[rows]
    if selector.screen is not None and not own_classes:
        return _with_own_scores(selector, module, t, rows, selector.screened_scores(x_ND).score_BK.double())
    task = t if own_classes else None
    count_N = module.statistics.count_K.to(device)[label_N]
    inside_N = calibration.in_statistics_M[rows] & (count_N >= 2)
    num_classes = len(module.labels) if own_classes else selector.num_classes
    score_NC = x_ND.new_empty((len(rows), num_classes), dtype=torch.float64)
    if not bool(inside_N.all()):
        score_NC[~inside_N] = selector.scores(x_ND[~inside_N], None if task is None else [task])
    class_N = label_N[inside_N] + selector.means.first_class[t]
    score_NC[inside_N] = leave_one_out_scores(
        selector,
        x_ND[inside_N],
        class_N,
        count_N[inside_N],
        task,
        in_metric=selector.metric.knows(module.sha256),
    )
    return score_NC


def sample_evidence(
    selector: WhitenedCosine, modules: Sequence[ActiveModule], max_vectors: int = MAX_VECTORS
) -> list[Evidence]:
    """Calibration vectors of tasks as if unseen, at most `max_vectors` together and fewer with very many
    classes, evenly over the tasks; with more than MAX_TASKS tasks, of every so-manieth."""
    num_classes = selector.num_classes
    max_vectors = min(max_vectors, max(MIN_VECTORS, MAX_SCORES // num_classes))
    max_vectors = min(max_vectors, max(MAX_TASKS, MEMORY_SCORES // num_classes))
    step = -(-len(modules) // min(max_vectors, MAX_TASKS))
    tasks = range(0, len(modules), step)
    quota = max(1, max_vectors // len(tasks))
    sampled = [modules[t].whole() for t in tasks]
    rows = [pick_rows(module, quota) for module in sampled]
    scores = _scores_of_samples(selector, sampled, tasks, rows)
    return [
        Evidence(
            task=t,
            row_N=row_N,
            label_N=module.calibration.label_M[row_N],
            score_NK=score_NK,
            logits_NC=module.calibration.held_out_logits_MK[row_N],
            first_class=selector.means.first_class[t],
        )
        for t, module, row_N, score_NK in zip(tasks, sampled, rows, scores, strict=True)
    ]


def pick_rows(module: TaskModule, quota: int) -> Tensor:
    """Rows of a task's calibration set, at most `quota`, evenly spread."""
    size = len(module.calibration)
    row_N = torch.linspace(0, max(0, size - 1), min(quota, size)).round().long()
    return row_N.to(module.calibration.label_M.device)


def _scores_of_samples(
    selector: WhitenedCosine, sampled: Sequence[TaskModule], tasks: Sequence[int], rows: Sequence[Tensor]
) -> list[Tensor]:
    """[N, K] scores as if unseen for each task; where classes are screened, float32 and in one product."""
    if selector.screen is None:
        return [
            unseen_scores(selector, module, t, own_classes=False, rows=row_N)
            for t, module, row_N in zip(tasks, sampled, rows, strict=True)
        ]
    x_ND = torch.cat([module.calibration.cls_MD[row_N] for module, row_N in zip(sampled, rows, strict=True)])
    parts = selector.screened_scores(x_ND).score_BK.split([len(row_N) for row_N in rows])
    return [
        _with_own_scores(selector, module, t, row_N, score_NK)
        for t, module, row_N, score_NK in zip(tasks, sampled, rows, parts, strict=True)
    ]


def _with_own_scores(
    selector: WhitenedCosine, module: TaskModule, t: int, rows: Tensor, score_NK: Tensor
) -> Tensor:
    """`score_NK` of the screen, in place with what the classes of the vectors' own task `t` make of them."""
    own_NC = unseen_scores(selector, module, t, own_classes=True, rows=rows)
    score_NK[:, selector.classes(t)] = own_NC.to(score_NK.dtype)
    return score_NK
