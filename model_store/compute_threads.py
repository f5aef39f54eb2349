"""How many compute threads torch starts from a thread of ours, and sharing work without them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")
_NUM_HELPERS = 4
_setting = threading.Lock()


@contextlib.contextmanager
def one_compute_thread() -> Iterator[None]:
    """Within, this thread computes by itself: sums have one order then, however many processors there are."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_compute_threads() -> None:
    """Let this thread keep the number of compute threads that it begins with.

    A thread takes it from torch's global number when it first computes, and `use_one_compute_thread` changes
    that number for a moment: whoever began just then would compute by itself for good.
    """
    with _setting:
        torch.get_num_threads()  # the first call settles it


def use_one_compute_thread() -> None:
    """Let this thread compute by itself, while all others stay as they are.

    Two threads that each start as many compute threads as there are cores wait for one another at the end of
    every small product, and on a busy machine they wait long (docs/experiments.md, section 12).
    """
    with _setting:
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        # The call also set what threads begin with that have not computed yet; only this one was meant.
        restoring = threading.Thread(target=torch.set_num_threads, args=(default,))
        restoring.start()
        restoring.join()


def side_by_side(work: Callable[[int], Result], parts: Sequence[int]) -> list[Result]:
    """`work` on every part, in order; several at once, for work that leaves the interpreter's lock alone.

    torch's own threads would spin while they wait for each other (`use_one_compute_thread`).
    """
    if len(parts) < 2:
        return [work(part) for part in parts]
    return list(_helpers().map(work, parts))


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_HELPERS, "helper", use_one_compute_thread)
