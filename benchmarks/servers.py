"""This service and its peers for the benchmarks of serving, each in processes of its own, and the load on
them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import free_port

PEERS_PYTHON = Path(".tosca/peers/bin/python")
START_TIMEOUT_S = 180.0
MAX_BATCH_SIZE = 8


@dataclass(frozen=True)
class Peer:
    """A module of benchmarks.peers and how it is run."""

    module: str
    engine: Literal["ordinary", "ours"] = "ordinary"
    has_workers: bool = False  # as many as `Served.workers`, which share its threads


OURS = "tosca"
OURS_PROCESSES = "tosca_processes"  # as many as `Served.workers`
PEERS = {  # as their users write them
    "plain_fastapi": Peer("plain_fastapi"),
    "lit_serve": Peer("lit_serve"),
    "lit_serve_workers": Peer("lit_serve", has_workers=True),
    "ray_serve": Peer("ray_serve"),
    "bento_ml": Peer("bento_ml"),
}
WITH_OUR_ENGINE = {  # the best of them, given this project's graph, streams and decoding
    "lit_serve_our_engine": Peer("lit_serve", "ours"),
    "lit_serve_workers_our_engine": Peer("lit_serve", "ours", has_workers=True),
}
WITH_WORKERS = {"bento_ml_workers": Peer("bento_ml", has_workers=True)}  # where one is too few: on a GPU
SERVERS = (OURS, *PEERS, *WITH_OUR_ENGINE)


@dataclass(frozen=True)
class Served:
    """What every server is given: a store, and for ordinary peers what tuning chose there, exported the
    ordinary way (no export: torch runs the model)."""

    store: str
    runtime: str
    export: Path | None
    threads: int
    workers: int  # where a server can have several
    max_batch_size: int = MAX_BATCH_SIZE


@contextlib.contextmanager
def running(server: str, served: Served, pictures: Path) -> Iterator[str]:
    """The URL of one server in its own process, until the block ends."""
    port = free_port()
    command, variables = _command(server, served, port)
    variables["OMP_NUM_THREADS"] = str(served.threads)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, server, process, next(pictures.iterdir()))
            if server == OURS_PROCESSES:
                _wait_for_processes(url, served.workers)
            yield url
        except AssertionError as error:
            log.seek(0)
            raise AssertionError(f"{error}: {log.read().decode(errors='replace')[-2000:]}") from error
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30.0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # some leave their workers behind
            process.wait()


def _command(server: str, served: Served, port: int) -> tuple[list[str], dict[str, str]]:
    """How a server is started, and its environment variables."""
    if server in (OURS, OURS_PROCESSES):
        tosca = str(Path(sys.executable).with_name("tosca"))
        command = [tosca, "serve", "--store", served.store, "--port", str(port)]
        if server == OURS_PROCESSES:
            command += ["--processes", str(served.workers)]
        return command, {  # its threads by default are as many as the others get
            "TOSCA_LOG_LEVEL": "warning",  # no server here writes a line for every request
            "TOSCA_CLS_CACHE_BYTES": "0",
            "TOSCA_MAX_BATCH_SIZE": str(served.max_batch_size),
        }
    peer = {**PEERS, **WITH_OUR_ENGINE, **WITH_WORKERS}[server]
    python = sys.executable if peer.module == "plain_fastapi" else str(PEERS_PYTHON)
    command = [python, "-m", f"benchmarks.peers.{peer.module}", "--store", served.store, "--port", str(port)]
    command += ["--threads", str(served.threads), "--max-batch-size", str(served.max_batch_size)]
    command += ["--engine", peer.engine]
    if peer.engine == "ordinary":
        command += ["--runtime", served.runtime]
        command += ["--export", str(served.export)] if served.export else []
    if peer.has_workers:
        command += ["--workers", str(served.workers)]
    return command, {}


def _wait_until_ready(url: str, server: str, process: "subprocess.Popen[bytes]", picture: Path) -> None:
    """Until a first picture is answered."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{server} ended"
        with contextlib.suppress(httpx.HTTPError):
            if _ask(url, picture).is_success:
                return
        time.sleep(0.2)
    raise AssertionError(f"{server} was not ready within {START_TIMEOUT_S} s")


def _wait_for_processes(url: str, num: int) -> None:
    """The first answers while the others are still starting."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if sum(one["is_live"] for one in httpx.get(f"{url}/replicas").raise_for_status().json()) == num:
            return
        time.sleep(0.2)
    raise AssertionError(f"not all of {num} processes were ready within {START_TIMEOUT_S} s")


def _ask(url: str, picture: Path) -> httpx.Response:
    headers = {"content-type": "image/jpeg"}
    return httpx.post(f"{url}/predict", content=picture.read_bytes(), headers=headers, timeout=30.0)


def answers(url: str, pictures: Path) -> list[dict[str, Any]]:
    """What a server answers to each picture of the folder, one after another, by name."""
    found = []
    for picture in sorted(pictures.iterdir()):
        (answer,) = _ask(url, picture).raise_for_status().json()["predictions"]
        found.append(answer)
    return found


def load(
    url: str,
    pictures: Path,
    seconds: float,
    *,
    clients: int = 0,
    rate: float = 0.0,
    pictures_a_request: int = 1,
) -> dict[str, float]:
    """One measurement by the load process: a closed loop of so many clients, or an open one at a rate."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), url, "--pictures", str(pictures)]
    command += ["--seconds", str(seconds), "--warm-up", str(seconds / 5)]
    command += ["--rate", str(rate)] if rate else ["--clients", str(clients)]
    command += ["--pictures-a-request", str(pictures_a_request)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds * 10 + 300)
    result: dict[str, float] = json.loads(done.stdout)
    return result
