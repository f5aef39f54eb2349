"""The route of predictions: documented by FastAPI, its parameters read without it.

FastAPI solves the parameters of an endpoint anew for every request, which takes half of the processor time
that a prediction costs beside its picture and its pass (docs/experiments.md). What is read here is what it
would have read, and what is refused is refused in the same words; tests/test_direct.py compares the two.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from service.routes.state import admitted, get_state
from service.schemas import PredictQuery

_NO_QUERY = PredictQuery.model_validate({})


class DirectRoute(APIRoute):
    """A route whose endpoint takes (request, state, caller, query, X-Request-Timeout), as `predict` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            state = await get_state(request)
            with admitted(request, state, "predict") as caller:
                query = read_query(request.query_params)
                answer = await self.endpoint(
                    request, state, caller, query, request.headers.get("x-request-timeout")
                )
            if isinstance(answer, Response):
                return answer
            return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

        return handle


def read_query(given: QueryParams) -> PredictQuery:
    """Of a parameter given twice the last counts. Raises RequestValidationError for one out of range."""
    if not given:
        return _NO_QUERY
    try:
        return PredictQuery.model_validate(dict(given))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise RequestValidationError([{**one, "loc": ("query", *one["loc"])} for one in faults]) from error
