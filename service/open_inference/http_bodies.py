"""Inference requests and answers as HTTP bodies: JSON, with the binary tensor data extension behind it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Response
from starlette.datastructures import Headers

from model_store.errors import InvalidRequest
from service.errors import BodyTooLarge, UnsupportedMediaType
from service.open_inference.answering import InferenceRequest, read_parameters
from service.open_inference.messages import (
    InferRequestIn,
    InferResponseOut,
    RequestInputIn,
    RequestOutputIn,
    ResponseOutputOut,
)
from service.open_inference.models import Model
from service.open_inference.tensors import InputTensor, OutputTensor
from service.payloads import decode_base64, parse_json
from service.settings import Settings

HEADER_LENGTH = "inference-header-content-length"
_MAX_DIGITS = 20


async def read_infer_body(
    body: bytes, headers: Headers, settings: Settings, max_elements: int
) -> tuple[InferenceRequest, set[str] | None]:
    """The request, and the names of the outputs wanted as binary data (None: all of them).

    `max_elements`: values the JSON part may hold. Raises InvalidRequest, BodyTooLarge and
    UnsupportedMediaType.
    """
    if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
        raise UnsupportedMediaType(f"content encoding {encoding[:20]!r}: send the body as it is")
    json_size = _json_size(headers.get(HEADER_LENGTH), len(body))
    if json_size > settings.max_json_bytes:
        raise BodyTooLarge(
            f"the JSON part has {json_size} bytes, at most {settings.max_json_bytes} are allowed: "
            "send binary tensor data"
        )
    message = parse_json(body[:json_size], InferRequestIn, max_elements)
    parameters = read_parameters(message.parameters or {})
    request = InferenceRequest(
        message.id or "",
        await _read_inputs(message.inputs, memoryview(body)[json_size:], settings),
        [one.name for one in message.outputs or ()],
        parameters,
    )
    return request, _binary_outputs(message.outputs or (), default=parameters.binary_data_output)


def _json_size(header: str | None, body_size: int) -> int:
    if header is None:
        return body_size
    is_number = header.isascii() and header.isdecimal() and len(header) <= _MAX_DIGITS
    if not is_number or int(header) > body_size:
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {header[:20]!r}: the body has {body_size} bytes"
        )
    return int(header)


async def _read_inputs(
    inputs: Sequence[RequestInputIn], binary: memoryview, settings: Settings
) -> list[InputTensor]:
    read = []
    start = 0
    for one in inputs:
        parameters = dict(one.parameters or {})
        size = parameters.pop("binary_data_size", None)
        _refuse_unknown(f"input {one.name!r}", parameters)
        data: bytes | list[Any]
        if size is None:
            if one.data is None:
                raise InvalidRequest(f"input {one.name!r} has neither data nor binary_data_size")
            data = await _decoded(one, settings)
        elif one.data is not None:
            raise InvalidRequest(f"input {one.name!r} has both data and binary_data_size")
        elif isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - start:
            raise InvalidRequest(
                f"input {one.name!r} has binary_data_size {str(size)[:20]}, "
                f"the body has {len(binary) - start} bytes left"
            )
        else:
            data = bytes(binary[start : start + size])
            start += size
        read.append(InputTensor(one.name, one.datatype, one.shape, data))
    if start != len(binary):
        raise InvalidRequest(f"{len(binary) - start} bytes of binary data belong to no input")
    return read


async def _decoded(given: RequestInputIn, settings: Settings) -> list[Any]:
    """The values of a tensor in JSON, which cannot hold pictures but in base64."""
    values = given.data or []
    if given.datatype != "BYTES":
        return values
    texts = [one for row in values for one in (row if isinstance(row, list) else [row])]
    if not all(isinstance(one, str) for one in texts):
        raise InvalidRequest(f"input {given.name!r}: BYTES in JSON are base64 strings")
    return await decode_base64(texts, settings.max_image_bytes)


def _binary_outputs(outputs: Sequence[RequestOutputIn], *, default: bool) -> set[str] | None:
    names = set()
    for one in outputs:
        parameters = dict(one.parameters or {})
        if parameters.pop("binary_data", default):
            names.add(one.name)
        _refuse_unknown(f"output {one.name!r}", parameters)
    return None if not outputs and default else names


def _refuse_unknown(where: str, parameters: Mapping[str, Any]) -> None:
    if parameters:
        raise InvalidRequest(f"{where}: unknown parameter {next(iter(parameters))[:100]!r}")


def infer_response(
    model: Model, request_id: str, outputs: Sequence[OutputTensor], binary: set[str] | None
) -> Response:
    """The answer; outputs named in `binary` (None: all) follow the JSON part."""
    parts: list[bytes] = []
    listed = []
    for one in outputs:
        out = ResponseOutputOut(name=one.name, shape=one.shape, datatype=one.datatype, data=None)
        if binary is None or one.name in binary:
            parts.append(one.raw)
            out.parameters = {"binary_data_size": len(parts[-1])}
        else:
            out.data = one.listed
        listed.append(out)
    message = InferResponseOut(
        model_name=model.name, model_version=model.version, id=request_id or None, outputs=listed
    )
    head = message.model_dump_json(exclude_none=True).encode()
    if not parts:
        return Response(head, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *parts]), media_type="application/octet-stream", headers=headers)
