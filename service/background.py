"""Start `tosca serve` behind the shell, wait until it is ready and print a request to try.

python -m service.background start --port 8000
python -m service.background stop
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from service.client import Client, ClientError, Readiness, Retries

FOLDER = Path(".tosca")
PID_FILE = FOLDER / "server.pid"
LOG_FILE = FOLDER / "server.log"
WAIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if arguments.action == "start":
        start(arguments.port)
    else:
        stop()


def start(port: int) -> None:
    """Start the server unless it runs, and return when it is ready."""
    url = f"http://127.0.0.1:{port}"
    process = None
    if _ready(url) is None:
        FOLDER.mkdir(exist_ok=True)
        with LOG_FILE.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603
                [Path(sys.executable).with_name("tosca"), "serve", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        PID_FILE.write_text(str(process.pid))
    deadline = time.monotonic() + WAIT_S
    while (state := _ready(url)) is None:
        if (process is not None and process.poll() is not None) or time.monotonic() > deadline:
            sys.exit(f"the server did not become ready; the end of {LOG_FILE}:\n{_tail()}")
        time.sleep(0.2)
    print(_greeting(url, state))  # noqa: T201


def stop() -> None:
    """Ask the server to drain and end, and wait for it."""
    if not PID_FILE.exists():
        return
    pid = int(PID_FILE.read_text())
    if not _serves(pid):
        PID_FILE.unlink()
        return
    try:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        PID_FILE.unlink()


def _serves(pid: int) -> bool:
    """Whether a process is a `tosca serve`: the number of one that ended may be another's by now."""
    if Path("/proc/self").exists():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        except OSError:  # gone
            return False
    else:  # not Linux
        command = ["ps", "-ww", "-o", "args=", "-p", str(pid)]
        words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    return any(Path(one).name == "tosca" and two == "serve" for one, two in pairwise(words))


def _ready(url: str) -> Readiness | None:
    with Client(url, timeout_s=2.0, retries=Retries.none()) as client:
        try:
            return client.ready()
        except ClientError:
            return None


def _greeting(url: str, state: Readiness) -> str:
    pictures = sorted(FOLDER.glob("demo/*/test/*/*"))
    example = next((one for one in pictures if one.suffix == ".jpg"), Path("picture.jpg"))
    return f"""
TOSCA Serving is ready at {url}: revision {state.revision}, {state.num_tasks} tasks, {state.backbone}
on {state.device}. The console is at {url}/, the API is described at {url}/docs, the log is {LOG_FILE},
`make stop` ends it. Try:

  curl --data-binary @{example} {url}/predict
"""


def _tail() -> str:
    return "\n".join(LOG_FILE.read_text(errors="replace").splitlines()[-20:])


if __name__ == "__main__":
    main()
