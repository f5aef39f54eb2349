"""Stream files: which tasks are learnt one after another, in TOML.

Exactly one of

- `[[tasks]]`     each a `name` with a `folder` (relative to --data) or a `builtin` demo task
- `[split]`       one folder whose classes are cut into tasks of `classes_per_task`
- `[alphabets]`   folders of ALPHABET/CLASS/pictures without splits; every alphabet is a task
"""

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_store.errors import InvalidDataset
from model_store.manifest import TaskName

Scenario = Literal["class-incremental", "domain-incremental", "mixed"]
Order = Literal["shuffled", "fixed"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskEntry(_Table):
    name: TaskName
    folder: str | None = None
    builtin: Literal["digits", "textiles"] | None = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.folder is None) == (self.builtin is None):
            raise ValueError(f"task {self.name!r} needs either a folder or a builtin")
        return self


class Split(_Table):
    folder: str
    classes_per_task: int = Field(ge=2)


class Alphabets(_Table):
    """Of every class, the first `train_per_class` files in sorted order train and the others test. With
    `classes_per_task` an alphabet is cut into tasks of at most so many classes."""

    folders: tuple[str, ...] = Field(min_length=1)
    train_per_class: int = Field(ge=1)
    classes_per_task: int | None = Field(None, ge=2)


class Stream(_Table):
    """`order` says whether a seed shuffles the tasks (of a split: its classes) or the file's order stays.

    In a domain-incremental stream classes of one name are one class; in the others every task has its own.
    """

    name: TaskName
    description: str = ""
    scenario: Scenario
    order: Order = "shuffled"
    tasks: tuple[TaskEntry, ...] = ()
    split: Split | None = None
    alphabets: Alphabets | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        given = [bool(self.tasks), self.split is not None, self.alphabets is not None]
        if sum(given) != 1:
            raise ValueError("a stream needs exactly one of [[tasks]], [split] and [alphabets]")
        if self.tasks and len(self.tasks) < 2:
            raise ValueError("a stream needs at least two tasks")
        if len({task.name for task in self.tasks}) != len(self.tasks):
            raise ValueError("task names must be distinct")
        if self.scenario == "domain-incremental" and not self.tasks:
            raise ValueError("a domain-incremental stream needs [[tasks]] with the same classes")
        return self


def read_stream(path: Path) -> Stream:
    """Raises InvalidDataset for a file that is missing, no TOML, or no stream."""
    try:
        return Stream.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidDataset(f"stream {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "stream"
        raise InvalidDataset(f"stream {path}: {where}: {first['msg']}") from error
