"""Reading request bodies: raw bytes, multipart or JSON, bounded before they are held."""

import base64
import binascii
from collections.abc import Callable
from typing import TypeVar

import torch
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from model_store.backbone import Backbone
from model_store.errors import Conflict, InvalidRequest
from service.errors import BodyTooLarge, UnsupportedMediaType
from service.schemas import PredictRequest, StoredModule

# CLS vectors leave a layer norm: their numbers are of the order of ten.
MAX_CLS_VALUE = 1e4
Body = TypeVar("Body", bound=BaseModel)
# What `curl --data-binary` sends unless told otherwise, and no content type at all, count as raw bytes.
BINARY_TYPES = ("application/octet-stream", "application/x-www-form-urlencoded", "")


class LimitBody:
    """ASGI middleware that refuses a body larger than `limit_of(path)` bytes while it arrives."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[str], int]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["path"])
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise BodyTooLarge(f"request body exceeds the limit of {limit} bytes")
            return message

        await self._app(scope, limited, send)


async def read_pictures(request: Request, max_images: int) -> PredictRequest | list[bytes]:
    """The pictures of a prediction request: a list of bytes, or the parsed JSON form.

    Raises InvalidRequest, BodyTooLarge and UnsupportedMediaType.
    """
    media_type = _media_type(request)
    if media_type == "multipart/form-data":
        return await _uploads(request, max_images)
    if media_type == "application/json":
        return await _json(request, PredictRequest)
    if media_type.startswith("image/") or media_type in BINARY_TYPES:
        return [await _raw(request)]
    raise UnsupportedMediaType(
        f"content type {media_type!r}: send a picture as image/* or application/octet-stream, "
        "several as multipart/form-data, or base64 in application/json"
    )


def decode_base64(images: list[str]) -> list[bytes]:
    """Raises InvalidRequest naming the picture that is no base64."""
    pictures = []
    for i, text in enumerate(images):
        try:
            pictures.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"images.{i} is not base64: {error}") from error
    return pictures


def read_cls(body: PredictRequest, backbone: Backbone) -> Tensor:
    """[B, D] float32 CLS vectors that a client kept.

    Raises Conflict when another backbone computed them and InvalidRequest when they cannot be CLS vectors.
    """
    if body.backbone_fingerprint != backbone.fingerprint:
        raise Conflict(
            f"the CLS vectors were computed by backbone {body.backbone_fingerprint}, "
            f"this service runs {backbone.fingerprint}: send the pictures"
        )
    vectors = body.cls or []
    for i, vector in enumerate(vectors):
        if len(vector) != backbone.feature_dim:
            raise InvalidRequest(f"cls.{i} has {len(vector)} numbers, expected {backbone.feature_dim}")
        if max(abs(value) for value in vector) > MAX_CLS_VALUE:
            raise InvalidRequest(f"cls.{i} has a number beyond ±{MAX_CLS_VALUE:g}, which no CLS vector has")
    return torch.tensor(vectors, dtype=torch.float32)


async def read_module_body(request: Request) -> bytes | StoredModule:
    """A module file as raw body or single multipart file, or a reference to a stored one."""
    media_type = _media_type(request)
    if media_type == "multipart/form-data":
        files = await _uploads(request, max_files=1)
        return files[0]
    if media_type == "application/json":
        return await _json(request, StoredModule)
    if media_type in BINARY_TYPES:
        return await _raw(request)
    raise UnsupportedMediaType(
        f"content type {media_type!r}: send a module file as application/octet-stream or "
        "multipart/form-data, or application/json with module_sha256"
    )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def _raw(request: Request) -> bytes:
    body = await request.body()
    if not body:
        raise InvalidRequest("the request body is empty")
    return body


async def _json(request: Request, model: type[Body]) -> Body:
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidRequest(f"{where}: {first['msg']}") from error


async def _uploads(request: Request, max_files: int) -> list[bytes]:
    try:
        form = await request.form(max_files=max_files, max_fields=0)
    except HTTPException as error:  # Starlette's own refusal of a malformed body
        raise InvalidRequest(f"multipart body: {error.detail}") from error
    try:
        files = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    finally:
        await form.close()
    if not files:
        raise InvalidRequest("the multipart body holds no file")
    return files
