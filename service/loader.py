"""Threads that wait for the store, so that those which decode and compute need not."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from model_store.compute_threads import use_one_compute_thread

_NUM_READERS = 4


def make_loader(niceness: int) -> ThreadPoolExecutor:
    """One thread that changes the active set. It computes by itself, and leaves processors to answers by
    `niceness` (0 … 19, Linux)."""

    def yield_to_answers() -> None:
        use_one_compute_thread()
        if sys.platform == "linux" and niceness > 0:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

    return ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=yield_to_answers)


def make_readers() -> ThreadPoolExecutor:
    """Threads for questions whose modules must be read first, which is found out by trying without."""
    return ThreadPoolExecutor(_NUM_READERS, "module-reader", use_one_compute_thread)
