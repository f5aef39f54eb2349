"""POST /feedback: the true label of a picture that was answered."""

from fastapi import APIRouter, Request

from service.feedback import Truth, is_right
from service.payloads import read_feedback
from service.routes.state import Predicting, State, problems
from service.schemas.feedback import FeedbackOut, FeedbackRequest

router = APIRouter(tags=["feedback"])
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": FeedbackRequest.model_json_schema()}},
    }
}


@router.post("/feedback", openapi_extra=_BODY, responses=problems(404, 409, 413, 415, 422))
async def give_feedback(request: Request, state: State, _: Predicting) -> FeedbackOut:
    """Say what a picture really showed, by the `x-request-id` of the answer.

    The answering task's accuracy and calibration in /traffic and /metrics come from it. A label that is told
    again counts once; one for a module that is not active any more does not count.
    """
    body = await read_feedback(request)
    truth = Truth(body.task, body.label)
    given, is_first = state.engine.recent.label(body.request_id, body.index, truth)
    bank = state.registry.active.bank
    is_correct = is_right(bank, given, truth)
    is_counted = is_first and state.engine.traffic.learn(bank, given, is_correct=is_correct)
    return FeedbackOut(
        task=given.task,
        label=given.label,
        confidence=given.confidence,
        correct=is_correct,
        counted=is_counted,
    )
