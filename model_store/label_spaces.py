"""Label spaces: tasks that declare the same one answer together about the same labels."""
# B batch, K classes of all tasks, L labels of one space, C classes of one task, T tasks, S spaces

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


@dataclass(frozen=True, slots=True)
class LabelSpaces:
    """All label spaces of a bank, in order of their first task."""

    spaces: tuple[LabelSpace, ...]
    space_of_task_T: Tensor
    num_labels_S: Tensor

    @classmethod
    def arrange(cls, modules: Sequence[TaskModule], device: torch.device) -> "LabelSpaces":
        members: dict[str, list[int]] = {}
        for t, module in enumerate(modules):
            # A space's name never equals the key of a task alone, which no name may look like.
            key = f"space {module.label_space}" if module.label_space is not None else f"task {module.task}"
            members.setdefault(key, []).append(t)
        return cls.of([_make_space(modules, tuple(tasks), device) for tasks in members.values()], device)

    @classmethod
    def of(cls, spaces: Sequence[LabelSpace], device: torch.device) -> "LabelSpaces":
        number = {t: s for s, space in enumerate(spaces) for t in space.members}
        return cls(
            spaces=tuple(spaces),
            space_of_task_T=torch.tensor([number[t] for t in sorted(number)], device=device),
            num_labels_S=torch.tensor([len(space.labels) for space in spaces], device=device),
        )

    @classmethod
    def alone(cls, t: int, module: TaskModule, num_tasks: int, device: torch.device) -> "LabelSpaces":
        """Only task `t` of a bank, whatever space it belongs to; the others must have no probability."""
        position_C = torch.arange(len(module.labels), device=device)
        space_of_task_T = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        num_labels_S = torch.tensor([len(module.labels)], device=device)
        return cls((LabelSpace((t,), module.labels, (position_C,)),), space_of_task_T, num_labels_S)

    def __len__(self) -> int:
        return len(self.spaces)

    def __getitem__(self, s: int) -> LabelSpace:
        return self.spaces[s]

    def of_task(self, t: int) -> LabelSpace:
        return self.spaces[int(self.space_of_task_T[t])]

    def probabilities(self, prob_BT: Tensor) -> Tensor:
        """[B, S] sums of [B, T] task probabilities within the spaces."""
        if len(self) == prob_BT.shape[1]:
            return prob_BT
        return prob_BT.new_zeros(len(prob_BT), len(self)).index_add(1, self.space_of_task_T, prob_BT)

    def number_labels(self) -> Tensor:
        """[K] the number of each class's label, over all spaces: equal for classes that are one label."""
        by_task: list[Tensor] = [torch.empty(0)] * len(self.space_of_task_T)
        first = 0
        for space in self.spaces:
            for t, position_C in zip(space.members, space.position_C, strict=True):
                by_task[t] = position_C + first
            first += len(space.labels)
        return torch.cat(by_task)


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
