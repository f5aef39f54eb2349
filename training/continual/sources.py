"""The pictures of a stream: folders, demo tasks, alphabets."""

import re
from pathlib import Path

from model_store.decoding import IMAGE_SUFFIXES
from model_store.errors import InvalidDataset
from training.continual.streams import Alphabets, Stream, TaskEntry
from training.demo import write_demo_pictures
from training.pictures import LabelledPicture, PictureSource, Split
from training.sources import open_source

BUILTIN_TRAIN, BUILTIN_TEST = 60, 20  # pictures a class, as the development streams have


def open_stream(stream: Stream, data: Path) -> tuple[PictureSource, ...]:
    """One source a task, or the single source that a split cuts. Raises InvalidDataset.

    Demo tasks are written under DATA/.builtin on first use.
    """
    if stream.split is not None:
        sources: tuple[PictureSource, ...] = (open_source(data / stream.split.folder),)
    elif stream.alphabets is not None:
        sources = _open_alphabets(stream.alphabets, data)
    else:
        sources = tuple(_open_task(task, data) for task in stream.tasks)
    for source in sources:
        if not any(one.split == "test" for one in source.pictures):
            raise InvalidDataset(
                f"{source.name} has no test split, and a benchmark must not test on training"
            )
    return sources


def _open_task(task: TaskEntry, data: Path) -> PictureSource:
    if task.builtin is not None:
        folder = write_demo_pictures(data / ".builtin", BUILTIN_TRAIN, BUILTIN_TEST)[task.builtin]
    else:
        assert task.folder is not None, "a task entry has a folder or a builtin"
        folder = data / task.folder
    source = open_source(folder)
    return PictureSource(task.name, source.pictures, source.labels)


def _open_alphabets(alphabets: Alphabets, data: Path) -> tuple[PictureSource, ...]:
    """Sorted by name; an alphabet that several folders hold is taken from the first of them."""
    found: dict[str, Path] = {}
    for root in (data / folder for folder in alphabets.folders):
        if not root.is_dir():
            raise InvalidDataset(f"{root} is no folder of alphabets")
        for folder in _subfolders(root):
            found.setdefault(folder.name, folder)
    if len(found) < 2:
        raise InvalidDataset(f"{', '.join(alphabets.folders)}: expected at least two ALPHABET folders")
    whole = [_open_alphabet(found[name], alphabets.train_per_class) for name in sorted(found)]
    if alphabets.classes_per_task is None:
        return tuple(whole)
    return tuple(part for source in whole for part in _cut(source, alphabets.classes_per_task))


def _open_alphabet(folder: Path, train_per_class: int) -> PictureSource:
    pictures: dict[Split, list[LabelledPicture]] = {"train": [], "test": []}
    classes = _subfolders(folder)
    for class_folder in classes:
        files = sorted(file for file in class_folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) <= train_per_class:
            raise InvalidDataset(
                f"{class_folder}: {len(files)} pictures, but {train_per_class} train and the rest tests"
            )
        for i, file in enumerate(files):
            split: Split = "train" if i < train_per_class else "test"
            pictures[split].append(LabelledPicture(file, class_folder.name, split))
    if len(classes) < 2:
        raise InvalidDataset(f"{folder}: an alphabet needs at least two class folders")
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", folder.name).strip("_")
    labels = tuple(one.name for one in classes)
    return PictureSource(name, (*pictures["train"], *pictures["test"]), labels)


def _cut(source: PictureSource, classes_per_task: int) -> list[PictureSource]:
    """Consecutive classes of a source as sources of nearly equal size."""
    num_parts = -(-len(source.labels) // classes_per_task)
    parts = []
    for i in range(num_parts):
        first, end = (len(source.labels) * edge // num_parts for edge in (i, i + 1))
        labels = source.labels[first:end]
        pictures = tuple(one for one in source.pictures if one.label in labels)
        parts.append(PictureSource(f"{source.name}-{i:02d}", pictures, labels))
    return parts


def _subfolders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
