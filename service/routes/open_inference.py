"""/v2: the Open Inference Protocol over HTTP."""

from importlib.metadata import version as installed_version
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response

from service.admission import deadline_s
from service.disconnect import while_connected
from service.errors import EngineStopped, ShuttingDown
from service.open_inference.answering import infer as answer
from service.open_inference.answering import max_listed
from service.open_inference.http_bodies import infer_response, read_infer_body
from service.open_inference.messages import (
    ErrorOut,
    InferRequestIn,
    InferResponseOut,
    ModelMetadataOut,
    ModelReadyOut,
    ServerLiveOut,
    ServerMetadataOut,
    ServerReadyOut,
    TensorMetadataOut,
    inline_schema,
)
from service.open_inference.models import EXTENSIONS, PLATFORM, find_model, inputs_of
from service.prediction import Inquiry
from service.routes.state import Predicting, Reading, State

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
health_router = APIRouter(prefix="/v2/health", tags=["open inference protocol"])


ModelName = Annotated[str, Path(description="`tosca`, or the name of a task.", examples=["tosca"])]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for refusals with these statuses, and those that any request may get."""
    every = sorted({*statuses, 401, 403, 408, 412, 413, 422, 429})
    return {status: {"description": "Error of the protocol", "model": ErrorOut} for status in every}


_BODY = {
    "requestBody": {
        "required": True,
        "description": "JSON, or `Inference-Header-Content-Length` bytes of JSON and binary tensors.",
        "content": {
            "application/json": {"schema": inline_schema(InferRequestIn)},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": InferResponseOut}}


@health_router.get("/live", responses={503: {"model": ErrorOut}})
async def live(state: State) -> ServerLiveOut:
    """200 while every inference thread makes progress."""
    if not state.engine.is_alive:
        raise EngineStopped("an inference thread has stopped or hangs")
    return ServerLiveOut(live=True)


@health_router.get("/ready", responses={503: {"model": ErrorOut}})
async def ready(state: State) -> ServerReadyOut:
    """200 once the service is warmed up, until shutdown begins."""
    if not state.accepts:
        raise ShuttingDown("not ready")
    return ServerReadyOut(ready=True)


@router.get("", responses=errors())
async def server_metadata(_: Reading) -> ServerMetadataOut:
    """What this server is, and the extensions it has."""
    return ServerMetadataOut(
        name="tosca-serving", version=installed_version("tosca-serving"), extensions=list(EXTENSIONS)
    )


@router.get("/models/{name}", responses=errors(404))
@router.get("/models/{name}/versions/{version}", responses=errors(404))
async def model_metadata(state: State, _: Reading, name: ModelName, version: str = "") -> ModelMetadataOut:
    """The service as a whole (`tosca`) or an active task, with its tensors."""
    model = find_model(state.registry.active, name, version)
    return ModelMetadataOut(
        name=model.name,
        versions=[model.version],
        platform=PLATFORM,
        inputs=[TensorMetadataOut.model_validate(one) for one in inputs_of(state.engine.backbone.manifest)],
        outputs=[TensorMetadataOut.model_validate(one) for one in model.outputs],
    )


@router.get("/models/{name}/ready", responses=errors(404, 503))
@router.get("/models/{name}/versions/{version}/ready", responses=errors(404, 503))
async def model_ready(state: State, _: Reading, name: ModelName, version: str = "") -> ModelReadyOut:
    """200 when the model answers; 404 when it is not served."""
    model = find_model(state.registry.active, name, version)
    if not state.accepts:
        raise ShuttingDown("not ready")
    return ModelReadyOut(name=model.name, ready=True)


@router.post("/models/{name}/infer", openapi_extra=_BODY, responses=_ANSWER | errors(404, 409, 415, 503, 504))
@router.post(
    "/models/{name}/versions/{version}/infer",
    openapi_extra=_BODY,
    responses=_ANSWER | errors(404, 409, 415, 503, 504),
)
async def infer(
    request: Request,
    state: State,
    _: Predicting,
    name: ModelName,
    version: str = "",
    x_request_timeout: Annotated[str | None, Header(description="Seconds the answer may take.")] = None,
) -> Response:
    """Answer the pictures of one input: `image` (encoded), `pixels` (normalised) or `cls` (CLS vectors)."""
    active = state.registry.active
    model = find_model(active, name, version)
    timeout_s = deadline_s(x_request_timeout, state.settings)
    inquiry = Inquiry.admit(state.engine, state.settings, active.bank, timeout_s)
    backbone = state.engine.backbone
    body = await request.body()
    max_elements = max_listed(backbone, state.settings.max_images_per_request)
    asked, binary = await read_infer_body(body, request.headers, state.settings, max_elements)
    outputs = await while_connected(request, answer(inquiry, model, asked, backbone))
    return infer_response(model, asked.request_id, outputs, binary)
