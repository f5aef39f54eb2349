"""Answering a question again, offline, with the very revision that its receipt names."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.answers import Answer
from model_store.bank import ModuleBank
from model_store.errors import InvalidRequest
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY
from model_store.manifest import Sha256
from model_store.offline import OfflinePredictor
from model_store.selection import Selection
from model_store.store import ModelStore

# Batches of different sizes, and other processors, round differently in float32.
CONFIDENCE_TOLERANCE = 1e-3


class GivenReceipt(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    revision: int = Field(ge=1)
    module_sha256: Sha256
    backbone_fingerprint: Sha256


class GivenChoice(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    label: str
    probability: float


class GivenAnswer(BaseModel):
    """An answer as a server gave it; fields that later versions add are left out of the comparison."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: str
    label: str
    confidence: float
    task_probability: float | None = None
    alternatives: tuple[GivenChoice, ...] = ()
    p_value: float | None = None
    abstained: bool | None = None
    prediction_set: tuple[GivenChoice, ...] | None = None
    receipt: GivenReceipt


@dataclass(frozen=True, slots=True)
class Given:
    """What is to be replayed: a receipt, and the whole answer where it is known."""

    receipt: GivenReceipt
    answer: GivenAnswer | None


def read_given(text: str | bytes, index: int = 0) -> Given:
    """A response of /predict (its answer number `index`), one answer, or a bare receipt, as JSON.

    Raises InvalidRequest.
    """
    try:
        value: Any = json.loads(text)
        if isinstance(value, dict) and "predictions" in value:
            value = value["predictions"][index]
        if isinstance(value, dict) and "receipt" in value:
            answer = GivenAnswer.model_validate(value)
            return Given(answer.receipt, answer)
        return Given(GivenReceipt.model_validate(value), None)
    except (IndexError, KeyError, TypeError) as error:
        raise InvalidRequest(f"there is no answer number {index}") from error
    except (ValidationError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"neither an answer nor a receipt: {str(error)[:300]}") from error


@dataclass(frozen=True, slots=True)
class Replayed:
    """An answer computed again, and what else a given one is judged by."""

    answer: Answer
    least_listed: float  # no pair that it leaves out is more probable
    num_known: int  # calibration vectors that its p-value counts
    abstain_level: float
    threshold: float | None  # least probability in its prediction set

    @classmethod
    def of(
        cls,
        answer: Answer,
        bank: ModuleBank,
        *,
        selection: Selection = "lda",
        task: str | None = None,
        top_k: int = 5,
        coverage: float | None = None,
        abstain_level: float = 0.0,
    ) -> "Replayed":
        """What `bank` answered to a question."""
        module = bank.module(answer.task)
        listed = [answer.confidence, *(one.probability for one in answer.alternatives)]
        return cls(
            answer,
            least_listed=listed[-1] if len(listed) == top_k else MIN_ALTERNATIVE_PROBABILITY,
            num_known=len(module.whole().calibration),
            abstain_level=abstain_level if module.abstain_level is None else module.abstain_level,
            threshold=None if coverage is None else bank.coverage_threshold(coverage, selection, task),
        )


def replay(
    store: ModelStore,
    receipt: GivenReceipt,
    picture: bytes,
    *,
    selection: Selection = "lda",
    task: str | None = None,
    top_k: int = 5,
    coverage: float | None = None,
    abstain_level: float = 0.0,
    device: str = "auto",
    runtime: str = "auto",
) -> Replayed:
    """The answer of the revision in a receipt. Raises UnknownRevision, InvalidImage, InvalidRequest."""
    revision = store.revision(receipt.revision)
    if revision.backbone_fingerprint != receipt.backbone_fingerprint:
        raise InvalidRequest(
            f"the receipt names backbone {receipt.backbone_fingerprint[:12]}…, but revision "
            f"{receipt.revision} of {store.url} has {revision.backbone_fingerprint[:12]}…"
        )
    predictor = OfflinePredictor(store, revision=receipt.revision, device=device, runtime=runtime)
    answer = predictor.answer(
        [picture],
        selection=selection,
        task=task,
        top_k=top_k,
        coverage=coverage,
        abstain_level=abstain_level,
    )[0]
    return Replayed.of(
        answer,
        predictor.bank,
        selection=selection,
        task=task,
        top_k=top_k,
        coverage=coverage,
        abstain_level=abstain_level,
    )


