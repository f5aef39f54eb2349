"""What each task has answered since the service started: pictures, confidences, abstentions, drift.

Written and read on the event loop, so that nothing needs a lock. Memory is bounded: at most `max_tasks` tasks
are told apart, all others are counted together, and what is known of a task goes when the task does.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from model_store.answers import Answer
from model_store.bank import ModuleBank
from service.drift import DriftWatch
from service.feedback import GivenAnswer
from service.reliability import Reliability

# Bin i of a histogram of confidences holds those above the edge before and at most edge i.
CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(slots=True)
class Tally:
    """Counts of answered pictures."""

    num_images: int = 0
    num_abstained: int = 0
    sum_of_confidences: float = 0.0
    confidence_histogram: list[int] = field(default_factory=lambda: [0] * len(CONFIDENCE_EDGES))

    def add(self, answer: Answer) -> None:
        self.num_images += 1
        self.num_abstained += answer.abstained
        self.sum_of_confidences += answer.confidence
        bin_ = bisect_left(CONFIDENCE_EDGES, answer.confidence)
        self.confidence_histogram[min(bin_, len(CONFIDENCE_EDGES) - 1)] += 1  # rounding may exceed 1


@dataclass(slots=True)
class TaskTraffic:
    """One active task: its tally, and what is known of its present module alone."""

    module_sha256: str
    drift: DriftWatch
    tally: Tally = field(default_factory=Tally)
    reliability: Reliability = field(default_factory=Reliability)


class Traffic:
    """The tallies of all tasks together, of each one that is told apart, and of the others."""

    def __init__(
        self,
        max_tasks: int,
        drift_window: int,
        drift_alarm_rate: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._max_tasks = max_tasks
        self._drift_window = drift_window
        self._drift_alarm_rate = drift_alarm_rate
        self._revision = 0
        self._tasks: dict[str, TaskTraffic] = {}
        self.since = clock()
        self.total = Tally()
        self.others = Tally()

    def record(self, bank: ModuleBank, answer: Answer, *, is_new: bool) -> None:
        """Count the answer that `bank` gave to a picture. One that is not `is_new` was seen before and says
        nothing about drift: pictures that probes and retries repeat are no sample."""
        self.follow(bank)
        self.total.add(answer)
        traffic = self._find(bank, answer.task)
        if traffic is None:
            self.others.add(answer)
            return
        traffic.tally.add(answer)
        if is_new and traffic.module_sha256 == bank.module(answer.task).sha256:
            traffic.drift.add(answer.p_value)

    def learn(self, bank: ModuleBank, given: GivenAnswer, *, is_correct: bool) -> bool:
        """Take in whether an answer was right; False when its module is not active in `bank` any more, or its
        task is not told apart."""
        self.follow(bank)
        known = self._tasks.get(given.task)
        if known is None or known.module_sha256 != given.module_sha256:
            return False
        known.reliability.add(given.confidence, is_correct=is_correct)
        return True

    def follow(self, bank: ModuleBank) -> None:
        """Forget tasks that are not active any more, and how modules did that were replaced."""
        if bank.revision <= self._revision:
            return
        self._revision = bank.revision
        self._tasks = {task: one for task, one in self._tasks.items() if task in bank}
        for task, one in self._tasks.items():
            if one.module_sha256 != bank.module(task).sha256:
                one.module_sha256 = bank.module(task).sha256
                one.drift, one.reliability = self._watch(bank, task), Reliability()

    def tasks(self) -> Sequence[tuple[str, TaskTraffic]]:
        """The tasks told apart, most pictures first."""
        return sorted(self._tasks.items(), key=lambda item: (-item[1].tally.num_images, item[0]))

    def _find(self, bank: ModuleBank, task: str) -> TaskTraffic | None:
        """What is known of a task; None when it was removed meanwhile or there are too many."""
        known = self._tasks.get(task)
        if known is None and bank.revision == self._revision and len(self._tasks) < self._max_tasks:
            known = TaskTraffic(bank.module(task).sha256, self._watch(bank, task))
            self._tasks[task] = known
        return known

    def _watch(self, bank: ModuleBank, task: str) -> DriftWatch:
        return DriftWatch(bank.module(task).num_known, self._drift_window, self._drift_alarm_rate)
