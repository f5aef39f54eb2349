"""What every continual method does, and how scores over (task, class) become predictions."""
# N pictures, D features, C columns: one for each (task, class) learnt, L labels: C without shared classes

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.continual.tasks import ContinualTask

# How a label that several tasks know is scored: probabilities and regression scores are added over the
# tasks, of distances the nearest counts. Only the first are probabilities to calibrate.
ScoreKind = Literal["probability", "additive", "nearest"]


@dataclass(frozen=True, slots=True)
class Predictions:
    """`prob_NL` and its maximum, `confidence_N`, only from methods that state probabilities."""

    task_N: Tensor
    label_N: Tensor
    confidence_N: Tensor | None
    prob_NL: Tensor | None

    @staticmethod
    def join(parts: "list[Predictions]") -> "Predictions":
        def cat(values: list[Tensor | None]) -> Tensor | None:
            given = [value for value in values if value is not None]
            return torch.cat(given) if given else None

        return Predictions(
            torch.cat([one.task_N for one in parts]),
            torch.cat([one.label_N for one in parts]),
            cat([one.confidence_N for one in parts]),
            cat([one.prob_NL for one in parts]),
        )


class Method(Protocol):
    """A continual learner. Each answer of `predict` rests on its own picture alone, unless a method says
    otherwise; `predict_within` is told the task (its number in order of learning)."""

    saved_s: float  # seconds of learning taken over from another method of the same run

    def learn(self, task: ContinualTask) -> None: ...

    def predict(self, cls_ND: Tensor) -> Predictions: ...

    def predict_within(self, cls_ND: Tensor, task: int) -> Predictions: ...

    @property
    def size_bytes(self) -> int:
        """What has to be kept to answer and to learn further."""
        ...


@runtime_checkable
class CautiousMethod(Protocol):
    """What a method has that also says what it cannot rule out, and how unusual a picture is."""

    def prediction_sets(self, cls_ND: Tensor, coverage: float) -> list[frozenset[int]]:
        """The labels of each picture's prediction set."""
        ...

    def p_values(self, cls_ND: Tensor) -> Tensor:
        """[N] in (0, 1]; low for pictures unlike those of any task learnt."""
        ...


@dataclass(frozen=True, slots=True)
class Columns:
    """The task number and the label of every score."""

    task_C: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    label_C: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def extended(self, label_K: Tensor) -> "Columns":
        """With the classes of the next task."""
        task_K = torch.full_like(label_K, self.num_tasks)
        return Columns(torch.cat([self.task_C, task_K]), torch.cat([self.label_C, label_K]))

    @property
    def num_tasks(self) -> int:
        return int(self.task_C[-1]) + 1 if len(self.task_C) else 0

    @property
    def num_labels(self) -> int:
        return int(self.label_C.max()) + 1


def decide(score_NC: Tensor, columns: Columns, kind: ScoreKind) -> Predictions:
    """The label with the best score, and of the tasks that know it the one with the best column."""
    label_NC = columns.label_C.expand_as(score_NC)
    empty_NL = score_NC.new_zeros(score_NC.shape[0], columns.num_labels)
    if kind == "nearest":
        score_NL = (empty_NL - torch.inf).scatter_reduce(1, label_NC, score_NC, reduce="amax")
    else:
        score_NL = empty_NL.scatter_add(1, label_NC, score_NC)
    best_N = score_NL.argmax(dim=1)
    candidate_NC = score_NC.masked_fill(label_NC != best_N[:, None], -torch.inf)
    task_N = columns.task_C[candidate_NC.argmax(dim=1)]
    if kind != "probability":
        return Predictions(task_N, best_N, None, None)
    return Predictions(task_N, best_N, score_NL.max(dim=1).values, score_NL)


class ScoringMethod(ABC):
    """A method that scores all columns at once."""

    kind: ScoreKind
    saved_s = 0.0

    def __init__(self) -> None:
        self.columns = Columns()

    def learn(self, task: ContinualTask) -> None:
        self.columns = self.columns.extended(task.label_K)
        self.add(task)

    @abstractmethod
    def add(self, task: ContinualTask) -> None:
        """Take in the training rows of `task`, whose classes are the newest columns."""

    @abstractmethod
    def scores(self, cls_ND: Tensor) -> Tensor:
        """[N, C]; rows of kind "probability" sum to 1."""

    @property
    @abstractmethod
    def size_bytes(self) -> int: ...

    def predict(self, cls_ND: Tensor) -> Predictions:
        return decide(self.scores(cls_ND), self.columns, self.kind)

    def predict_within(self, cls_ND: Tensor, task: int) -> Predictions:
        score_NC = self.scores(cls_ND)
        other_C = self.columns.task_C != task
        if self.kind == "probability":
            score_NC = F.normalize(score_NC.masked_fill(other_C, 0.0), p=1.0, dim=1)
            return decide(score_NC, self.columns, self.kind)
        # Labels are scored by their column in this task alone, so nothing is left to add up.
        return decide(score_NC.masked_fill(other_C, -torch.inf), self.columns, "nearest")


class TrainingRows:
    """All training vectors so far with their column; for methods that fit anew from everything."""

    def __init__(self) -> None:
        self._cls: list[Tensor] = []
        self._column: list[Tensor] = []
        self._num_columns = 0

    def add(self, task: ContinualTask) -> None:
        self._cls.append(task.train.cls_ND)
        self._column.append(task.train.label_N + self._num_columns)
        self._num_columns += len(task.label_K)

    @property
    def vectors(self) -> Tensor:
        """[N, D]"""
        return torch.cat(self._cls)

    @property
    def columns(self) -> Tensor:
        """[N], indices of columns"""
        return torch.cat(self._column)
