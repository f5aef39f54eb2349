"""The class means of all tasks, as the modules hold them: ten thousand tasks need no second copy."""
# K classes of all tasks, C classes of one task or of a few, D features

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ALL_CLASSES = slice(None)
# Classes of a block, on average: 6 MiB of float32 at D = 768.
BLOCK_CLASSES = 2048


class Block(NamedTuple):
    """Some tasks that follow one another: the digests of their modules, and where they stand."""

    sha256s: tuple[str, ...]
    tasks: slice


@dataclass(frozen=True, slots=True)
class ClassMeans:
    """Class means task after task, [C, D] for each, and where the classes of each task begin among all.

    What is computed for all classes is computed in blocks of tasks. Where a block ends depends on the tasks
    themselves and not on how many come before, so that a further task changes one block, and equal sets have
    equal blocks.
    """

    mean_of_task: tuple[Tensor, ...]
    first_class: tuple[int, ...]
    sha256_of_task: tuple[str, ...]

    @classmethod
    def of(cls, mean_of_task: Sequence[Tensor], sha256_of_task: Sequence[str]) -> "ClassMeans":
        """Of at least one task, with the digests of their modules."""
        first_class = accumulate((len(mean_CD) for mean_CD in mean_of_task[:-1]), initial=0)
        return cls(tuple(mean_of_task), tuple(first_class), tuple(sha256_of_task))

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

    def blocks(self) -> list[Block]:
        """All tasks in blocks: a task begins one with the chance of its classes in BLOCK_CLASSES."""
        starts = [
            t
            for t, (sha256, mean_CD) in enumerate(zip(self.sha256_of_task, self.mean_of_task, strict=True))
            if t == 0 or int(sha256[:8], 16) % BLOCK_CLASSES < len(mean_CD)
        ]
        stops = [*starts[1:], len(self.mean_of_task)]
        return [
            Block(self.sha256_of_task[start:stop], slice(start, stop))
            for start, stop in zip(starts, stops, strict=True)
        ]

    def of_block(self, block: Block) -> Tensor:
        """[C, D] float32."""
        return torch.cat(self.mean_of_task[block.tasks])
