"""A stream as its learner meets it: features of one task after another, in the order of a seed."""
# N training pictures, U test pictures, K classes of one task, D features

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model_store.errors import InvalidDataset
from training.continual.streams import Stream
from training.features import LabelledFeatures
from training.pictures import Split


@dataclass(frozen=True, slots=True)
class ContinualTask:
    """What one step brings. `train` has training rows only; its K labels are the classes `label_K`, numbers
    in order of first appearance over the whole stream. Test rows are sorted by class, as published."""

    name: str
    train: LabelledFeatures
    label_K: Tensor
    test_cls_UD: Tensor
    test_label_U: Tensor
    label_space: str | None = None  # that of a domain-incremental stream


def class_order(num: int, seed: int) -> list[int]:
    """A permutation of 0 … num−1 as PILOT draws it: numpy's legacy generator seeded with `seed`."""
    return [int(k) for k in np.random.RandomState(seed).permutation(num)]


def arrange(
    stream: Stream, features: Sequence[LabelledFeatures], seed: int, images_per_class: int | None = None
) -> tuple[ContinualTask, ...]:
    """The tasks of one run. `features` are those of the stream's sources, in their order; with
    `images_per_class` a seeded draw of that many training pictures of every class is all there is."""
    if stream.split is not None:
        (whole,) = features
        num_classes = len(whole.labels)
        order = _order(stream, num_classes, seed)
        size = stream.split.classes_per_task
        parts = [
            restrict(whole, order[start : start + size], f"{stream.name}-{i:02d}")
            for i, start in enumerate(range(0, num_classes, size))
        ]
        if len(parts) < 2:
            raise InvalidDataset(f"{whole.name}: {num_classes} classes make a single task of {size}")
    else:
        parts = [features[i] for i in _order(stream, len(features), seed)]
    numbers: dict[str, int] = {}
    shared = stream.scenario == "domain-incremental"
    tasks = tuple(_make_task(part, shared, numbers, stream.name) for part in parts)
    if images_per_class is None:
        return tasks
    generator = torch.Generator().manual_seed(seed)
    return tuple(replace(one, train=_draw(one.train, images_per_class, generator)) for one in tasks)


def renumber(tasks: Sequence[ContinualTask], first_label: int) -> tuple[ContinualTask, ...]:
    """The tasks of another stream, with labels that begin at `first_label`."""
    return tuple(
        replace(one, label_K=one.label_K + first_label, test_label_U=one.test_label_U + first_label)
        for one in tasks
    )


def restrict(features: LabelledFeatures, classes: Sequence[int], name: str) -> LabelledFeatures:
    """The rows of some classes, which are numbered anew in the order given."""
    number_K = torch.full((len(features.labels),), -1)
    number_K[list(classes)] = torch.arange(len(classes))
    rows = (number_K[features.label_N] >= 0).nonzero().squeeze(1)
    return replace(
        _take(features, rows),
        name=name,
        labels=tuple(features.labels[k] for k in classes),
        label_N=number_K[features.label_N[rows]],
    )


def _order(stream: Stream, num: int, seed: int) -> list[int]:
    return class_order(num, seed) if stream.order == "shuffled" else list(range(num))


def _draw(features: LabelledFeatures, per_class: int, generator: torch.Generator) -> LabelledFeatures:
    kept = []
    for k in range(len(features.labels)):
        rows = (features.label_N == k).nonzero().squeeze(1)
        kept.append(rows[torch.randperm(len(rows), generator=generator)[:per_class]])
    return _take(features, torch.cat(kept).sort().values)


def _make_task(
    features: LabelledFeatures, shared: bool, numbers: dict[str, int], stream_name: str
) -> ContinualTask:
    keys = [label if shared else f"{features.name}/{label}" for label in features.labels]
    label_K = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    is_test_N = torch.tensor([split == "test" for split in features.splits])
    test = _take(features, is_test_N.nonzero().squeeze(1))
    by_class = torch.argsort(test.label_N, stable=True)
    train = _take(features, (~is_test_N).nonzero().squeeze(1))
    return ContinualTask(
        name=features.name,
        train=replace(train, splits=tuple[Split, ...]("train" for _ in train.splits)),
        label_K=label_K,
        test_cls_UD=test.cls_ND[by_class],
        test_label_U=label_K[test.label_N[by_class]],
        label_space=stream_name if shared else None,
    )


def _take(features: LabelledFeatures, rows: Tensor) -> LabelledFeatures:
    return replace(
        features,
        cls_ND=features.cls_ND[rows],
        label_N=features.label_N[rows],
        splits=tuple(features.splits[i] for i in rows.tolist()),
    )
