"""Register a module once for every store operation, each time in a process that kills itself there.

python tests/stopping_writer.py STORE MODULE FOLDER NUM_OPERATIONS

FOLDER gets one copy of the store for each (operation, moment), as the killed process left it. The children
are forked before anything has touched the storage library, whose threads do not survive a fork.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from faulty_files import Moment, WatchedFiles

from model_store.object_files import ObjectFiles
from model_store.publishing import Publisher
from model_store.store import ModelStore


def main(store: Path, module: Path, folder: Path, num_operations: int) -> None:
    data = module.read_bytes()
    for stop_at in range(num_operations):
        for when in ("before", "after"):
            copy = folder / f"{stop_at}-{when}"
            shutil.copytree(store, copy, copy_function=os.link)
            child = os.fork()
            if child == 0:
                register_until(copy, data, stop_at, when)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                sys.exit(f"operation {stop_at} ({when}) was not reached: {status}")


def register_until(store: Path, data: bytes, stop_at: int, when: Moment) -> None:
    def kill(number: int, moment: Moment, _: str) -> None:
        if (number, moment) == (stop_at, when):
            os.kill(os.getpid(), signal.SIGKILL)

    files = WatchedFiles(ObjectFiles(str(store)), kill)
    Publisher(ModelStore(store, files=files)).register(data, force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
