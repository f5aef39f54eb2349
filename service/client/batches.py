"""Many pictures in requests of several, with a bar for those who watch."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice

from service.client.calls import Picture


def in_batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Lists of `size` pictures, the last one shorter; taken only as they are needed."""
    if size < 1:
        raise ValueError(f"batch_size is {size}, at least 1 is needed")
    waiting = iter(pictures)
    while batch := list(islice(waiting, size)):
        yield batch


@contextmanager
def counting(pictures: Iterable[Picture], *, progress: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of pictures just answered, which moves a progress bar."""
    if not progress:
        yield lambda _: None
        return
    # Only here: who watches no bar needs no rich.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = len(pictures) if isinstance(pictures, Sized) else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("pictures", total=total)
        yield lambda num: bar.advance(task, num)
