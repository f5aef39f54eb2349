"""Who changed what: an append-only log of every registration, removal and roll-back, asked for and done.

A change is asked for in one line, before anything happens, and its end is told in another. The first is on
the disk before the next step, so that no change is made that the log does not know of; where it cannot be
written, nothing is changed. Where only the second cannot, the change stands and the ordinary log has its end.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from model_store.errors import ToscaError
from service.errors import AuditUnavailable

log = logging.getLogger("tosca.audit")


class AuditLog:
    """Appends JSON lines to a file, and to the ordinary log. Without a file only to the latter."""

    def __init__(
        self, path: Path | None, on_end: Callable[[str, str, float], None] = lambda *_: None
    ) -> None:
        """`on_end` is told the action, its outcome (`done` or `refused`) and the seconds it took.

        Raises AuditUnavailable when the file cannot be opened for appending.
        """
        self._path = path
        self._on_end = on_end
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            except OSError as error:
                raise AuditUnavailable(f"audit log {path}: {error.strerror}") from error

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def change(self, action: str, **what: Any) -> Iterator[Callable[..., None]]:
        """Log the start and the end of a change; the block calls the yielded function with its result.

        Raises AuditUnavailable when the start cannot be logged.
        """
        result: dict[str, Any] = {}
        self._append("asked", action, what)
        started = time.monotonic()
        try:
            yield lambda **found: result.update(found)
        except Exception as error:
            fault = str(error) if isinstance(error, ToscaError) else "internal error"
            self._on_end(action, "refused", time.monotonic() - started)
            self._end("refused", action, what | {"fault": type(error).__name__, "detail": fault[:500]})
            raise
        self._on_end(action, "done", time.monotonic() - started)
        self._end("done", action, what | result)

    def _end(self, event: str, action: str, what: dict[str, Any]) -> None:
        """The client is told how the change ended, not that of this the log knows nothing."""
        try:
            self._append(event, action, what)
        except AuditUnavailable as error:
            log.critical("%s %s is missing in the audit log: %s", event, action, error)

    def _append(self, event: str, action: str, what: dict[str, Any]) -> None:
        line = {"at": datetime.now(UTC).isoformat(), "event": event, "action": action, **what}
        log.info("%s %s", event, action, extra={"fields": {"audit": line}})
        if self._descriptor is None:
            return
        data = json.dumps(line, ensure_ascii=False, default=str).encode() + b"\n"
        try:
            with self._lock:
                written = os.write(self._descriptor, data)
                os.fsync(self._descriptor)
        except OSError as error:
            raise AuditUnavailable(f"audit log {self._path}: {error.strerror}") from error
        if written != len(data):
            raise AuditUnavailable(f"audit log {self._path}: the disk is full")
