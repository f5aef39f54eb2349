"""Two replicas on Ray Serve over one store in S3, while tasks change and while one is killed:
`python -m benchmarks.ray_serve`.

A Ray cluster on this machine serves a store on an S3 server (moto, in a process of its own) with two replicas
of the default backbone behind Ray's proxy. RAY_CHANGES registrations and replacements are made through the
proxy, so at a replica that Ray chooses, while clients ask. No picture is seen twice, so every answer costs a
pass of the backbone. Then, under the same load and with changes going on, one replica is killed (SIGKILL).
Afterwards every answer is computed again offline with the revision in its receipt, and every acknowledged
change looked up in the store.

Propagation is counted from the moment that the client has its acknowledgement until every replica has been
seen to serve that revision or a later one. Replicas are looked at through the proxy, which asks one by
chance, and told apart by `x-tosca-replica`; how often each was looked at is reported. What propagation can be
at best is set by RAY_POLL_S, how often a replica looks into the store.
"""

import contextlib
import itertools
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from benchmarks.changing_demo import Change, Demo, at_work, changes, judge, quantiles
from benchmarks.machine import machine
from benchmarks.soak_clients import ask
from benchmarks.soak_record import Record, tell
from benchmarks.store_on_s3 import demo_on_s3
from model_store.store import ModelStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ray_cluster import RayCluster, ray_cluster
from serving import free_port

NUM_CHANGES = int(os.environ.get("RAY_CHANGES", "200"))
POLL_S = float(os.environ.get("RAY_POLL_S", "1.0"))
NUM_REPLICAS = 2
NUM_CLIENTS = 4
NUM_WATCHERS = 2
SECONDS_BETWEEN_LOOKS = 0.01
LONGEST_WAIT_S = 180.0
CHANGES_AROUND_THE_KILL = 10  # as many before it as after it
STORE = "s3://tosca/models"
RESULT = Path(__file__).parent / "results" / "ray_serve.json"


@dataclass
class Sightings:
    """When each replica was first seen to serve each revision, or a later one."""

    url: str
    seen: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    looks_at: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, record: Record, stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=30.0) as client:
            while not stop.wait(SECONDS_BETWEEN_LOOKS):
                try:
                    ready = client.get("/health/ready").raise_for_status()
                except httpx.HTTPError as error:
                    record.fail(f"readiness: {error!r}")
                    continue
                replica, revision, now = (
                    ready.headers["x-tosca-replica"],
                    ready.json()["revision"],
                    time.monotonic(),
                )
                with self._lock:
                    self.looks_at[replica].append(now)
                    seen = self.seen[replica]
                    if not seen or revision > seen[-1][1]:
                        seen.append((now, revision))

    def served_by_all(self, revision: int, num_replicas: int) -> float | None:
        """The moment from which so many replicas had been seen to serve it; None when they were not."""
        with self._lock:
            firsts = [
                next((moment for moment, number in seen if number >= revision), None)
                for seen in self.seen.values()
            ]
        moments = sorted(one for one in firsts if one is not None)
        return moments[num_replicas - 1] if len(moments) >= num_replicas else None

    def median_gap_s(self) -> float:
        """Between two looks at the same replica."""
        gaps = [b - a for one in self.looks_at.values() for a, b in itertools.pairwise(sorted(one))]
        return statistics.median(gaps)


