"""What a server's answers say, as values. Fields that a later server adds are left out."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from model_store.answers import Choice, Receipt


def known_fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Those items of `data` that are fields of the dataclass `kind`."""
    names = {one.name for one in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one picture, and what answered it.

    `confidence` is the calibrated probability of (task, label), `p_value` how typical the picture is of the
    task; `abstained` answers should not be relied on. `prediction_set` is there with a coverage.
    """

    task: str
    label: str
    confidence: float
    task_probability: float
    alternatives: tuple[Choice, ...]
    p_value: float
    abstained: bool
    receipt: Receipt
    prediction_set: tuple[Choice, ...] | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Prediction":
        listed = data.get("prediction_set")
        nested = {
            "alternatives": _choices(data["alternatives"]),
            "receipt": Receipt(**known_fields(Receipt, data["receipt"])),
            "prediction_set": None if listed is None else _choices(listed),
        }
        return cls(**known_fields(cls, data) | nested)


def _choices(data: list[Mapping[str, Any]]) -> tuple[Choice, ...]:
    return tuple(Choice(**known_fields(Choice, one)) for one in data)


@dataclass(frozen=True, slots=True)
class Task:
    """One active task and what its module file says about it."""

    task: str
    labels: tuple[str, ...]
    module_sha256: str
    size_bytes: int
    flow: str
    metrics: Mapping[str, float]
    training: Mapping[str, Any]
    provenance: Mapping[str, str]
    label_space: str | None = None
    abstain_level: float | None = None
    signer: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Task":
        return cls(**known_fields(cls, data) | {"labels": tuple(data["labels"])})


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of the revision that the server answers with."""

    revision: int
    backbone_fingerprint: str
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Tasks":
        return cls(**known_fields(cls, data) | {"tasks": tuple(Task.of(one) for one in data["tasks"])})


@dataclass(frozen=True, slots=True)
class Health:
    """How a set of tasks does on one task's calibration set, in [0, 1]."""

    selection_accuracy: float
    accuracy: float
    ece: float
    num_vectors: int


@dataclass(frozen=True, slots=True)
class TaskImpact:
    """A task's health before and after a change; None where the task is not active."""

    task: str
    before: Health | None
    after: Health | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "TaskImpact":
        before, after = (
            Health(**known_fields(Health, data[when])) if data.get(when) else None
            for when in ("before", "after")
        )
        return cls(data["task"], before, after)


@dataclass(frozen=True, slots=True)
class Replica:
    """A server of the same store, by its record there. `age_s` and `lifetime_s`: how old its record is, and
    at which age it counts as gone."""

    replica_id: str
    is_this: bool
    is_live: bool
    revision: int
    age_s: float
    lifetime_s: float
    address: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Replica":
        return cls(**known_fields(cls, data))


@dataclass(frozen=True, slots=True)
class Standing:
    """Which live replicas serve a change and which do not yet; `fault` is why that is not known."""

    all_serve: bool
    serving: tuple[Replica, ...]
    behind: tuple[Replica, ...]
    fault: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Standing":
        serving, behind = (tuple(Replica.of(one) for one in data[who]) for who in ("serving", "behind"))
        return cls(data["all_serve"], serving, behind, data.get("fault"))


@dataclass(frozen=True, slots=True)
class Change:
    """What a change did, or with a dry run would do; `harmed` are tasks that lose more than the margin.

    `replicas` is there where the change waited for all of them.
    """

    revision: int
    published: bool
    harmed: tuple[str, ...]
    impact: tuple[TaskImpact, ...]
    replaced_sha256: str | None = None
    num_unmeasured: int = 0  # active tasks that the report leaves out
    replicas: Standing | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Change":
        nested = {
            "replicas": Standing.of(data["replicas"]) if data.get("replicas") else None,
            "harmed": tuple(data["harmed"]),
            "impact": tuple(TaskImpact.of(one) for one in data["impact"]),
        }
        return cls(**known_fields(cls, data) | nested)


@dataclass(frozen=True, slots=True)
class Revision:
    """One entry of the history: which modules were active, since when, by whom and why."""

    number: int
    parent: int | None
    backbone_fingerprint: str
    tasks: Mapping[str, str]  # SHA-256 of the module by task
    reason: str
    author: str
    created_at: datetime

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Revision":
        created_at = datetime.fromisoformat(data["created_at"])
        return cls(**known_fields(cls, data) | {"created_at": created_at})


@dataclass(frozen=True, slots=True)
class Readiness:
    """A server that is ready: what it answers with, and how long ago it looked into the store."""

    revision: int
    num_tasks: int
    backbone: str
    backbone_fingerprint: str
    device: str
    runtime: str
    staleness_s: float
    is_stale: bool
    store_fault: str | None = None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Readiness":
        return cls(**known_fields(cls, data))
