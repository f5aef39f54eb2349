"""The calls of the API as values: what is sent, and what the answer means. Both clients carry them out."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

from service.client.results import Change, Prediction, Readiness, Replica, Revision, Task, Tasks

Result = TypeVar("Result")


class Saves(Protocol):
    """A picture of Pillow, which this package does not import."""

    def save(self, fp: io.BytesIO, format: str) -> object: ...  # noqa: A002 - Pillow's name


Wait: TypeAlias = Literal["this", "all"]  # for the replica that is asked, or for all of them
Picture: TypeAlias = "bytes | str | os.PathLike[str] | Saves"  # a str is a path


@dataclass(frozen=True, slots=True)
class Wishes:
    """How pictures are to be answered; None leaves it to the server."""

    task: str | None = None
    top_k: int | None = None
    selection: str | None = None
    coverage: float | None = None


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """One request, and what to make of the JSON that answers it.

    `is_repeatable`: doing it twice does no more than doing it once, so that it may be sent again after a
    fault that leaves open whether it was done. `revision_of`: which revision a result is of, 0 for none.
    """

    method: str
    path: str
    parse: Callable[[Any], Result]
    query: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True
    revision_of: Callable[[Result], int] | None = None


def read_picture(picture: Picture) -> bytes:
    """The encoded bytes of a picture; one of Pillow becomes a PNG, which loses nothing."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def predict(pictures: Sequence[bytes], wishes: Wishes) -> Call[list[Prediction]]:
    query = {name: value for name, value in asdict(wishes).items() if value is not None}
    files = [("image", (str(i), one)) for i, one in enumerate(pictures)]
    return Call("POST", "/predict", _predictions, query, files=files, revision_of=_newest_receipt)


def _predictions(data: Any) -> list[Prediction]:
    return [Prediction.of(one) for one in data["predictions"]]


def _newest_receipt(predictions: list[Prediction]) -> int:
    return max((one.receipt.revision for one in predictions), default=0)


def ready() -> Call[Readiness]:
    return Call("GET", "/health/ready", Readiness.of, revision_of=lambda ready: ready.revision)


def tasks() -> Call[Tasks]:
    return Call("GET", "/tasks", Tasks.of, revision_of=lambda tasks: tasks.revision)


def task(name: str) -> Call[Task]:
    return Call("GET", f"/tasks/{quote(name, safe='')}", Task.of)


def replicas() -> Call[list[Replica]]:
    return Call("GET", "/replicas", lambda data: [Replica.of(one) for one in data])


def add_task(
    module: bytes | str | os.PathLike[str],
    *,
    dry_run: bool,
    force: bool,
    reason: str,
    signature: str | None,
    wait: Wait | None,
) -> Call[Change]:
    return Call(
        "POST",
        "/tasks",
        Change.of,
        {"dry_run": dry_run, "force": force, "reason": reason} | _waiting(wait),
        content=module if isinstance(module, bytes) else Path(module).read_bytes(),
        headers={"content-type": "application/octet-stream"}
        | ({"x-module-signature": signature} if signature is not None else {}),
        revision_of=_changed_to,
    )


def remove_task(name: str, reason: str, wait: Wait | None) -> Call[Change]:
    return _change("DELETE", f"/tasks/{quote(name, safe='')}", reason, wait)


def revisions(limit: int) -> Call[list[Revision]]:
    return Call("GET", "/revisions", lambda data: [Revision.of(one) for one in data], {"limit": limit})


def rollback(number: int, reason: str, wait: Wait | None) -> Call[Change]:
    return _change("POST", f"/revisions/{number}/rollback", reason, wait)


def _change(method: str, path: str, reason: str, wait: Wait | None) -> Call[Change]:
    query = {"reason": reason} | _waiting(wait)
    return Call(method, path, Change.of, query, is_repeatable=False, revision_of=_changed_to)


def _waiting(wait: Wait | None) -> dict[str, str]:
    """The server knows best whom to wait for, unless the caller does."""
    return {} if wait is None else {"wait": wait}


def _changed_to(change: Change) -> int:
    return change.revision
