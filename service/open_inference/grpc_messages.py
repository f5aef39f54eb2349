"""Inference requests and answers as gRPC messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from model_store.errors import InvalidRequest
from service.open_inference.answering import InferenceRequest, read_parameters
from service.open_inference.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
)
from service.open_inference.messages import MAX_INPUTS, MAX_OUTPUTS, MAX_PARAMETERS
from service.open_inference.models import Model
from service.open_inference.tensors import MAX_SIDES, InputTensor, OutputTensor

# Of the HTTP form, which KServe's client writes here too: over gRPC, outputs and what it sends are raw.
_IGNORED = {"binary_data", "binary_data_size"}
_CONTENTS = {"BYTES": "bytes_contents", "FP32": "fp32_contents"}


def read_infer_message(message: ModelInferRequest, max_elements: int) -> InferenceRequest:
    """`max_elements`: values that a tensor may list instead of giving them raw. Raises InvalidRequest."""
    if len(message.inputs) > MAX_INPUTS or len(message.outputs) > MAX_OUTPUTS:
        raise InvalidRequest(
            f"{len(message.inputs)} inputs and {len(message.outputs)} outputs: "
            f"at most {MAX_INPUTS} and {MAX_OUTPUTS} are allowed"
        )
    num_raw = len(message.raw_input_contents)
    if num_raw not in (0, len(message.inputs)):
        raise InvalidRequest(f"{num_raw} raw_input_contents for {len(message.inputs)} inputs")
    inputs = []
    for i, one in enumerate(message.inputs):
        if len(one.shape) > MAX_SIDES:
            raise InvalidRequest(
                f"input {one.name[:100]!r} has {len(one.shape)} sides, at most {MAX_SIDES} are allowed"
            )
        if set(one.parameters) - _IGNORED:
            raise InvalidRequest(f"input {one.name[:100]!r}: no parameter means anything here")
        if num_raw and one.HasField("contents"):
            raise InvalidRequest(f"input {one.name[:100]!r} has both contents and raw_input_contents")
        data = message.raw_input_contents[i] if num_raw else _values(one, max_elements)
        inputs.append(InputTensor(one.name, one.datatype, tuple(one.shape), data))
    for output in message.outputs:
        if set(output.parameters) - _IGNORED:
            raise InvalidRequest(f"output {output.name[:100]!r}: no parameter means anything here")
    parameters = read_parameters(read_choices(message.parameters))
    return InferenceRequest(message.id, inputs, [one.name for one in message.outputs], parameters)


def infer_message(model: Model, request_id: str, outputs: Sequence[OutputTensor]) -> ModelInferResponse:
    """The answer, its tensors raw."""
    return ModelInferResponse(
        model_name=model.name,
        model_version=model.version,
        id=request_id,
        outputs=[
            ModelInferResponse.InferOutputTensor(name=one.name, datatype=one.datatype, shape=one.shape)
            for one in outputs
        ],
        raw_output_contents=[one.raw for one in outputs],
    )


def read_choices(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name; each message holds one value of several types. Raises InvalidRequest."""
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"{len(parameters)} parameters, at most {MAX_PARAMETERS} are allowed")
    chosen = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"parameter {name[:100]!r} has no value")
        chosen[name] = getattr(parameter, kind)
    return chosen


def _values(given: ModelInferRequest.InferInputTensor, max_elements: int) -> list[Any]:
    where = f"input {given.name[:100]!r}"
    field = _CONTENTS.get(given.datatype)
    if field is None:
        raise InvalidRequest(f"{where} has datatype {given.datatype[:20]!r}, expected BYTES or FP32")
    values = getattr(given.contents, field)
    if len(values) > max_elements:
        raise InvalidRequest(f"{where} lists {len(values)} values: send more than {max_elements} raw")
    return list(values)
