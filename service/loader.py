"""The thread that changes the active set, out of the way of the passes."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from model_store.compute_threads import use_one_compute_thread


def make_loader(niceness: int) -> ThreadPoolExecutor:
    """One thread, computing by itself, that leaves processors to answers by `niceness` (0 … 19, Linux)."""

    def yield_to_answers() -> None:
        use_one_compute_thread()
        if sys.platform == "linux" and niceness > 0:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

    return ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=yield_to_answers)
