"""The compose project under test: its commands, its HTTP answers, its figures."""

import http.client
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = "python:3.11-slim-bookworm"
SERVICE_IMAGE = "tosca-serving:local"
TRAINER_IMAGE = "tosca-trainer:local"
PROMETHEUS_IMAGE = "tosca-test-prometheus:local"


def run(
    *command: str, timeout_s: float = 120, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command at the repository's root; its output is in the error when it fails."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(
            f"{' '.join(command)}: exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
    return result


def compose_command() -> list[str] | None:
    """`docker compose` with the file at the root, or an old docker-compose with the file it can read."""
    if run("docker", "compose", "version", check=False).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose", "-f", "docker/compose.yaml"]
    return None


def builder_env() -> dict[str, str]:
    """An engine without the build component still has the classic builder."""
    return {"DOCKER_BUILDKIT": "0"} if run("docker", "buildx", "version", check=False).returncode else {}


@dataclass
class Stack:
    pictures: Path
    port: int
    proxy_port: int
    prometheus_port: int
    project: str = "tosca-test"
    command: list[str] | None = field(default_factory=compose_command)
    figures: list[str] = field(default_factory=list)

    def compose(self, *arguments: str, timeout_s: float = 300, check: bool = True) -> str:
        assert self.command is not None, "the fixture skips without Compose"
        env = {"TOSCA_PORT": str(self.port), "TOSCA_PROXY_PORT": str(self.proxy_port)}
        env |= {
            "TOSCA_PROMETHEUS_PORT": str(self.prometheus_port),
            "TOSCA_PROMETHEUS_IMAGE": PROMETHEUS_IMAGE,
        }
        env |= {"TOSCA_PICTURES": str(self.pictures), "TOSCA_BIND": "127.0.0.1"}
        env |= builder_env()
        command = [*self.command, "-p", self.project, *arguments]
        return run(*command, timeout_s=timeout_s, check=check, **env).stdout

    def note(self, text: str) -> None:
        """Keep a figure for the transcript."""
        self.figures.append(text)
        print(text)

    def container(self, service: str = "service") -> str:
        (name,) = self.compose("ps", "-q", service).split()
        return name

    def inspect(self, template: str, service: str = "service") -> str:
        return run("docker", "inspect", "--format", template, self.container(service)).stdout.strip()

    def request(
        self, method: str, path: str, body: bytes | None = None, *, port: int = 0, timeout_s: float = 60
    ) -> tuple[int, Any]:
        """One request on a connection of its own: status and parsed JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=timeout_s)
        try:
            kind = "application/json" if body and body[:1] == b"{" else "application/octet-stream"
            connection.request(method, path, body, {"Content-Type": kind} if body else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def wait_ready(self, *, port: int = 0, timeout_s: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                status, answer = self.request("GET", "/health/ready", port=port, timeout_s=3)
                if status == 200:
                    return dict(answer)
            except (OSError, http.client.HTTPException, ValueError):
                pass
            time.sleep(0.1)
        raise AssertionError(
            f"not ready within {timeout_s} s:\n{self.compose('logs', '--tail', '40', check=False)}"
        )

    def wait_healthy(self, service: str = "service", timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.inspect("{{.State.Health.Status}}", service) == "healthy":
                return
            time.sleep(0.5)
        raise AssertionError(f"{service} is {self.inspect('{{json .State.Health}}', service)}")

    def predict(self, picture: bytes, *, query: str = "", port: int = 0) -> dict[str, Any]:
        status, answer = self.request("POST", f"/predict{query}", picture, port=port)
        assert status == 200, answer
        return dict(answer["predictions"][0])
