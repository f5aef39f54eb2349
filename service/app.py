"""The FastAPI application: `create_app(settings)` and the lifespan that starts and stops its parts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.publishing import Publisher
from model_store.store import ModelStore
from service import problems
from service.engine import Engine
from service.payloads import LimitBody
from service.registry import TaskRegistry
from service.routes import health, predict, revisions, tasks
from service.routes.state import ServiceState
from service.settings import Settings


def create_app(settings: Settings, backbone: Backbone | None = None) -> FastAPI:
    """The service as an ASGI application.

    At start it opens the store, loads and warms up the backbone (unless one is given), builds the bank of
    the newest revision, and only then is ready. At stop it answers what it has admitted.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine, registry = await asyncio.to_thread(_load, settings, backbone)
        with engine, contextlib.closing(registry):
            state = ServiceState(settings, engine, registry)
            app.state.service = state
            follower = (
                asyncio.create_task(registry.follow(settings.store_poll_s)) if settings.store_poll_s else None
            )
            state.is_ready = True
            yield
            state.is_ready = False
            if follower is not None:
                follower.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await follower

    app = FastAPI(
        title="TOSCA Serving",
        version=version("tosca-serving"),
        summary="One frozen backbone, one LuCA module per task, chosen per image by calibrated confidence.",
        lifespan=lifespan,
    )
    for router in (predict.router, tasks.router, revisions.router, health.router):
        app.include_router(router)
    problems.install(app)

    def limit_of(path: str) -> int:
        return settings.max_module_bytes if path.startswith("/tasks") else settings.max_body_bytes

    app.add_middleware(LimitBody, limit_of=limit_of)
    return app


def _load(settings: Settings, backbone: Backbone | None) -> tuple[Engine, TaskRegistry]:
    store = ModelStore(settings.store)
    if backbone is None:
        backbone = load_backbone(
            store,
            store.require_head().backbone_fingerprint,
            device=settings.device,
            runtime=settings.runtime,
            num_threads=settings.torch_threads,
        )
    publisher = Publisher(store, backbone.device, settings.impact_margin)
    return Engine(backbone, settings), TaskRegistry(publisher)
