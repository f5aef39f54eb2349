"""The published class-incremental protocol: benchmarks, increments and class orders.

As in PILOT (Sun, Zhou, Zhan, Ye, arXiv 2309.07117): classes numbered in sorted order of their folders, then
permuted by numpy's legacy generator; every increment has the same number of classes, the first included.
"""

from dataclasses import dataclass

from training.continual.streams import Order, Split, Stream

ARCHITECTURE = "vit_base_patch16_224.augreg_in21k"
SEEDS = (1993, 1994, 1995, 1996, 1997)


@dataclass(frozen=True, slots=True)
class PaperDataset:
    num_classes: int
    increment: int


DATASETS = {
    "cifar100": PaperDataset(100, 5),
    "cub200": PaperDataset(200, 10),
    "imagenet-r": PaperDataset(200, 20),
    "imagenet-a": PaperDataset(200, 20),
    "omnibenchmark": PaperDataset(300, 30),
    "vtab": PaperDataset(50, 10),
}


def paper_stream(dataset: str, increment: int | None = None, order: Order = "shuffled") -> Stream:
    """The stream over DATA/{train,test}/CLASS; `increment` replaces the published one."""
    size = increment or DATASETS[dataset].increment
    return Stream(
        name=f"{dataset}-inc{size}",
        description=f"published protocol, {ARCHITECTURE}",
        scenario="class-incremental",
        order=order,
        split=Split(folder=".", classes_per_task=size),
    )
