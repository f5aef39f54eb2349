"""POST /predict."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from torch import Tensor

from service.admission import deadline_s
from service.disconnect import while_connected
from service.payloads import decode_base64, read_cls, read_pictures
from service.prediction import Inquiry, Wishes
from service.routes.direct import DirectRoute
from service.routes.state import Predicting, State, problems
from service.schemas.predict import PredictQuery, PredictRequest, PredictResponse

router = APIRouter(tags=["predict"], route_class=DirectRoute)

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "A picture, several pictures, or base64 or CLS vectors in JSON.",
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": _BINARY["schema"]}},
                }
            },
            "application/json": {"schema": PredictRequest.model_json_schema()},
        },
    }
}


@router.post(
    "/predict",
    openapi_extra=_BODY,
    responses=problems(404, 409, 413, 415, 422, 503, 504),
    response_model=PredictResponse,
    response_model_exclude_none=True,
)
async def predict(
    request: Request,
    state: State,
    _: Predicting,
    query: Annotated[PredictQuery, Query()],
    x_request_timeout: Annotated[str | None, Header(description="Seconds the answer may take.")] = None,
) -> PredictResponse:
    """Answer each picture with the most probable (task, label) over all active tasks.

    Every answer carries the receipt of what answered. A picture that cannot be read refuses its whole
    request and nobody else's.
    """
    timeout_s = deadline_s(x_request_timeout, state.settings)
    inquiry = Inquiry.admit(state.engine, state.settings, state.registry.active.bank, timeout_s)
    limit = state.settings.max_images_per_request
    body = await read_pictures(request, limit, state.engine.backbone.feature_dim)
    task, top_k, selection, coverage = query.task, query.top_k, query.selection, query.coverage
    pictures: list[bytes] | Tensor
    if isinstance(body, PredictRequest):
        task, top_k, selection = body.task or task, body.top_k or top_k, body.selection or selection
        coverage = body.coverage or coverage
        inquiry.check_count(len(body.images or body.cls or ()))
        if body.images:
            pictures = await decode_base64(body.images, state.settings.max_image_bytes)
        else:
            pictures = read_cls(body, state.engine.backbone)
    else:
        pictures = body
    inquiry.check_top_k(top_k)
    wishes = Wishes(task, top_k, selection, coverage)
    answers = await while_connected(request, inquiry.answer(pictures, wishes))
    cls_of = state.engine.backbone.fingerprint if query.return_cls else None
    return PredictResponse.of(answers, timings=query.timings, cls_of=cls_of)
