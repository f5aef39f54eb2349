"""/health: is the process alive, and should it get traffic."""

from fastapi import APIRouter

from service.errors import ShuttingDown
from service.routes.state import State, problems
from service.schemas import Live, Ready

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", responses=problems(503))
async def live(state: State) -> Live:
    """200 while the inference thread makes progress."""
    if not state.engine.is_alive:
        raise ShuttingDown("the inference thread has stopped or hangs")
    return Live(status="live")


@router.get("/ready", responses=problems(503))
async def ready(state: State) -> Ready:
    """200 once the backbone is loaded and warmed up, until shutdown begins."""
    if not state.is_ready or not state.engine.is_alive:
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
    )
