"""`tosca serve --processes N`: N servers on one port, started, watched and ended by this process.

    supervisor    holds the port, without listening
    ├── server 0  the process of `service.server`, a replica of the store; admin port + 0
    └── server i  listens on the same port (SO_REUSEPORT), the system deals connections out; admin port + i

The first is started alone, so that what is wrong is said once. A server that ends before it was ready ends
all of them with its status; one that ends later is started again. What one publishes the others are told.
"""

import contextlib
import logging
import multiprocessing
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import torch

from model_store.console import err
from model_store.errors import ToscaError
from model_store.store import ModelStore
from service.errors import InvalidSettings
from service.logs import configure_logs
from service.ports import held
from service.server import serve
from service.settings import Settings
from service.siblings import MAX_MESSAGE_BYTES, Siblings

log = logging.getLogger("tosca.supervisor")
_LEAST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_WELL_AFTER_S = 60.0  # ready for as long, a server that ends is started again after the least pause
_SPAWN = multiprocessing.get_context("spawn")  # CUDA forbids fork
_LAST_PORT = 65535


def supervise(settings: Settings) -> None:
    """Serve with `settings.processes` servers until a signal, and until they have drained.

    Raises InvalidSettings, CannotListen, and SystemExit with the status of a server that did not end well.
    """
    configure_logs(settings)
    check(settings)
    with _holding(settings) as shared, _signals() as signals:
        status = _Supervisor(shared, signals).run()
    if status:
        sys.exit(status)


@dataclass(slots=True)
class _Server:
    """A server that runs: `replica_id` and `ready_at` once it has said that it is ready."""

    place: int
    process: SpawnProcess
    channel: socket.socket
    replica_id: str | None = None
    ready_at: float | None = None

    def tell(self, message: str) -> None:
        with contextlib.suppress(OSError):  # full or gone
            self.channel.send(message.encode(), socket.MSG_DONTWAIT)


class _Supervisor:
    """The servers by place. One loop; whatever happens wakes it."""

    def __init__(self, settings: Settings, signals: socket.socket) -> None:
        self._settings = settings
        self._signals = signals
        self._records = ModelStore(settings.store).replicas
        self._servers: dict[int, _Server] = {}
        self._start_at = {0: 0.0}
        self._pause_s = dict.fromkeys(range(settings.processes), 0.0)
        self._were_ready: set[int] = set()
        self._newest = 0  # revision
        self._status: int | None = None  # once the service ends

    def run(self) -> int:
        """Until a signal, or a server that could not start; the exit status."""
        resource_tracker.ensure_running()  # now, because it changes which signals are blocked
        try:
            while self._status is None or self._servers:
                self._turn()
        finally:  # none is left, but after a fault of ours, at which they drain
            for one in self._servers.values():
                one.channel.close()
        return self._status

    def _turn(self) -> None:
        """Start whose time has come, wait for what happens next and see to it."""
        for place in [place for place, at in self._start_at.items() if at <= time.monotonic()]:
            del self._start_at[place]
            self._servers[place] = self._start(place)
        servers = [*self._servers.values()]
        happened = wait(
            [self._signals, *(one.channel for one in servers), *(one.process.sentinel for one in servers)],
            max(0.0, min(self._start_at.values()) - time.monotonic()) if self._start_at else None,
        )
        for number in b"".join(_received(self._signals)):
            self._stop(self._status or 0, "end" if self._status is not None else f"drain {number}")
        for one in servers:
            for message in _received(one.channel):
                self._hear(one, message.decode())
            if one.process.sentinel in happened:
                self._bury(one)

    def _start(self, place: int) -> _Server:
        settings = self._settings
        if settings.admin_port:
            settings = settings.model_copy(update={"admin_port": settings.admin_port + place})
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = _SPAWN.Process(target=_run, name=f"server-{place}", args=(settings, theirs))
        # Inherited, so that Ctrl-C in a terminal is no traceback of each server's imports.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            theirs.close()
        return _Server(place, process, ours)

    def _hear(self, one: _Server, message: str) -> None:
        number, one.replica_id = message.split()
        if one.ready_at is None:
            one.ready_at = time.monotonic()
            log.info("server %d is ready: process %d", one.place, one.process.pid)
            if not self._were_ready and self._status is None:
                self._start_at = dict.fromkeys(range(1, self._settings.processes), 0.0)
            self._were_ready.add(one.place)
        if int(number) > self._newest:
            self._newest = int(number)
            for other in self._servers.values():
                if other is not one and other.replica_id is not None:
                    other.tell(f"revision {number}")

    def _stop(self, status: int, message: str) -> None:
        self._status = status
        self._start_at.clear()
        for one in self._servers.values():
            if one.replica_id is None:
                one.process.terminate()
            else:
                one.tell(message)

    def _bury(self, one: _Server) -> None:
        """See to a server that has ended: start another one in its place, or end the service."""
        one.process.join()
        code = one.process.exitcode or 0
        status = code if code >= 0 else 128 - code
        del self._servers[one.place]
        one.channel.close()
        one.process.close()
        if status and one.replica_id is not None:  # else a change would wait until the record lapses
            threading.Thread(target=self._forget, args=(one.replica_id,), daemon=True).start()
        if self._status is not None:
            if code != -signal.SIGTERM or one.replica_id is not None:  # else it was stopped while it started
                self._status = self._status or status
        elif one.place not in self._were_ready:
            log.critical("server %d ended with status %d before it was ready", one.place, status)
            self._stop(status or 1, f"drain {int(signal.SIGTERM)}")
        else:
            well_s = time.monotonic() - one.ready_at if one.ready_at is not None else 0.0
            pause_s = self._pause_s[one.place] = next_pause_s(self._pause_s[one.place], well_s)
            log.error("server %d ended with status %d: another one in %g s", one.place, status, pause_s)
            self._start_at[one.place] = time.monotonic() + pause_s

    def _forget(self, replica_id: str) -> None:
        """Remove the record of a replica that could not do so itself; on a thread, for the store may hang."""
        with contextlib.suppress(ToscaError):
            self._records.remove(replica_id)


