"""A server among those that share its port: what it tells their supervisor, and what it is told."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

from service.registry import TaskRegistry

MAX_MESSAGE_BYTES = 256


class Siblings:
    """One end of the channel to the supervisor, whose messages are

    - up, `REVISION REPLICA_ID`: what is served, first when this server listens, then at every change;
    - down, `revision NUMBER`: what another one serves; `drain SIGNAL`; `end`: at once.

    When the channel ends, so does this server: nobody would start it again, or stop it.
    """

    def __init__(self, channel: socket.socket) -> None:
        """`channel` keeps messages apart (SOCK_SEQPACKET)."""
        self._channel = channel
        self._obey: Callable[[list[str]], None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._listen, name="siblings", daemon=True).start()

    def join(
        self,
        registry: TaskRegistry,
        own_id: str,
        drain: Callable[[int], None],
        end: Callable[[], None],
    ) -> None:
        """From now on tell what is served and take over what others serve. Called on the event loop, when the
        server listens; `drain` is called with a signal, possibly again when it has begun."""
        loop = asyncio.get_running_loop()

        def obey(words: list[str]) -> None:
            match words:
                case ["revision", number]:
                    if registry.active.revision.number < int(number):
                        self._keep(loop.create_task(registry.look()))
                case ["drain", number]:
                    drain(int(number))
                case ["end"]:
                    end()

        def obey_soon(words: list[str]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the process is about to
                loop.call_soon_threadsafe(obey, words)

        self._obey = obey_soon
        self._keep(loop.create_task(self._tell(registry, own_id)))

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, registry: TaskRegistry, own_id: str) -> None:
        told = 0
        while True:
            await registry.beyond(told)
            told = registry.active.revision.number
            with contextlib.suppress(OSError):  # full or gone: others look at the store by themselves
                self._channel.send(f"{told} {own_id}".encode(), socket.MSG_DONTWAIT)

    def _listen(self) -> None:
        """On a thread of its own, so that it also works while the backbone is being loaded."""
        with contextlib.suppress(OSError):
            while message := self._channel.recv(MAX_MESSAGE_BYTES):
                if self._obey is not None:
                    self._obey(message.decode().split())
        if self._obey is None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._obey(["drain", str(int(signal.SIGTERM))])
