"""Who else serves this store: one small record a replica, written over and over while it lives.

    replicas/<replica id>.json

These are the only objects of a store that are overwritten and removed. Nothing depends on them but what is
told about replicas: a store without them serves as well.

A record counts as live for the time that it states itself. How old it is says the storage, which stamps
every object with its own clock: a replica that writes a record knows from it what the storage's clock shows,
so that no clock of any other machine matters.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.object_files import Files, Stamp

_FOLDER = "replicas"
_STAMP_RESOLUTION_S = 1.0  # object stores stamp whole seconds
_READERS = 8

ReplicaId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]


class ReplicaRecord(BaseModel):
    """What a replica says about itself."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a later version may say more

    format_version: Literal[1] = 1
    replica_id: ReplicaId
    address: str | None = Field(None, max_length=300)
    revision: int = Field(ge=1)
    lifetime_s: float = Field(gt=0.0, le=86_400.0)
    written_at: datetime  # by the writer's clock: for people, nothing is computed from it


@dataclass(frozen=True, slots=True)
class Replica:
    """A record, and how old it is by the storage's clock."""

    record: ReplicaRecord
    age_s: float

    @property
    def is_live(self) -> bool:
        return self.age_s <= self.record.lifetime_s + _STAMP_RESOLUTION_S


class ReplicaRecords:
    """The records of one store, as one replica writes and reads them. Safe to use from several threads."""

    def __init__(self, files: Files, clock: Callable[[], float] = time.monotonic) -> None:
        self._files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._own: tuple[str, float] | None = None  # name of the record written here, and when, by `clock`
        self._read: dict[str, tuple[str, ReplicaRecord | None]] = {}  # version and record by name

    def write(self, replica_id: str, revision: int, lifetime_s: float, address: str | None = None) -> None:
        """Say that a replica lives and what it serves, in place of what it said before."""
        record = ReplicaRecord(
            replica_id=replica_id,
            address=address,
            revision=revision,
            lifetime_s=lifetime_s,
            written_at=datetime.now(UTC),
        )
        with self._lock:
            self._files.put(_path(replica_id), record.model_dump_json().encode())
            self._own = (_name(replica_id), self._clock())

    def remove(self, replica_id: str) -> None:
        """Forget a replica; nothing happens where it is not known."""
        with self._lock:  # after a write that is under way, which would bring it back
            self._files.delete(_path(replica_id))

    def all(self) -> list[Replica]:
        """Every replica with a readable record, live or not, by id. Records that did not change since they
        were read last are not read again."""
        with self._lock:
            stamps = sorted(self._files.stamps(_FOLDER), key=lambda one: one.name)
            now = self._now(stamps)
            changed = [one for one in stamps if self._read.get(one.name, ("",))[0] != one.version]
            if changed:
                with ThreadPoolExecutor(min(_READERS, len(changed)), "replicas") as pool:
                    found = list(pool.map(self._record, changed))
                self._read |= {
                    one.name: (one.version, record) for one, record in zip(changed, found, strict=True)
                }
            self._read = {one.name: self._read[one.name] for one in stamps}
            return [
                Replica(record, max(0.0, now - one.modified_at.timestamp()))
                for one in stamps
                if (record := self._read[one.name][1]) is not None
            ]

    def collect(self, keep_s: float) -> int:
        """Remove the records of replicas that have been dead for `keep_s`; how many there were."""
        dead = [one for one in self.all() if not one.is_live and one.age_s > one.record.lifetime_s + keep_s]
        for one in dead:
            self.remove(one.record.replica_id)
        return len(dead)

    def _now(self, stamps: list[Stamp]) -> float:
        """What the storage's clock shows, seconds since 1970; that of this machine where it is not known."""
        if self._own is not None:
            name, written_at = self._own
            for one in stamps:
                if one.name == name:
                    return one.modified_at.timestamp() + self._clock() - written_at
        return datetime.now(UTC).timestamp()

    def _record(self, stamp: Stamp) -> ReplicaRecord | None:
        """The record of a stamp; None when it has gone meanwhile or says nothing that we understand."""
        try:
            record = ReplicaRecord.model_validate_json(self._files.get(f"{_FOLDER}/{stamp.name}") or b"")
        except ValidationError:
            return None
        return record if _name(record.replica_id) == stamp.name else None


def _name(replica_id: str) -> str:
    return f"{replica_id}.json"


def _path(replica_id: str) -> str:
    return f"{_FOLDER}/{_name(replica_id)}"
