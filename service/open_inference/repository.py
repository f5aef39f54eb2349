"""Triton's model-repository extension: tasks as models that can be loaded and unloaded."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_store.errors import CorruptStore, InvalidRequest, UnknownRevision, UnknownTask
from model_store.publishing import Outcome, Publisher
from service.open_inference.models import SERVICE_MODEL, find_model
from service.registry import TaskRegistry
from service.replicas import Replicas

log = logging.getLogger("tosca.repository")


@dataclass(frozen=True, slots=True)
class IndexedModel:
    """A model of the index: READY, or UNAVAILABLE for a reason."""

    name: str
    version: str
    state: str
    reason: str = ""


class ModelRepository:
    """What can be loaded: every task of the store's history, in the version it had last.

    Loading publishes a revision with that module, unloading one without the task.
    """

    def __init__(self, registry: TaskRegistry, replicas: Replicas, max_revisions: int) -> None:
        """`max_revisions`: how far back the history is read."""
        self._registry = registry
        self._replicas = replicas
        self._max_revisions = max_revisions
        self._latest: dict[str, str] = {}  # SHA-256 by task; changed on the loader thread alone
        self._read_up_to = 0

    async def index(self, *, ready_only: bool = False) -> list[IndexedModel]:
        """The service as a whole, the active tasks, and those that can be loaded again."""
        latest = {} if ready_only else await self._registry.read(self._follow)
        active = self._registry.active
        names = [SERVICE_MODEL, *sorted(active.files)]
        models = [IndexedModel(name, find_model(active, name).version, "READY") for name in names]
        return models + [
            IndexedModel(name, sha256, "UNAVAILABLE", "unloaded")
            for name, sha256 in sorted(latest.items())
            if name not in names
        ]

    async def load(self, name: str, *, author: str | None, parameters: Mapping[str, Any]) -> int:
        """Make the module that a task had last active again, unless it is; the revision then served.

        Raises UnknownTask when the history has no such task, and what a registration raises.
        """
        _check_is_task(name)
        if parameters:
            raise InvalidRequest("parameters of a load are not supported: register a module with POST /tasks")
        latest = await self._registry.read(self._follow)
        if name not in latest:
            raise UnknownTask(
                f"no task {name[:100]!r} in the last {self._max_revisions} revisions of the store"
            )
        outcome = await self._registry.register_stored(
            latest[name], dry_run=False, force=False, reason=f"load {name}", author=author
        )
        return await self._settled(outcome)

    async def unload(self, name: str, *, author: str | None) -> int:
        """Take a task out of the active set; the revision then served. Raises UnknownTask."""
        _check_is_task(name)
        outcome = await self._registry.remove(name, reason=f"unload {name}", author=author)
        return await self._settled(outcome)

    async def _settled(self, outcome: Outcome) -> int:
        number = outcome.active.revision.number
        await self._replicas.settle(number)
        return number

    def _follow(self, publisher: Publisher) -> Mapping[str, str]:
        """The latest module of every task made for this backbone; no revision is read twice, and one that
        cannot be read is left out."""
        newest = publisher.store.head_number(known=self._read_up_to)
        for number in range(max(self._read_up_to, newest - self._max_revisions) + 1, newest + 1):
            try:
                revision = publisher.store.revision(number)
            except (CorruptStore, UnknownRevision) as error:
                log.warning("revision %d is left out of the model repository: %s", number, error)
            else:
                if revision.backbone_fingerprint == publisher.backbone.fingerprint:
                    self._latest |= revision.tasks
            self._read_up_to = number
        return dict(self._latest)


def _check_is_task(name: str) -> None:
    if name == SERVICE_MODEL:
        raise InvalidRequest(f"model {SERVICE_MODEL!r} is the service itself: load and unload its tasks")
