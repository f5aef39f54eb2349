"""Where finished module files go: a folder, or a model store that serves them."""

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol

from model_store.errors import InvalidModule, ToscaError
from model_store.manifest import ModuleManifest
from model_store.module_file import read_module
from model_store.publishing import Publisher
from model_store.store import ModelStore


class Destination(Protocol):
    def manifest(self, task: str) -> ModuleManifest | None:
        """What is there of a task; None when nothing is, or nothing whole."""

    def keep(self, task: str, data: bytes) -> dict[str, Any]:
        """Put a module file there and say where it is."""


class FolderDestination:
    """FOLDER/TASK.safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(self, task: str) -> ModuleManifest | None:
        try:
            return read_module(self._path(task).read_bytes()).manifest
        except (OSError, InvalidModule):
            return None

    def keep(self, task: str, data: bytes) -> dict[str, Any]:
        return {"output": str(write_file(self._path(task), data))}

    def _path(self, task: str) -> Path:
        return self._folder / f"{task}.safetensors"


class StoreDestination:
    """The active tasks of a store: keeping is publishing, with all its checks."""

    def __init__(self, store: ModelStore, *, force: bool) -> None:
        self._publisher = Publisher(store)
        self._force = force

    def manifest(self, task: str) -> ModuleManifest | None:
        file = self._publisher.active.files.get(task)
        return None if file is None else file.manifest

    def keep(self, task: str, data: bytes) -> dict[str, Any]:
        """Nothing is published where the very file is active already. Raises HarmsOtherTasks and whatever
        else publishing refuses."""
        outcome = self._publisher.register(data, force=self._force, reason=f"train {task}")
        return {"revision": outcome.active.revision.number, "published": outcome.published}


def write_file(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all. Raises ToscaError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ToscaError(f"{path} cannot be written: {error.strerror}") from error
    return path
