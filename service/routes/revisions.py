"""/revisions: the history of the active set, and going back in it."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from service.routes.state import Administering, State, problems
from service.routes.waiting import Waiting
from service.schemas.changes import ChangeOut
from service.schemas.revisions import RevisionOut

router = APIRouter(prefix="/revisions", tags=["revisions"])


@router.get("", responses=problems(503))
async def list_revisions(
    state: State,
    _: Administering,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many, newest first.")] = 50,
) -> list[RevisionOut]:
    """The newest revisions of the store, newest first."""
    revisions = await state.registry.read(lambda publisher: publisher.store.revisions(limit))
    return [RevisionOut.of(one) for one in revisions]


@router.post("/{number}/rollback", responses=problems(404, 409, 503))
async def roll_back(
    response: Response,
    state: State,
    caller: Administering,
    waiting: Waiting,
    number: Annotated[int, Path(ge=1, le=10**12 - 1, description="The revision to go back to.")],
    reason: Annotated[str, Query(max_length=1000, description="Kept in the revision.")] = "",
) -> ChangeOut:
    """Publish the task set of an old revision as a new revision."""
    outcome = await state.registry.rollback(number, reason=reason, author=caller.author)
    return await waiting.answer(outcome, response)
