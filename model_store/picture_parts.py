"""Pictures without labels, by the thousand: found in folders and tables, and cut into parts of a fixed size.

Accepted sources, each name standing for its pictures in a fixed order:

- a picture file
- a folder: every picture below it, by path
- a `.csv` or `.parquet` file with a column `path`, relative to the file's folder
- a `.parquet` file with a column `image`: encoded pictures, or as Hugging Face's `datasets` writes them
"""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_store.decoding import IMAGE_SUFFIXES
from model_store.errors import InvalidDataset, InvalidImage

_ROWS_READ_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """The pictures inside a Parquet file, rows `start` to before `stop`."""

    table: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures that are answered together: files, or rows of one table."""

    number: int
    pictures: tuple[str, ...] | Rows

    @property
    def names(self) -> tuple[str, ...]:
        """What the pictures are called in results: a path, or TABLE#ROW, counted from 0."""
        if isinstance(self.pictures, Rows):
            return tuple(f"{self.pictures.table}#{i}" for i in range(self.pictures.start, self.pictures.stop))
        return self.pictures

    def read(self) -> list[bytes | InvalidImage]:
        """The encoded pictures, or why there is none, in the order of `names`."""
        if isinstance(self.pictures, Rows):
            return _read_rows(self.pictures)
        return [_read_file(path) for path in self.pictures]


def cut(sources: Sequence[Path], size: int) -> list[Part]:
    """All pictures of some sources in parts of `size`, but for the last of the files and of each table.

    Raises InvalidDataset where a source is not there, cannot be read or holds no picture.
    """
    files: list[str] = []
    tables: list[Rows] = []
    for source in sources:
        found = _find(source)
        if isinstance(found, Rows):
            tables.append(found)
        else:
            files += found
        if not found:
            raise InvalidDataset(f"{source} holds no pictures")
    pieces: list[tuple[str, ...] | Rows] = [
        tuple(files[start : start + size]) for start in range(0, len(files), size)
    ]
    pieces += [
        Rows(one.table, start, min(start + size, one.stop))
        for one in tables
        for start in range(0, one.stop, size)
    ]
    return [Part(number, pictures) for number, pictures in enumerate(pieces)]


def digest(parts: Sequence[Part]) -> str:
    """SHA-256 over what all pictures are called, part by part."""
    listing = "\n\n".join("\n".join(one.names) for one in parts)
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()


def _find(source: Path) -> list[str] | Rows:
    suffix = source.suffix.lower()
    if source.is_dir():
        return [
            str(path)
            for path in sorted(source.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        ]
    if not source.is_file():
        raise InvalidDataset(f"{source} does not exist")
    if suffix == ".csv":
        return _paths_of_csv(source)
    return _find_in_parquet(source) if suffix == ".parquet" else [str(source)]


def _paths_of_csv(source: Path) -> list[str]:
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise InvalidDataset(f"{source}: column 'path' is missing")
            return [_beside(source, number, row["path"]) for number, row in enumerate(reader, 1)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDataset(f"{source} is no readable CSV file: {error}") from error


def _find_in_parquet(source: Path) -> list[str] | Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            names = file.schema_arrow.names
            if "image" in names:
                return Rows(str(source), 0, file.metadata.num_rows)
            if "path" not in names:
                raise InvalidDataset(f"{source}: neither a column 'image' nor a column 'path'")
            paths = file.read(columns=["path"]).column("path").to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidDataset(f"{source} is no readable Parquet file: {error}") from error
    return [_beside(source, number, path) for number, path in enumerate(paths, 1)]


def _beside(source: Path, number: int, path: object) -> str:
    if not isinstance(path, str) or not path:
        raise InvalidDataset(f"{source}: row {number} has no path")
    return str(source.parent / path)


def _read_file(path: str) -> bytes | InvalidImage:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        return InvalidImage(f"cannot be opened: {error.strerror}")


def _read_rows(rows: Rows) -> list[bytes | InvalidImage]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(rows.table) as file:
        group_starts_at, groups = 0, []
        first = None
        for i in range(file.metadata.num_row_groups):
            num_rows = file.metadata.row_group(i).num_rows
            if group_starts_at < rows.stop and group_starts_at + num_rows > rows.start:
                groups.append(i)
                first = group_starts_at if first is None else first
            group_starts_at += num_rows
        cells = _cells(file, groups, first or 0)
        return [_picture(cell) for row, cell in cells if rows.start <= row < rows.stop]


def _cells(file: Any, groups: list[int], row: int) -> Iterator[tuple[int, Any]]:
    for batch in file.iter_batches(_ROWS_READ_TOGETHER, row_groups=groups, columns=["image"]):
        for cell in batch.column(0):
            yield row, cell
            row += 1


def _picture(cell: Any) -> bytes | InvalidImage:
    value = cell.as_py()
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else InvalidImage("the row holds no encoded picture")
