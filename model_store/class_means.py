"""The class means of all tasks, as the modules hold them: ten thousand tasks need no second copy."""
# K classes of all tasks, C classes of one task or of a few, D features

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

ALL_CLASSES = slice(None)
# Classes put together at a time: 12 MiB at D = 768.
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class ClassMeans:
    """Class means task after task, [C, D] for each, and where the classes of each task begin among all."""

    mean_of_task: tuple[Tensor, ...]
    first_class: tuple[int, ...]

    @classmethod
    def of(cls, mean_of_task: Sequence[Tensor]) -> "ClassMeans":
        """Of at least one task."""
        first_class = accumulate((len(mean_CD) for mean_CD in mean_of_task[:-1]), initial=0)
        return cls(tuple(mean_of_task), tuple(first_class))

    @property
    def feature_dim(self) -> int:
        return self.mean_of_task[0].shape[1]

    def __len__(self) -> int:
        return self.first_class[-1] + len(self.mean_of_task[-1])

    def classes(self, t: int) -> slice:
        """Where the classes of task `t` stand among all."""
        return slice(self.first_class[t], self.first_class[t] + len(self.mean_of_task[t]))

    def of_task(self, t: int) -> Tensor:
        """[C, D] float64."""
        return self.mean_of_task[t].double()

    def all(self) -> Tensor:
        """[K, D] float64."""
        return torch.cat(self.mean_of_task).double()

    def chunks(self) -> Iterator[Tensor]:
        """[C, D] of some thousand classes at a time, always cut in the same places."""
        pending: list[Tensor] = []
        num_pending = 0
        for mean_CD in self.mean_of_task:
            pending.append(mean_CD)
            num_pending += len(mean_CD)
            if num_pending >= _CHUNK:
                yield torch.cat(pending)
                pending, num_pending = [], 0
        if pending:
            yield torch.cat(pending)
