"""Tables of labelled pictures by path: the columns `path` and `label`, and optionally `split`.

An empty split means train. Relative paths are taken from the manifest's folder.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_store.errors import InvalidDataset
from training.pictures import SPLITS, LabelledPicture, PicturePath, in_order


def read_csv(path: Path) -> list[LabelledPicture]:
    """Pictures by split, label and path. Raises InvalidDataset, which names the row below the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            check_columns(path, list(reader.fieldnames or []), "path")
            return in_order([picture_of_row(path, number, row) for number, row in enumerate(reader, 1)])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDataset(f"{path} is no readable CSV file: {error}") from error
    except OSError as error:
        raise InvalidDataset(f"{path}: {error.strerror}") from error


def check_columns(path: Path, names: list[str], picture: str) -> None:
    """Raise InvalidDataset unless a table has a label and the column that says what the picture is."""
    missing = [name for name in (picture, "label") if name not in names]
    if missing:
        raise InvalidDataset(f"{path}: column {missing[0]!r} is missing; it has {', '.join(names) or 'none'}")


def picture_of_row(
    path: Path, number: int, row: Mapping[str, Any], place: PicturePath | None = None
) -> LabelledPicture:
    """The picture of a row, counted from 1, at `place` or where its path says. Raises InvalidDataset."""
    label, split = row.get("label"), row.get("split") or "train"
    if place is None and row.get("path"):
        place = path.parent / str(row["path"])
    if place is None or label is None or not str(label).strip():
        missing = "a path and a label" if "path" in row else "a label"
        raise InvalidDataset(f"{path}: row {number} needs {missing}")
    if split not in SPLITS:
        raise InvalidDataset(f"{path}: row {number} has split {split!r}, expected {', '.join(SPLITS)}")
    return LabelledPicture(place, str(label), split)
