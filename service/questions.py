"""What a request asks of the bank it was admitted with, and an answer with where its time went."""
# B batch, D features

import math
import time
from dataclasses import dataclass

from torch import Tensor

from model_store.answers import Answer
from model_store.bank import ModuleBank, Stage
from model_store.selection import Selection
from service.errors import NotFinite
from service.timings import Interval, Timings


@dataclass(frozen=True, slots=True)
class Question:
    """How a request wants its pictures answered, and the bank it was admitted with."""

    bank: ModuleBank
    selection: Selection = "lda"
    task: str | None = None
    top_k: int = 5
    every_label: bool = False  # of the named task
    coverage: float | None = None
    abstain_level: float = 0.0

    @property
    def kind(self) -> tuple[int, str, str, int, bool, float]:
        """Equal for questions that one call of their bank can answer; the abstain level is the server's."""
        task, coverage = self.task or "", self.coverage or 0.0
        return self.bank.revision, self.selection, task, self.top_k, self.every_label, coverage

    def answer(self, cls_BD: Tensor) -> tuple[list[Answer], Interval]:
        """What the bank answers, whether a pass or a cache gave the vectors; and when its modules ran."""
        ended_at: dict[Stage, float] = {}
        answers = self.bank.answer(
            cls_BD,
            selection=self.selection,
            task=self.task,
            top_k=self.top_k,
            every_label=self.every_label,
            coverage=self.coverage,
            abstain_level=self.abstain_level,
            on_stage=lambda stage: ended_at.update({stage: time.monotonic()}),
        )
        return answers, Interval(ended_at["selected"], ended_at["evaluated"])


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    answer: Answer
    timings: Timings
    cls_D: Tensor  # float32, on the CPU


def check_finite(answer: Answer) -> None:
    """Raises NotFinite when one of an answer's probabilities is no number."""
    listed = (*answer.alternatives, *(answer.prediction_set or ()))
    probabilities = (
        answer.confidence,
        answer.task_probability,
        answer.p_value,
        *(one.probability for one in listed),
    )
    if not all(math.isfinite(one) for one in probabilities):
        raise NotFinite(f"module {answer.receipt.module_sha256[:12]}… gives no number for this picture")
