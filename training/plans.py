"""What is to be trained: one task, or many from a folder or a file.

A folder names its tasks by its contents: every sub-folder, `.csv`, `.parquet` and `.tar` in it is a task. A
`.toml` file can say more, task by task; what it leaves out is as the command line says:

    [tasks.birds]
    data = "pictures/birds"     # from the file's folder
    label_space = "animals"
    abstain_level = 0.05
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.errors import InvalidDataset
from model_store.luca import Flow
from model_store.manifest import ModuleManifest
from training.recipes import BY_NAME, RecipeName
from training.sources import FILE_SUFFIXES, SourceName, locate

MAX_SEED = 2**53  # exact in JSON, and torch's generators take a thousand times as much


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """Everything that decides a module file, but for the backbone."""

    task: str
    data: SourceName
    recipe: RecipeName = "default"
    flow: Flow = "tosca"
    seed: int = 0
    label_space: str | None = None
    abstain_level: float | None = None
    min_images: int = 2

    def is_made_by(self, manifest: ModuleManifest, fingerprint: str, data_sha256: str) -> bool:
        """Whether a module file is what training by this plan would give again."""
        wanted = {**asdict(BY_NAME[self.recipe]), "seed": self.seed}
        return (
            manifest.task == self.task
            and manifest.backbone_fingerprint == fingerprint
            and manifest.provenance.get("data_sha256") == data_sha256
            and (manifest.flow, manifest.label_space, manifest.abstain_level)
            == (self.flow, self.label_space, self.abstain_level)
            and all(manifest.training.get(name) == value for name, value in wanted.items())
        )


class _Entry(BaseModel):
    """One task of a .toml file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(min_length=1)
    recipe: RecipeName | None = None
    flow: Flow | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    label_space: str | None = None
    abstain_level: float | None = Field(None, ge=0.0, le=1.0)
    min_images: int | None = Field(None, ge=1)


class _Plans(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: Mapping[str, _Entry] = Field(min_length=1)


def read_plans(path: Path, like: TaskPlan) -> list[TaskPlan]:
    """The tasks of a folder or a .toml file, sorted by name. Raises InvalidDataset.

    `like` gives what a task does not say of itself.
    """
    if path.is_dir():
        return _plans_of_folder(path, like)
    if path.suffix.lower() != ".toml":
        raise InvalidDataset(f"{path}: expected a folder of tasks or a .toml file that lists them")
    try:
        listed = _Plans.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidDataset(f"{path}: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise InvalidDataset(f"{path} is no list of tasks: {_first_fault(error)}") from error
    return [
        replace(like, task=task, **_said(entry) | {"data": locate(entry.data, path.parent)})
        for task, entry in sorted(listed.tasks.items())
    ]


def _plans_of_folder(root: Path, like: TaskPlan) -> list[TaskPlan]:
    found: dict[str, Path] = {}
    for child in sorted(root.iterdir()):
        if child.name.startswith(".") or not (child.is_dir() or child.suffix.lower() in FILE_SUFFIXES):
            continue
        task = child.name if child.is_dir() else child.stem
        if task in found:
            raise InvalidDataset(f"{root}: {found[task].name} and {child.name} are both task {task!r}")
        found[task] = child
    if not found:
        raise InvalidDataset(
            f"{root} holds no tasks: expected a folder or a {', '.join(FILE_SUFFIXES)} file for each"
        )
    return [replace(like, task=task, data=data) for task, data in sorted(found.items())]


def _said(entry: _Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.model_dump().items() if value is not None}


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        return f"{'.'.join(str(one) for one in fault['loc'])}: {fault['msg']}"
    return str(error)
