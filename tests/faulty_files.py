"""A store's storage that fails or stops where a test wants it to: the boundary is handed in, nothing is patched."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from model_store.errors import StoreUnavailable
from model_store.object_files import Files, Stamp

Moment = Literal["before", "after"]
Result = TypeVar("Result")
Hook = Callable[[int, Moment, str], None]  # number of the operation, moment, what it does


@dataclass
class WatchedFiles:
    """Files that tell `hook` before and after every operation; what the hook raises, the operation raises."""

    inner: Files
    hook: Hook
    operations: list[str] = field(default_factory=list)

    def get(self, path: str) -> bytes | None:
        return self._do(f"get {path}", lambda: self.inner.get(path))

    def exists(self, path: str) -> bool:
        return self._do(f"head {path}", lambda: self.inner.exists(path))

    def put_new(self, path: str, data: bytes) -> bool:
        return self._do(f"put {path}", lambda: self.inner.put_new(path, data))

    def put(self, path: str, data: bytes) -> None:
        self._do(f"overwrite {path}", lambda: self.inner.put(path, data))

    def delete(self, path: str) -> None:
        self._do(f"delete {path}", lambda: self.inner.delete(path))

    def stamps(self, folder: str) -> Iterator[Stamp]:
        return iter(self._do(f"list {folder}", lambda: list(self.inner.stamps(folder))))

    def names(self, folder: str, after: str | None = None) -> Iterator[str]:
        return iter(self._do(f"list {folder}", lambda: list(self.inner.names(folder, after))))

    def folders(self, folder: str) -> list[str]:
        return self._do(f"list {folder}", lambda: self.inner.folders(folder))

    def _do(self, what: str, operation: Callable[[], Result]) -> Result:
        number = len(self.operations)
        self.operations.append(what)
        self.hook(number, "before", what)
        result = operation()
        self.hook(number, "after", what)
        return result


def watch(number: int, moment: Moment, what: str) -> None:
    """A hook that lets everything pass."""


def failing_at(failing: int, when: Moment) -> Hook:
    """A hook that lets one operation fail; `after` is an operation that was done but never confirmed."""

    def hook(number: int, moment: Moment, what: str) -> None:
        if (number, moment) == (failing, when):
            raise StoreUnavailable(f"no answer to: {what}")

    return hook


@dataclass
class Outage:
    """A hook that lets every operation fail while `is_on`; `only` narrows it to some operations."""

    is_on: bool = False
    only: str = ""

    def __call__(self, number: int, moment: Moment, what: str) -> None:
        if self.is_on and moment == "before" and what.startswith(self.only):
            raise StoreUnavailable("no answer: the store is away")
