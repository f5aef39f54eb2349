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
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import obstore
from obstore.store import from_url

from benchmarks.machine import machine
from benchmarks.soak import train_variants
from benchmarks.soak_clients import ask
from benchmarks.soak_record import Acknowledged, Record, tell
from model_store.backbone_loading import load_backbone
from model_store.store import ModelStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from churn import find_mismatches
from serving import free_port, running_server

NUM_CHANGES = int(os.environ.get("PROPAGATION_CHANGES", "200"))
POLL_S = float(os.environ.get("PROPAGATION_POLL_S", "1.0"))
TARGETS = tuple(os.environ.get("PROPAGATION_TARGETS", "").split())
STORE = os.environ.get("PROPAGATION_STORE", "s3://tosca/models")
CLIENTS_EACH = int(os.environ.get("PROPAGATION_CLIENTS", "1"))
SECONDS_BETWEEN_CHANGES = 0.5  # at random, twice as many at most
SECONDS_BETWEEN_LOOKS = 0.01
LONGEST_WAIT_S = 120.0
DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "propagation.json"
Modules = dict[tuple[str, int], bytes]


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


@dataclass(frozen=True)
class Change:
    """An acknowledged change: who was asked, how long it took, when the client had its answer."""

    by: int
    revision: int
    acknowledged_at: float
    took_s: float


def main() -> None:
    about = machine()
    source = ModelStore(DEMO / "store")
    backbone = load_backbone(source)
    modules = train_variants(backbone)
    pictures = [path.read_bytes() for path in sorted((DEMO / "demo").glob("*/test/*/*"))]
    with tempfile.TemporaryDirectory() as name, _replicas(Path(name)) as urls:
        record, changes, sightings, seconds = measure(urls, pictures, modules, NUM_CHANGES)
        store = ModelStore(STORE)
        lost = [fault for one in record.acknowledged if (fault := one.fault(store))]
        print(f"replaying {len(record.answers)} answers offline …", flush=True)
        mismatches = find_mismatches(store, backbone, pictures, record.answers)
    report = {
        "machine": about,
        "runtime": backbone.runtime_name,
        "replicas": "already running" if TARGETS else "tosca serve, 2 processes",
        "store": "already there" if TARGETS else "S3 (moto), a process of its own",
        "poll_s": None if TARGETS else POLL_S,
        **summary(record, changes, sightings, seconds),
        "acknowledged_changes_lost": len(lost),
        "replayed": len(record.answers),
        "mismatches": len(mismatches),
    }
    tell(report, RESULT, record.failures, lost, mismatches)
    if record.failures or lost or mismatches:
        sys.exit(1)


def measure(
    urls: Sequence[str], pictures: list[bytes], modules: Modules, num_changes: int
) -> tuple[Record, list[Change], list[Sightings], float]:
    """Change tasks at the replicas `urls` while clients ask them; until all serve the newest revision."""
    record, stop = Record(), threading.Event()
    record.begin_life(os.getpid())  # of replicas that nobody stops: every missing answer is a failure
    sightings = [Sightings(url) for url in urls]
    workers = [threading.Thread(target=one.watch, args=(record, stop)) for one in sightings]
    workers += [
        threading.Thread(target=ask, args=(url, pictures, seed, record, stop))
        for seed, url in enumerate([*urls] * CLIENTS_EACH)
    ]
    started = time.monotonic()
    for one in workers:
        one.start()
    try:
        changes = _change(urls, modules, num_changes, record)
        _wait_for_all(sightings, changes, record)
    finally:
        stop.set()
        for one in workers:
            one.join(120.0)
    return record, changes, sightings, time.monotonic() - started


