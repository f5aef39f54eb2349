"""What the bank's answer to a picture costs alone and in a batch, by the number of tasks.

Processor time of one thread, of vectors like the calibration vectors of tasks drawn at random, when every
task has been asked before: a task's first answer under a revision costs more, once. Tasks are the demo's
ten-class task moved about (benchmarks/many_tasks.py).

TOSCA_BENCH_TASKS (1,100,1000,10000), TOSCA_BENCH_ROUNDS (10).
"""

import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.many_tasks import demo_tasks
from model_store.bank import ModuleBank
from model_store.publishing import Publisher
from model_store.store import ModelStore

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "bank_batches.json"
COUNTS = [int(count) for count in os.environ.get("TOSCA_BENCH_TASKS", "1,100,1000,10000").split(",")]
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "10"))
BATCH_SIZES = (1, 64)


def main() -> None:
    torch.set_num_threads(1)
    about = machine()
    bank = Publisher(ModelStore(DEMO / "store")).active.bank
    modules = demo_tasks(bank, max(COUNTS))
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        asked = ModuleBank.build(
            modules[:count],
            revision=1,
            backbone_fingerprint=bank.backbone_fingerprint,
            feature_dim=bank.feature_dim,
        )
        for module in asked.modules:
            asked.answer(module.calibration.cls_MD[:1].float())
        for batch_size in BATCH_SIZES:
            chance = random.Random(batch_size)
            took = []
            for _ in range(ROUNDS * max(BATCH_SIZES) // batch_size):
                drawn = [asked.modules[chance.randrange(count)].calibration.cls_MD for _ in range(batch_size)]
                cls_BD = torch.stack([cls_MD[chance.randrange(len(cls_MD))] for cls_MD in drawn]).float()
                started = time.thread_time()
                asked.answer(cls_BD)
                took.append(1e3 * (time.thread_time() - started) / batch_size)
            row = {"tasks": count, "batch_size": batch_size, "cpu_ms_a_picture": statistics.median(took)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    RESULT.write_text(json.dumps({"machine": about, "rounds": ROUNDS, "answers": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
