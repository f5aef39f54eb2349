"""Answers whose true label may still come back: the last ones, without their pictures."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model_store.bank import ModuleBank
from model_store.errors import Conflict
from service.errors import UnknownAnswer


class Truth(NamedTuple):
    """What somebody says a picture shows; without a task the label alone counts."""

    task: str | None
    label: str


@dataclass(slots=True)
class GivenAnswer:
    """What feedback needs to know of an answer: what it said, and which module of its task was active."""

    task: str
    label: str
    confidence: float
    module_sha256: str
    truth: Truth | None = None


class RecentAnswers:
    """The last answers by the id of their request and the place of their picture in it.

    Ids may come from clients: one that comes again replaces all answers that had it.
    """

    def __init__(self, max_answers: int) -> None:
        self._max_answers = max_answers
        self._num_answers = 0
        self._of_request: OrderedDict[str, dict[int, GivenAnswer]] = OrderedDict()

    def __len__(self) -> int:
        return self._num_answers

    def remember(self, request_id: str, answers: Sequence[GivenAnswer]) -> None:
        """The answers of a whole request, in order."""
        self._num_answers += len(answers) - len(self._of_request.pop(request_id, ()))
        if answers:
            self._of_request[request_id] = dict(enumerate(answers))
        while self._num_answers > self._max_answers:
            oldest, left = next(iter(self._of_request.items()))
            del left[min(left)]
            self._num_answers -= 1
            if not left:
                del self._of_request[oldest]

    def label(self, request_id: str, index: int, truth: Truth) -> tuple[GivenAnswer, bool]:
        """The answer that `truth` is about, and whether this is the first time that it is told.

        Raises UnknownAnswer for an answer that was never given here or so long ago that it is forgotten, and
        Conflict when another truth was told before.
        """
        given = self._of_request.get(request_id, {}).get(index)
        if given is None:
            raise UnknownAnswer(
                f"picture {index} of request {request_id!r} is not among the last {self._max_answers} that "
                "this process answered"
            )
        if given.truth is not None and given.truth != truth:
            raise Conflict(
                f"picture {index} of request {request_id!r} was labelled {given.truth.label!r} before"
            )
        is_first = given.truth is None
        given.truth = truth
        return given, is_first


def is_right(bank: ModuleBank, given: GivenAnswer, truth: Truth) -> bool:
    """Whether an answer said the truth; of tasks that share a label space either may have said it."""
    if given.label != truth.label:
        return False
    if truth.task is None or truth.task == given.task:
        return True
    if truth.task not in bank or given.task not in bank:
        return False
    space = bank.module(given.task).label_space
    return space is not None and space == bank.module(truth.task).label_space
