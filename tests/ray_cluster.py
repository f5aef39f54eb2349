"""A small Ray cluster of its own, and the processes in it, for tests and benchmarks that kill some of them.

Its processes are found and ended by the folder that it alone has, whatever they are called: in their command
line, or among the files they have open, for some of them write over both and their environment.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving import free_port

_END_TIMEOUT_S = 20.0
_DEPLOY_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class RayCluster:
    """`address` for `--address`; `environment` for whatever talks to it."""

    address: str
    environment: Mapping[str, str]
    log: Path
    metrics_url: str

    def tosca(self, *arguments: str, **variables: str) -> str:
        """What a `tosca` command prints that has to succeed."""
        command = [str(Path(sys.executable).with_name("tosca")), *arguments]
        done = subprocess.run(
            command,
            env={**self.environment, "RAY_ADDRESS": self.address, **variables},
            capture_output=True,
            text=True,
            timeout=_DEPLOY_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def replicas(self) -> list[int]:
        """Process ids of the replicas that live."""
        found = processes_of(self.environment["RAY_TMPDIR"])
        return sorted(pid for pid, name in found if "ServeReplica:tosca" in name)


@contextlib.contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """Variables for Ray processes that share nothing with others on this machine; they end with the block."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it, and their paths are bounded
    try:
        yield {
            **os.environ,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
    finally:
        end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(
    num_cpus: int = 2, object_store_bytes: int = 100 * 2**20, dashboard_port: int | None = None
) -> Iterator[RayCluster]:
    """A cluster of one node on loopback; all its processes end with the block.

    `serve deploy` talks to the dashboard, which takes seconds and memory and is left out without a port.
    """
    with ray_environment() as environment:
        port = free_port()
        log = Path(environment["RAY_TMPDIR"]) / "head.log"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
        metrics_port = free_port()
        options = {
            "metrics-export-port": metrics_port,
            "node-ip-address": "127.0.0.1",
            "port": port,
            "num-cpus": num_cpus,
            "object-store-memory": object_store_bytes,
            "include-dashboard": "false" if dashboard_port is None else "true",
            "temp-dir": environment["RAY_TMPDIR"],
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
        }
        if dashboard_port is not None:
            options["dashboard-port"] = dashboard_port
        command += [f"--{name}={value}" for name, value in options.items()]
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            _wait_for(log, process)
            metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
            yield RayCluster(f"127.0.0.1:{port}", environment, log, metrics_url)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
            process.kill()
            process.wait()


def processes_of(folder: str) -> Iterator[tuple[int, str]]:
    """(process id, command line) of every living process that uses a folder (Linux)."""
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if folder in command or any(str(one.readlink()).startswith(folder) for one in _open_files(place)):
                yield int(place.name), command


def _open_files(place: Path) -> Iterator[Path]:
    yield place / "cwd"
    yield from (place / "fd").iterdir()


def end_processes_of(folder: str) -> None:
    """End what is left of a cluster, and wait until nothing is."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while left := [pid for pid, _ in processes_of(folder) if pid != os.getpid()]:
        assert time.monotonic() < deadline, f"processes that do not end: {left}"
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _wait_for(log: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 90.0
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
