"""What sparsity costs: accuracy against bytes for several strengths of the proximal penalty."""
# N test pictures

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict

from model_store.backbone import BackboneManifest
from model_store.bank import ModuleBank
from model_store.luca import count_parameters, matrix_names
from model_store.module_file import ModuleFile, read_module
from training.continual.metrics import share
from training.continual.tasks import ContinualTask
from training.recipes import DEFAULT
from training.trainer import train_task

STRENGTHS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)


class SparsityResult(BaseModel):
    """All tasks of a stream with one penalty, over all seeds.

    `density` is the share of LuCA's matrix entries that are not zero, `luca_bytes` what LuCA takes in a file
    (masks, values, vectors), `file_bytes` the whole file, each a mean over tasks. `luca_accuracy` is that of
    LuCA and its head alone with the true task given, `accuracy` that of the bank end to end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    proximal_l1: float
    density: float
    luca_bytes: float
    file_bytes: float
    luca_accuracy: float
    accuracy: float


def sparsity_curve(
    tasks_by_seed: Sequence[tuple[int, Sequence[ContinualTask]]],
    backbone: BackboneManifest,
    strengths: Sequence[float] = STRENGTHS,
    done: Callable[[SparsityResult], None] = lambda _: None,
) -> list[SparsityResult]:
    """One result a strength; `done` hears of each."""
    results = []
    for strength in strengths:
        runs = [_run(tasks, backbone, strength, seed) for seed, tasks in tasks_by_seed]
        results.append(
            SparsityResult(
                proximal_l1=strength,
                **{
                    name: sum(getattr(one, name) for one in runs) / len(runs)
                    for name in _Run.__dataclass_fields__
                },
            )
        )
        done(results[-1])
    return results


@dataclass(frozen=True, slots=True)
class _Run:
    density: float
    luca_bytes: float
    file_bytes: float
    luca_accuracy: float
    accuracy: float


def _run(tasks: Sequence[ContinualTask], backbone: BackboneManifest, strength: float, seed: int) -> _Run:
    recipe = replace(DEFAULT, proximal_l1=strength)
    files = [
        read_module(train_task(task.name, task.train, backbone, recipe=recipe, seed=seed).data)
        for task in tasks
    ]
    bank = ModuleBank.build(
        (file.module for file in files),
        revision=1,
        backbone_fingerprint=backbone.fingerprint,
        feature_dim=backbone.feature_dim,
    )
    sizes = [_luca_size(file) for file in files]
    right_N, right_alone_N = [], []
    for task, file in zip(tasks, files, strict=True):
        truth = [file.module.labels[k] for k in _own_labels(task).tolist()]
        answers = bank.answer(task.test_cls_UD, top_k=1)
        right_N += [
            one.task == task.name and one.label == label for one, label in zip(answers, truth, strict=True)
        ]
        best_U = file.module.head(file.module.luca_output(task.test_cls_UD)).argmax(dim=1)
        right_alone_N += (best_U == _own_labels(task)).tolist()
    return _Run(
        density=sum(density for density, _ in sizes) / len(files),
        luca_bytes=sum(size_bytes for _, size_bytes in sizes) / len(files),
        file_bytes=sum(file.size_bytes for file in files) / len(files),
        luca_accuracy=share(torch.tensor(right_alone_N)),
        accuracy=share(torch.tensor(right_N)),
    )


def _luca_size(file: ModuleFile) -> tuple[float, int]:
    """(density of the matrices, bytes of LuCA in the file)"""
    luca = file.module.luca
    matrices = [getattr(luca, name) for name in matrix_names(luca.flow)]
    num_entries = sum(one.numel() for one in matrices)
    num_values = sum(int((one != 0).sum()) for one in matrices)
    num_others = count_parameters(luca) - num_entries
    mask_bytes = sum(-(-one.numel() // 8) for one in matrices)
    return num_values / num_entries, mask_bytes + 2 * (num_values + num_others)


def _own_labels(task: ContinualTask) -> torch.Tensor:
    """[U] test labels counted within the task."""
    return (task.test_label_U[:, None] == task.label_K).long().argmax(dim=1)
