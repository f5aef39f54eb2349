"""Every refusal is a problem document (RFC 9457), and this table says which fault is which status."""

import math
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from model_store import errors as faults
from model_store.errors import ToscaError
from service import errors as service_faults

MEDIA_TYPE = "application/problem+json"

# The most specific class wins.
STATUS_OF: dict[type[ToscaError], int] = {
    faults.InvalidModule: 422,
    faults.FingerprintMismatch: 409,
    faults.InvalidImage: 422,
    faults.UnsupportedImageFormat: 415,
    faults.ImageTooLarge: 413,
    faults.InvalidRequest: 422,
    faults.NotFound: 404,
    faults.Conflict: 409,
    faults.CorruptStore: 500,
    faults.StoreUnavailable: 503,
    service_faults.Overloaded: 503,
    service_faults.ShuttingDown: 503,
    service_faults.DeadlineExceeded: 504,
    service_faults.BodyTooLarge: 413,
    service_faults.UnsupportedMediaType: 415,
}


def status_of(error: ToscaError) -> int:
    """The HTTP status of a fault; 500 for one that no row names."""
    return next((STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF), 500)


def problem(
    status: int, kind: str, detail: str, instance: str, headers: dict[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """A problem document as a response."""
    body = {
        "type": f"urn:tosca:problem:{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        **extra,
    }
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def problem_of(error: ToscaError, instance: str) -> JSONResponse:
    """The problem document of a fault; its type is the fault's name, hyphenated."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    headers = {}
    if isinstance(error, service_faults.Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, service_faults.ShuttingDown | faults.StoreUnavailable):
        headers["Retry-After"] = "5"
    return problem(status_of(error), kind, str(error), instance, headers)


def install(app: FastAPI) -> None:
    """Turn every refusal of `app` into a problem document."""

    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ToscaError), "registered for ToscaError"
        return problem_of(error, request.url.path)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), "registered for RequestValidationError"
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(422, "invalid-request", f"{where}: {first['msg']}", request.url.path)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), "registered for HTTPException"
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, "http", str(error.detail), request.url.path, headers)

    async def on_bug(request: Request, _: Exception) -> JSONResponse:
        return problem(500, "internal", "This is a bug; the log has the details.", request.url.path)

    app.add_exception_handler(ToscaError, on_fault)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)
