"""/health: is the process alive, and should it get traffic."""

from fastapi import APIRouter

from service.errors import EngineStopped, ShuttingDown
from service.routes.state import State, health_problems
from service.schemas.health import Live, Ready

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", responses=health_problems)
async def live(state: State) -> Live:
    """200 while every inference thread makes progress."""
    if not state.engine.is_alive:
        raise EngineStopped("an inference thread has stopped or hangs")
    return Live(status="live")


@router.get("/ready", responses=health_problems)
async def ready(state: State) -> Ready:
    """200 once the backbone is loaded and warmed up, until shutdown begins.

    A store that cannot be reached leaves the service ready: it answers with the revision it has, and says
    here that it is stale.
    """
    if not state.accepts:
        raise ShuttingDown("not ready")
    active = state.registry.active
    backbone = state.engine.backbone
    return Ready(
        status="ready",
        revision=active.revision.number,
        num_tasks=len(active.files),
        backbone=backbone.manifest.architecture,
        backbone_fingerprint=backbone.fingerprint,
        device=str(backbone.device),
        runtime=backbone.runtime_name,
        staleness_s=state.registry.staleness_s,
        is_stale=state.registry.fault is not None
        or bool(state.settings.store_poll_s and state.registry.staleness_s > state.settings.stale_after_s),
        store_fault=state.registry.fault,
    )
