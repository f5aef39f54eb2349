"""What a soak saw: answers, failures, acknowledged changes, and the lives of its server."""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model_store.errors import UnknownRevision
from model_store.store import ModelStore

Action = Literal["register", "replace", "remove", "roll back"]


@dataclass(frozen=True)
class Acknowledged:
    """A change that the server said it had published as `revision`.

    `module_sha256` is what `task` then was, None after its removal; `back_to` the revision rolled back to.
    """

    revision: int
    action: Action
    task: str = ""
    module_sha256: str | None = None
    back_to: int | None = None

    def fault(self, store: ModelStore) -> str | None:
        """How the store's history contradicts it; None when it is there."""
        try:
            tasks = dict(store.revision(self.revision).tasks)
            if self.back_to is not None:
                is_kept = tasks == dict(store.revision(self.back_to).tasks)
            else:
                is_kept = tasks.get(self.task) == self.module_sha256
        except UnknownRevision as error:
            return f"{self.action} was acknowledged, but {error}"
        return None if is_kept else f"{self.action} is not what revision {self.revision} holds: {self}"


@dataclass
class Life:
    """One process of the server, from ready to its end."""

    pid: int
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    change_cut_short: str | None = None  # what was being changed when it was killed
    rss_mb: list[float] = field(default_factory=list)


class Record:
    """Written by many threads, each under `lock`.

    While the server is down, and when it is killed under a request, that request has no answer and nobody
    is to blame; every other missing answer is a failure.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.lives: list[Life] = []
        self.life: Life | None = None
        self.answers: list[tuple[int, dict[str, Any]]] = []  # (picture, prediction)
        self.failures: list[str] = []
        self.acknowledged: list[Acknowledged] = []
        self.changes: Counter[str] = Counter()
        self.num_cut_short: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.health_s: list[float] = []
        self.changes_s: list[float] = [0.1]
        self.change_under_way: str | None = None
        self.is_changing = threading.Event()

    def begin_life(self, pid: int) -> None:
        with self.lock:
            self.life = Life(pid)
            self.lives.append(self.life)

    def end_life(self) -> None:
        """To be said before the process is made to end."""
        with self.lock:
            assert self.life is not None, "a life ends after it has begun"
            self.life.ended_at = time.monotonic()
            self.life.change_cut_short = self.change_under_way
            self.life = None

    def no_answer(self, what: str, life: Life | None, error: Exception) -> None:
        """A request sent during `life` met a broken or refused connection."""
        with self.lock:
            if life is None or life is not self.life:
                self.num_cut_short[what] += 1
            else:
                self.failures.append(f"{what}: {error!r}")

    def fail(self, failure: str) -> None:
        with self.lock:
            self.failures.append(failure)

    @property
    def newest_acknowledged(self) -> int:
        with self.lock:
            return max((one.revision for one in self.acknowledged), default=0)


def tell(report: Mapping[str, object], path: Path, *problems: Sequence[object]) -> None:
    """Write and print a report, after the first few problems of each kind."""
    for some in problems:
        for problem in some[:5]:
            print(problem)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
