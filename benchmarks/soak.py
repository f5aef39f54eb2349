"""The oracle under churn for minutes: `SOAK_S=1800 python -m benchmarks.soak`.

A server with the default backbone answers concurrent clients while tasks are registered, replaced, rolled
back and removed over HTTP, and a second process publishes into the same store. Afterwards every answer is
computed again offline with the revision in its receipt. Reports counts, mismatches, failures and memory.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from model_store.backbone import Backbone
from model_store.store import ModelStore, with_task, without_task
from training.feature_cache import FeatureCache
from training.features import extract_features
from training.sources import open_source
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from churn import find_mismatches
from serving import running_server

DURATION_S = float(os.environ.get("SOAK_S", "600"))
NUM_CLIENTS = 4
SECONDS_BETWEEN_CHANGES = 1.5
SECONDS_BETWEEN_WRITES = 4.0
SECONDS_BETWEEN_SAMPLES = 5.0
NAMES = ("digits-1", "digits-2", "textiles-1", "textiles-2")
VERSIONS = 2
DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "soak.json"


@dataclass
class Tally:
    """What happened; written by several threads, each under the lock."""

    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    rss_mb: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
        return
    source = ModelStore(DEMO / "store")
    head = source.require_head()
    backbone = Backbone.load(source.backbone(head.backbone_fingerprint), device="cpu")
    modules = train_variants(backbone)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = copy_store(source, folder / "store")
        (folder / "modules").mkdir()
        for (task, version), data in modules.items():
            (folder / "modules" / f"{task}.{version}.safetensors").write_bytes(data)
        pictures = demo_pictures()
        tally, seconds = soak(store, pictures, modules, folder)
        print(f"replaying {len(tally.answers)} answers offline …", flush=True)
        mismatches = find_mismatches(store, backbone, pictures, tally.answers)
        report = summary(tally, mismatches, seconds, store)
    for problem in (*tally.failures[:5], *mismatches[:5]):
        print(problem)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    sys.exit(bool(mismatches or tally.failures))


def train_variants(backbone: Backbone) -> dict[tuple[str, int], bytes]:
    """Two versions of four tasks: the demo's, on shifted features, under other names."""
    cache = FeatureCache(DEMO / "cache", backbone.fingerprint, backbone.precision, backbone.feature_dim)
    modules = {}
    for i, name in enumerate(NAMES):
        source = open_source(DEMO / "demo" / name.split("-")[0])
        features = extract_features(source, backbone, cache, show_progress=False)
        for version in range(VERSIONS):
            generator = torch.Generator().manual_seed(10 * i + version)
            shift = 0.3 * torch.randn(features.cls_ND.shape, generator=generator)
            shifted = replace(features, name=name, cls_ND=features.cls_ND + shift)
            modules[name, version] = train_task(name, shifted, backbone.manifest, seed=version).data
    return modules


def copy_store(source: ModelStore, folder: Path) -> ModelStore:
    head = source.require_head()
    store = ModelStore(folder)
    store.publish_first(store.put_backbone(source.backbone(head.backbone_fingerprint)))
    for task, sha256 in head.tasks.items():
        store.publish(with_task(task, store.put_module(source.module(sha256))), f"add {task}")
    return store


def demo_pictures(num_per_class: int = 3) -> list[bytes]:
    folders = sorted((DEMO / "demo").glob("*/test/*"))
    return [path.read_bytes() for one in folders for path in sorted(one.iterdir())[:num_per_class]]


def soak(
    store: ModelStore, pictures: list[bytes], modules: dict[tuple[str, int], bytes], folder: Path
) -> tuple[Tally, float]:
    tally, stop = Tally(), threading.Event()
    settings = {"store_poll_s": 0.5, "audit_log": folder / "audit.jsonl", "log_level": "warning"}
    with running_server(store.url, folder / "log", **settings) as server:
        work = [
            threading.Thread(target=ask, args=(server.url, pictures, i, tally, stop))
            for i in range(NUM_CLIENTS)
        ]
        work.append(threading.Thread(target=change, args=(server.url, modules, tally, stop)))
        work.append(threading.Thread(target=sample, args=(server.url, server.process.pid, tally, stop)))
        started = time.monotonic()
        for one in work:
            one.start()
        arguments = ["write", store.url, str(folder / "modules"), str(DURATION_S)]
        writer = subprocess.Popen([sys.executable, "-m", "benchmarks.soak", *arguments])
        stop.wait(DURATION_S)
        stop.set()
        for one in work:
            one.join(120.0)
        seconds = time.monotonic() - started
        if writer.wait(60.0) != 0:
            tally.failures.append(f"the second writer ended with status {writer.returncode}")
    if server.process.returncode != 0:
        tally.failures.append(f"the server ended with status {server.process.returncode}")
    return tally, seconds


