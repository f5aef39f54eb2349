"""Label spaces: tasks that declare the same one answer together about the same labels."""
# K classes of all tasks, L labels of one space, C classes of one task

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.task_module import TaskModule


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """The tasks that share labels, as indices in the bank, and where each task's classes stand among the
    labels they know between them. A task that declares no space is alone in its own."""

    members: tuple[int, ...]
    labels: tuple[str, ...]
    position_C: tuple[Tensor, ...]  # [C] for each member


def arrange_label_spaces(modules: Sequence[TaskModule], device: torch.device) -> tuple[LabelSpace, ...]:
    """The spaces in order of their first task."""
    members: dict[str, list[int]] = {}
    for t, module in enumerate(modules):
        # A space's name never equals the key of a task alone, which no name may look like.
        key = f"space {module.label_space}" if module.label_space is not None else f"task {module.task}"
        members.setdefault(key, []).append(t)
    return tuple(_make_space(modules, tuple(tasks), device) for tasks in members.values())


def _make_space(modules: Sequence[TaskModule], members: tuple[int, ...], device: torch.device) -> LabelSpace:
    position: dict[str, int] = {}
    for t in members:
        for label in modules[t].labels:
            position.setdefault(label, len(position))
    return LabelSpace(
        members=members,
        labels=tuple(position),
        position_C=tuple(
            torch.tensor([position[label] for label in modules[t].labels], device=device) for t in members
        ),
    )


def number_labels(spaces: Sequence[LabelSpace], num_tasks: int) -> Tensor:
    """[K] the number of each class's label, counted over all spaces: equal for classes that are one label."""
    by_task: list[Tensor] = [torch.empty(0)] * num_tasks
    first = 0
    for space in spaces:
        for t, position_C in zip(space.members, space.position_C, strict=True):
            by_task[t] = position_C + first
        first += len(space.labels)
    return torch.cat(by_task)
