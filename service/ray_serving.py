"""The service as a Ray Serve application: every replica holds what `tosca serve` holds, behind Ray's proxies.

    Ray's proxy (ports, connections) → router → replica: the application of `service.app`, one engine
                                            ├── replica …
                                            └── replica …    each follows the store

A replica is the same application, engine and routes as the process of `service.server`. What that process
does is Ray's here: the proxies own the ports, `check_health` takes the place of the watch over the engine,
and a replica that is to go is taken out of the routers, then waited for, then stopped with its lifespan.

Example: tosca ray deploy --replicas 2 --cpus 1
"""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.errors import EngineStopped, InvalidSettings
from service.exposition import gather
from service.logs import configure_logs
from service.ray_metrics import RayMetrics
from service.settings import Settings

DEPLOYMENT = "Replica"
_ANY_HOST = "0.0.0.0"  # noqa: S104 - nothing listens there: it is what access is judged by
REPLICA_HEADER = "x-tosca-replica"
IMPORT_PATH = f"{__name__}:build_app"
# They are of a process that owns its ports, or would be taken twice by two replicas on one machine.
_NOT_UNDER_RAY = ("processes", "admin_port", "grpc_port", "tls_certificate", "tls_key")


class Arguments(BaseModel):
    """What a Serve config file may say under `args`; `settings` are those of `service.settings`, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(1, gt=0, description="Replicas, where their number is not to follow the load.")
    min_replicas: int = Field(1, gt=0, description="Fewest replicas that autoscaling keeps.")
    max_replicas: int | None = Field(None, gt=0, description="Most replicas; turns autoscaling on.")
    target_ongoing_requests: float | None = Field(
        None, gt=0.0, description="Requests under way in a replica that autoscaling aims at: two batches."
    )
    num_cpus: float = Field(1.0, gt=0.0, description="Processors of a replica; its threads keep to them.")
    num_gpus: float = Field(0.0, ge=0.0, description="GPUs of a replica; 0.5: two replicas share one.")
    max_ongoing_requests: int | None = Field(
        None, gt=0, description="Requests that Ray lets into a replica: TOSCA_MAX_CONNECTIONS."
    )
    max_queued_requests: int | None = Field(
        None, gt=0, description="Requests that wait in a proxy for a replica: as many as may be in one."
    )
    env: dict[str, str] = Field({}, description="Environment variables of the replicas.")
    settings: dict[str, JsonValue] = Field({}, description="Settings by name, before those of TOSCA_*.")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Arguments":
        given = self.model_fields_set
        if self.max_replicas is None:
            if given & {"min_replicas", "target_ongoing_requests"}:
                raise ValueError("min_replicas and target_ongoing_requests need max_replicas")
        elif "replicas" in given:
            raise ValueError("replicas is a fixed number, max_replicas lets it vary: give one of them")
        elif self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, max_replicas {self.max_replicas}")
        return self


def build_app(args: Arguments) -> Application:
    """The application that `serve deploy` and `tosca ray deploy` run. Raises InvalidSettings."""
    settings = replica_settings(args)
    options = deployment_options(args, settings)
    application: Application = serve.deployment(name=DEPLOYMENT, **options)(Replica).bind(settings)
    return application


def replica_settings(args: Arguments) -> Settings:
    """The settings of one replica, whose threads keep to its processors. Raises InvalidSettings.

    Where nothing says otherwise a replica takes its proxy to be reachable by strangers, for it cannot know.
    """
    given: dict[str, Any] = {"host": _ANY_HOST, **args.settings}
    settings = Settings(**given)
    for name in _NOT_UNDER_RAY:
        if getattr(settings, name) != Settings.model_fields[name].default:
            raise InvalidSettings(f"TOSCA_{name.upper()} cannot be had under Ray Serve: see docs/ray.md")
    num_threads = max(1, int(args.num_cpus))
    return settings.model_copy(
        update={
            "torch_threads": settings.torch_threads or num_threads,
            "decode_threads": settings.decode_threads or min(8, num_threads),
        }
    )


def deployment_options(args: Arguments, settings: Settings) -> dict[str, Any]:
    """What Ray Serve is told about the replicas.

    Raises InvalidSettings where Ray would refuse, in its own words, requests that the service has room for.
    """
    max_ongoing = args.max_ongoing_requests or settings.max_connections
    if max_ongoing <= settings.max_queued_images:
        raise InvalidSettings(
            f"max_ongoing_requests is {max_ongoing}, but must be more than the {settings.max_queued_images} "
            "pictures of TOSCA_MAX_QUEUED_IMAGES, so that refusals come from the service"
        )
    options: dict[str, Any] = {
        "max_ongoing_requests": max_ongoing,
        "max_queued_requests": args.max_queued_requests or max_ongoing,
        "graceful_shutdown_wait_loop_s": settings.shutdown_grace_s,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s,
        "logging_config": {"enable_access_log": False},  # the service's own line says more
        "ray_actor_options": {
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            **({"runtime_env": {"env_vars": args.env}} if args.env else {}),
        },
    }
    if args.max_replicas is None:
        return options | {"num_replicas": args.replicas}
    batch_size = settings.max_batch_size or (64 if args.num_gpus else 8)
    autoscaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests or 2.0 * batch_size,
    )
    return options | {"autoscaling_config": autoscaling}


@serve.ingress()
class Replica:
    """One engine and its application, in an actor of Ray."""

    def __init__(self, settings: Settings) -> None:
        configure_logs(settings)
        self._settings = settings
        self._service: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve, which runs the application's lifespan before the replica gets requests."""
        replica = serve.get_replica_context().replica_id.unique_id
        self._service = create_app(self._settings)
        self._metrics = RayMetrics(replica)
        return NameReplica(self._service, replica)

    async def check_health(self) -> None:
        """Called by Ray Serve every ten seconds; a replica that raises is replaced. Raises EngineStopped.

        The moment at which the replica's metrics are handed to Ray, too.
        """
        if self._service is None:
            return
        check_engine(self._service, self._settings)
        state = getattr(self._service.state, "service", None)
        if state is not None and self._settings.serves_metrics("main"):
            families = [*state.engine.telemetry.metrics.registry.collect(), *gather(state)]
            await asyncio.to_thread(self._metrics.publish, families)


def check_engine(service: FastAPI, settings: Settings) -> None:
    """Raises EngineStopped for a service that has started and can answer no more, if it is to end then."""
    state = getattr(service.state, "service", None)
    if state is not None and settings.exit_when_dead and not state.engine.is_alive:
        raise EngineStopped("an inference thread has stopped or hangs")


class NameReplica:
    """ASGI middleware: every answer names the replica it came from, and has its request's id once.

    Ray's proxy gives every request an id where it brings none, and every answer that id.
    """

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self._app = app
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REPLICA_HEADER] = self._replica
                del headers["x-request-id"]
            await send(message)

        await self._app(scope, receive, named if scope["type"] == "http" else send)
