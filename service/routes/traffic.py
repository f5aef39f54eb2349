"""GET /traffic: what each task has answered since the service started."""

from fastapi import APIRouter

from service.routes.state import Reading, State, problems
from service.schemas.traffic import TrafficOut

router = APIRouter(tags=["traffic"])


@router.get("/traffic", responses=problems())
async def show_traffic(state: State, _: Reading) -> TrafficOut:
    """Pictures, abstentions, confidences and drift by task, most pictures first.

    Counted since this process started, by this process alone. A task that was removed is not listed any more;
    its pictures stay in the sums.
    """
    traffic = state.engine.traffic
    traffic.follow(state.registry.active.bank)
    return TrafficOut.of(traffic)
