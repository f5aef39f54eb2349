"""What a model store asks of its storage: read, write once, list. A folder or an object store.

This is the store's boundary: tests hand in another object with the same methods, which fails, stops or is
slow where they want it to.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from model_store.errors import StoreUnavailable


class Files(Protocol):
    """Objects by path, written once and never changed. Every method raises StoreUnavailable."""

    def get(self, path: str) -> bytes | None:
        """The bytes of an object; None when there is none."""

    def exists(self, path: str) -> bool:
        """Whether there is an object; its bytes are not read."""

    def put_new(self, path: str, data: bytes) -> bool:
        """Write an object unless it exists; True when this call wrote it. Whole or not at all."""

    def names(self, folder: str, after: str | None = None) -> Iterator[str]:
        """Names of the objects in a folder, those after the path `after` only."""

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""


class ObjectFiles:
    """Files through obstore: a local folder (created when absent), S3, GCS or Azure."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store, self._root = _open(url)

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
        with self._translated():
            try:
                # One whole put: multipart uploads have no put-if-absent everywhere.
                obstore.put(self._store, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            if self._root is not None:
                _sync(self._root, self._root / path)
        return True

    def names(self, folder: str, after: str | None = None) -> Iterator[str]:
        with self._translated():
            for page in obstore.list(self._store, folder, offset=after):
                for entry in page:
                    yield Path(entry["path"]).name

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
            message = str(error).splitlines()[0]
            raise StoreUnavailable(f"store {self._url} does not answer: {message}") from error


def _open(url: str) -> tuple[ObjectStore, Path | None]:
    if "://" not in url or url.startswith("file://"):
        path = Path(url.removeprefix("file://")).expanduser().resolve()
        try:
            return LocalStore(path, mkdir=True), path
        except (BaseError, OSError) as error:
            raise StoreUnavailable(f"store folder {path} cannot be opened: {error}") from error
    try:
        return from_url(url), None
    except (BaseError, ValueError) as error:
        raise StoreUnavailable(f"store {url} cannot be opened: {error}") from error


def _sync(root: Path, path: Path) -> None:
    """Make a file and the names that lead to it survive a loss of power, not only of the process."""
    for one in (path, *(folder for folder in path.parents if folder.is_relative_to(root))):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