def differences(given: GivenAnswer, expected: Replayed) -> list[str]:
    """How a given answer differs from the one computed offline; empty when it does not.

    Probabilities may differ by CONFIDENCE_TOLERANCE, and p-values by one known vector. Where the two best are
    that close, either may be first; of another task, what belongs to the task cannot be compared then. The
    module in the receipt must be the expected one exactly. A prediction set whose coverage is not known may
    end anywhere.
    """
    answer = expected.answer
    ours = {(one.task, one.label): one.probability for one in answer.prediction_set or ()}
    ours |= {(one.task, one.label): one.probability for one in answer.alternatives}
    ours[answer.task, answer.label] = answer.confidence
    found = []
    place = (given.task, given.label)
    if place not in ours or answer.confidence - ours[place] > CONFIDENCE_TOLERANCE:
        found.append(f"answered {given.task}/{given.label}, offline {answer.task}/{answer.label}")
    elif not _close(given.confidence, ours[place]):
        found.append(f"confidence {given.confidence:.6f}, offline {ours[place]:.6f}")
    if given.task == answer.task:
        found += _different_task(given, expected)
    found += _different_choices(given.alternatives, ours, expected.least_listed)
    if given.prediction_set is not None:
        found += _different_set(given.prediction_set, ours, expected)
    elif expected.threshold is not None:
        found.append("no prediction set")
    return found


def _different_task(given: GivenAnswer, expected: Replayed) -> list[str]:
    """What belongs to the answering task."""
    answer = expected.answer
    found = []
    if given.receipt.module_sha256 != answer.receipt.module_sha256:
        found.append(
            f"module {given.receipt.module_sha256[:12]}…, offline {answer.receipt.module_sha256[:12]}…"
        )
    if given.task_probability is not None and not _close(given.task_probability, answer.task_probability):
        found.append(f"task probability {given.task_probability:.6f}, offline {answer.task_probability:.6f}")
    p_value = answer.p_value if given.p_value is None else given.p_value
    if not _close(p_value, answer.p_value, 1.0 / (expected.num_known + 1)):
        found.append(f"p-value {p_value:.6f}, offline {answer.p_value:.6f}")
    elif given.abstained is not None and given.abstained != (p_value <= expected.abstain_level):
        verdict = "abstained" if given.abstained else "not abstained"
        found.append(f"{verdict} with p-value {p_value:.6f} at level {expected.abstain_level:g}")
    return found


def _different_choices(
    given: Sequence[GivenChoice], ours: dict[tuple[str, str], float], most_unlisted: float
) -> list[str]:
    found = []
    for one in given:
        probability = ours.get((one.task, one.label))
        if probability is None and not one.probability <= most_unlisted + CONFIDENCE_TOLERANCE:
            found.append(
                f"{one.task}/{one.label} with {one.probability:.6f}, offline at most {most_unlisted:.6f}"
            )
        elif probability is not None and not _close(one.probability, probability):
            found.append(f"{one.task}/{one.label} with {one.probability:.6f}, offline {probability:.6f}")
    return found


def _different_set(
    given: Sequence[GivenChoice], ours: dict[tuple[str, str], float], expected: Replayed
) -> list[str]:
    found = _different_choices(given, ours, expected.least_listed)
    threshold = expected.threshold
    if threshold is None:
        threshold = min((one.probability for one in given), default=math.inf)
    theirs = {(one.task, one.label): one.probability for one in given}
    for (task, label), probability in (theirs | ours).items():
        is_in = (task, label) in theirs
        if is_in != (probability >= threshold) and not _close(probability, threshold):
            found.append(f"{task}/{label} {'in' if is_in else 'not in'} the prediction set")
    return found


def _close(given: float, expected: float, tolerance: float = CONFIDENCE_TOLERANCE) -> bool:
    """False for what is no number."""
    return abs(given - expected) <= tolerance + 1e-9
