"""The end of a process: SIGTERM under load drops nothing, readiness goes first, the exit status is 0."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
from certificates import self_signed
from pictures import encoded, noise
from serving import RunningServer, running_server

from model_store.store import ModelStore, with_task
from service.open_inference import inference_pb2

MakeModule = Callable[..., bytes]
PICTURE = encoded(noise())
pytestmark = pytest.mark.slow  # each starts a server of its own


@pytest.fixture
def store(tiny_store: ModelStore, make_module: MakeModule) -> ModelStore:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    return tiny_store


class Balancer:
    """Clients behind a load balancer: they send while the server is ready, and count what becomes of it.

    Half of them keep their connection, half open one for each request.
    """

    def __init__(self, server: RunningServer, num_clients: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.readiness: list[int] = []
        self._server = server
        self._not_ready = threading.Event()
        self._lock = threading.Lock()
        watcher = threading.Thread(target=self._watch)
        clients = [threading.Thread(target=self._ask, args=(i % 2 == 0,)) for i in range(num_clients)]
        self._threads = [watcher, *clients]

    def start(self) -> None:
        for one in self._threads:
            one.start()

    def wait_for(self, num_requests: int) -> None:
        deadline = time.monotonic() + 120.0
        while self.outcomes.total() < num_requests and time.monotonic() < deadline:
            time.sleep(0.05)

    def join(self) -> None:
        for one in self._threads:
            one.join(60.0)

    def _watch(self) -> None:
        deadline = time.monotonic() + 240.0
        try:
            with httpx.Client(base_url=self._server.url, timeout=10.0) as client:
                while time.monotonic() < deadline:
                    status = client.get("/health/ready").status_code
                    self.readiness.append(status)
                    if status != 200:
                        break
                    time.sleep(0.02)
        finally:
            self._not_ready.set()

    def _ask(self, keeps_connection: bool) -> None:
        headers = {} if keeps_connection else {"connection": "close"}
        with httpx.Client(base_url=self._server.url, timeout=30.0, headers=headers) as client:
            while not self._not_ready.is_set():
                try:
                    outcome = str(client.post("/predict", content=PICTURE).status_code)
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                with self._lock:
                    self.outcomes[outcome] += 1


def drain_under_load(store: ModelStore, log: Path, num_clients: int, num_requests: int) -> Balancer:
    """SIGTERM after so many requests, while the load goes on."""
    with running_server(store.url, log, shutdown_grace_s=1.0) as server:
        balancer = Balancer(server, num_clients)
        balancer.start()
        balancer.wait_for(num_requests)
        before = balancer.outcomes.total()
        server.process.send_signal(signal.SIGTERM)
        balancer.join()
        assert server.process.wait(30.0) == 0, log.read_text()
    assert before >= num_requests, "there must be a load"
    assert balancer.outcomes.total() > before, "there must be a load after the signal"
    assert balancer.readiness[-1] == 503
    return balancer


def test_sigterm_under_load_drops_no_request_and_exits_0(store: ModelStore, tmp_path: Path) -> None:
    balancer = drain_under_load(store, tmp_path / "log", num_clients=6, num_requests=60)
    assert set(balancer.outcomes) == {"200"}, balancer.outcomes


@pytest.mark.timeout(900)
def test_five_sigterms_under_load_drop_no_request(store: ModelStore, tmp_path: Path) -> None:
    total: Counter[str] = Counter()
    for _ in range(5):
        total += drain_under_load(store, tmp_path / "log", num_clients=12, num_requests=100).outcomes
    print(json.dumps({"drains": 5, "outcomes": total}))
    assert set(total) == {"200"}, total


def test_in_the_grace_period_the_server_is_not_ready_and_answers_on(
    store: ModelStore, tmp_path: Path
) -> None:
    with running_server(store.url, tmp_path / "log", shutdown_grace_s=20.0) as server:
        with httpx.Client(base_url=server.url, timeout=20.0) as client:
            assert "connection" not in client.post("/predict", content=PICTURE).headers
            server.process.send_signal(signal.SIGTERM)
            while client.get("/health/ready").status_code == 200:
                pass
            answer = client.post("/predict", content=PICTURE)
            assert answer.status_code == 200
            assert answer.headers["connection"] == "close"
            assert client.get("/health/live").status_code == 200
            server.process.send_signal(signal.SIGTERM)  # a second signal ends it at once
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(10.0)
        assert server.process.poll() == 0
    assert "draining" in (tmp_path / "log").read_text()


def test_sigterm_under_load_drops_no_grpc_call(store: ModelStore, tmp_path: Path) -> None:
    """Clients that call while `ServerReady` says so get every answer."""
    grpc_port = free_port()
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    contents = inference_pb2.InferTensorContents(bytes_contents=[PICTURE])
    tensor = inference_pb2.ModelInferRequest.InferInputTensor(
        name="image", datatype="BYTES", shape=[1], contents=contents
    )
    asked = inference_pb2.ModelInferRequest(model_name="tosca", inputs=[tensor])

    def ask() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            infer = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                inference_pb2.ModelInferRequest.SerializeToString,
                inference_pb2.ModelInferResponse.FromString,
            )
            while ask_ready(channel).ready:
                try:
                    infer(asked, timeout=30.0)
                    outcome = "OK"
                except grpc.RpcError as error:
                    outcome = error.code().name
                with lock:
                    outcomes[outcome] += 1

    with running_server(
        store.url, tmp_path / "log", shutdown_grace_s=1.0, grpc_port=grpc_port, cls_cache_bytes=0
    ) as server:
        clients = [threading.Thread(target=ask) for _ in range(6)]
        for one in clients:
            one.start()
        deadline = time.monotonic() + 60.0
        while outcomes.total() < 60 and time.monotonic() < deadline:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        for one in clients:
            one.join(60.0)
        assert server.process.wait(30.0) == 0, (tmp_path / "log").read_text()
    assert set(outcomes) == {"OK"} and outcomes.total() >= 60, outcomes


def test_every_line_of_the_log_is_json(store: ModelStore, tmp_path: Path) -> None:
    with running_server(store.url, tmp_path / "log", audit_log=tmp_path / "audit") as server:
        ids = {"x-request-id": "order-66", "traceparent": f"00-{'4' * 32}-{'5' * 16}-01"}
        httpx.post(f"{server.url}/predict", content=PICTURE, headers=ids)
        httpx.delete(f"{server.url}/tasks/birds", headers=ids)
    lines = [json.loads(one) for one in (tmp_path / "log").read_text().splitlines()]
    ours = [one for one in lines if one.get("request_id") == "order-66"]
    assert {one["message"] for one in ours} >= {"POST /predict 200", "DELETE /tasks/birds 200"}
    assert {one["trace_id"] for one in ours} == {"4" * 32}
    audit = [json.loads(one) for one in (tmp_path / "audit").read_text().splitlines()]
    assert [(one["event"], one["task"], one["request_id"]) for one in audit] == [
        ("asked", "birds", "order-66"),
        ("done", "birds", "order-66"),
    ]


def ask_ready(channel: grpc.Channel) -> inference_pb2.ServerReadyResponse:
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ServerReady",
        inference_pb2.ServerReadyRequest.SerializeToString,
        inference_pb2.ServerReadyResponse.FromString,
    )
    return call(inference_pb2.ServerReadyRequest(), timeout=30.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_with_a_certificate_the_server_speaks_https_and_nothing_else(
    store: ModelStore, tmp_path: Path
) -> None:
    certificate, key = self_signed(tmp_path)
    grpc_port = free_port()
    settings = {"tls_certificate": certificate, "tls_key": key, "grpc_port": grpc_port}
    with running_server(store.url, tmp_path / "log", **settings) as server:
        trusted = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(f"{server.url}/predict", content=PICTURE, verify=trusted)
        assert answer.status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health/live")
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        address = f"127.0.0.1:{grpc_port}"
        with grpc.secure_channel(address, credentials) as safe, grpc.insecure_channel(address) as plain:
            assert ask_ready(safe).ready
            with pytest.raises(grpc.RpcError):
                ask_ready(plain)
