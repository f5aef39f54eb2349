"""Freed memory goes back to the system, which some C libraries put off for ever."""

import ctypes
import sys


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps what lies between living allocations: after building a
    bank of a thousand tasks about a tenth of its size."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries give memory back by themselves
        trim(0)
