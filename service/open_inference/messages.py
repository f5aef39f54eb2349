"""The protocol's JSON messages, with examples for the OpenAPI document."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from service.open_inference.tensors import MAX_SIDES

MAX_INPUTS = 8
MAX_OUTPUTS = 100
MAX_PARAMETERS = 100
Parameters = Annotated[dict[str, bool | int | float | str], Field(max_length=MAX_PARAMETERS)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True, strict=True)


def inline_schema(message: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a message with those inside it written out, so that it may stand anywhere."""
    schema = message.model_json_schema()
    parts: dict[str, Any] = schema.pop("$defs", {})

    def written_out(node: Any) -> Any:
        if isinstance(node, list):
            return [written_out(one) for one in node]
        if not isinstance(node, dict):
            return node
        if (ref := node.get("$ref")) is not None:
            return written_out(parts[ref.removeprefix("#/$defs/")])
        return {name: written_out(one) for name, one in node.items()}

    whole: dict[str, Any] = written_out(schema)
    return whole


class ErrorOut(Message):
    error: str = Field(examples=["model 'birds' is neither 'tosca' nor a task of revision 7"])


class ServerLiveOut(Message):
    live: bool = Field(examples=[True])


class ServerReadyOut(Message):
    ready: bool = Field(examples=[True])


class ModelReadyOut(Message):
    name: str = Field(examples=["textiles"])
    ready: bool = Field(examples=[True])


class ServerMetadataOut(Message):
    name: str = Field(examples=["tosca-serving"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data", "model_repository"]])


class TensorMetadataOut(Message):
    name: str = Field(examples=["image"])
    datatype: str = Field(examples=["BYTES"])
    shape: tuple[int, ...] = Field(examples=[[-1]])


class ModelMetadataOut(Message):
    """A model; give one of its inputs."""

    name: str = Field(examples=["textiles"])
    versions: list[str]
    platform: str = Field(examples=["tosca"])
    inputs: list[TensorMetadataOut]
    outputs: list[TensorMetadataOut]


class RequestInputIn(Message):
    """A tensor: `data` as values, pictures in base64, or `binary_data_size` bytes behind the JSON part."""

    name: str = Field(max_length=100, examples=["image"])
    shape: tuple[int, ...] = Field(max_length=MAX_SIDES, examples=[[1]])
    datatype: str = Field(max_length=20, examples=["BYTES"])
    parameters: Parameters | None = None
    data: list[Any] | None = None


class RequestOutputIn(Message):
    name: str = Field(max_length=100, examples=["label"])
    parameters: Parameters | None = None


class InferRequestIn(Message):
    """The JSON part of an inference request."""

    id: str | None = Field(None, max_length=1000)
    model_name: str | None = Field(None, description="Named by the path; KServe's client repeats it.")
    model_version: str | None = Field(None, description="Named by the path, as well.")
    parameters: Parameters | None = None
    inputs: list[RequestInputIn] = Field(min_length=1, max_length=MAX_INPUTS)
    outputs: list[RequestOutputIn] | None = Field(None, max_length=MAX_OUTPUTS)


class ResponseOutputOut(Message):
    name: str = Field(examples=["label"])
    shape: tuple[int, ...] = Field(examples=[[1]])
    datatype: str = Field(examples=["BYTES"])
    parameters: Parameters | None = None
    data: list[Any] | None = Field(None, examples=[["nominal"]])


class InferResponseOut(Message):
    """The JSON part of an answer; outputs with `binary_data_size` lie behind it, in order."""

    model_name: str = Field(examples=["textiles"])
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutputOut]


class IndexIn(Message):
    ready: bool = Field(False, description="Only models that are ready.")


class IndexedModelOut(Message):
    name: str = Field(examples=["textiles"])
    version: str
    state: str = Field(examples=["READY"])
    reason: str = Field(examples=[""])


class LoadIn(Message):
    parameters: dict[str, Any] | None = None


class UnloadIn(Message):
    """`unload_dependents` is accepted and means nothing: no task depends on another."""

    parameters: dict[str, Any] | None = None
