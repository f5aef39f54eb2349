"""A real Prometheus scrapes a real service: the rules are valid, every query of the dashboard finds something."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from pictures import encoded, noise
from serving import RunningServer, running_server
from test_monitoring import FOLDER, RULES, expressions

from model_store.store import ModelStore, with_task

PROGRAMS = Path(".tosca/prometheus/usr/bin").resolve()
WAIT_S = 60.0
# Nothing has gone wrong, so these have nothing to show.
MAY_BE_EMPTY = {name for name in expressions() if name.startswith("alert ")}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def program(name: str) -> str:
    found = shutil.which(name, path=f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed; `make test-monitoring` unpacks Debian's package")
    return found


def test_rules_are_valid_for_promtool() -> None:
    command = [program("promtool"), "check", "rules", str(FOLDER / "alerts.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{sum(len(group['rules']) for group in RULES['groups'])} rules found" in result.stdout


def test_alerts_fire_when_they_should_and_only_then() -> None:
    command = [program("promtool"), "test", "rules", str(FOLDER / "alerts.test.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def server(
    tiny_store: ModelStore, make_module: Callable[..., bytes], tmp_path: Path
) -> Iterator[RunningServer]:
    for task, seed in (("birds", 1), ("cars", 2)):
        tiny_store.publish(
            with_task(task, tiny_store.put_module(make_module(task, seed=seed))), f"add {task}"
        )
    with running_server(tiny_store.url, tmp_path / "server.log") as server:
        yield server


@pytest.fixture
def prometheus(server: RunningServer, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the server every second, with the configuration's rules."""
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yaml")]
    [scrape] = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program("prometheus"), "--config.file=prometheus.yaml", "--storage.tsdb.path=data"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], cwd=tmp_path, stdout=log, stderr=log
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30.0)


def drive(url: str, stop: threading.Event) -> None:
    """Every kind of request there is, until told to stop."""
    with httpx.Client(base_url=url, timeout=30.0) as client:
        seed = 0
        while not stop.is_set():
            for task in ("birds", "cars"):
                seed += 1
                picture = encoded(noise(seed % 5, seed // 2))  # each comes twice
                answered = client.post("/predict", params={"task": task}, content=picture)
                told = {"request_id": answered.headers["x-request-id"], "label": f"{task}-0"}
                client.post("/feedback", json=told).raise_for_status()
            client.get("/tasks/nothing")
            client.delete("/tasks/nothing")
            stop.wait(0.05)


def test_every_query_of_the_dashboard_finds_something_and_no_rule_fails(
    server: RunningServer, prometheus: str
) -> None:
    stop = threading.Event()
    driver = threading.Thread(target=drive, args=(server.url, stop))
    driver.start()
    try:
        empty = _ask_until_found(prometheus)
    finally:
        stop.set()
        driver.join()
    with httpx.Client(base_url=prometheus, timeout=30.0) as client:
        groups = client.get("/api/v1/rules").json()["data"]["groups"]
    health = {rule["name"]: (rule["health"], rule["state"]) for group in groups for rule in group["rules"]}
    print(json.dumps({"queries": len(expressions()), "empty": sorted(empty), "alerts": health}))
    assert empty == set()
    assert len(health) == sum(len(group["rules"]) for group in RULES["groups"])
    assert {state for state, _ in health.values()} == {"ok"}
    assert health["ToscaDown"][1] == "inactive"


def _ask_until_found(prometheus: str) -> set[str]:
    """The queries that still find nothing when the time is over."""
    deadline = time.monotonic() + WAIT_S
    missing = set(expressions()) - MAY_BE_EMPTY
    with httpx.Client(base_url=prometheus, timeout=30.0) as client:
        while missing and time.monotonic() < deadline:
            time.sleep(1.0)
            for name in sorted(missing):
                try:
                    answer = client.get("/api/v1/query", params={"query": expressions()[name]})
                except httpx.TransportError:
                    break  # it has not started yet
                if answer.status_code == 503:
                    break
                assert answer.status_code == 200, (name, answer.text)
                found = answer.json()["data"]["result"]
                if any(one["value"][1] != "NaN" for one in found):
                    missing.discard(name)
    return missing
