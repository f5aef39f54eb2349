"""A revision: the complete set of active tasks at one moment, and how the log holds it.

A file of the log is a JSON object; the last of its fields, `digest`, is the SHA-256 of the bytes before that
field. Revisions of before there was one are read without.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from model_store.errors import CorruptStore
from model_store.manifest import Sha256, TaskName

Reason = Annotated[str, Field(max_length=1000)]
_DIGEST = b',\n  "digest": "'  # a string in JSON has no line breaks, so that nothing else looks like it


class EpochRef(BaseModel):
    """The revision that began an epoch, and the digest of the epoch's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    sha256: Sha256


class _Entry(BaseModel):
    """What every file of the log says of its revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    backbone_fingerprint: Sha256
    reason: Reason
    author: str = Field(max_length=200)
    created_at: datetime


class Revision(_Entry):
    """The complete set of active tasks at one moment; immutable, numbered from 1 without gaps.

    In an epoch, what depends on all tasks together is that of the tasks which began it.
    """

    format_version: Literal[1, 2] = 1
    tasks: Mapping[TaskName, Sha256]
    epoch: EpochRef | None = None

    @property
    def parent(self) -> int | None:
        return self.number - 1 if self.number > 1 else None


class RevisionChanges(_Entry):
    """A revision as the log has it within an epoch: how its tasks differ from those that began it."""

    format_version: Literal[3] = 3
    epoch: EpochRef
    changes: Mapping[TaskName, Sha256 | None]

    @model_validator(mode="after")
    def _check_order(self) -> "RevisionChanges":
        if self.epoch.number >= self.number:
            raise ValueError(
                f"revision {self.number} cannot be in an epoch that began with {self.epoch.number}"
            )
        return self

    @classmethod
    def of(cls, revision: Revision, began: Mapping[str, str]) -> "RevisionChanges":
        assert revision.epoch is not None, "only within an epoch"
        changes: dict[str, str | None] = {
            task: sha256 for task, sha256 in revision.tasks.items() if began.get(task) != sha256
        }
        changes |= {task: None for task in began if task not in revision.tasks}
        return cls(epoch=revision.epoch, changes=changes, **_entry(revision))

    def revision(self, began: Mapping[str, str]) -> Revision:
        """Raises CorruptStore when a task is removed that did not begin the epoch."""
        for task, sha256 in self.changes.items():
            if sha256 is None and task not in began:
                raise CorruptStore(f"revision {self.number} removes {task!r}, which did not begin its epoch")
        tasks = {**began, **self.changes}
        kept = {task: sha256 for task, sha256 in sorted(tasks.items()) if sha256 is not None}
        return unchecked_revision(kept, self.epoch, **_entry(self))


def unchecked_revision(tasks: Mapping[str, str], epoch: EpochRef | None, **entry: Any) -> Revision:
    """A revision of tasks that were checked where they come from: to look at a hundred thousand of them once
    more would take longer than all else. `entry` is checked."""
    checked = _entry(_Entry(**entry))
    version = 1 if epoch is None else 2
    return Revision.model_construct(format_version=version, tasks=tasks, epoch=epoch, **checked)


def log_file(revision: Revision, began: Mapping[str, str] | None) -> bytes:
    """A revision as the log holds it: by its changes to the tasks that `began` its epoch, or whole."""
    if began is None:
        text = revision.model_dump_json(indent=2, exclude_none=True)
    else:
        text = RevisionChanges.of(revision, began).model_dump_json(indent=2)
    content = text.encode().removesuffix(b"\n}")
    return content + _DIGEST + _digest_and_end(content)


_LOG_FILE: TypeAdapter[Revision | RevisionChanges] = TypeAdapter(
    Annotated[Revision | RevisionChanges, Field(discriminator="format_version")]
)


def read_log_file(data: bytes) -> Revision | RevisionChanges:
    """Raises ValueError for what is no revision, or not the one that was written."""
    content, has_digest, rest = data.rpartition(_DIGEST)
    if has_digest:
        if rest != _digest_and_end(content):
            raise ValueError("its content does not match its own digest")
        data = content + b"\n}"
    return _LOG_FILE.validate_json(data)


def _digest_and_end(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b'"\n}'


def _entry(of: _Entry) -> dict[str, Any]:
    return {name: getattr(of, name) for name in _Entry.model_fields}
