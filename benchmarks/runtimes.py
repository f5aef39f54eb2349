"""Every runtime of the default backbone: images per second and latency by batch size, the ratio to torch in
float32, and the parity of its answers on real pictures; and the passes of the chosen one side by side.
TOSCA_BENCH_ROUNDS sets the timed passes (7).

The passes of each runtime alternate with passes of torch in float32, and ratios are medians of the pairs.
Parity is measured on the demo's test pictures, by the demo's tasks.
"""

import json
import os
from pathlib import Path

import torch

from benchmarks.machine import machine
from model_store.measuring import Plan, tune
from model_store.parity import read_labelled
from model_store.publishing import Publisher
from model_store.store import ModelStore
from model_store.tune_command import print_measurements
from model_store.tuning import Measurement

DEMO = Path(".tosca")
TASKS = ("digits", "textiles")
RESULT = Path(__file__).parent / "results" / "runtimes.json"
MAX_PICTURES = 60
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "7"))
BATCH_SIZES = (1, 8, 64) if torch.cuda.is_available() else (1, 8)


def main() -> None:
    about = machine()
    store = ModelStore(DEMO / "store")
    artefact = store.backbone(store.require_head().backbone_fingerprint)
    folders = {task: DEMO / "demo" / task / "test" for task in TASKS}
    pictures = read_labelled(folders, artefact.manifest.preprocessing, MAX_PICTURES)
    plan = Plan(batch_sizes=BATCH_SIZES, num_rounds=ROUNDS)
    tuned = tune(artefact, pictures, plan, bank=Publisher(store).active.bank, on_measured=report)
    print_measurements(tuned.tuning)
    result = {
        "backbone": artefact.manifest.architecture,
        "machine": about,
        "rounds": ROUNDS,
        "tuning": tuned.tuning.model_dump(mode="json"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({one.runtime: round(one.best_speedup, 2) for one in tuned.tuning.table}))


def report(measured: Measurement) -> None:
    print(f"{measured.runtime}: {measured.best_speedup:.2f} × float32", flush=True)


if __name__ == "__main__":
    main()
