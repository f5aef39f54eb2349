"""Containers are tested by `make test-docker` only: without TOSCA_DOCKER_TESTS=1 nothing here is collected.

The engine that answers is used; where none does and the tests run as root, one is started and ended again.
Where the base image cannot be pulled, a script that makes it may be named by TOSCA_DOCKER_BASE_SCRIPT.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose_stack import BASE_IMAGE, ROOT, Stack, run

collect_ignore_glob = [] if os.environ.get("TOSCA_DOCKER_TESTS") == "1" else ["test_*.py"]


def _answers() -> bool:
    return run("docker", "info", timeout_s=20, check=False).returncode == 0


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Docker engine that answers, with the base image in it; skips with the reason where there is none."""
    if shutil.which("docker") is None:
        pytest.skip("Docker is not installed: no `docker` command")
    daemon: subprocess.Popen[bytes] | None = None
    if not _answers():
        if shutil.which("dockerd") is None or os.geteuid() != 0:
            pytest.skip("no Docker engine answers, and none can be started: needs dockerd and root")
        log = tmp_path_factory.mktemp("engine") / "dockerd.log"
        with log.open("wb") as stream:
            daemon = subprocess.Popen(["dockerd"], stdout=stream, stderr=stream, start_new_session=True)
        for _ in range(60):
            if _answers() or daemon.poll() is not None:
                break
            time.sleep(0.5)
        if not _answers():
            daemon.terminate()
            pytest.skip(f"dockerd does not start here: {log.read_text(errors='replace')[-300:]}")
    try:
        _require_base_image()
        yield
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait(60)


def _require_base_image() -> None:
    if run("docker", "image", "inspect", BASE_IMAGE, check=False).returncode == 0:
        return
    script = Path(os.environ.get("TOSCA_DOCKER_BASE_SCRIPT", "../shared/tools/docker-base.sh"))
    if script.is_file():
        run("bash", str(script), BASE_IMAGE, timeout_s=600)
    elif run("docker", "pull", "--quiet", BASE_IMAGE, timeout_s=300, check=False).returncode:
        pytest.skip(f"{BASE_IMAGE} cannot be pulled, and TOSCA_DOCKER_BASE_SCRIPT names no script making it")


@pytest.fixture(scope="session")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The built project under a name of its own; its containers and volumes are gone afterwards."""
    pictures = tmp_path_factory.mktemp("pictures")
    pictures.chmod(0o755)
    built = Stack(pictures=pictures, port=_free_port(), proxy_port=_free_port(), prometheus_port=_free_port())
    if built.command is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    built.compose("build", "init", "service", timeout_s=1800)
    try:
        yield built
    finally:
        for number, line in enumerate(built.figures, 1):
            print(f"figure {number}: {line}")
        built.compose(
            "--profile", "s3", "--profile", "monitoring", "down", "--volumes", "--remove-orphans", check=False
        )


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


assert ROOT.joinpath("docker").is_dir(), "tests/docker lies in the repository"
