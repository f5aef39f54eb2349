"""Reading request bodies: raw bytes, multipart or JSON, bounded before they are held."""

import asyncio
import binascii
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

import torch
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from model_store.backbone import Backbone
from model_store.errors import Conflict, ImageTooLarge, InvalidRequest
from model_store.signatures import Signature
from service.bodies import media_type_of
from service.errors import UnsupportedMediaType
from service.schemas.feedback import FeedbackRequest
from service.schemas.predict import PredictRequest
from service.schemas.tasks import StoredModule

# CLS vectors leave a layer norm: their numbers are of the order of ten.
MAX_CLS_VALUE = 1e4
Body = TypeVar("Body", bound=BaseModel)
# What `curl --data-binary` sends unless told otherwise, and no content type at all, count as raw bytes.
BINARY_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded", "")
_BASE64_SLICE = 4 * 2**18  # characters; a multiple of four
_MAX_FIELDS = 8


async def read_pictures(request: Request, max_images: int, feature_dim: int) -> PredictRequest | list[bytes]:
    """The pictures of a prediction request: a list of bytes, or the parsed JSON form, which may hold
    `max_images` pictures or as many vectors of `feature_dim` numbers.

    Raises InvalidRequest, BodyTooLarge and UnsupportedMediaType.
    """
    media_type = media_type_of(request.headers)
    if media_type == "multipart/form-data":
        return await _uploads(request, max_images)
    if media_type == "application/json":
        return await _json(request, PredictRequest, max_images * (feature_dim + 1))
    if media_type.startswith("image/") or media_type in BINARY_TYPES:
        return [await _raw(request)]
    raise UnsupportedMediaType(
        f"content type {media_type!r}: send a picture as image/* or application/octet-stream, "
        "several as multipart/form-data, or base64 in application/json"
    )


async def decode_base64(images: list[str], max_bytes: int) -> list[bytes]:
    """The bytes of base64 pictures, each of at most about `max_bytes`; off the event loop.

    Raises InvalidRequest naming the picture that is no base64, and ImageTooLarge.
    """
    for i, text in enumerate(images):
        if len(text) // 4 * 3 > max_bytes + 3:
            raise ImageTooLarge(f"images.{i} has more than the {max_bytes} bytes allowed")
    return await asyncio.to_thread(lambda: [_from_base64(i, text) for i, text in enumerate(images)])


def _from_base64(i: int, text: str) -> bytes:
    """Decoded in slices: a decoder keeps the interpreter to itself, and health checks must not wait."""
    picture = bytearray()
    try:
        if len(text) % 4:
            raise ValueError(f"{len(text)} characters are not a multiple of four")
        for start in range(0, len(text), _BASE64_SLICE):
            slice_ = text[start : start + _BASE64_SLICE]
            if "=" in slice_[:-2] or ("=" in slice_ and start + _BASE64_SLICE < len(text)):
                raise ValueError("padding amid the text")
            picture += binascii.a2b_base64(slice_, strict_mode=True)
    except ValueError as error:  # binascii.Error is one
        raise InvalidRequest(f"images.{i} is not base64: {error}") from error
    return bytes(picture)


def read_cls(body: PredictRequest, backbone: Backbone) -> Tensor:
    """[B, D] float32 CLS vectors that a client kept.

    Raises Conflict when another backbone computed them and InvalidRequest when they cannot be CLS vectors.
    """
    check_fingerprint(body.backbone_fingerprint, backbone)
    vectors = body.cls or []
    for i, vector in enumerate(vectors):
        if len(vector) != backbone.feature_dim:
            raise InvalidRequest(f"cls.{i} has {len(vector)} numbers, expected {backbone.feature_dim}")
        if max(abs(value) for value in vector) > MAX_CLS_VALUE:
            raise InvalidRequest(f"cls.{i} has a number beyond ±{MAX_CLS_VALUE:g}, which no CLS vector has")
    return torch.tensor(vectors, dtype=torch.float32)


def check_fingerprint(fingerprint: str | None, backbone: Backbone) -> None:
    """Raises Conflict unless `fingerprint` is that of the backbone whose CLS vectors are known here."""
    if fingerprint != backbone.fingerprint:
        raise Conflict(
            f"the CLS vectors were computed by backbone {fingerprint}, "
            f"this service runs {backbone.fingerprint}: send the pictures"
        )


async def read_module_body(request: Request) -> bytes | StoredModule:
    """A module file as raw body or single multipart file, or a reference to a stored one."""
    media_type = media_type_of(request.headers)
    if media_type == "multipart/form-data":
        files = await _uploads(request, max_files=1)
        return files[0]
    if media_type == "application/json":
        return await _json(request, StoredModule, max_elements=1)
    if media_type in BINARY_TYPES:
        return await _raw(request)
    raise UnsupportedMediaType(
        f"content type {media_type!r}: send a module file as application/octet-stream or "
        "multipart/form-data, or application/json with module_sha256"
    )


async def read_feedback(request: Request) -> FeedbackRequest:
    """Raises InvalidRequest and UnsupportedMediaType."""
    media_type = media_type_of(request.headers)
    if media_type != "application/json":
        raise UnsupportedMediaType(f"content type {media_type!r}: send application/json")
    return await _json(request, FeedbackRequest, max_elements=256)  # a label may have commas


def read_signature(header: str | None) -> Signature | None:
    """The signature that came with a module file. Raises InvalidRequest."""
    if header is None:
        return None
    try:
        return Signature.model_validate_json(header)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise InvalidRequest(f"X-Module-Signature is no signature: {message}") from error


async def _raw(request: Request) -> bytes:
    body = await request.body()
    if not body:
        raise InvalidRequest("the request body is empty")
    return body


async def _json(request: Request, model: type[Body], max_elements: int) -> Body:
    body = await request.body()
    await asyncio.sleep(0)  # joining and parsing megabytes takes its time: let others in between
    return parse_json(body, model, max_elements)


def parse_json(body: bytes, model: type[Body], max_elements: int) -> Body:
    """A JSON document as `model`. Raises InvalidRequest, naming the field that is wrong."""
    # Millions of empty elements would keep the parser, and so the event loop, busy for seconds. Neither
    # base64 nor a task's name has commas, so their number bounds that of the elements before parsing.
    if body.count(b",") > max_elements + _MAX_FIELDS:
        raise InvalidRequest(f"the JSON body has more than the {max_elements} elements allowed")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidRequest(f"{where}: {first['msg']}") from error


class _WholeForm(MultiPartParser):
    """Starlette's parser, which would leave out a last part that nothing ends."""

    def __init__(self, request: Request, max_files: int) -> None:
        super().__init__(request.headers, self._pieces(request), max_files=max_files, max_fields=0)
        self._is_whole = False

    def on_end(self) -> None:
        self._is_whole = True

    async def _pieces(self, request: Request) -> AsyncGenerator[bytes]:
        async with aclosing(request.stream()) as stream:
            async for piece in stream:
                yield piece
        if not self._is_whole:
            raise MultiPartException("its closing boundary is missing")


async def _uploads(request: Request, max_files: int) -> list[bytes]:
    parser = _WholeForm(request, max_files)
    try:
        async with aclosing(parser.stream):
            form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"multipart body: {error.message}") from error
    except UnicodeError as error:  # of the charset that the client names
        raise InvalidRequest(f"multipart body: {error}") from error
    try:
        files = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    finally:
        await form.close()
    if not files:
        raise InvalidRequest("the multipart body holds no file")
    return files
