"""The oracle under churn and kills for minutes: `SOAK_S=1800 SOAK_KILLS=15 python -m benchmarks.soak`.

A server with the default backbone, in the runtime that was tuned for it, answers concurrent clients while
tasks are registered, replaced, rolled back and removed over HTTP, and a second process publishes into the
same store. No picture is seen twice, so every answer costs a pass of the backbone. In the second half the
server is killed (SIGKILL) SOAK_KILLS times and started again under its clients, every second time amid a
change. Afterwards every answer is computed again offline with the revision in its receipt, and every
acknowledged change looked up in the store. Reports counts, mismatches, losses, failures and memory.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from benchmarks.changing_demo import DEMO, NAMES, Demo, judge
from benchmarks.machine import machine
from benchmarks.soak_clients import ask, change, sample
from benchmarks.soak_record import Life, Record, tell
from model_store.store import ModelStore, with_task, without_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import free_port, running_server

DURATION_S = float(os.environ.get("SOAK_S", "600"))
NUM_KILLS = int(os.environ.get("SOAK_KILLS", "6"))
NUM_CLIENTS = 4
SECONDS_BETWEEN_WRITES = 4.0
LONGEST_WAIT_FOR_A_CHANGE_S = 30.0
LAST_LIFE_S = 10.0
# Small enough that a soak fills it: what is kept must be bounded too.
CLS_CACHE_BYTES = 2**20
# Of resident memory, from the first quarter of a life to its last, where it was sampled often enough.
MAX_GROWTH = 1.1
MIN_SAMPLES = 8
RESULT = Path(__file__).parent / "results" / "soak.json"


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
        return
    about = machine()
    demo = Demo.load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(DEMO / "store", folder / "store")
        store = ModelStore(folder / "store")
        (folder / "modules").mkdir()
        for (task, version), data in demo.modules.items():
            (folder / "modules" / f"{task}.{version}.safetensors").write_bytes(data)
        record, seconds = soak(store, demo, folder)
        verdict = judge(demo, store, record)
        report = {
            "machine": about,
            "runtime": demo.backbone.runtime_name,
            "pictures": len(demo.pictures),
            **summary(record, seconds, store),
            "acknowledged_changes": len(record.acknowledged),
            **verdict.figures,
        }
    tell(report, RESULT, record.failures, verdict.lost, verdict.mismatches)
    sys.exit(bool(record.failures or verdict.lost or verdict.mismatches or growing(record)))


def soak(store: ModelStore, demo: Demo, folder: Path) -> tuple[Record, float]:
    """The lives of the server, and around them clients, changes, samples and a second writer."""
    record, stop, port = Record(), threading.Event(), free_port()
    url = f"http://127.0.0.1:{port}"
    workers = [
        threading.Thread(target=ask, args=(url, demo.pictures, seed, record, stop))
        for seed in range(NUM_CLIENTS)
    ]
    workers.append(threading.Thread(target=change, args=(url, demo.modules, record, stop)))
    workers.append(threading.Thread(target=sample, args=(url, record, stop)))
    settings = {
        "port": port,
        "store_poll_s": 0.5,
        "audit_log": folder / "audit.jsonl",
        "log_level": "warning",
        "cls_cache_bytes": CLS_CACHE_BYTES,
    }
    started = time.monotonic()
    try:
        for kill_after_s in (*kill_moments(), None):
            newest = record.newest_acknowledged
            with running_server(store.url, folder / "log", **settings) as server:
                record.begin_life(server.process.pid)
                check_served(url, store, newest, record)
                if len(record.lives) == 1:
                    started = time.monotonic()
                    writer = start_writer(store.url, folder / "modules")
                    for one in workers:
                        one.start()
                if kill_after_s is not None:
                    wait_for_kill(started + kill_after_s, record)
                    record.end_life()
                    server.process.kill()
                    server.process.wait()
                    continue
                time.sleep(max(LAST_LIFE_S, started + DURATION_S - time.monotonic()))
                stop.set()
                for one in workers:
                    one.join(120.0)
                record.end_life()
    finally:
        stop.set()
    seconds = time.monotonic() - started
    if writer.wait(60.0) != 0:
        record.fail(f"the second writer ended with status {writer.returncode}")
    if server.process.returncode != 0:
        record.fail(f"the server ended with status {server.process.returncode}")
    return record, seconds


def kill_moments() -> Iterator[float]:
    """Seconds from the start: one random moment in each of NUM_KILLS equal parts of the second half."""
    choice = random.Random(5)
    part_s = DURATION_S / 2 / max(1, NUM_KILLS)
    for i in range(NUM_KILLS):
        yield DURATION_S / 2 + part_s * (i + choice.random())


def wait_for_kill(moment: float, record: Record) -> None:
    """Until the moment has come, and for every second kill until somewhere in a change under way."""
    time.sleep(max(0.0, moment - time.monotonic()))
    if len(record.lives) % 2 and record.is_changing.wait(LONGEST_WAIT_FOR_A_CHANGE_S):
        with record.lock:
            typical_s = statistics.median(record.changes_s)
        time.sleep(random.Random(len(record.lives)).uniform(0.0, typical_s))


def check_served(url: str, store: ModelStore, newest: int, record: Record) -> None:
    """A server that has started serves the newest acknowledged revision or a later one, whole."""
    listed = httpx.get(f"{url}/tasks", timeout=30.0).raise_for_status().json()
    if listed["revision"] < newest:
        record.fail(f"revision {newest} was acknowledged, {listed['revision']} is served after the restart")
    served = {one["task"]: one["module_sha256"] for one in listed["tasks"]}
    if served != dict(store.revision(listed["revision"]).tasks):
        record.fail(f"after the restart revision {listed['revision']} is not served as the store has it")


def start_writer(store_url: str, modules: Path) -> "subprocess.Popen[bytes]":
    arguments = ["write", store_url, str(modules), str(DURATION_S)]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.soak", *arguments])


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


def growing(record: Record) -> list[Life]:
    """Lives over which the memory of the server grew by more than MAX_GROWTH."""
    sampled = [one for one in record.lives if len(one.rss_mb) >= MIN_SAMPLES]
    return [one for one in sampled if quarter(one, -1) > MAX_GROWTH * quarter(one, 0)]


def quarter(life: Life, which: int) -> float:
    """Median MB of the first (0) or last (-1) quarter of a life."""
    size = max(1, len(life.rss_mb) // 4)
    return statistics.median(life.rss_mb[:size] if which == 0 else life.rss_mb[-size:])


def summary(record: Record, seconds: float, store: ModelStore) -> dict[str, Any]:
    revisions = store.revisions(limit=10**6)
    latency = sorted(record.latencies_s)
    killed = record.lives[:-1]
    outages = [later.began_at - one.ended_at for one, later in zip(killed, record.lives[1:], strict=True)]
    return {
        "seconds": round(seconds, 1),
        "clients": NUM_CLIENTS,
        "requests_answered": len(record.answers),
        "failures": len(record.failures),
        "kills": len(killed),
        "kills_amid_a_change": sum(one.change_cut_short is not None for one in killed),
        "cut_short_or_refused_while_down": dict(sorted(record.num_cut_short.items())),
        "down_s": {"median": round(statistics.median(outages), 1), "max": round(max(outages), 1)}
        if outages
        else None,
        "changes_over_http": dict(sorted(record.changes.items())),
        "revisions": len(revisions),
        "revisions_by_second_process": sum(one.author == "second-process" for one in revisions),
        "revisions_that_answered": len({answer["receipt"]["revision"] for _, answer in record.answers}),
        "latency_s": {
            "median": round(statistics.median(latency), 3),
            "p99": round(latency[int(0.99 * (len(latency) - 1))], 3),
        },
        "health_check_s": {
            "median": round(statistics.median(record.health_s), 4),
            "max": round(max(record.health_s), 4),
        },
        "lives": [
            {
                "seconds": round(one.ended_at - one.began_at, 1),
                "change_cut_short": one.change_cut_short,
                "rss_mb_first_quarter": quarter(one, 0) if one.rss_mb else None,
                "rss_mb_last_quarter": quarter(one, -1) if one.rss_mb else None,
            }
            for one in record.lives
        ],
        "lives_whose_memory_grew": len(growing(record)),
    }


if __name__ == "__main__":
    main()
