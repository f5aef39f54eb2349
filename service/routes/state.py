"""What every route needs: the running parts of the service, put on the app by its lifespan."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from service.engine import Engine
from service.registry import TaskRegistry
from service.schemas import ProblemOut
from service.settings import Settings


@dataclass
class ServiceState:
    settings: Settings
    engine: Engine
    registry: TaskRegistry
    is_ready: bool = False


def get_state(request: Request) -> ServiceState:
    return cast(ServiceState, request.app.state.service)


State = Annotated[ServiceState, Depends(get_state)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for refusals with these statuses."""
    schema = {"application/problem+json": {"schema": ProblemOut.model_json_schema()}}
    return {status: {"description": "Problem document (RFC 9457)", "content": schema} for status in statuses}
