"""Resident memory over TOSCA_BENCH_CYCLES (10,000) registrations and removals of a task beside the demo's, as
the service makes them: `python -m benchmarks.cycles`."""

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import machine, resident_bytes
from benchmarks.many_tasks import moved_file, task_distance
from model_store.freed_memory import give_back_memory
from model_store.publishing import Publisher
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "cycles.json"
CYCLES = int(os.environ.get("TOSCA_BENCH_CYCLES", "10000"))
VERSIONS = 5
SAMPLES = 100


def main() -> None:
    torch.set_num_threads(1)
    about = machine()
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        shutil.copytree(DEMO / "store", store)
        publisher = Publisher(ModelStore(store))
        bank = publisher.active.bank
        template = bank.module("digits")
        distance = task_distance(template, bank.module("textiles"))
        files = [
            moved_file(template, "visitor", distance, seed, publisher.backbone) for seed in range(VERSIONS)
        ]
        resident = []
        started = time.perf_counter()
        for i in range(CYCLES):
            publisher.register(files[i % VERSIONS], force=True)
            publisher.remove("visitor")
            give_back_memory()
            if i % max(1, CYCLES // SAMPLES) == 0:
                resident.append(resident_bytes(os.getpid()))
                print(f"{i} cycles: {resident[-1] / 2**20:.1f} MiB", flush=True)
        seconds = time.perf_counter() - started
    tenth = max(1, len(resident) // 10)
    before, after = (statistics.median(part) for part in (resident[1 : 1 + tenth], resident[-tenth:]))
    result = {
        "cycles": CYCLES,
        "seconds": round(seconds),
        "resident_mib_before": round(before / 2**20, 1),
        "resident_mib_after": round(after / 2**20, 1),
        "ratio": round(after / before, 3),
        "samples_mib": [round(one / 2**20, 1) for one in resident],
        "machine": about,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
