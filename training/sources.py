"""Labelled pictures: an image folder or a manifest, checked before anything is computed.

Accepted sources:

- `FOLDER/CLASS/*.jpg`                      (all pictures train; the held-out figures are cross-fitted)
- `FOLDER/{train,val,test}/CLASS/*.jpg`     (`train` required; `val` and `test` optional)
- a `.csv` or `.parquet` file with columns `path` and `label`, and optionally `split`; relative paths are
  taken from the manifest's folder
"""

import csv
import unicodedata
from collections import Counter
from pathlib import Path

from model_store.decoding import IMAGE_SUFFIXES
from model_store.errors import InvalidDataset
from training.pictures import SPLITS, LabelledPicture, PictureSource, Split

SourceName = str | Path  # as `tosca train --data` takes it
FILE_SUFFIXES = (".csv", ".parquet")


def locate(name: str, folder: Path) -> SourceName:
    """A source as a file in `folder` names it."""
    return folder / name


def open_source(name: SourceName, *, min_images_per_class: int = 2, to_train: bool = True) -> PictureSource:
    """Find the pictures of a source and judge its labels. Raises InvalidDataset.

    With `to_train` off, a source may have any split and any number of classes and pictures.
    """
    path = Path(name)
    if path.is_dir():
        pictures = _scan_folder(path)
    elif path.suffix.lower() in FILE_SUFFIXES:
        pictures = _read_manifest(path)
    elif path.exists():
        raise InvalidDataset(f"{path}: expected a folder of class folders, a .csv or a .parquet manifest")
    else:
        raise InvalidDataset(f"{path} does not exist")
    if not pictures:
        raise InvalidDataset(
            f"{path} holds no pictures: expected CLASS/*.jpg or {{train,val,test}}/CLASS/*.jpg "
            f"with suffixes {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    ordered = tuple(sorted(pictures, key=lambda one: (SPLITS.index(one.split), one.label, str(one.path))))
    labels = tuple(sorted({one.label for one in ordered}))
    _check_spelling(path, labels)
    if to_train:
        _check_counts(path, ordered, labels, min_images_per_class)
    return PictureSource(path.stem if path.is_file() else path.resolve().name, ordered, labels)


def _scan_folder(root: Path) -> list[LabelledPicture]:
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if any(folder.name in SPLITS for folder in folders):
        strangers = [folder.name for folder in folders if folder.name not in SPLITS]
        if strangers:
            raise InvalidDataset(f"{root} mixes split folders with others: {', '.join(strangers[:5])}")
        splits: list[tuple[Split, Path]] = [
            (split, root / split) for split in SPLITS if (root / split).is_dir()
        ]
    else:
        splits = [("train", root)]
    pictures = []
    for split, folder in splits:
        for class_folder in sorted(child for child in folder.iterdir() if child.is_dir()):
            if class_folder.name.startswith("."):
                continue
            found = [
                LabelledPicture(file, class_folder.name, split)
                for file in sorted(class_folder.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            ]
            if not found and split == "train":
                raise InvalidDataset(f"class folder {class_folder} holds no pictures")
            pictures += found
    return pictures


def _read_manifest(path: Path) -> list[LabelledPicture]:
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    pictures = []
    for number, row in enumerate(rows, start=1):
        picture_path, label, split = row.get("path"), row.get("label"), row.get("split") or "train"
        if not picture_path or label is None or not str(label).strip():
            raise InvalidDataset(f"{path}: row {number} needs a path and a label")
        if split not in SPLITS:
            raise InvalidDataset(f"{path}: row {number} has split {split!r}, expected {', '.join(SPLITS)}")
        pictures.append(LabelledPicture(path.parent / str(picture_path), str(label), split))
    return pictures


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or [])
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDataset(f"{path} is no readable CSV file: {error}") from error


def _read_parquet(path: Path) -> list[dict[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidDataset(f"{path} is no readable Parquet file: {error}") from error
    _check_columns(path, table.column_names)
    wanted = [name for name in ("path", "label", "split") if name in table.column_names]
    rows: list[dict[str, str]] = table.select(wanted).to_pylist()
    return rows


def _check_columns(path: Path, columns: list[str] | tuple[str, ...] | object) -> None:
    names = list(columns) if isinstance(columns, list | tuple) else []
    missing = [name for name in ("path", "label") if name not in names]
    if missing:
        raise InvalidDataset(f"{path}: column {missing[0]!r} is missing; it has {', '.join(names) or 'none'}")


def _check_spelling(path: Path, labels: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        folded = unicodedata.normalize("NFKC", label).strip().casefold()
        if folded in seen:
            raise InvalidDataset(
                f"{path}: class names {seen[folded]!r} and {label!r} are the same but for spelling"
            )
        seen[folded] = label


def _check_counts(
    path: Path, pictures: tuple[LabelledPicture, ...], labels: tuple[str, ...], min_images_per_class: int
) -> None:
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
