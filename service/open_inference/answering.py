"""One inference request, whichever transport brought it, to the engine and back."""
# B batch, C channels, H height, W width, D features

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from model_store.answers import Answer, Choice
from model_store.backbone import Backbone
from model_store.errors import InvalidRequest
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY
from model_store.preprocess import Preprocessing
from model_store.selection import Selection
from service.open_inference.models import Model
from service.open_inference.tensors import InputTensor, OutputTensor, read_elements, read_floats
from service.payloads import MAX_CLS_VALUE, check_fingerprint
from service.prediction import Inquiry, Wishes

_PIXEL_TOLERANCE = 0.5  # of an 8-bit step: how far beyond black and white rounding forgives


class InferParameters(BaseModel):
    """Parameters of a request; those of the native API, and Triton's that have a meaning here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: int | None = Field(None, ge=1, description="How many (task, label) pairs to list at most.")
    selection: Selection = Field("lda", description="How the task is chosen.")
    coverage: float | None = Field(
        None, gt=0.0, lt=1.0, description="Also list every (task, label) that this coverage cannot rule out."
    )
    backbone_fingerprint: str | None = Field(None, description="The backbone that computed `cls`.")
    timeout: int = Field(
        0, ge=0, lt=2**64, description="Microseconds the answer may take; 0: the server's default."
    )
    priority: int = Field(0, ge=0, description="Triton's; requests are answered in the order they come.")
    binary_data_output: bool = Field(False, description="All outputs as binary tensor data (HTTP).")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What is asked of a model: one input, the outputs wanted (none: all), parameters."""

    request_id: str
    inputs: Sequence[InputTensor]
    output_names: Sequence[str]
    parameters: InferParameters


def read_parameters(given: Mapping[str, Any]) -> InferParameters:
    """Raises InvalidRequest for a parameter that is unknown or out of range."""
    try:
        return InferParameters.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:100] for part in first["loc"])
        raise InvalidRequest(f"parameters.{where}: {first['msg']}") from error


def max_listed(backbone: Backbone, max_images: int) -> int:
    """How many values may come as a list, which is slow to read: the pixels of one picture, or the CLS
    vectors of as many pictures as a request may have. Raw tensors know no such bound."""
    sides = backbone.preprocessing.height * backbone.preprocessing.width
    return max(3 * sides, max_images * (backbone.feature_dim + 1))


async def infer(
    inquiry: Inquiry, model: Model, request: InferenceRequest, backbone: Backbone
) -> list[OutputTensor]:
    """The outputs asked for, computed as `POST /predict` computes its answers.

    Raises InvalidRequest and Conflict, and what the engine raises.
    """
    parameters = request.parameters
    top_k = parameters.top_k or 5
    inquiry.check_top_k(top_k)
    names = _chosen_outputs(model, request)
    pictures = await _pictures(request, backbone, inquiry)
    wishes = Wishes(model.task, top_k, parameters.selection, parameters.coverage, "probability" in names)
    if parameters.timeout:
        inquiry = replace(inquiry, timeout_s=min(inquiry.timeout_s, parameters.timeout / 1e6))
    answers = [one.answer for one in await inquiry.answer(pictures, wishes)]
    return [_output(name, model, answers, top_k) for name in names]


def _chosen_outputs(model: Model, request: InferenceRequest) -> list[str]:
    """The outputs to give, in the order asked for; all that there are when none is named."""
    known = [one.name for one in model.outputs]
    if len(request.output_names) > len(known):
        raise InvalidRequest(f"{len(request.output_names)} outputs of {len(known)} that there are")
    for name in request.output_names:
        if name not in known:
            raise InvalidRequest(f"model {model.name!r} has no output {name[:100]!r}: {', '.join(known)}")
    if request.parameters.coverage is None:
        if "prediction_set" in request.output_names:
            raise InvalidRequest("output 'prediction_set' needs the parameter coverage")
        known.remove("prediction_set")
    return list(request.output_names) or known


