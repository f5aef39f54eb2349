"""/tasks: what is active, and changing it while requests are being answered."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from model_store.revision_reader import ActiveSet
from service.payloads import read_module_body, read_signature
from service.routes.state import Administering, Reading, State, problems
from service.routes.waiting import Waiting
from service.schemas.changes import ChangeOut
from service.schemas.tasks import StoredModule, TaskOut, TasksOut

router = APIRouter(prefix="/tasks", tags=["tasks"])
admin_router = APIRouter(prefix="/tasks", tags=["tasks"])

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "A module file, or a reference to one in the store.",
        "content": {
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"module": _BINARY["schema"]}}
            },
            "application/json": {"schema": StoredModule.model_json_schema()},
        },
    }
}
Reason = Annotated[str, Query(max_length=1000, description="Kept in the revision.")]


@admin_router.post(
    "",
    status_code=201,
    openapi_extra=_BODY,
    responses={200: {"description": "Dry run, or already active"}, **problems(404, 409, 413, 415, 422, 503)},
)
async def register_task(
    request: Request,
    response: Response,
    state: State,
    caller: Administering,
    waiting: Waiting,
    dry_run: Annotated[bool, Query(description="Only report the impact.")] = False,
    force: Annotated[bool, Query(description="Go ahead even if another task is harmed.")] = False,
    reason: Reason = "",
    x_module_signature: Annotated[
        str | None, Header(max_length=1000, description="The JSON that `tosca sign` writes.")
    ] = None,
) -> ChangeOut:
    """Add or replace a task. Answered when the new revision is published and serving.

    The file is checked against the format, the backbone and its trainer's own outputs; the impact on
    every active task is measured. A refused file changes nothing.
    """
    signature = read_signature(x_module_signature)
    body = await read_module_body(request)
    if isinstance(body, StoredModule):
        outcome = await state.registry.register_stored(
            body.module_sha256,
            dry_run=dry_run,
            force=force,
            reason=reason,
            author=caller.author,
            signature=signature,
        )
    else:
        outcome = await state.registry.register(
            body, dry_run=dry_run, force=force, reason=reason, author=caller.author, signature=signature
        )
    if not outcome.published:
        response.status_code = 200
    return await waiting.answer(outcome, response, dry_run=dry_run)


@router.get("", responses=problems())
async def list_tasks(state: State, _: Reading) -> TasksOut:
    """The tasks of the revision now served."""
    active = state.registry.active
    return TasksOut(
        revision=active.revision.number,
        backbone_fingerprint=active.revision.backbone_fingerprint,
        tasks=[_task(active, task) for task in sorted(active.files)],
    )


@router.get("/{task}", responses=problems(404))
async def show_task(task: str, state: State, _: Reading) -> TaskOut:
    """One active task."""
    active = state.registry.active
    active.bank.module(task)  # raises UnknownTask
    return _task(active, task)


@admin_router.delete("/{task}", responses=problems(404, 409, 503))
async def remove_task(
    task: str,
    response: Response,
    state: State,
    caller: Administering,
    waiting: Waiting,
    reason: Reason = "",
) -> ChangeOut:
    """Take a task out of the active set; answers become what they were without it, bit for bit."""
    outcome = await state.registry.remove(task, reason=reason, author=caller.author)
    return await waiting.answer(outcome, response)


def _task(active: ActiveSet, task: str) -> TaskOut:
    file = active.files[task]
    return TaskOut.of(file, active.bank.signers.get(file.sha256))
