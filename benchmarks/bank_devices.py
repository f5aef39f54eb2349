"""What a bank's answers cost on the CPU and on a CUDA device, by the number of tasks.

Time from CLS vectors on the host to answers, with one thread on the CPU, of vectors like the calibration
vectors of tasks drawn at random, when every task has been asked before. Tasks are the demo's ten-class task
moved about (benchmarks/many_tasks.py).

TOSCA_BENCH_TASKS (1,100,1000,10000), TOSCA_BENCH_ROUNDS (10).

Example: python -m benchmarks.bank_devices
"""

import copy
import json
import random
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.bank_batches import BATCH_SIZES, COUNTS, DEMO, ROUNDS
from benchmarks.machine import machine
from benchmarks.many_tasks import demo_tasks
from model_store.bank import ModuleBank
from model_store.publishing import Publisher
from model_store.store import ModelStore
from model_store.task_module import TaskModule

RESULT = Path(__file__).parent / "results" / "bank_devices.json"
DEVICES = ("cpu", "cuda")
MOST_ASKED = 200  # tasks of which the vectors are
Parts = TypeVar("Parts")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    torch.set_num_threads(1)
    about = machine()
    bank = Publisher(ModelStore(DEMO / "store")).active.bank
    modules = demo_tasks(bank, max(COUNTS))
    rows: list[dict[str, Any]] = []
    for device in DEVICES:
        placed = [on_device(module, device) for module in modules]
        for count in COUNTS:
            built = ModuleBank.build(
                placed[:count],
                revision=1,
                backbone_fingerprint=bank.backbone_fingerprint,
                feature_dim=bank.feature_dim,
                device=device,
            )
            for batch_size in BATCH_SIZES:
                row = {"device": device, "tasks": count, "batch_size": batch_size}
                rows.append(row | {"ms": measure(built, modules[:count], batch_size)})
                print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps({"machine": about, "rounds": ROUNDS, "answers": rows}, indent=2) + "\n")


def measure(bank: ModuleBank, modules: list[TaskModule], batch_size: int) -> float:
    """The median milliseconds of an answer to so many vectors."""
    chance = random.Random(batch_size)
    asked = chance.sample(modules, min(len(modules), MOST_ASKED))
    vectors_ND = torch.stack([module.calibration.cls_MD[0].float() for module in asked])
    for cls_BD in vectors_ND.split(64):
        bank.answer(cls_BD)
    took = []
    for _ in range(ROUNDS):
        cls_BD = vectors_ND[[chance.randrange(len(asked)) for _ in range(batch_size)]]
        started = time.perf_counter()
        bank.answer(cls_BD)
        took.append(1e3 * (time.perf_counter() - started))
    return statistics.median(took)


def on_device(module: TaskModule, device: str) -> TaskModule:
    """A copy, its class statistics left where they are: banks want them on the CPU."""
    assert module.standardisation is not None, "a task of the default recipe"
    return replace(
        module,
        standardisation=moved(module.standardisation, device),
        luca=copy.deepcopy(module.luca).to(device),
        head=copy.deepcopy(module.head).to(device),
        ridge=moved(module.ridge, device),
        calibration=moved(module.calibration, device),
    )


def moved(parts: Parts, device: str) -> Parts:
    """A dataclass with its tensors on `device`."""
    values = {field.name: getattr(parts, field.name) for field in fields(parts)}  # type: ignore[arg-type]
    return replace(  # type: ignore[type-var]
        parts, **{name: one.to(device) for name, one in values.items() if isinstance(one, Tensor)}
    )


if __name__ == "__main__":
    main()
