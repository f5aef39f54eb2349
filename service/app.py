"""The FastAPI applications of the main and the admin port, and the lifespan that holds their parts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Security
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import State
from starlette.types import Lifespan

from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.compute_threads import settle_compute_threads
from model_store.publishing import Publisher
from model_store.signatures import Trust
from model_store.store import ModelStore
from service import problems
from service.access import Access
from service.admission import KeyQuota
from service.audit import AuditLog
from service.bodies import LimitBodies
from service.engine import Engine
from service.errors import InvalidSettings
from service.open_inference.grpc_server import serving_grpc
from service.open_inference.repository import ModelRepository
from service.registry import TaskRegistry
from service.replicas import Replicas
from service.request_context import TrackRequests
from service.routes import (
    feedback,
    health,
    metrics,
    model_repository,
    open_inference,
    predict,
    replicas,
    revisions,
    tasks,
    traffic,
)
from service.routes.console import add_console
from service.routes.direct import Ahead, DirectRoute
from service.routes.state import ServiceState, documented, require
from service.settings import Plane, Settings
from service.shedding import ShedLoad
from service.telemetry import Telemetry
from service.tracing import NO_TRACER, TraceRequests, Tracing
from service.web import CloseWhenDraining, SecureHeaders


def create_app(
    settings: Settings, backbone: Backbone | None = None, store: ModelStore | None = None
) -> FastAPI:
    """The service as an ASGI application.

    At start it opens the store, loads and warms up the backbone (unless they are given), builds the bank of
    the newest revision, and only then is ready. At stop it answers what it has admitted. With an admin
    port set, changes of the tasks and the console are left to `create_admin_app`.
    """
    access = Access(settings)
    tracing = Tracing(settings)
    telemetry = Telemetry(tracer=tracing.tracer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settle_compute_threads()  # before the parts have threads, some of which compute by themselves
        with (
            contextlib.closing(tracing),
            AuditLog(settings.audit_log, telemetry.metrics.count_change) as audit,
        ):
            engine, registry = await asyncio.to_thread(_load, settings, backbone, store, audit, telemetry)
            with engine, contextlib.closing(registry):
                quota = KeyQuota(settings.max_requests_per_key)
                known = Replicas(registry, settings)
                repository = ModelRepository(registry, known, settings.max_history)
                state = ServiceState(settings, engine, registry, known, access, quota, repository)
                app.state.service = state
                async with (
                    _following(registry, settings.store_poll_s),
                    known.present(),
                    serving_grpc(state),
                ):
                    state.is_ready = True
                    yield
                    state.is_ready = False

    app = _new_app(settings, telemetry, lifespan)
    routers = [predict.router, feedback.router, tasks.router, traffic.router, replicas.router]
    routers += [open_inference.router, model_repository.router]
    if settings.admin_port is None:
        routers += [tasks.admin_router, revisions.router, model_repository.admin_router]
    _include(app, routers)
    _include_metrics(app, settings, "main")
    if settings.admin_port is None and settings.show_console:
        add_console(app)
    return app


def create_admin_app(settings: Settings, main: FastAPI) -> FastAPI:
    """The application of the admin port, over the running parts of `main`: everything, so that the console
    finds all it needs where it came from."""
    app = _new_app(settings, main.state.telemetry, None, main.state)
    routers = [predict.router, feedback.router, tasks.router, traffic.router, replicas.router]
    routers += [open_inference.router, model_repository.router]
    _include(app, [*routers, tasks.admin_router, revisions.router, model_repository.admin_router])
    _include_metrics(app, settings, "admin")
    if settings.show_console:
        add_console(app)
    return app


def _include(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Routes that want a key, and those of /health, which do not."""
    for router in routers:
        app.include_router(router, dependencies=documented)
        app.router.routes[:0] = [Ahead(one) for one in router.routes if isinstance(one, DirectRoute)]
    app.include_router(health.router)
    app.include_router(open_inference.health_router)


def _include_metrics(app: FastAPI, settings: Settings, plane: Plane) -> None:
    if settings.serves_metrics(plane):
        needed = [*documented, Security(require("read"))] if settings.metrics_need_key else []
        app.include_router(metrics.router, dependencies=needed)


def _new_app(
    settings: Settings,
    telemetry: Telemetry,
    lifespan: Lifespan[FastAPI] | None,
    state: State | None = None,
) -> FastAPI:
    app = FastAPI(
        title="TOSCA Serving",
        version=version("tosca-serving"),
        summary="One frozen backbone, one LuCA module per task, chosen per image by calibrated confidence.",
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.show_docs else None,
        redoc_url=None,
    )
    if state is not None:
        app.state = state
    app.state.telemetry = telemetry
    problems.install(app)

    def limit_of(path: str, media_type: str) -> int:
        if path == "/feedback":
            return settings.max_feedback_bytes
        limit = settings.max_module_bytes if path.startswith("/tasks") else settings.max_body_bytes
        if path.startswith("/v2/repository"):
            limit = settings.max_json_bytes
        return min(limit, settings.max_json_bytes) if media_type == "application/json" else limit

    # Each wraps what stands above it: ids are there first, bodies are bounded last.
    app.add_middleware(
        LimitBodies,
        limit_of=limit_of,
        timeout_s=settings.body_timeout_s,
        max_buffered_bytes=settings.max_buffered_bytes,
    )
    app.add_middleware(ShedLoad, state=app.state)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "authorization",
                "content-type",
                "x-minimum-revision",
                "x-request-id",
                "x-request-timeout",
            ],
            expose_headers=["x-request-id", "x-revision", "retry-after"],
        )
    app.add_middleware(CloseWhenDraining, state=app.state)
    app.add_middleware(SecureHeaders)
    if telemetry.tracer is not NO_TRACER:
        app.add_middleware(TraceRequests, tracer=telemetry.tracer)
    app.add_middleware(TrackRequests, metrics=telemetry.metrics)
    return app


@asynccontextmanager
async def _following(registry: TaskRegistry, poll_s: float) -> AsyncIterator[None]:
    """Take over what others publish while the block runs; never, when `poll_s` is 0."""
    follower = asyncio.create_task(registry.follow(poll_s)) if poll_s else None
    try:
        yield
    finally:
        if follower is not None:
            follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await follower


def _load(
    settings: Settings,
    backbone: Backbone | None,
    store: ModelStore | None,
    audit: AuditLog,
    telemetry: Telemetry,
) -> tuple[Engine, TaskRegistry]:
    store = store or ModelStore(settings.store)
    if backbone is None:
        backbone = load_backbone(
            store,
            store.require_head().backbone_fingerprint,
            device=settings.device,
            runtime=settings.runtime,
            num_threads=settings.torch_threads,
            num_streams=settings.streams,
        )
    trust = Trust.nobody()
    if settings.trusted_signers is not None:
        trust = Trust.read(settings.trusted_signers, is_required=settings.require_signature)
    elif settings.require_signature:
        raise InvalidSettings("TOSCA_REQUIRE_SIGNATURE needs TOSCA_TRUSTED_SIGNERS: nobody is trusted yet")
    publisher = Publisher(
        store,
        margin=settings.impact_margin,
        trust=trust,
        module_memory_bytes=settings.module_memory_bytes,
    )
    registry = TaskRegistry(
        publisher,
        audit,
        settings.loader_niceness,
        settings.store_read_gap_s,
        begins_epochs=settings.begin_epochs,
    )
    return Engine(backbone, settings, telemetry), registry
