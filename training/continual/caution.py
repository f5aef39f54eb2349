"""Whether a method knows when not to answer: coverage of its prediction sets, rejection of unknown tasks."""
# N pictures, L labels

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_store.errors import InvalidRequest
from training.continual.method import CautiousMethod, Method, Predictions
from training.continual.metrics import area_under_roc, false_positives_at_95, share
from training.continual.results import CoverageResult, RejectionResult
from training.continual.tasks import ContinualTask

COVERAGES = (0.9, 0.95, 0.99)
ABSTAIN_LEVEL = 0.05


def measure_coverage(
    method: CautiousMethod, cls_ND: Tensor, label_N: Tensor, predictions: Predictions
) -> tuple[CoverageResult, ...]:
    """Prediction sets of test pictures at COVERAGES, beside the lists of most probable labels. A coverage for
    which the tasks have too few calibration vectors is left out."""
    assert predictions.prob_NL is not None, "a method with prediction sets states probabilities"
    better_N = (predictions.prob_NL > predictions.prob_NL.gather(1, label_N[:, None])).sum(dim=1)
    results = []
    for nominal in COVERAGES:
        try:
            sets = method.prediction_sets(cls_ND, nominal)
        except InvalidRequest:
            continue
        results.append(_coverage(sets, label_N, better_N, nominal))
    return tuple(results)


def _coverage(
    sets: list[frozenset[int]], label_N: Tensor, better_N: Tensor, nominal: float
) -> CoverageResult:
    covered = [label in one for label, one in zip(label_N.tolist(), sets, strict=True)]
    coverage = sum(covered) / len(sets)
    top_k = 1
    while share(better_N < top_k) < coverage:
        top_k += 1
    return CoverageResult(
        nominal=nominal,
        coverage=coverage,
        mean_size=sum(len(one) for one in sets) / len(sets),
        equal_top_k=top_k,
    )


def leave_tasks_out(
    make: Callable[[], Method], tasks: Sequence[ContinualTask]
) -> tuple[RejectionResult, ...] | None:
    """Learn all tasks but one, for each in turn, and ask about the test pictures of all; None for a method
    without p-values."""
    if not isinstance(make(), CautiousMethod):
        return None
    return tuple(_leave_out(make, tasks, left_out) for left_out in range(len(tasks)))


def _leave_out(make: Callable[[], Method], tasks: Sequence[ContinualTask], left_out: int) -> RejectionResult:
    method = make()
    assert isinstance(method, CautiousMethod), "checked by the caller"
    known = [task for j, task in enumerate(tasks) if j != left_out]
    for task in known:
        method.learn(task)
    known_N = method.p_values(torch.cat([task.test_cls_UD for task in known]))
    unknown_N = method.p_values(tasks[left_out].test_cls_UD)
    return RejectionResult(
        task=tasks[left_out].name,
        auroc=area_under_roc(known_N, unknown_N),
        fpr95=false_positives_at_95(known_N, unknown_N),
        abstained_known=share(known_N <= ABSTAIN_LEVEL),
        abstained_unknown=share(unknown_N <= ABSTAIN_LEVEL),
    )
