"""Threads that wait for their turn beside passes of the backbone."""

import contextlib
import os
import sys


def wait_for_turns() -> None:
    """Let this thread, on Linux, wait for its turn instead of interrupting a pass: after an interruption a
    pass finds the caches full of something else (docs/experiments.md, sections 14 and 16). Threads that it
    starts from now on do the same. Where a sandbox forbids it, passes are interrupted."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # 0: this thread
