"""GET /replicas: who else serves this store."""

from fastapi import APIRouter

from service.routes.state import Reading, State, problems
from service.schemas.replicas import ReplicaOut

router = APIRouter(tags=["replicas"])


@router.get("/replicas", responses=problems(503))
async def list_replicas(state: State, _: Reading) -> list[ReplicaOut]:
    """The replicas that keep a record in the store, and the revision each serves.

    Those that are gone without a farewell are listed as not live until their records are removed. Replicas
    write no record where heartbeats are off (`TOSCA_REPLICA_HEARTBEAT_S`).
    """
    own_id = state.replicas.own_id
    return [ReplicaOut.of(one, own_id) for one in await state.replicas.all()]
