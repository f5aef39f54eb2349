"""Every refusal is a problem document (RFC 9457), and this table says which fault is which status."""

import math
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from model_store import errors as faults
from model_store.errors import ToscaError
from service import errors as service_faults
from service.request_context import current_request

CLIENT_CLOSED_REQUEST = 499  # nginx's name for it; nobody reads the response, but logs count it
MEDIA_TYPE = "application/problem+json"
_MAX_TEXT = 1000
_CHALLENGE = 'Bearer realm="tosca"'

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
    faults.InvalidTrust: 422,
    service_faults.Unauthenticated: 401,
    service_faults.Forbidden: 403,
    service_faults.BodyTimeout: 408,
    service_faults.RevisionBehind: 412,
    service_faults.TooManyRequests: 429,
    service_faults.NotFinite: 500,
    service_faults.Refused: 503,
    service_faults.AuditUnavailable: 503,
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
    """A problem document as a response; under /v2 the error object that the protocol there wants."""
    context = current_request.get()
    if context is not None:
        context.refusal = kind
    if instance.startswith("/v2/") or instance == "/v2":
        return JSONResponse({"error": detail[:_MAX_TEXT]}, status, headers=headers)
    body = {
        "type": f"urn:tosca:problem:{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail[:_MAX_TEXT],  # it may quote what the client sent
        "instance": instance[:_MAX_TEXT],
        **({"request_id": context.request_id} if context else {}),
        **extra,
    }
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def problem_of(error: ToscaError, instance: str) -> JSONResponse:
    """The problem document of a fault; its type is the fault's name, hyphenated."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    extra = {"revision": error.served} if isinstance(error, service_faults.RevisionBehind) else {}
    return problem(status_of(error), kind, str(error), instance, _headers_of(error), **extra)


def _headers_of(error: ToscaError) -> dict[str, str]:
    match error:
        case service_faults.Refused():
            return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        case faults.StoreUnavailable() | service_faults.AuditUnavailable():
            return {"Retry-After": "5"}
        case service_faults.RevisionBehind():
            return {"Retry-After": "1", "X-Revision": str(error.served)}
        case service_faults.Unauthenticated():
            return {"WWW-Authenticate": _CHALLENGE + (', error="invalid_token"' if error.is_wrong else "")}
        case service_faults.Forbidden() if error.scope:
            return {"WWW-Authenticate": f'{_CHALLENGE}, error="insufficient_scope", scope="{error.scope}"'}
        case service_faults.BodyTimeout() | service_faults.BodyTooLarge():
            return {"Connection": "close"}  # the rest of the body is not worth waiting for
        case _:
            return {}


def _methods(request: Request) -> list[str]:
    """What may be asked of a path, over all the routes that have it."""
    documented: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    found = [item for path, item in documented.items() if compile_path(path)[0].fullmatch(request.url.path)]
    return sorted({method.upper() for item in found for method in item})


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
        headers = dict(error.headers or {})
        if error.status_code == 405 and (methods := _methods(request)):
            headers["Allow"] = ", ".join(methods)
        return problem(error.status_code, "http", str(error.detail), request.url.path, headers)

    async def on_leaving(_request: Request, _: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(request: Request, _: Exception) -> JSONResponse:
        context = current_request.get()
        headers = {"Connection": "close"}  # as uvicorn does after a fault
        if context is not None:
            headers["x-request-id"] = context.request_id  # sent outside TrackRequests
        detail = "This is a bug; the log has the details."
        return problem(500, "internal", detail, request.url.path, headers)

    app.add_exception_handler(ToscaError, on_fault)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_leaving)
    app.add_exception_handler(Exception, on_bug)
