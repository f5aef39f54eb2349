"""The impact report: what a change of the active set does to the active tasks.

Both banks answer the tasks' calibration sets, each vector as if its own task had never seen it: all tasks
of a small set; of a large one those that changed, and those whose classes look most like theirs.
"""

from dataclasses import dataclass

import torch

from model_store.bank import ModuleBank
from model_store.calibration import expected_calibration_error
from model_store.known_vectors import pick_rows

MAX_TASKS = 16  # measured for one report
# Of one task, where classes are screened; and no more of all than these scores, vectors times classes, but
# for MIN_VECTORS of each.
MAX_VECTORS = 32
MAX_SCORES = 2**26
MIN_VECTORS = 4


@dataclass(frozen=True, slots=True)
class TaskHealth:
    """How a bank does on one task's calibration set; all values in [0, 1]."""

    selection_accuracy: float
    accuracy: float
    ece: float
    num_vectors: int


@dataclass(frozen=True, slots=True)
class TaskImpact:
    task: str
    before: TaskHealth | None
    after: TaskHealth | None

    @property
    def accuracy_loss(self) -> float:
        """Share of right answers lost, for a task active before and after."""
        if self.before is None or self.after is None:
            return 0.0
        return self.before.accuracy - self.after.accuracy


@dataclass(frozen=True, slots=True)
class ImpactReport:
    """What was measured, sorted by task, and how many more active tasks there are."""

    tasks: tuple[TaskImpact, ...]
    num_unmeasured: int = 0

    def worst_loss(self, ignoring: str | None = None) -> TaskImpact | None:
        """The surviving task that loses most, other than the one being changed."""
        others = [
            impact for impact in self.tasks if impact.task != ignoring and impact.before and impact.after
        ]
        return max(others, key=lambda impact: impact.accuracy_loss, default=None)


def measure_health(bank: ModuleBank, task: str) -> TaskHealth:
    """Selection accuracy, end-to-end accuracy and ECE of a bank on one task's calibration set, or on some
    of it where very many classes make each vector dear."""
    module = bank.module(task).whole()
    if len(module.calibration) == 0:
        return TaskHealth(0.0, 0.0, 0.0, 0)
    row_M = pick_rows(module, _num_vectors(bank) if bank.is_screened else len(module.calibration))
    answers = bank.answer_calibration(task, row_M)
    true_labels = [module.labels[k] for k in module.calibration.label_M[row_M].tolist()]
    right_task = [bank.answers_for(answer, task) for answer in answers]
    right = [
        ours and answer.label == label
        for ours, answer, label in zip(right_task, answers, true_labels, strict=True)
    ]
    confidence_M = torch.tensor([answer.confidence for answer in answers])
    return TaskHealth(
        selection_accuracy=sum(right_task) / len(answers),
        accuracy=sum(right) / len(answers),
        ece=expected_calibration_error(confidence_M, torch.tensor(right)),
        num_vectors=len(answers),
    )


def _num_vectors(bank: ModuleBank) -> int:
    affordable = MAX_SCORES // (MAX_TASKS * len(bank.task_of_class_K))
    return min(MAX_VECTORS, max(MIN_VECTORS, affordable))


def compare_banks(
    before: ModuleBank, after: ModuleBank, known: dict[str, TaskHealth] | None = None
) -> ImpactReport:
    """The impact of replacing `before` by `after`, on at most MAX_TASKS tasks. `known` holds health of
    `before` already measured."""
    known = known or {}

    def health(bank: ModuleBank, task: str) -> TaskHealth | None:
        return measure_health(bank, task) if task in bank else None

    names = {module.task for bank in (before, after) for module in bank.modules}
    measured = names if len(names) <= MAX_TASKS else _most_affected(before, after)
    return ImpactReport(
        tuple(
            TaskImpact(task, known.get(task) or health(before, task), health(after, task))
            for task in sorted(measured)
        ),
        num_unmeasured=len(names) - len(measured),
    )


def _most_affected(before: ModuleBank, after: ModuleBank) -> set[str]:
    """The tasks that changed, and an equal number of neighbours of each."""
    old, new = ({module.task: module.sha256 for module in bank.modules} for bank in (before, after))
    changed = sorted(task for task in old.keys() | new.keys() if old.get(task) != new.get(task))[:MAX_TASKS]
    num_neighbours = (MAX_TASKS - len(changed)) // max(1, len(changed))
    neighbours = [
        bank.neighbours(task, num_neighbours)
        for bank in (before, after)
        for task in changed
        if task in bank and (bank is after or task not in after)
    ]
    return set(changed).union(*neighbours)
