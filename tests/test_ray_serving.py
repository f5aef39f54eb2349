"""Replicas on Ray Serve: the same answers, the same limits, and no request lost when replicas come and go."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from churn import find_mismatches
from pictures import encoded, noise
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import RayCluster, processes_of, ray_cluster, ray_environment
from serving import free_port

from model_store.backbone import Backbone, BackboneArtefact
from model_store.store import ModelStore, with_task

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour, seed)) for colour in range(3) for seed in range(4)]
MAX_QUEUED = 8
REPLICA_HEADER = "x-tosca-replica"
SETTINGS = {
    "TOSCA_STORE_POLL_S": "0.2",
    "TOSCA_MAX_QUEUED_IMAGES": str(MAX_QUEUED),
    "TOSCA_CLS_CACHE_BYTES": "0",
    "TOSCA_MAX_BODY_BYTES": "1000000",
}


@dataclass(frozen=True)
class Deployed:
    cluster: RayCluster
    store: ModelStore
    url: str

    def deploy(self) -> None:
        self.cluster.tosca(
            *("ray", "deploy", "--replicas", "2", "--cpus", "1", "--port", self.url.rpartition(":")[2]),
            TOSCA_STORE=self.store.url,
            **SETTINGS,
        )


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> Iterator[Deployed]:
    """Two replicas over a store with the task "birds"."""
    store = ModelStore(tmp_path_factory.mktemp("ray") / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(with_task("birds", store.put_module(make_module("birds", seed=1))), "add birds")
    with ray_cluster() as cluster:
        one = Deployed(cluster, store, f"http://127.0.0.1:{free_port()}")
        one.deploy()
        yield one


@dataclass
class Load:
    """Clients that ask without pause; what became of each request."""

    url: str
    token: str = ""
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    by_replica: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self, num_clients: int = 3) -> Iterator["Load"]:
        stop = threading.Event()
        clients = [threading.Thread(target=self._ask, args=(i, stop)) for i in range(num_clients)]
        for one in clients:
            one.start()
        try:
            yield self
        finally:
            stop.set()
            for one in clients:
                one.join(120.0)

    def wait_for(self, num_more: int) -> None:
        wanted = self.outcomes.total() + num_more
        deadline = time.monotonic() + 120.0
        while self.outcomes.total() < wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.outcomes.total() >= wanted, f"the load has stopped: {self.outcomes}"

    def _ask(self, index: int, stop: threading.Event) -> None:
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        with httpx.Client(base_url=self.url, timeout=60.0, headers=headers) as client:
            while not stop.is_set():
                index = (index + 1) % len(PICTURES)
                try:
                    response = client.post("/predict", content=PICTURES[index], params={"top_k": 1})
                except httpx.HTTPError as error:
                    with self._lock:
                        self.outcomes[type(error).__name__] += 1
                    continue
                with self._lock:
                    self.outcomes[str(response.status_code)] += 1
                    if response.is_success:
                        self.answers.append((index, response.json()["predictions"][0]))
                        self.by_replica[response.headers[REPLICA_HEADER]] += 1


def revisions_of_all(url: str, num_replicas: int, at_least: int) -> None:
    """Wait until so many replicas have said that they serve `at_least` or a later revision."""
    deadline = time.monotonic() + 60.0
    seen: dict[str, int] = {}
    while time.monotonic() < deadline:
        ready = httpx.get(f"{url}/health/ready", timeout=30.0)
        if ready.is_success:
            seen[ready.headers[REPLICA_HEADER]] = ready.json()["revision"]
        if sum(one >= at_least for one in seen.values()) >= num_replicas:
            return
    raise AssertionError(f"revision {at_least} is served by too few of {seen}")


def test_answers_of_every_replica_equal_the_offline_ones(
    deployed: Deployed, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    """Also right after a registration, which lands on one replica and is followed by the other."""
    with Load(deployed.url).running() as load:
        load.wait_for(60)
        answer = httpx.post(f"{deployed.url}/tasks", content=make_module("cars", seed=2), timeout=60.0)
        assert answer.status_code == 201, answer.text
        revisions_of_all(deployed.url, 2, answer.json()["revision"])
        load.wait_for(60)
    assert set(load.outcomes) == {"200"}
    assert len(load.by_replica) == 2
    assert len({one["receipt"]["revision"] for _, one in load.answers}) == 2
    assert not find_mismatches(deployed.store, tiny_backbone, PICTURES, load.answers)


def test_refusals_of_the_service_reach_the_client_through_the_proxy(deployed: Deployed) -> None:
    files = [("images", (f"{i}.png", PICTURES[0], "image/png")) for i in range(MAX_QUEUED + 1)]
    with httpx.Client(base_url=deployed.url, timeout=60.0) as client:
        with ThreadPoolExecutor(16) as clients:  # each of them fills the queue of a replica
            together = list(clients.map(lambda _: client.post("/predict", files=files[1:]), range(64)))
        refused = [one for one in together if one.status_code != 200]
        assert {one.status_code for one in refused} == {503}
        assert all(one.headers["retry-after"].isdigit() for one in refused)
        assert {one.json()["type"] for one in refused} == {"urn:tosca:problem:overloaded"}
        assert client.post("/predict", files=files).status_code == 422  # so many may never wait
        large = client.post("/predict", content=b"x" * 1_000_001)
        assert large.status_code == 413 and large.json()["type"] == "urn:tosca:problem:body-too-large"
        endless = client.post("/predict", content=(b"x" * 100_000 for _ in range(100)))
        assert endless.status_code == 413
        named = client.post("/predict", content=PICTURES[0], headers={"x-request-id": "order-66"})
        assert named.headers.get_list("x-request-id") == ["order-66"]


def test_metrics_of_every_replica_are_exported_by_ray(deployed: Deployed) -> None:
    newest = float(deployed.store.require_head().number)
    deadline = time.monotonic() + 60.0
    found: dict[str, float] = {}
    while time.monotonic() < deadline and sorted(found.values()) != [newest, newest]:
        time.sleep(0.5)
        families = text_string_to_metric_families(httpx.get(deployed.cluster.metrics_url).text)
        samples = [one for family in families for one in family.samples if one.name == "ray_tosca_revision"]
        found = {one.labels["replica"]: one.value for one in samples}
    assert sorted(found.values()) == [newest, newest], found


def test_a_rolling_update_under_load_fails_no_request(deployed: Deployed, tiny_backbone: Backbone) -> None:
    with Load(deployed.url).running() as load:
        load.wait_for(60)
        before = set(load.by_replica)
        deployed.deploy()
        load.by_replica.clear()
        load.wait_for(60)
    assert before.isdisjoint(load.by_replica), "the old replicas still answer"
    assert set(load.outcomes) == {"200"}, load.outcomes
    assert not find_mismatches(deployed.store, tiny_backbone, PICTURES, load.answers)


def test_a_killed_replica_is_replaced_and_loses_no_acknowledged_registration(
    deployed: Deployed, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    modules = {f"killed-{i}": make_module(f"killed-{i}", seed=i) for i in range(12)}
    acknowledged: dict[str, str] = {}
    refused: Counter[int] = Counter()
    stop = threading.Event()

    def register() -> None:
        with httpx.Client(base_url=deployed.url, timeout=120.0) as client:
            for task, data in itertools.cycle(modules.items()):
                if stop.is_set() or len(acknowledged) == len(modules):
                    return
                try:
                    response = client.post("/tasks", content=data, params={"force": True})
                except httpx.HTTPError:
                    refused[0] += 1
                    continue
                if response.is_success:
                    acknowledged[task] = hashlib.sha256(data).hexdigest()
                else:
                    refused[response.status_code] += 1

    writer = threading.Thread(target=register)
    with Load(deployed.url).running() as load:
        load.wait_for(30)
        writer.start()
        load.wait_for(30)
        victim = deployed.cluster.replicas[0]
        os.kill(victim, signal.SIGKILL)
        load.wait_for(100)
        deadline = time.monotonic() + 120.0
        while len(set(deployed.cluster.replicas) - {victim}) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        load.wait_for(30)
        stop.set()
        writer.join(120.0)
        revisions_of_all(deployed.url, 2, deployed.store.require_head().number)
    kept = deployed.store.require_head().tasks
    lost = [task for task, sha256 in acknowledged.items() if kept.get(task) != sha256]
    failed = load.outcomes.total() - load.outcomes["200"]
    print(json.dumps({"outcomes": load.outcomes, "acknowledged": len(acknowledged), "refused": refused}))
    assert acknowledged and not lost
    assert failed <= 3 * 2, f"more than what the killed replica had under way: {load.outcomes}"
    assert not find_mismatches(deployed.store, tiny_backbone, PICTURES, load.answers)


def test_what_is_under_way_is_answered_when_the_service_ends(
    tiny_store: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    """SIGTERM for a `tosca ray deploy` with a cluster of its own, while a request's body is still arriving."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    port, log = free_port(), tmp_path / "log"
    with ray_environment() as environment, log.open("ab") as output:
        command = [str(Path(sys.executable).with_name("tosca")), "ray", "deploy", "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--store", tiny_store.url], env=environment, stdout=output, stderr=output
        )
        wait_for(log, "answers on", process)
        with socket.create_connection(("127.0.0.1", port), timeout=60.0) as connection:
            picture = PICTURES[0]
            head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(picture)}\r\n\r\n"
            connection.sendall(head.encode() + picture[:100])
            wait_for(log, "Removing 1 replica", process, after=lambda: process.send_signal(signal.SIGTERM))
            connection.sendall(picture[100:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert process.wait(60.0) == 0, log.read_text()
        deadline = time.monotonic() + 30.0
        while (left := list(processes_of(environment["RAY_TMPDIR"]))) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, "the command leaves nothing of its cluster"


def test_a_config_file_deploys_replicas_that_want_keys_and_follow_the_load(
    tiny_store: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    """`tosca ray deploy --config` to `serve deploy`: one replica until there is load, then two, and nobody notices."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    dashboard, url = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    keys = {"TOSCA_KEYS_FILE": str(tmp_path / "keys.json"), "TOSCA_CLS_CACHE_BYTES": "0"}
    with ray_cluster(dashboard_port=int(dashboard.rpartition(":")[2])) as cluster:
        token = json.loads(cluster.tosca("keys", "create", "app", "--scope", "predict", "--json", **keys))[
            "token"
        ]
        config = tmp_path / "serve.yaml"
        wanted = ["--max-replicas", "2", "--target-ongoing", "1", "--port", url.rpartition(":")[2]]
        config.write_text(
            cluster.tosca("ray", "deploy", "--config", "--store", tiny_store.url, *wanted, **keys)
        )
        command = [
            str(Path(sys.executable).with_name("serve")),
            "deploy",
            "--address",
            dashboard,
            str(config),
        ]
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=120.0)
        assert done.returncode == 0, done.stdout + done.stderr
        deadline = time.monotonic() + 120.0
        while not is_ready(url) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert len(cluster.replicas) == 1
        assert httpx.post(f"{url}/predict", content=PICTURES[0]).status_code == 401
        with Load(url, token).running(num_clients=4) as load:
            deadline = time.monotonic() + 180.0
            while len(load.by_replica) < 2 and time.monotonic() < deadline:
                load.wait_for(20)
        assert len(load.by_replica) == 2
        assert set(load.outcomes) == {"200"}, load.outcomes


def is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/ready", timeout=10.0).is_success
    return False


def wait_for(
    log: Path, text: str, process: "subprocess.Popen[bytes]", after: Callable[[], None] = lambda: None
) -> None:
    after()
    deadline = time.monotonic() + 120.0
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
