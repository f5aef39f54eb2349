"""Very many tasks for benchmarks: a trained task, moved about in the space of CLS vectors.

A moved task keeps the geometry of its pictures and its module; its distance to the others is that between
unrelated trained tasks. Every task has weights of its own in memory, as real ones would.
"""
# K classes, D features

import copy
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.task_module import TaskModule

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_modules import module_bytes


def moved_task(module: TaskModule, task: str, distance: float, seed: int) -> TaskModule:
    """`module` under another name, with its pictures `distance` away in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    shift_D = torch.randn(module.luca.feature_dim, generator=generator)
    shift_D *= distance / float(shift_D.norm())
    calibration, statistics = module.calibration, module.statistics
    assert module.standardisation is not None, "a task of the default recipe"
    return replace(
        module,
        task=task,
        labels=tuple(f"{task} {label}" for label in module.labels),
        sha256=hashlib.sha256(f"{task} {seed}".encode()).hexdigest(),
        standardisation=replace(module.standardisation, mean_D=module.standardisation.mean_D + shift_D),
        luca=copy.deepcopy(module.luca),
        head=copy.deepcopy(module.head),
        ridge=copy.deepcopy(module.ridge),
        statistics=replace(statistics, mean_KD=statistics.mean_KD + shift_D),
        calibration=replace(calibration, cls_MD=(calibration.cls_MD.float() + shift_D).half()),
    )


def demo_tasks(bank: ModuleBank, num: int) -> list[TaskModule]:
    """So many tasks from the ten-class one of the demo's bank, as far apart as its tasks are."""
    template = bank.module("digits").whole()
    distance = task_distance(template, bank.module("textiles").whole())
    return [moved_task(template, f"task{i:05}", distance, i) for i in range(num)]


def task_distance(one: TaskModule, other: TaskModule) -> float:
    """Between the centres of two tasks' class means."""
    centres: list[Tensor] = [module.statistics.mean_KD.mean(dim=0) for module in (one, other)]
    return float((centres[0] - centres[1]).norm())


def moved_file(
    module: TaskModule, task: str, distance: float, seed: int, backbone: BackboneManifest
) -> bytes:
    """The module file of a moved task."""
    moved = moved_task(module, task, distance, seed)
    logits_MK = moved.logits(moved.calibration.cls_MD.float())
    return module_bytes(replace(moved, calibration=replace(moved.calibration, logits_MK=logits_MK)), backbone)
