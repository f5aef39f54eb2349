"""Label spaces: tasks that declare the same one answer together about the same labels."""
# B batch, K classes of all tasks, L labels of one space, C classes of one task, T tasks, S spaces

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.task_module import ActiveModule


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """The tasks that share labels, as indices in the bank, and where each task's classes stand among the
    labels they know between them. A task that declares no space is alone in its own."""

    members: tuple[int, ...]
    labels: tuple[str, ...]
    position_C: tuple[Tensor, ...]  # [C] for each member


@dataclass(frozen=True, slots=True)
class LabelSpaces:
    """All label spaces of a bank, in order of their first task. Only those of several tasks are kept as
    such, for nearly all tasks are alone in theirs."""

    modules: tuple[ActiveModule, ...]
    first_task: tuple[int, ...]  # of each space
    shared: Mapping[int, LabelSpace]  # by number of the space
    space_of_task_T: Tensor
    num_labels_S: Tensor

    @classmethod
    def arrange(cls, modules: Sequence[ActiveModule], device: torch.device) -> "LabelSpaces":
        first_task: list[int] = []
        space_of_task: list[int] = []
        members: dict[str, list[int]] = {}
        for t, module in enumerate(modules):
            tasks = [] if module.label_space is None else members.setdefault(module.label_space, [])
            if not tasks:
                first_task.append(t)
            tasks.append(t)
            space_of_task.append(len(first_task) - 1 if tasks[0] == t else space_of_task[tasks[0]])
        shared = {
            space_of_task[tasks[0]]: _make_space(modules, tuple(tasks), device)
            for tasks in members.values()
            if len(tasks) > 1
        }
        num_labels = [len(modules[t].labels) for t in first_task]
        for s, space in shared.items():
            num_labels[s] = len(space.labels)
        return cls(
            modules=tuple(modules),
            first_task=tuple(first_task),
            shared=shared,
            space_of_task_T=torch.tensor(space_of_task, dtype=torch.int64, device=device),
            num_labels_S=torch.tensor(num_labels, dtype=torch.int64, device=device),
        )

    def alone(self, t: int) -> "LabelSpaces":
        """Only task `t`, whatever space it belongs to; the others must have no probability."""
        return LabelSpaces(
            modules=self.modules,
            first_task=(t,),
            shared={},
            space_of_task_T=torch.zeros_like(self.space_of_task_T),
            num_labels_S=self.num_labels_S.new_tensor([len(self.modules[t].labels)]),
        )

    def __len__(self) -> int:
        return len(self.first_task)

    def __getitem__(self, s: int) -> LabelSpace:
        if (space := self.shared.get(s)) is not None:
            return space
        t = self.first_task[s]
        labels = self.modules[t].labels
        return LabelSpace((t,), labels, (torch.arange(len(labels), device=self.num_labels_S.device),))

    def of_task(self, t: int) -> LabelSpace:
        return self[int(self.space_of_task_T[t])]

    def probabilities(self, prob_BT: Tensor) -> Tensor:
        """[B, S] sums of [B, T] task probabilities within the spaces."""
        if len(self) == prob_BT.shape[1]:
            return prob_BT
        return prob_BT.new_zeros(len(prob_BT), len(self)).index_add(1, self.space_of_task_T, prob_BT)

    def number_labels(self) -> Tensor:
        """[K] the number of each class's label, over all spaces: equal for classes that are one label."""
        first_label = (self.num_labels_S.cumsum(0) - self.num_labels_S)[self.space_of_task_T].tolist()
        number = [torch.arange(len(module.labels)) for module in self.modules]
        for space in self.shared.values():
            for t, position_C in zip(space.members, space.position_C, strict=True):
                number[t] = position_C.cpu()
        sizes = torch.tensor([len(one) for one in number])
        first_K = torch.tensor(first_label).repeat_interleave(sizes)
        return (torch.cat(number) + first_K).to(self.num_labels_S.device)


def _make_space(
    modules: Sequence[ActiveModule], members: tuple[int, ...], device: torch.device
) -> LabelSpace:
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
