"""The process around the application: its ports, its signals, its end.

    SIGTERM → readiness off, connections closed after their answer → grace period, still accepting
            → no new connections → what is admitted is answered → exit 0

A load balancer sees readiness go and sends no more; what it had sent is answered. SIGINT skips the grace
period. A process that can answer no more ends with status 70, for its supervisor to start another.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from model_store.backbone import Backbone
from service.app import create_admin_app, create_app
from service.errors import InvalidSettings
from service.http_protocol import bounded_protocol
from service.logs import configure_logs
from service.planes import Planes
from service.ports import bind, check_ports, port_of
from service.settings import Settings
from service.siblings import Siblings
from service.turns import wait_for_turns

log = logging.getLogger("tosca.server")
DEAD_STATUS = 70  # EX_SOFTWARE
_TICKS_BETWEEN_CHECKS = 10  # a tick of uvicorn is 0.1 s
# Allocations between two collections. Of Python's 700 a few requests under way make more, and each of them
# would be looked at again and again (docs/experiments.md).
_GARBAGE_THRESHOLD = 5000


def serve(settings: Settings, backbone: Backbone | None = None, *, siblings: Siblings | None = None) -> None:
    """Serve until a signal; with `siblings` on a port that is theirs, too.

    Raises InvalidSettings, CannotListen, and what creating the application raises.
    """
    configure_logs(settings)
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise InvalidSettings("TOSCA_TLS_CERTIFICATE and TOSCA_TLS_KEY go together")
    main = create_app(settings, backbone)
    planes = Planes(main)
    sockets = [bind(settings.host, settings.port, is_shared=siblings is not None)]
    if settings.admin_port is not None:
        sockets.append(bind(settings.admin_host, settings.admin_port))
        check_ports(*sockets)
        planes.put(port_of(sockets[1]), create_admin_app(settings, main))
    config = config_of(settings, planes, main.state.telemetry.metrics.count_refusal)
    for name, one in zip(("main", "admin"), sockets, strict=False):
        log.info("%s port: %s:%d", name, *one.getsockname()[:2])
    Server(config, main, settings, siblings).run(sockets)


def config_of(settings: Settings, app: ASGIApp, on_refusal: Callable[[str], None]) -> uvicorn.Config:
    """What uvicorn is told, whose times are whole seconds: never less than was set."""
    return uvicorn.Config(
        app,
        http=bounded_protocol(settings, on_refusal),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout_s),
    )


class Server(uvicorn.Server):
    """uvicorn with the shutdown and the watch described above."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        settings: Settings,
        siblings: Siblings | None = None,
    ) -> None:
        super().__init__(config)
        self._app = app
        self._settings = settings
        self._siblings = siblings
        self._num_dead_checks = 0
        self._is_draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What is there once the application has started stays: the collector need not look at it again.
        Where passes run on the processors, the event loop does not interrupt them."""
        await super().startup(sockets)
        state = getattr(self._app.state, "service", None)
        if state is not None and state.engine.backbone.device.type == "cpu":
            wait_for_turns()
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GARBAGE_THRESHOLD, *gc.get_threshold()[1:])
        if self._siblings is not None and state is not None:
            self._siblings.join(state.registry, state.replicas.own_id, self.drain, self.end)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """The first signal drains, the second ends at once. Not remembered, so that the exit status is 0.

        One of several servers ends at once when its supervisor says so: a terminal's or systemd's signal
        reaches it twice, by itself and as word of the supervisor.
        """
        if self._is_draining and self._siblings is None:
            self.end()
        else:
            self.drain(sig)

    def drain(self, sig: int) -> None:
        """What the first signal does; nothing once that has begun."""
        if self._is_draining:
            return
        self._is_draining = True
        grace_s = self._settings.shutdown_grace_s if sig == signal.SIGTERM else 0.0
        asyncio.get_event_loop().call_soon_threadsafe(self._drain, grace_s)

    def end(self) -> None:
        """What the second signal does."""
        self.force_exit = self.should_exit = True

    def _drain(self, grace_s: float) -> None:
        log.info("draining: not ready any more, accepting for %g s", grace_s)
        state = getattr(self._app.state, "service", None)
        if state is not None:
            state.is_ready = False
            state.is_draining = True
        asyncio.get_running_loop().call_later(grace_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_BETWEEN_CHECKS == 0 and self._settings.exit_when_dead:
            self._end_if_dead()
        return await super().on_tick(counter)

    def _end_if_dead(self) -> None:
        state = getattr(self._app.state, "service", None)
        if state is None or state.engine.is_alive:
            self._num_dead_checks = 0
            return
        self._num_dead_checks += 1
        if self._num_dead_checks > 1:  # one round, for the refusals to reach their clients
            log.critical("the engine answers no more: ending with status %d", DEAD_STATUS)
            logging.shutdown()
            os._exit(DEAD_STATUS)  # no clean-up: a thread that hangs would hold it for ever
