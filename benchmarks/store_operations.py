"""What the operations of a store ask of it: requests of each kind, bytes and seconds, with 10 to 1,000 tasks.

A publisher registers, removes, rolls back; a second one, as every replica has, looks for revisions, follows
one change, starts. Their store counts what passes: an object store bills requests, however fast they are. The
folder is local, so the seconds are those of reading, checking and building alone, on one thread.

Then 1, 2, 4 and 8 writers publish to one store without pause, each request to it taking WRITER_DELAY_S as if
it were far away: how many registrations pass in a second, and how many attempts each takes. Their modules are
tiny, so that waiting for the store is nearly all they do.

TOSCA_BENCH_TASKS (10,100,1000), TOSCA_BENCH_ROUNDS (5 of each operation), TOSCA_BENCH_SECONDS (20 of each
number of writers).
"""

import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.many_tasks import moved_file, task_distance
from model_store.backbone import BackboneArtefact
from model_store.errors import Conflict
from model_store.object_files import ObjectFiles
from model_store.publishing import Publisher
from model_store.store import ModelStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_modules import backbone_manifest, module_bytes, random_module

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "store_operations.json"
COUNTS = [int(count) for count in os.environ.get("TOSCA_BENCH_TASKS", "10,100,1000").split(",")]
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "5"))
SECONDS = float(os.environ.get("TOSCA_BENCH_SECONDS", "20"))
WRITERS = (1, 2, 4, 8)
WRITER_DELAY_S = 0.05
KEYS_A_LIST = 1000  # what one LIST request returns at most, on S3


# What an object store bills a method of Files as; HEAD costs what GET does, DELETE nothing.
BILLED = {
    "get": "get",
    "exists": "get",
    "put_new": "put",
    "put": "put",
    "delete": "delete",
    "names": "list",
    "stamps": "list",
    "folders": "list",
}


class CountedFiles:
    """A folder that counts requests by what they are billed as, and the bytes they carry, and takes `delay_s`
    for each. It stands for whatever methods the store's files have."""

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        self.counts: Counter[str] = Counter()
        self._files = ObjectFiles(str(folder))
        self._delay_s = delay_s
        self._lock = threading.Lock()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        kind, ask = BILLED[method], getattr(self._files, method)

        def counted(path: str, *arguments: Any, **options: Any) -> Any:
            found = ask(path, *arguments, **options)
            requests = 1
            if kind == "list":
                found = list(found)
                requests = max(1, math.ceil(len(found) / KEYS_A_LIST))
            with self._lock:
                self.counts[kind] += requests
                self.counts["bytes_in"] += len(found) if isinstance(found, bytes) else 0
                if kind == "put":
                    self.counts["bytes_out"] += len(arguments[0])
                if method == "put_new" and path.startswith("revisions/"):
                    self.counts["revisions_tried"] += 1
                    self.counts["revisions_written"] += found
                    self.counts["revision_bytes"] += len(arguments[0])
            time.sleep(requests * self._delay_s)
            return iter(found) if isinstance(found, list) and method != "folders" else found

        return counted


def main() -> None:
    torch.set_num_threads(1)
    about = machine()
    result = {
        "machine": about,
        "rounds": ROUNDS,
        "operations": [row for count in COUNTS for row in measure_operations(count)],
        "writer_delay_s": WRITER_DELAY_S,
        "writers": [measure_writers(number) for number in WRITERS],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


# -- one operation after another ---------------------------------------------------------------------


def measure_operations(num_tasks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        shutil.copytree(DEMO / "store", folder)
        versions = fill(folder, num_tasks)
        files = CountedFiles(folder)
        writer = Publisher(ModelStore(folder))
        rows: dict[str, list[dict[str, float]]] = {}

        def time_operation(operation: str, work: Callable[[], object]) -> None:
            files.counts.clear()
            began, cpu_began = time.perf_counter(), time.process_time()
            work()
            took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
            rows.setdefault(operation, []).append(took | files.counts)

        def counted() -> Publisher:
            return Publisher(ModelStore(folder, files=files))

        time_operation("start", counted)
        replica = counted()
        for i in range(ROUNDS):
            time_operation("look", replica.refresh)
            writer.register(versions[i], force=True)
            time_operation("follow", replica.refresh)
            writer.remove("visitor")
            replica.refresh()
            time_operation("register", lambda i=i: replica.register(versions[i], force=True))  # type: ignore[misc]
            before = replica.active.revision.number - 1
            time_operation("roll back", lambda before=before: replica.rollback(before))  # type: ignore[misc]
            writer.register(versions[i], force=True)
            replica.refresh()
            time_operation("remove", lambda: replica.remove("visitor"))
            writer.refresh()
    summary = []
    for operation, runs in rows.items():
        row: dict[str, Any] = {"operation": operation, "tasks": num_tasks}
        for name in ("get", "put", "list", "bytes_in", "bytes_out", "revision_bytes"):
            row[name] = round(statistics.median(one.get(name, 0) for one in runs))
        for name in ("seconds", "cpu_seconds"):
            row[name] = round(statistics.median(one[name] for one in runs), 4)
        summary.append(row)
        print(json.dumps(row), flush=True)
    return summary


def fill(folder: Path, num_tasks: int) -> list[bytes]:
    """Make as many tasks active in a copy of the demo's store; the files of one more, a version a round."""
    store = ModelStore(folder)
    publisher = Publisher(store)
    template = publisher.active.bank.module("digits")
    distance = task_distance(template, publisher.active.bank.module("textiles"))
    tasks = {}
    for i in range(num_tasks):
        data = moved_file(template, f"task{i:05}", distance, i, publisher.backbone)
        tasks[f"task{i:05}"] = store.put_module(data)
    store.publish(lambda _: tasks, "many tasks")
    with_tasks = Publisher(store)
    if with_tasks.epoch_is_due:  # as a server does after a change
        with_tasks.begin_epoch()
    return [moved_file(template, "visitor", distance, 10**6 + i, publisher.backbone) for i in range(ROUNDS)]


# -- writers at once ---------------------------------------------------------------------------------


def measure_writers(number: int) -> dict[str, Any]:
    """`number` writers, each replacing its own task again and again."""
    weights = b"weights that nobody loads"
    manifest = backbone_manifest().model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    with tempfile.TemporaryDirectory() as name:
        plain = ModelStore(name)
        plain.publish_first(plain.put_backbone(BackboneArtefact(manifest, weights)))
        files = CountedFiles(Path(name), WRITER_DELAY_S)
        start = threading.Barrier(number)

        def write(writer: int) -> int:
            """Publish until the time is over; how often it gave up."""
            modules = [random_module(f"task{writer}", seed=version) for version in (0, 1)]
            versions = [module_bytes(module, manifest) for module in modules]
            publisher = Publisher(ModelStore(name, files=files))
            num_given_up, i = 0, 0
            start.wait()
            ends_at = time.monotonic() + SECONDS
            while time.monotonic() < ends_at:
                i += 1
                try:
                    publisher.register(versions[i % 2], force=True)
                except Conflict:
                    num_given_up += 1
            return num_given_up

        with ThreadPoolExecutor(number) as pool:
            num_given_up = sum(pool.map(write, range(number)))
    counts = files.counts
    row = {
        "writers": number,
        "published_per_s": round(counts["revisions_written"] / SECONDS, 3),
        "attempts_a_publication": round(counts["revisions_tried"] / max(1, counts["revisions_written"]), 3),
        "given_up": num_given_up,
        "requests_a_publication": round(
            (counts["get"] + counts["put"] + counts["list"]) / max(1, counts["revisions_written"]), 2
        ),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
