"""Labelled pictures as every source gives them, whatever they lie in."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from model_store.errors import InvalidDataset

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class PicturePath(Protocol):
    """Where the bytes of a picture lie: a file, or a place inside one. As text it names the place."""

    def read_bytes(self) -> bytes:
        """The encoded picture, read anew each time. Raises OSError or InvalidImage."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    path: PicturePath
    label: str
    split: Split


def in_order(pictures: list[LabelledPicture]) -> list[LabelledPicture]:
    """By split, label and path, whatever order they were found in."""
    return sorted(pictures, key=lambda one: (SPLITS.index(one.split), one.label, str(one.path)))


@dataclass(frozen=True, slots=True)
class PictureSource:
    """Pictures in a fixed order and the labels in sorted order.

    Files come by split, label and path; pictures inside larger files as they lie there, so that reading
    them all in order reads every file once.
    """

    name: str
    pictures: tuple[LabelledPicture, ...]
    labels: tuple[str, ...]


def check_counts(
    path: Path | str, pictures: Sequence[LabelledPicture], labels: tuple[str, ...], min_images_per_class: int
) -> None:
    """Raises InvalidDataset unless there are two classes and so many training pictures of each."""
    counts = Counter(one.label for one in pictures if one.split == "train")
    if not counts:
        raise InvalidDataset(f"{path} has no training pictures")
    if len(labels) < 2:
        raise InvalidDataset(f"{path} has a single class {labels[0]!r}: a classification task needs two")
    for label in labels:
        if counts[label] < min_images_per_class:
            raise InvalidDataset(
                f"{path}: class {label!r} has {counts[label]} training picture(s), at least "
                f"{min_images_per_class} are needed"
            )
