"""The impact report: what a change of the active set does to the active tasks.

Both banks answer the tasks' calibration sets, each vector as if its own task had never seen it: all tasks
of a small set; of a large one those that changed, and those whose classes look most like theirs. Where a
change leaves every other task's scores alone (`ModuleBank.scores_tasks_apart`), tasks far from it have no
part in what it does to those near it: a large set is then reduced to the tasks around the change.
"""

from dataclasses import dataclass

import torch

from model_store.bank import ModuleBank
from model_store.calibration import expected_calibration_error
from model_store.known_vectors import pick_rows

MAX_TASKS = 16  # measured for one report
MAX_VECTORS = 32  # of one task of a large set
AROUND = 32  # tasks of a large set that is reduced, around the change


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
    """What was measured, sorted by task, and how many more active tasks there are.

    `is_among_all`: not among the tasks around the change alone.
    """

    tasks: tuple[TaskImpact, ...]
    num_unmeasured: int = 0
    is_among_all: bool = True

    def worst_loss(self, ignoring: str | None = None) -> TaskImpact | None:
        """The surviving task that loses most, other than the one being changed."""
        others = [
            impact for impact in self.tasks if impact.task != ignoring and impact.before and impact.after
        ]
        return max(others, key=lambda impact: impact.accuracy_loss, default=None)

    def harmed(self, margin: float, ignoring: str | None = None) -> tuple[str, ...]:
        """The other tasks that lose more than `margin`, not by rounding alone: 1.0 - 0.95 > 0.05."""
        return tuple(
            one.task for one in self.tasks if one.task != ignoring and one.accuracy_loss > margin + 1e-9
        )


def measure_health(bank: ModuleBank, task: str, max_vectors: int | None = None) -> TaskHealth:
    """Selection accuracy, end-to-end accuracy and ECE of a bank on one task's calibration set, or on at most
    `max_vectors` of it."""
    module = bank.module(task).whole()
    if len(module.calibration) == 0:
        return TaskHealth(0.0, 0.0, 0.0, 0)
    row_M = pick_rows(module, len(module.calibration) if max_vectors is None else max_vectors)
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


def compare_banks(
    before: ModuleBank, after: ModuleBank, known: dict[str, TaskHealth] | None = None
) -> ImpactReport:
    """The impact of replacing `before` by `after`, on at most MAX_TASKS tasks. `known` holds health of
    `before` already measured, among all tasks; it counts where it is of as many vectors as are asked now."""
    known = known or {}
    num_tasks = len({module.task for module in before.modules} | {module.task for module in after.modules})
    changed = _changed(before, after)
    max_vectors = MAX_VECTORS if before.is_screened or after.is_screened else None
    is_apart = before.scores_tasks_apart and after.scores_tasks_apart and after.epoch is before.epoch
    is_among_all = num_tasks <= AROUND or not is_apart
    if not is_among_all:
        around = _with_neighbours(before, after, changed, AROUND)
        before, after = (bank.among(task for task in around if task in bank) for bank in (before, after))
        known = {}

    def health(bank: ModuleBank, task: str) -> TaskHealth | None:
        return measure_health(bank, task, max_vectors) if task in bank else None

    def health_before(task: str) -> TaskHealth | None:
        found = known.get(task)
        if found is None:
            return health(before, task)
        num_known = before.module(task).num_known
        num_vectors = num_known if max_vectors is None else min(num_known, max_vectors)
        return found if found.num_vectors == num_vectors else health(before, task)

    names = {module.task for bank in (before, after) for module in bank.modules}
    if len(names) > MAX_TASKS:
        names = _with_neighbours(before, after, changed, MAX_TASKS)
    return ImpactReport(
        tuple(TaskImpact(task, health_before(task), health(after, task)) for task in sorted(names)),
        num_unmeasured=num_tasks - len(names),
        is_among_all=is_among_all,
    )


def _changed(before: ModuleBank, after: ModuleBank) -> list[str]:
    """The tasks that are in one bank alone, or by another module."""
    old, new = ({module.task: module.sha256 for module in bank.modules} for bank in (before, after))
    return sorted(task for task in old.keys() | new.keys() if old.get(task) != new.get(task))


def _with_neighbours(before: ModuleBank, after: ModuleBank, changed: list[str], num: int) -> set[str]:
    """At most `num` tasks: those that changed, and an equal number of neighbours of each."""
    changed = changed[:num]
    num_neighbours = (num - len(changed)) // max(1, len(changed))
    neighbours = [
        bank.neighbours(task, num_neighbours)
        for bank in (before, after)
        for task in changed
        if task in bank and (bank is after or task not in after)
    ]
    return set(changed).union(*neighbours)
