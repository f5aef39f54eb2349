"""`wait=all` of every change: its answer waits for the other replicas, for a bounded time."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Header, Query, Response

from model_store.errors import InvalidRequest
from model_store.publishing import Outcome
from service.admission import deadline_s
from service.replicas import Replicas
from service.routes.state import State
from service.schemas.changes import ChangeOut
from service.schemas.replicas import StandingOut


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request waits for all replicas to serve its change, once that is published; None: not."""

    replicas: Replicas
    started_at: float
    longest_s: float | None
    request_timeout_s: float | None

    async def answer(self, outcome: Outcome, response: Response, *, dry_run: bool = False) -> ChangeOut:
        """What the change did and, where it was to wait, how far it has come. It stays done either way."""
        number = outcome.active.revision.number
        response.headers["x-revision"] = str(number)
        if self.longest_s is None or dry_run:
            return ChangeOut.of(outcome)
        timeout_s = self.longest_s
        if self.request_timeout_s is not None:
            left_s = self.request_timeout_s - (time.monotonic() - self.started_at)
            timeout_s = min(timeout_s, max(0.0, left_s))
        standing = await self.replicas.wait_for(number, timeout_s)
        return ChangeOut.of(outcome, StandingOut.of(standing, self.replicas.own_id))


async def read_patience(
    state: State,
    wait: Annotated[
        Literal["this", "all"] | None,
        Query(
            description="`this` replica, which is the default unless several processes share the port, or "
            "`all`: answer when every live replica serves the change, or after "
            "`TOSCA_REPLICA_WAIT_S` or X-Request-Timeout; the body says which do. The status is that of the "
            "change, which is published in any case."
        ),
    ] = None,
    x_request_timeout: Annotated[str | None, Header(description="Seconds the answer may take.")] = None,
) -> Patience:
    """Raises InvalidRequest, before anything is changed, where replicas do not know each other."""
    wait = wait or state.settings.default_wait
    if wait == "all" and not state.replicas.are_known:
        raise InvalidRequest(
            "wait=all needs replicas that know each other: set TOSCA_REPLICA_HEARTBEAT_S on all of them"
        )
    return Patience(
        state.replicas,
        started_at=time.monotonic(),
        longest_s=state.settings.replica_wait_s if wait == "all" else None,
        request_timeout_s=None
        if x_request_timeout is None
        else deadline_s(x_request_timeout, state.settings),
    )


Waiting = Annotated[Patience, Depends(read_patience)]
