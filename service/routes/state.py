"""What every route needs: the running parts of the service, put on the app by its lifespan; the caller."""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPBearer
from pydantic import Field

from service.access import Access, Caller
from service.admission import KeyQuota, deadline_s
from service.engine import Engine
from service.keys import Scope
from service.open_inference.repository import ModelRepository
from service.registry import TaskRegistry
from service.replicas import Replicas
from service.request_context import current_request
from service.schemas.problem import ProblemOut
from service.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="An API key, as `tosca keys create` shows it once.")


@dataclass
class ServiceState:
    settings: Settings
    engine: Engine
    registry: TaskRegistry
    replicas: Replicas
    access: Access
    quota: KeyQuota
    repository: ModelRepository
    is_ready: bool = False
    is_draining: bool = False

    @property
    def accepts(self) -> bool:
        """Whether a load balancer should send requests here."""
        return self.is_ready and self.engine.is_alive


async def get_state(request: Request) -> ServiceState:
    return cast(ServiceState, request.app.state.service)


State = Annotated[ServiceState, Depends(get_state)]
RevisionNumber = Annotated[int, Field(ge=1, le=10**12 - 1)]


@contextlib.asynccontextmanager
async def admitted(
    request: Request, state: ServiceState, scope: Scope, minimum_revision: int | None
) -> AsyncIterator[Caller]:
    """The caller, who may act under `scope` and has a place among the requests of its key while the block
    runs, once `minimum_revision` or a later one is served.

    Raises Unauthenticated, Forbidden, TooManyRequests and RevisionBehind, before the body is read.
    """
    headers = request.headers
    caller = state.access.identify(headers.get("authorization"))
    if (context := current_request.get()) is not None:
        context.caller = caller.name
    state.access.check(caller, scope)
    if request.method not in ("GET", "HEAD"):
        state.access.check_origin(caller, headers.get("origin"), headers.get("host"))
    with state.quota.place(caller.key_id, state.engine.drain_s):
        if minimum_revision is not None:
            timeout_s = deadline_s(headers.get("x-request-timeout"), state.settings)
            await state.registry.catch_up(minimum_revision, min(timeout_s, state.settings.catch_up_timeout_s))
        yield caller


def require(scope: Scope) -> Callable[..., AsyncIterator[Caller]]:
    """A dependency: the caller, `admitted` under `scope` until its answer is sent."""

    async def admit(
        request: Request,
        state: State,
        x_minimum_revision: Annotated[
            RevisionNumber | None,
            Header(description="Answer with this revision or a later one, or with 412."),
        ] = None,
    ) -> AsyncIterator[Caller]:
        async with admitted(request, state, scope, x_minimum_revision) as caller:
            yield caller

    return admit


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for refusals with these statuses, and those that any request may get."""
    schema = {"application/problem+json": {"schema": ProblemOut.model_json_schema()}}
    every = sorted({*statuses, 401, 403, 408, 412, 422, 429})
    return {status: {"description": "Problem document (RFC 9457)", "content": schema} for status in every}


health_problems: dict[int | str, dict[str, Any]] = {503: problems(503)[503]}
Predicting = Annotated[Caller, Security(require("predict"))]
Reading = Annotated[Caller, Security(require("read"))]
Administering = Annotated[Caller, Security(require("admin"))]
documented = [Depends(_bearer)]  # tells the OpenAPI document about keys; `require` does the checking
