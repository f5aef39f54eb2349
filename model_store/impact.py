"""The impact report: what a change of the active set does to every active task.

Both banks answer every task's calibration set, each vector as if its own task had never seen it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from model_store.bank import ModuleBank
from model_store.calibration import expected_calibration_error


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
    tasks: tuple[TaskImpact, ...]

    def worst_loss(self, ignoring: str | None = None) -> TaskImpact | None:
        """The surviving task that loses most, other than the one being changed."""
        others = [
            impact for impact in self.tasks if impact.task != ignoring and impact.before and impact.after
        ]
        return max(others, key=lambda impact: impact.accuracy_loss, default=None)


def measure_health(bank: ModuleBank, task: str) -> TaskHealth:
    """Selection accuracy, end-to-end accuracy and ECE of a bank on one task's calibration set."""
    module = bank.module(task)
    if len(module.calibration) == 0:
        return TaskHealth(0.0, 0.0, 0.0, 0)
    answers = bank.answer_calibration(task)
    true_labels = [module.labels[k] for k in module.calibration.label_M.tolist()]
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
    """The impact of replacing `before` by `after`. `known` holds health of `before` already measured."""
    known = known or {}

    def health(bank: ModuleBank, task: str) -> TaskHealth | None:
        return measure_health(bank, task) if task in bank else None

    names: Iterable[str] = sorted({module.task for bank in (before, after) for module in bank.modules})
    return ImpactReport(
        tuple(
            TaskImpact(task, known.get(task) or health(before, task), health(after, task)) for task in names
        )
    )
