"""Answering a question again, offline, with the very revision that its receipt names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.answers import Answer
from model_store.errors import InvalidRequest
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
    alternatives: tuple[GivenChoice, ...] = ()
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


def replay(
    store: ModelStore,
    receipt: GivenReceipt,
    picture: bytes,
    *,
    selection: Selection = "lda",
    task: str | None = None,
    top_k: int = 5,
    device: str = "auto",
    runtime: str = "auto",
) -> Answer:
    """The answer of the revision in a receipt. Raises UnknownRevision, InvalidImage, InvalidRequest."""
    revision = store.revision(receipt.revision)
    if revision.backbone_fingerprint != receipt.backbone_fingerprint:
        raise InvalidRequest(
            f"the receipt names backbone {receipt.backbone_fingerprint[:12]}…, but revision "
            f"{receipt.revision} of {store.url} has {revision.backbone_fingerprint[:12]}…"
        )
    predictor = OfflinePredictor(store, revision=receipt.revision, device=device, runtime=runtime)
    return predictor.answer([picture], selection=selection, task=task, top_k=top_k)[0]


def differences(given: GivenAnswer, expected: Answer) -> list[str]:
    """How a given answer differs from the one computed offline; empty when it does not.

    Probabilities may differ by CONFIDENCE_TOLERANCE. Where the two best are that close, either may be
    first. The module in the receipt must be the expected one exactly.
    """
    ours = {(expected.task, expected.label): expected.confidence}
    ours |= {(one.task, one.label): one.probability for one in expected.alternatives}
    found = []
    place = (given.task, given.label)
    if place not in ours or expected.confidence - ours[place] > CONFIDENCE_TOLERANCE:
        found.append(f"answered {given.task}/{given.label}, offline {expected.task}/{expected.label}")
    elif not abs(given.confidence - ours[place]) <= CONFIDENCE_TOLERANCE:
        found.append(f"confidence {given.confidence:.6f}, offline {ours[place]:.6f}")
    if given.task == expected.task and given.receipt.module_sha256 != expected.receipt.module_sha256:
        found.append(
            f"module {given.receipt.module_sha256[:12]}…, offline {expected.receipt.module_sha256[:12]}…"
        )
    return found + _different_choices(given.alternatives, ours)


def _different_choices(given: Sequence[GivenChoice], ours: dict[tuple[str, str], float]) -> list[str]:
    return [
        f"{one.task}/{one.label} with {one.probability:.6f}, offline {ours[one.task, one.label]:.6f}"
        for one in given
        if (one.task, one.label) in ours
        and not abs(one.probability - ours[one.task, one.label]) <= CONFIDENCE_TOLERANCE
    ]
