"""A real `tosca serve` in its own process, for tests that kill it or load it."""

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RunningServer:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path


@contextlib.contextmanager
def running_server(store_url: str, log: Path, **settings: object) -> Iterator[RunningServer]:
    """Serve `store_url` on loopback until the block ends, on a free port unless one is set; settings become
    TOSCA_* variables."""
    command = [Path(sys.executable).with_name("tosca"), "serve"]
    with serving_process(command, store_url, log, **settings) as server:
        yield server


@contextlib.contextmanager
def serving_process(
    command: Sequence[str | Path],
    store_url: str,
    log: Path,
    *,
    reached_at: str = "127.0.0.1",
    **settings: object,
) -> Iterator[RunningServer]:
    """The same with a command of one's own that reads its settings from the environment, and an address."""
    chosen = {"shutdown_grace_s": 0, "port": free_port(), **settings, "store": store_url}
    port = chosen["port"]
    variables = {f"TOSCA_{name.upper()}": str(value) for name, value in chosen.items()}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdout=output,
            stderr=output,
        )
    certificate = chosen.get("tls_certificate")
    url = f"{'https' if certificate else 'http'}://{reached_at}:{port}"
    verify = ssl.create_default_context(cafile=str(certificate)) if certificate else False
    try:
        _wait_until_ready(url, process, log, verify)
        yield RunningServer(url, process, log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60.0)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(
    url: str, process: "subprocess.Popen[bytes]", log: Path, verify: ssl.SSLContext | bool
) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready", timeout=5.0, verify=verify).is_success:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready within {START_TIMEOUT_S} s: {log.read_text()}")
