"""Parquet files of labelled pictures: by path as a CSV manifest, or with the encoded pictures inside.

The column `image` holds pictures as bytes, or as Hugging Face's `datasets` writes them; class numbers are
then given the names in the file's metadata. Beside it stand `label` and optionally `split`.
"""

import json
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from model_store.errors import InvalidDataset, InvalidImage
from training.manifests import check_columns, picture_of_row
from training.pictures import LabelledPicture, in_order

_BATCH_ROWS = 64  # pictures read at a time
_BATCHES_KEPT = 8  # more rows than readers can lie apart: `features` hashes and decodes in windows


def read_parquet(path: Path) -> list[LabelledPicture]:
    """Pictures by split, label and path; those inside the file in its order. Raises InvalidDataset."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            images = ParquetImages(path) if "image" in schema.names else None
            check_columns(path, schema.names, "path" if images is None else "image")
            _check_image_type(path, schema)
            columns = ("path", "label", "split") if images is None else ("label", "split")
            wanted = [name for name in columns if name in schema.names]
            names = _class_names(schema)
            pictures: list[LabelledPicture] = []
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number = len(pictures) + 1
                    if names is not None:
                        row["label"] = names.get(row["label"])
                    place = None if images is None else ParquetCell(images, number)
                    pictures.append(picture_of_row(path, number, row, place))
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidDataset(f"{path} is no readable Parquet file: {error}") from error
    return pictures if images is not None else in_order(pictures)


class ParquetImages:
    """The column `image` of a file, read forward a few rows at a time, whatever its row groups are.

    Safe for several threads that ask for rows in nearly ascending order, which costs one reading of the
    file; going far back begins anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._kept: deque[tuple[int, Any]] = deque(maxlen=_BATCHES_KEPT)  # (first row, column)
        self._next_row = -1  # not begun

    def read(self, row: int) -> bytes | None:
        """The bytes in a row, counted from 0; None where there are none. Raises InvalidImage."""
        try:
            with self._lock:
                return _bytes_of(self._find(row))
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            raise InvalidImage(f"cannot be read from the file: {error}") from error

    def _find(self, row: int) -> Any:
        while True:
            for first, column in self._kept:
                if first <= row < first + len(column):
                    return column[row - first].as_py()
            if not 0 <= self._next_row <= row:
                self._begin()
            batch = next(self._batches)
            self._kept.append((self._next_row, batch.column(0)))
            self._next_row += batch.num_rows

    def _begin(self) -> None:
        # Without a pre-buffer the pages that a batch lies in are in memory, not a whole row group.
        file = pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20)
        self._batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=["image"])
        self._kept.clear()
        self._next_row = 0


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """One picture inside a Parquet file; rows count from 1 as in messages about manifests."""

    images: ParquetImages = field(repr=False)
    row: int

    def read_bytes(self) -> bytes:
        data = self.images.read(self.row - 1)
        if data is None:
            raise InvalidImage("holds no picture")
        return data

    def __str__(self) -> str:
        return f"{self.images.path} row {self.row}"


def _bytes_of(cell: Any) -> bytes | None:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None


def _check_image_type(path: Path, schema: pyarrow.Schema) -> None:
    if "image" not in schema.names:
        return
    kind = schema.field("image").type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise InvalidDataset(
            f"{path}: column 'image' is {kind}; expected the bytes of encoded pictures, "
            "or a column 'path' in its place"
        )


def _class_names(schema: pyarrow.Schema) -> dict[Any, str] | None:
    """Names of the class numbers in column `label`, where Hugging Face's `datasets` wrote them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"] if features["label"]["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return {i: str(name) for i, name in enumerate(names)} if isinstance(names, list) else None
