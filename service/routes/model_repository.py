"""/v2/repository: Triton's model-repository extension, over tasks."""

from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.open_inference.messages import IndexedModelOut, IndexIn, LoadIn, UnloadIn, inline_schema
from service.payloads import parse_json
from service.routes.open_inference import errors
from service.routes.state import Administering, Reading, State

router = APIRouter(prefix="/v2/repository", tags=["open inference protocol"])
admin_router = APIRouter(prefix="/v2/repository", tags=["open inference protocol"])
_MAX_ELEMENTS = 100
Body = TypeVar("Body", bound=BaseModel)


def _optional_body(message: type[BaseModel]) -> dict[str, Any]:
    return {
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": inline_schema(message)}},
        }
    }


async def _read(request: Request, message: type[Body]) -> Body:
    """The body, read once the caller is known to be allowed; none is an empty one."""
    return parse_json(await request.body() or b"{}", message, _MAX_ELEMENTS)


@router.post("/index", openapi_extra=_optional_body(IndexIn), responses=errors(503))
async def index(request: Request, state: State, _: Reading) -> list[IndexedModelOut]:
    """The models that are served, and the tasks that can be loaded again."""
    asked = await _read(request, IndexIn)
    models = await state.repository.index(ready_only=asked.ready)
    return [IndexedModelOut.model_validate(one) for one in models]


@admin_router.post(
    "/models/{name}/load",
    response_class=Response,
    openapi_extra=_optional_body(LoadIn),
    responses=errors(404, 409, 503),
)
async def load(request: Request, state: State, caller: Administering, name: str) -> Response:
    """Make the module that a task had last in the store's history active again."""
    asked = await _read(request, LoadIn)
    number = await state.repository.load(name, author=caller.author, parameters=asked.parameters or {})
    return Response(headers={"x-revision": str(number)})


@admin_router.post(
    "/models/{name}/unload",
    response_class=Response,
    openapi_extra=_optional_body(UnloadIn),
    responses=errors(404, 409, 503),
)
async def unload(request: Request, state: State, caller: Administering, name: str) -> Response:
    """Take a task out of the active set; its module stays in the store."""
    await _read(request, UnloadIn)
    number = await state.repository.unload(name, author=caller.author)
    return Response(headers={"x-revision": str(number)})
