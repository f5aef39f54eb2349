"""How well a store answers labelled pictures, with the published decomposition.

End-to-end accuracy = choosing the right task, then the right class; both are reported apart, and beside
them what the closed-form classifier alone would have reached on the same pictures. Tasks of one label space
answer together, so an answer of any of them is of the right task.
"""
# N pictures

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.answers import Answer
from model_store.bank import ModuleBank
from model_store.calibration import expected_calibration_error
from model_store.errors import InvalidDataset
from model_store.selection import Selection
from training.features import LabelledFeatures


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over a set of pictures, each in [0, 1]."""

    num_pictures: int
    selection_accuracy: float
    accuracy_given_task: float
    accuracy: float
    lda_accuracy: float
    ece: float


@dataclass(frozen=True, slots=True)
class _Outcomes:
    right_task_N: Tensor
    right_given_task_N: Tensor
    right_N: Tensor
    right_lda_N: Tensor
    confidence_N: Tensor

    def summarise(self) -> Evaluation:
        return Evaluation(
            num_pictures=len(self.right_N),
            selection_accuracy=float(self.right_task_N.double().mean()),
            accuracy_given_task=float(self.right_given_task_N.double().mean()),
            accuracy=float(self.right_N.double().mean()),
            lda_accuracy=float(self.right_lda_N.double().mean()),
            ece=expected_calibration_error(self.confidence_N, self.right_N),
        )


def evaluate_bank(
    bank: ModuleBank, data: Mapping[str, LabelledFeatures], selection: Selection = "lda"
) -> tuple[Evaluation, dict[str, Evaluation]]:
    """(over all pictures, by task). `data` maps task names to features; a test split is used alone.

    Raises UnknownTask for a task that is not active and InvalidDataset for a label it does not have.
    """
    outcomes = {task: _evaluate_task(bank, task, features, selection) for task, features in data.items()}
    together = _Outcomes(
        *(
            torch.cat([getattr(one, name) for one in outcomes.values()])
            for name in _Outcomes.__dataclass_fields__
        )
    )
    return together.summarise(), {task: one.summarise() for task, one in outcomes.items()}


def _evaluate_task(
    bank: ModuleBank, task: str, features: LabelledFeatures, selection: Selection
) -> _Outcomes:
    labels = bank.module(task).labels
    for label in features.labels:
        if label not in labels:
            raise InvalidDataset(f"{features.name}: task {task!r} has no class {label!r}")
    rows = features.rows("test")
    if len(rows) == 0:
        rows = torch.arange(len(features.label_N))
    cls_ND = features.cls_ND[rows]
    truth = [features.labels[k] for k in features.label_N[rows].tolist()]
    answers = bank.answer(cls_ND, selection=selection, top_k=1)
    given = bank.answer(cls_ND, task=task, top_k=1)
    lda_task_N, lda_class_N = bank.closed_form_answer(cls_ND)
    space_of_task = bank.spaces.space_of_task_T.tolist()
    own = next(t for t, module in enumerate(bank.modules) if module.task == task)
    lda = [
        space_of_task[t] == space_of_task[own] and bank.modules[t].labels[k] == label
        for t, k, label in zip(lda_task_N.tolist(), lda_class_N.tolist(), truth, strict=True)
    ]
    return _Outcomes(
        right_task_N=torch.tensor([bank.answers_for(answer, task) for answer in answers]),
        right_given_task_N=_right(bank, given, task, truth),
        right_N=_right(bank, answers, task, truth),
        right_lda_N=torch.tensor(lda),
        confidence_N=torch.tensor([answer.confidence for answer in answers]),
    )


def _right(bank: ModuleBank, answers: Sequence[Answer], task: str, truth: Sequence[str]) -> Tensor:
    return torch.tensor(
        [
            bank.answers_for(answer, task) and answer.label == label
            for answer, label in zip(answers, truth, strict=True)
        ]
    )