def next_pause_s(last_s: float, well_s: float) -> float:
    """How long to wait before a server that was ready for `well_s` is started again: twice as long as the
    last time, unless it was well for long."""
    if well_s > _WELL_AFTER_S:
        return _LEAST_PAUSE_S
    return min(max(2.0 * last_s, _LEAST_PAUSE_S), _LONGEST_PAUSE_S)


def _run(settings: Settings, channel: socket.socket) -> None:
    """A server, in its process; a fault is one line, as of any command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the server drains at it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        serve(settings, siblings=Siblings(channel))
    except ToscaError as error:
        err.print(f"error: {error}", style="red")
        sys.exit(1)


def check(settings: Settings) -> None:
    """Raises InvalidSettings where several processes cannot be one service."""
    asked = f"TOSCA_PROCESSES={settings.processes}"
    if sys.platform != "linux":
        raise InvalidSettings(f"{asked} needs Linux, where processes can share a port")
    for name in ("replica_heartbeat_s", "store_poll_s"):
        if getattr(settings, name) == 0.0:
            raise InvalidSettings(f"{asked} needs TOSCA_{name.upper()}: else they do not follow each other")
    if settings.admin_port is None:
        log.warning("no admin port: /metrics speaks for whichever process answers, /feedback reaches any")
    elif settings.admin_port + settings.processes - 1 > _LAST_PORT:
        raise InvalidSettings(f"{asked} needs as many admin ports from {settings.admin_port} on")


@contextlib.contextmanager
def _holding(settings: Settings) -> Iterator[Settings]:
    """The settings of each server, while the ports that they share are kept for them."""
    with contextlib.ExitStack() as kept:
        ports = {
            name: kept.enter_context(held(settings.host, port))
            for name in ("port", "grpc_port")
            if (port := getattr(settings, name)) is not None
        }
        num_threads = settings.torch_threads or max(1, torch.get_num_threads() // settings.processes)
        yield settings.model_copy(update={**ports, "torch_threads": num_threads})


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Where the numbers of signals that ask for the end arrive while the block runs."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        handlers = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield reader
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)
            signal.set_wakeup_fd(-1)


def _received(channel: socket.socket) -> Iterator[bytes]:
    """What has arrived."""
    with contextlib.suppress(OSError):  # nothing more, or the other end is gone
        while message := channel.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT):
            yield message
