"""How fast a change reaches the other replica, and whether anything fails or answers wrongly meanwhile:
`python -m benchmarks.propagation`.

Two servers (`tosca serve`) with the default backbone share a store on an S3 server (moto, in a process of its
own). PROPAGATION_CHANGES registrations and replacements go to one or the other by chance while clients ask
both. No picture is seen twice, so every answer costs a pass of the backbone. Afterwards every answer is
computed again offline with the revision in its receipt, and every acknowledged change looked up in the store.

Propagation is counted from the moment that the client has its acknowledgement to the moment that the other
replica says it serves that revision or a later one, looked at every 10 ms. What it can be at best is set by
PROPAGATION_POLL_S, how often a replica looks into the store. PROPAGATION_CLIENTS ask each replica without
pause, so that loading a bank competes with answers for the processors.

Replicas that run already are measured with PROPAGATION_TARGETS="URL URL" and PROPAGATION_STORE=URL, which
must hold the demo's backbone; the credentials of the store come from the usual variables.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.changing_demo import Change, Demo, at_work, changes, judge, quantiles
from benchmarks.machine import machine
from benchmarks.soak_clients import ask
from benchmarks.soak_record import Record, tell
from benchmarks.store_on_s3 import demo_on_s3
from model_store.store import ModelStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import running_server

NUM_CHANGES = int(os.environ.get("PROPAGATION_CHANGES", "200"))
POLL_S = float(os.environ.get("PROPAGATION_POLL_S", "1.0"))
TARGETS = tuple(os.environ.get("PROPAGATION_TARGETS", "").split())
STORE = os.environ.get("PROPAGATION_STORE", "s3://tosca/models")
CLIENTS_EACH = int(os.environ.get("PROPAGATION_CLIENTS", "1"))
SECONDS_BETWEEN_LOOKS = 0.01
LONGEST_WAIT_S = 120.0
RESULT = Path(__file__).parent / "results" / "propagation.json"


@dataclass
class Sightings:
    """When a replica was first seen to serve each revision, or a later one."""

    url: str
    seen: list[tuple[float, int]] = field(default_factory=list)  # moment, revision: both only grow

    def watch(self, record: Record, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=30.0) as client:
            while not stop.wait(SECONDS_BETWEEN_LOOKS):
                try:
                    number = client.get("/health/ready").raise_for_status().json()["revision"]
                except httpx.HTTPError as error:
                    record.fail(f"readiness of {self.url}: {error!r}")
                    continue
                if not self.seen or number > self.seen[-1][1]:
                    self.seen.append((time.monotonic(), number))

    def first(self, revision: int) -> float | None:
        """The moment from which `revision` was served; None when it never was."""
        return next((moment for moment, number in self.seen if number >= revision), None)


def main() -> None:
    about = machine()
    demo = Demo.load()
    with tempfile.TemporaryDirectory() as name, _replicas(Path(name)) as urls:
        record, made, sightings, seconds = measure(urls, demo)
        verdict = judge(demo, ModelStore(STORE), record)
    report = {
        "machine": about,
        "runtime": demo.backbone.runtime_name,
        "replicas": "already running" if TARGETS else "tosca serve, 2 processes",
        "store": "already there" if TARGETS else "S3 (moto), a process of its own",
        "poll_s": None if TARGETS else POLL_S,
        **summary(record, made, sightings, seconds),
        **verdict.figures,
    }
    tell(report, RESULT, record.failures, verdict.lost, verdict.mismatches)
    if record.failures or verdict.lost or verdict.mismatches:
        sys.exit(1)


def measure(urls: Sequence[str], demo: Demo) -> tuple[Record, list[Change], list[Sightings], float]:
    """Change tasks at the replicas `urls` while clients ask them; until all serve the newest revision."""
    record, sightings = Record(), [Sightings(url) for url in urls]
    record.begin_life(os.getpid())  # of replicas that nobody stops: every missing answer is a failure
    watchers = [partial(one.watch, record) for one in sightings]
    clients = [
        partial(ask, url, demo.pictures, seed, record) for seed, url in enumerate([*urls] * CLIENTS_EACH)
    ]
    started = time.monotonic()
    with at_work([*watchers, *clients]):
        made = list(itertools.islice(changes(urls, demo.modules, record), NUM_CHANGES))
        _wait_for_all(sightings, made, record)
    return record, made, sightings, time.monotonic() - started


def _wait_for_all(sightings: Sequence[Sightings], made: Sequence[Change], record: Record) -> None:
    """Until every replica serves the newest revision; a failure when one does not in time."""
    newest = max((one.revision for one in made), default=0)
    ends_at = time.monotonic() + LONGEST_WAIT_S
    for one in sightings:
        while one.first(newest) is None:
            if time.monotonic() > ends_at:
                record.fail(f"{one.url} does not serve revision {newest} after {LONGEST_WAIT_S:g} s")
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def propagations_s(made: Sequence[Change], sightings: Sequence[Sightings]) -> list[float]:
    """Seconds from each acknowledgement until every other replica served the change, from 0."""
    found = []
    for change in made:
        others = [one.first(change.revision) for i, one in enumerate(sightings) if i != change.by]
        if None not in others:
            found.append(max(0.0, max(moment for moment in others if moment) - change.acknowledged_at))
    return found


def summary(
    record: Record, made: Sequence[Change], sightings: Sequence[Sightings], seconds: float
) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "clients": CLIENTS_EACH * len(sightings),
        "requests_answered": len(record.answers),
        "failed_requests": len(record.failures),
        "changes": dict(sorted(record.changes.items())),
        "revisions_that_answered": len({answer["receipt"]["revision"] for _, answer in record.answers}),
        "propagation_s": quantiles(propagations_s(made, sightings)),
        "change_s": quantiles([one.took_s for one in made]),
        "latency_s": quantiles(record.latencies_s),
    }


@contextlib.contextmanager
def _replicas(folder: Path) -> Iterator[list[str]]:
    """The URLs of two replicas: those that run already, or new ones on an S3 server with the demo's store."""
    if TARGETS:
        yield list(TARGETS)
        return
    settings = {"store_poll_s": POLL_S, "log_level": "warning", "torch_threads": 1, "cls_cache_bytes": 0}
    with demo_on_s3(STORE, folder / "s3.log"), contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(running_server(STORE, folder / f"{name}.log", **settings))
            for name in ("first", "second")
        ]
        yield [one.url for one in servers]


if __name__ == "__main__":
    main()