def ask(url: str, pictures: list[bytes], seed: int, tally: Tally, stop: threading.Event) -> None:
    """Ask without pause; whatever is not a whole answer is a failure."""
    choice = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60.0) as client:
        while not stop.is_set():
            index = choice.randrange(len(pictures))
            began = time.monotonic()
            try:
                response = client.post("/predict", content=pictures[index], params={"top_k": 1})
                outcome = None if response.is_success else f"{response.status_code} {response.text}"
            except httpx.HTTPError as error:
                outcome = repr(error)
            with tally.lock:
                tally.latencies_s.append(time.monotonic() - began)
                if outcome is None:
                    tally.answers.append((index, response.json()["predictions"][0]))
                else:
                    tally.failures.append(f"prediction: {outcome}")


def change(url: str, modules: dict[tuple[str, int], bytes], tally: Tally, stop: threading.Event) -> None:
    """Register, replace, remove and roll back in turn by chance; the other writer may be faster (404)."""
    choice = random.Random(99)
    with httpx.Client(base_url=url, timeout=120.0) as client:
        while not stop.wait(SECONDS_BETWEEN_CHANGES):
            listed = client.get("/tasks").json()
            active = {one["task"] for one in listed["tasks"]} & set(NAMES)
            action = choice.choice(("register", "register", "remove", "roll back"))
            if action == "register":
                key = choice.choice(sorted(modules))
                action = "replace" if key[0] in active else "register"
                response = client.post("/tasks", content=modules[key], params={"force": True})
            elif action == "remove" and active:
                response = client.delete(f"/tasks/{choice.choice(sorted(active))}")
            else:
                action = "roll back"
                number = choice.randint(max(3, listed["revision"] - 20), listed["revision"])
                response = client.post(f"/revisions/{number}/rollback")
            with tally.lock:
                if response.is_success:
                    tally.changes[action] += 1
                elif response.status_code == 404:
                    tally.changes[f"{action}: the other writer was first"] += 1
                else:
                    tally.failures.append(f"{action}: {response.status_code} {response.text}")


def sample(url: str, pid: int, tally: Tally, stop: threading.Event) -> None:
    """Memory of the server, and how long its health check takes."""
    with httpx.Client(base_url=url, timeout=10.0) as client:
        while not stop.wait(SECONDS_BETWEEN_SAMPLES):
            began = time.monotonic()
            response = client.get("/health/live")
            with tally.lock:
                tally.health_s.append(time.monotonic() - began)
                tally.rss_mb.append(rss_mb(pid))
                if not response.is_success:
                    tally.failures.append(f"liveness: {response.status_code}")


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise AssertionError("Linux says how much memory a process has")


def write(store_url: str, folder: Path, duration_s: float) -> None:
    """The second process: publishes and removes tasks straight in the store."""
    store = ModelStore(store_url, author="second-process")
    files = sorted(folder.iterdir())
    choice = random.Random(7)
    ends_at = time.monotonic() + duration_s
    while time.monotonic() + SECONDS_BETWEEN_WRITES < ends_at:
        time.sleep(SECONDS_BETWEEN_WRITES)
        removable = sorted(set(store.require_head().tasks) & set(NAMES))
        if removable and choice.random() < 0.5:
            name = choice.choice(removable)
            store.publish(
                lambda revision, name=name: (
                    without_task(name)(revision) if name in revision.tasks else revision.tasks
                ),
                f"remove {name}",
            )
        else:
            file = choice.choice(files)
            store.publish(
                with_task(file.name.split(".")[0], store.put_module(file.read_bytes())), f"put {file.name}"
            )


def summary(tally: Tally, mismatches: list[str], seconds: float, store: ModelStore) -> dict[str, Any]:
    revisions = store.revisions(limit=10**6)
    quarter = max(1, len(tally.rss_mb) // 4)
    latency = sorted(tally.latencies_s)
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "seconds": round(seconds, 1),
        "clients": NUM_CLIENTS,
        "requests_answered": len(tally.answers),
        "failures": len(tally.failures),
        "replayed": len(tally.answers),
        "mismatches": len(mismatches),
        "changes_over_http": dict(sorted(tally.changes.items())),
        "revisions": len(revisions),
        "revisions_by_second_process": sum(one.author == "second-process" for one in revisions),
        "revisions_that_answered": len({answer["receipt"]["revision"] for _, answer in tally.answers}),
        "latency_s": {
            "median": round(statistics.median(latency), 3),
            "p99": round(latency[int(0.99 * (len(latency) - 1))], 3),
        },
        "health_check_s": {
            "median": round(statistics.median(tally.health_s), 4),
            "max": round(max(tally.health_s), 4),
        },
        "rss_mb": {
            "start": tally.rss_mb[0],
            "end": tally.rss_mb[-1],
            "max": max(tally.rss_mb),
            "median_of_first_quarter": statistics.median(tally.rss_mb[:quarter]),
            "median_of_last_quarter": statistics.median(tally.rss_mb[-quarter:]),
        },
    }


if __name__ == "__main__":
    main()