def main() -> None:
    about = machine()
    demo = Demo.load()
    with tempfile.TemporaryDirectory() as name, _replicas(Path(name)) as (url, cluster):
        calm, made, sightings, seconds = measure(url, demo)
        killed, outage = kill_one(url, cluster, demo)
        verdict = judge(demo, ModelStore(STORE), calm, killed)
    propagations_s = [
        max(0.0, moment - one.acknowledged_at)
        for one in made
        if (moment := sightings.served_by_all(one.revision, NUM_REPLICAS)) is not None
    ]
    report = {
        "machine": about,
        "runtime": demo.backbone.runtime_name,
        "replicas": NUM_REPLICAS,
        "clients": NUM_CLIENTS,
        "store": "S3 (moto), a process of its own",
        "poll_s": POLL_S,
        "seconds": round(seconds, 1),
        "requests_answered": len(calm.answers),
        "failed_requests": len(calm.failures),
        "changes": dict(sorted(calm.changes.items())),
        "revisions_that_answered": len(
            {answer["receipt"]["revision"] for one in (calm, killed) for _, answer in one.answers}
        ),
        "propagation_s": quantiles(propagations_s),
        "between_looks_at_a_replica_s": round(sightings.median_gap_s(), 4),
        "change_s": quantiles([one.took_s for one in made]),
        "latency_s": quantiles(calm.latencies_s),
        "killed_replica": {
            "requests_answered": len(killed.answers),
            "requests_failed": dict(Counter(_kind(one) for one in killed.failures)),
            "acknowledged_changes": len(killed.acknowledged),
            "replaced_after_s": round(outage, 1),
        },
        **verdict.figures,
    }
    tell(report, RESULT, calm.failures, verdict.lost, verdict.mismatches)
    if calm.failures or verdict.lost or verdict.mismatches or len(propagations_s) < len(made):
        sys.exit(1)


def measure(url: str, demo: Demo) -> tuple[Record, list[Change], Sightings, float]:
    """Change tasks while clients ask, until every replica serves the newest revision."""
    record, sightings = Record(), Sightings(url)
    started = time.monotonic()
    with _load(url, demo.pictures, record, sightings):
        made = list(itertools.islice(changes([url], demo.modules, record), NUM_CHANGES))
        newest = max(one.revision for one in made)
        ends_at = time.monotonic() + LONGEST_WAIT_S
        while sightings.served_by_all(newest, NUM_REPLICAS) is None and time.monotonic() < ends_at:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return record, made, sightings, time.monotonic() - started


def kill_one(url: str, cluster: RayCluster, demo: Demo) -> tuple[Record, float]:
    """Kill a replica between changes, under load; and seconds until there are as many as before."""
    record, sightings = Record(), Sightings(url)
    with _load(url, demo.pictures, record, sightings):
        made = changes([url], demo.modules, record)
        for _ in itertools.islice(made, CHANGES_AROUND_THE_KILL):
            pass
        before = set(cluster.replicas)
        os.kill(min(before), signal.SIGKILL)
        began = time.monotonic()
        for _ in itertools.islice(made, CHANGES_AROUND_THE_KILL):
            pass
        while len(sightings.looks_at) < NUM_REPLICAS + 1:  # the one that takes its place has answered
            if time.monotonic() > began + LONGEST_WAIT_S:
                raise RuntimeError(f"no replica took the place of the killed one in {LONGEST_WAIT_S:g} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        outage = time.monotonic() - began
    return record, outage


def _load(
    url: str, pictures: list[bytes], record: Record, sightings: Sightings
) -> AbstractContextManager[None]:
    """Clients that ask and watchers that look, while the block runs."""
    record.begin_life(os.getpid())  # nothing that a client may forgive: every missing answer is a failure
    clients = [partial(ask, url, pictures, seed, record) for seed in range(NUM_CLIENTS)]
    return at_work([*clients, *[partial(sightings.watch, record)] * NUM_WATCHERS])


def _kind(failure: str) -> str:
    """What was asked, and what came back, without particulars."""
    return " ".join(failure.split()[:2])


@contextlib.contextmanager
def _replicas(folder: Path) -> Iterator[tuple[str, RayCluster]]:
    """The proxy's URL and the cluster, over the demo's store on an S3 server."""
    with demo_on_s3(STORE, folder / "s3.log"), ray_cluster(num_cpus=NUM_REPLICAS) as cluster:
        port = free_port()
        cluster.tosca(
            *("ray", "deploy", "--store", STORE, "--port", str(port)),
            *("--replicas", str(NUM_REPLICAS), "--cpus", "1"),
            TOSCA_STORE_POLL_S=str(POLL_S),
            TOSCA_CLS_CACHE_BYTES="0",
            TOSCA_LOG_LEVEL="warning",
        )
        yield f"http://127.0.0.1:{port}", cluster


if __name__ == "__main__":
    main()
