"""The servers of one store, and how far a change has come among them."""

from pydantic import Field

from model_store.replicas import Replica
from service.replicas import Standing
from service.schemas.strict import Strict


class ReplicaOut(Strict):
    """A replica by its record in the store."""

    replica_id: str = Field(examples=["host-1f0c9a3e"])
    is_this: bool = Field(description="Whether it is the one that answers.")
    is_live: bool = Field(description="Its record is younger than it says records of it get.")
    revision: int = Field(description="What it served when it wrote its record.", examples=[7])
    address: str | None = Field(examples=["http://10.0.0.7:8000"])
    age_s: float = Field(description="Seconds since its record was written, by the store's clock.")
    lifetime_s: float = Field(description="Seconds after which it counts as gone.", examples=[30.0])

    @classmethod
    def of(cls, replica: Replica, own_id: str) -> "ReplicaOut":
        record = replica.record
        return cls(
            replica_id=record.replica_id,
            is_this=record.replica_id == own_id,
            is_live=replica.is_live,
            revision=record.revision,
            address=record.address,
            age_s=round(replica.age_s, 3),
            lifetime_s=record.lifetime_s,
        )


class StandingOut(Strict):
    """How far a change has come among the live replicas, with `wait=all`."""

    all_serve: bool = Field(description="Whether every live replica serves the change, or a later one.")
    serving: list[ReplicaOut]
    behind: list[ReplicaOut]
    fault: str | None = Field(None, description="Why it is not known.")

    @classmethod
    def of(cls, standing: Standing, own_id: str) -> "StandingOut":
        return cls(
            all_serve=standing.all_serve,
            serving=[ReplicaOut.of(one, own_id) for one in standing.serving],
            behind=[ReplicaOut.of(one, own_id) for one in standing.behind],
            fault=standing.fault,
        )
