"""The route of predictions: documented by FastAPI, its parameters read without it.

FastAPI solves the parameters of an endpoint anew for every request, which takes half of the processor time
that a prediction costs beside its picture and its pass (docs/experiments.md). What is read here is what it
would have read, and what is refused is refused in the same words; tests/test_direct.py compares the two. Its
router and the stacks of contexts around an endpoint take a seventh of what is left: they are passed by, too.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from service.routes.state import RevisionNumber, admitted, get_state
from service.schemas.predict import PredictQuery

_REVISION_NUMBER: TypeAdapter[int] = TypeAdapter(RevisionNumber)
_NO_QUERY = PredictQuery.model_validate({})


class DirectRoute(APIRoute):
    """A route whose endpoint takes (request, state, caller, query, X-Request-Timeout), as `predict` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            state = await get_state(request)
            minimum_revision = read_minimum_revision(request)
            async with admitted(request, state, "predict", minimum_revision) as caller:
                query = read_query(request.query_params) if request.scope["query_string"] else _NO_QUERY
                answer = await self.endpoint(
                    request, state, caller, query, request.headers.get("x-request-timeout")
                )
            return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

        return handle


class Ahead(Route):
    """The way to a DirectRoute ahead of FastAPI's router, which still documents it."""

    def __init__(self, route: DirectRoute) -> None:
        self._handle = route.get_route_handler()
        super().__init__(route.path, self._answer, methods=route.methods, include_in_schema=False)
        self.app = self._answer  # Starlette takes a method for an endpoint of its own kind

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, {**child_scope, "route": self}  # by which requests are counted

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handle(Request(scope, receive, send))
        await response(scope, receive, send)


def read_query(given: QueryParams) -> PredictQuery:
    """Of a parameter given twice the last counts. Raises RequestValidationError for one out of range."""
    try:
        return PredictQuery.model_validate(dict(given))
    except ValidationError as error:
        raise RequestValidationError(_faults(error, "query")) from error


def read_minimum_revision(request: Request) -> int | None:
    """Raises RequestValidationError, which names what is wrong with the query, too."""
    given = request.headers.get("x-minimum-revision")
    if given is None:
        return None
    try:
        return _REVISION_NUMBER.validate_python(given)
    except ValidationError as error:
        faults = _faults(error, "header", "x-minimum-revision")
        try:
            read_query(request.query_params)
        except RequestValidationError as other:
            faults += other.errors()
        raise RequestValidationError(faults) from error


def _faults(error: ValidationError, *where: str) -> list[dict[str, Any]]:
    return [{**one, "loc": (*where, *one["loc"])} for one in error.errors(include_url=False)]