async def _pictures(request: InferenceRequest, backbone: Backbone, inquiry: Inquiry) -> list[bytes] | Tensor:
    """Encoded pictures, [B, 3, H, W] uint8 pixels or [B, D] CLS vectors: what the engine takes."""
    if len(request.inputs) != 1:
        raise InvalidRequest(f"{len(request.inputs)} inputs: give one of image, pixels and cls")
    (given,) = request.inputs
    inquiry.check_count(given.shape[0] if given.shape else 0)
    match given.name:
        case "image":
            pictures: list[bytes] | Tensor = read_elements(given)
        case "pixels":
            pictures = await asyncio.to_thread(_read_pixels, given, backbone.preprocessing)
        case "cls":
            check_fingerprint(request.parameters.backbone_fingerprint, backbone)
            cls_BD = read_floats(given, (backbone.feature_dim,))
            if not (np.abs(cls_BD) <= MAX_CLS_VALUE).all():
                raise InvalidRequest(f"input 'cls' goes beyond ±{MAX_CLS_VALUE:g}, which no CLS vector does")
            pictures = torch.from_numpy(cls_BD)
        case _:
            raise InvalidRequest(f"unknown input {given.name[:100]!r}: give one of image, pixels and cls")
    if not len(pictures):
        raise InvalidRequest(f"input {given.name!r} is empty")
    return pictures


def _read_pixels(given: InputTensor, preprocessing: Preprocessing) -> Tensor:
    """[B, 3, H, W] uint8 pixels of normalised ones.

    Every runtime takes pixels of eight bits and normalises them on the device, as for encoded pictures, so
    the client's normalisation is undone and rounded to the step it came from.
    """
    normalised_BCHW = read_floats(given, (3, preprocessing.height, preprocessing.width))
    mean_C11 = np.asarray(preprocessing.mean, dtype=np.float32)[:, None, None]
    std_C11 = np.asarray(preprocessing.std, dtype=np.float32)[:, None, None]
    pixels_BCHW = (normalised_BCHW * std_C11 + mean_C11) * 255.0
    low, high = -_PIXEL_TOLERANCE, 255.0 + _PIXEL_TOLERANCE
    if not ((pixels_BCHW >= low) & (pixels_BCHW <= high)).all():  # NaN is in no range
        raise InvalidRequest(
            f"input 'pixels' goes beyond black and white: normalise with mean {list(preprocessing.mean)} and "
            f"std {list(preprocessing.std)}"
        )
    return torch.from_numpy(pixels_BCHW.round().clip(0.0, 255.0).astype(np.uint8))


def _output(name: str, model: Model, answers: Sequence[Answer], top_k: int) -> OutputTensor:
    match name:
        case "task" | "label":
            return OutputTensor.of_texts(name, [getattr(one, name) for one in answers])
        case "confidence" | "task_probability" | "p_value":
            return OutputTensor.of_numbers(name, [getattr(one, name) for one in answers])
        case "abstained":
            return OutputTensor.of_flags(name, [one.abstained for one in answers])
        case "receipt":
            return OutputTensor.of_texts(name, [json.dumps(asdict(one.receipt)) for one in answers])
        case "alternatives":
            return OutputTensor.of_texts(name, [_listed(_likely(one, top_k)) for one in answers])
        case "prediction_set":
            return OutputTensor.of_texts(name, [_listed(one.prediction_set or ()) for one in answers])
        case "probability":
            return OutputTensor.of_numbers(name, [_probabilities(model, one) for one in answers])
        case "labels":
            return OutputTensor.of_texts(name, model.labels)
        case _:
            raise AssertionError(f"output {name!r} was checked against those of the model")


def _likely(answer: Answer, top_k: int) -> list[Choice]:
    """The alternatives that `POST /predict` lists, of an answer that may hold every label."""
    likely = (one for one in answer.alternatives if one.probability >= MIN_ALTERNATIVE_PROBABILITY)
    return list(likely)[: top_k - 1]


def _listed(choices: Sequence[Choice]) -> str:
    return json.dumps([asdict(one) for one in choices], ensure_ascii=False)


def _probabilities(model: Model, answer: Answer) -> list[float]:
    """[K] what a named task gives each of its labels; the answer lists every one."""
    found = {one.label: one.probability for one in answer.alternatives} | {answer.label: answer.confidence}
    return [found[label] for label in model.labels]