def _change(urls: Sequence[str], modules: Modules, num_changes: int, record: Record) -> list[Change]:
    """Register each task in one version and then in the other, at a replica drawn by chance."""
    choice = random.Random(13)
    names = sorted({name for name, _ in modules})
    changes = []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=120.0)) for url in urls]
        for i in range(num_changes):
            time.sleep(choice.uniform(0.0, 2 * SECONDS_BETWEEN_CHANGES))
            task, version = names[i % len(names)], (i // len(names)) % 2
            by = choice.randrange(len(clients))
            began = time.monotonic()
            try:
                # Forced: these tasks look alike on purpose, so the impact report would refuse them.
                response = clients[by].post("/tasks", params={"force": True}, content=modules[task, version])
                response.raise_for_status()
            except httpx.HTTPError as error:
                record.fail(f"change: {error!r}")
                continue
            now = time.monotonic()
            told = response.json()
            module_sha256 = hashlib.sha256(modules[task, version]).hexdigest()
            changes.append(Change(by, told["revision"], now, now - began))
            action = "replace" if told["replaced_sha256"] else "register"
            record.changes[action] += 1
            record.acknowledged.append(Acknowledged(told["revision"], action, task, module_sha256))
    return changes


def _wait_for_all(sightings: Sequence[Sightings], changes: Sequence[Change], record: Record) -> None:
    """Until every replica serves the newest revision; a failure when one does not in time."""
    newest = max((one.revision for one in changes), default=0)
    ends_at = time.monotonic() + LONGEST_WAIT_S
    for one in sightings:
        while one.first(newest) is None:
            if time.monotonic() > ends_at:
                record.fail(f"{one.url} does not serve revision {newest} after {LONGEST_WAIT_S:g} s")
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)


def propagations_s(changes: Sequence[Change], sightings: Sequence[Sightings]) -> list[float]:
    """Seconds from each acknowledgement until every other replica served the change, from 0."""
    found = []
    for change in changes:
        others = [one.first(change.revision) for i, one in enumerate(sightings) if i != change.by]
        if None not in others:
            found.append(max(0.0, max(moment for moment in others if moment) - change.acknowledged_at))
    return found


def summary(
    record: Record, changes: Sequence[Change], sightings: Sequence[Sightings], seconds: float
) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "clients": CLIENTS_EACH * len(sightings),
        "requests_answered": len(record.answers),
        "failed_requests": len(record.failures),
        "changes": dict(sorted(record.changes.items())),
        "revisions_that_answered": len({answer["receipt"]["revision"] for _, answer in record.answers}),
        "propagation_s": quantiles(propagations_s(changes, sightings)),
        "change_s": quantiles([one.took_s for one in changes]),
        "latency_s": quantiles(record.latencies_s),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {
        "num": len(values),
        "p50": round(statistics.median(ordered), 4),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 4),
        "max": round(ordered[-1], 4),
    }


@contextlib.contextmanager
def _replicas(folder: Path) -> Iterator[list[str]]:
    """The URLs of two replicas: those that run already, or new ones on an S3 server with the demo's store."""
    if TARGETS:
        yield list(TARGETS)
        return
    settings = {"store_poll_s": POLL_S, "log_level": "warning", "torch_threads": 1, "cls_cache_bytes": 0}
    with s3_server(folder / "s3.log") as endpoint, contextlib.ExitStack() as stack:
        bucket = STORE.removeprefix("s3://").partition("/")[0]
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=30)
        copy_folder(DEMO / "store", STORE)
        servers = [
            stack.enter_context(running_server(STORE, folder / f"{name}.log", **settings))
            for name in ("first", "second")
        ]
        yield [one.url for one in servers]


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """The endpoint of an S3 server in memory, which this process and those it starts use from now on."""
    port = free_port()
    command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
    }
    try:
        ends_at = time.monotonic() + 60.0
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(endpoint, timeout=5.0)
                break
            if process.poll() is not None or time.monotonic() > ends_at:
                raise RuntimeError(f"the S3 server does not start: {log.read_text()}")
            time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        process.wait(30.0)


def copy_folder(folder: Path, url: str) -> None:
    """Every file of a store in a folder, put under the same name into an object store."""
    target = from_url(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(target, str(path.relative_to(folder)), path.read_bytes(), use_multipart=False)


if __name__ == "__main__":
    main()
