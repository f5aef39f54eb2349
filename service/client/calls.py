"""The calls of the API as values: what is sent, and what the answer means. Both clients carry them out."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

from service.client.results import Change, Prediction, Readiness, Revision, Task, Tasks

Result = TypeVar("Result")


class Saves(Protocol):
    """A picture of Pillow, which this package does not import."""

    def save(self, fp: io.BytesIO, format: str) -> object: ...  # noqa: A002 - Pillow's name


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
    fault that leaves open whether it was done.
    """

    method: str
    path: str
    parse: Callable[[Any], Result]
    query: Mapping[str, Any] = field(default_factory=dict)
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True


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
    return Call("POST", "/predict", _predictions, query, files=files)


def _predictions(data: Any) -> list[Prediction]:
    return [Prediction.of(one) for one in data["predictions"]]


def ready() -> Call[Readiness]:
    return Call("GET", "/health/ready", Readiness.of)


def tasks() -> Call[Tasks]:
    return Call("GET", "/tasks", Tasks.of)


def task(name: str) -> Call[Task]:
    return Call("GET", f"/tasks/{quote(name, safe='')}", Task.of)


def add_task(
    module: bytes | str | os.PathLike[str], *, dry_run: bool, force: bool, reason: str, signature: str | None
) -> Call[Change]:
    return Call(
        "POST",
        "/tasks",
        Change.of,
        {"dry_run": dry_run, "force": force, "reason": reason},
        content=module if isinstance(module, bytes) else Path(module).read_bytes(),
        headers={"content-type": "application/octet-stream"}
        | ({"x-module-signature": signature} if signature is not None else {}),
    )


def remove_task(name: str, reason: str) -> Call[Change]:
    path = f"/tasks/{quote(name, safe='')}"
    return Call("DELETE", path, Change.of, {"reason": reason}, is_repeatable=False)


def revisions(limit: int) -> Call[list[Revision]]:
    return Call("GET", "/revisions", lambda data: [Revision.of(one) for one in data], {"limit": limit})


def rollback(number: int, reason: str) -> Call[Change]:
    return Call("POST", f"/revisions/{number}/rollback", Change.of, {"reason": reason}, is_repeatable=False)
