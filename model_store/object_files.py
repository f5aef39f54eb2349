"""What a model store asks of its storage: read, write once, list. A folder or an object store.

Only the records of replicas (`model_store.replicas`) are overwritten and removed.

This is the store's boundary: tests hand in another object with the same methods, which fails, stops or is
slow where they want it to.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from model_store.errors import StoreUnavailable


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the storage itself says about an object: when it was written, by the storage's clock; `version`
    changes whenever it is written."""

    name: str
    modified_at: datetime
    version: str


class Files(Protocol):
    """Objects by path. Every method raises StoreUnavailable."""

    def get(self, path: str) -> bytes | None:
        """The bytes of an object; None when there is none."""

    def exists(self, path: str) -> bool:
        """Whether there is an object; its bytes are not read."""

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object unless it exists; True when this call wrote it. Whole or not at all, and when this
        returns it survives a loss of power, whoever wrote it."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object over whatever is there. Whole or not at all; a loss of power may undo it."""

    def delete(self, path: str) -> None:
        """Remove an object if it is there."""

    def names(self, folder: str, after: str | None = None) -> Iterator[str]:
        """Names of the objects in a folder, those after the path `after` only."""

    def stamps(self, folder: str) -> Iterator[Stamp]:
        """What is known of the objects in a folder without reading them."""

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""


class ObjectFiles:
    """Files through obstore: a local folder (created when first written to), S3, GCS or Azure."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._root = folder_of(url)
        self._opened: ObjectStore | None = None
        with self._translated():
            is_there = self._root is None or self._root.exists()
        if is_there:
            self._begin()

    @property
    def _store(self) -> ObjectStore:
        """The storage, or an empty one in place of a folder that is not there."""
        if self._opened is None and self._root is not None and self._root.exists():
            self._begin()
        return self._opened or MemoryStore()

    def _begin(self) -> None:
        """Create the folder of a store that is to be written to."""
        self._opened = self._opened or _open(self._url, self._root)

    def get(self, path: str) -> bytes | None:
        with self._translated():
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        with self._translated():
            try:
                obstore.head(self._store, path)
            except FileNotFoundError:
                return False
        return True

    def put_new(self, path: str, data: bytes) -> bool:
        self._begin()
        with self._translated():
            try:
                # One whole put: multipart uploads have no put-if-absent everywhere.
                obstore.put(self._store, path, data, mode="create", use_multipart=False)
                is_new = True
            except AlreadyExistsError:
                is_new = False  # but perhaps not flushed: its writer may have been killed before that
            if self._root is not None:
                _sync(self._root, self._root / path)
        return is_new

    def put(self, path: str, data: bytes) -> None:
        self._begin()
        with self._translated():
            obstore.put(self._store, path, data, use_multipart=False)

    def delete(self, path: str) -> None:
        with self._translated(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def names(self, folder: str, after: str | None = None) -> Iterator[str]:
        with self._translated():
            for page in obstore.list(self._store, folder, offset=after):
                for entry in page:
                    yield Path(entry["path"]).name

    def stamps(self, folder: str) -> Iterator[Stamp]:
        with self._translated():
            for page in obstore.list(self._store, folder):
                for entry in page:
                    modified_at = entry["last_modified"]
                    yield Stamp(
                        Path(entry["path"]).name, modified_at, entry["e_tag"] or modified_at.isoformat()
                    )

    def folders(self, folder: str) -> list[str]:
        with self._translated():
            found = obstore.list_with_delimiter(self._store, folder)["common_prefixes"]
        return [Path(one).name for one in found]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Name every fault of the storage StoreUnavailable; a missing bucket is one, too."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"store {self._url} does not answer: {_first_line(error)}") from error


def folder_of(url: str) -> Path | None:
    """The folder that a URL or path names; None for an object store."""
    if "://" not in url or url.startswith("file://"):
        return Path(url.removeprefix("file://")).expanduser().resolve()
    return None


def _open(url: str, root: Path | None) -> ObjectStore:
    if root is not None:
        try:
            return LocalStore(root, mkdir=True)
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"store folder {root} cannot be opened: {_first_line(error)}") from error
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise StoreUnavailable(f"store {url} cannot be opened: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What obstore says to people; a dump for its authors may follow."""
    return str(error).partition("\n")[0]


def _sync(root: Path, path: Path) -> None:
    """Make a file and the names that lead to it survive a loss of power, not only of the process."""
    for one in (path, *(folder for folder in path.parents if folder.is_relative_to(root))):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
