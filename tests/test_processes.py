"""Several server processes on one port: one service to its clients, to a terminal and to whoever watches it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pictures import encoded, noise
from pydantic import ValidationError
from serving import START_TIMEOUT_S, RunningServer, free_port, running_server, serving_process
from test_lifecycle import ask_ready
from test_replicas import Join, join, listed, wait_until

from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore, with_task
from service.errors import CannotListen, InvalidSettings
from service.ports import bind, held, port_of
from service.server import Server
from service.settings import Settings
from service.siblings import Siblings
from service.supervisor import check, next_pause_s

MakeModule = Callable[..., bytes]
PICTURE = encoded(noise())
TOSCA = Path(sys.executable).with_name("tosca")
__all__ = ["join"]  # a fixture
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes share a port on Linux alone")


# -- a service of two processes ------------------------------------------------------------------------------


class HalfSent:
    """A prediction whose body is half sent: under way until `finish`."""

    def __init__(self, url: str) -> None:
        self._socket = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0), 60.0)
        self._socket.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
            % len(PICTURE)
        )
        assert self._socket.recv(1000).startswith(b"HTTP/1.1 100"), "the body is awaited"

    def finish(self) -> int:
        self._socket.sendall(PICTURE)
        with self._socket.makefile("rb") as answer:
            status = int(answer.readline().split()[1])
        self.close()
        return status

    def close(self) -> None:
        self._socket.close()


class Service:
    """Two servers and their supervisor, each server reached alone by its admin port."""

    def __init__(self, server: RunningServer, admin_port: int) -> None:
        self.url = server.url
        self.process = server.process
        self.admin_urls = [f"http://127.0.0.1:{admin_port + place}" for place in range(2)]
        self._log = server.log

    def said(self, pattern: str) -> list[tuple[str, ...]]:
        """The groups of every line of the supervisor's that fits."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        messages = [one["message"] for one in lines if one["logger"] == "tosca.supervisor"]
        return [found.groups() for one in messages if (found := re.fullmatch(pattern, one))]

    def processes(self) -> list[int]:
        """Of the servers that were ready last, by place."""
        ready = {int(place): int(pid) for place, pid in self.said(r"server (\d) is ready: process (\d+)")}
        return [pid for _, pid in sorted(ready.items())]

    def log(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def two_processes(store: ModelStore, folder: Path, **settings: object) -> Iterator[Service]:
    """They look at the store once an hour: what they know before they know from each other."""
    admin_port = two_free_ports()
    chosen = {"processes": 2, "admin_port": admin_port, "store_poll_s": 3600, **settings}
    with running_server(store.url, folder / "log", **chosen) as server:
        service = Service(server, admin_port)
        wait_until(lambda: len(service.processes()) == 2, START_TIMEOUT_S)
        yield service


def two_free_ports() -> int:
    """The first of two neighbours that nobody listens on."""
    while True:
        port = free_port()
        with contextlib.suppress(CannotListen), bind("127.0.0.1", port + 1):
            return port


def num_listeners(port: int) -> int:
    """Sockets that listen on a port."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def children(pid: int) -> list[int]:
    """Servers among the children of a process."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [one for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def own_id(url: str) -> str:
    (own,) = [one["replica_id"] for one in replicas(url) if one["is_this"]]
    return own


def wait_until_draining(service: Service) -> None:
    wait_until(lambda: service.log().count("draining: ") == 2)


def listed_in(store: ModelStore) -> list[str]:
    return [one.record.replica_id for one in store.replicas.all()]


def replicas(url: str) -> list[dict[str, Any]]:
    return httpx.get(f"{url}/replicas").raise_for_status().json()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_artefact: BackboneArtefact) -> ModelStore:
    store = ModelStore(tmp_path_factory.mktemp("shared") / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    return store


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def audit_log(store: ModelStore) -> Path:
    return Path(store.url).with_name("audit")


@pytest.fixture(scope="module")
def service(store: ModelStore, grpc_port: int, audit_log: Path) -> Iterator[Service]:
    folder = Path(store.url).parent
    with two_processes(store, folder, grpc_port=grpc_port, audit_log=audit_log) as service:
        yield service


def test_two_processes_answer_on_one_port(service: Service, grpc_port: int) -> None:
    ids = {own_id(url) for url in service.admin_urls}
    assert len(ids) == 2
    seen: set[str] = set()
    wait_until(lambda: seen.add(own_id(service.url)) or seen == ids)  # each time on another connection
    assert {one["replica_id"] for one in replicas(service.url)} == ids
    assert num_listeners(httpx.URL(service.url).port or 0) == num_listeners(grpc_port) == 2
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        assert ask_ready(channel).ready


def test_each_process_is_a_scrape_target(service: Service) -> None:
    starts = [
        re.findall(r"\nprocess_start_time_seconds (.+)\n", httpx.get(f"{url}/metrics").text)
        for url in service.admin_urls
    ]
    assert len({time for (time,) in starts}) == 2


def test_the_log_says_which_process_wrote_a_line(service: Service) -> None:
    lines = [json.loads(line) for line in service.log().splitlines()]
    assert {one["process"] for one in lines if one["logger"] == "tosca.server"} == {"server-0", "server-1"}
    assert all("process" not in one for one in lines if one["logger"] == "tosca.supervisor")


def test_an_acknowledged_change_is_served_by_all(
    service: Service, make_module: MakeModule, audit_log: Path
) -> None:
    """They tell each other: none looks at the store by itself in time. All append to one audit log."""
    first, second = service.admin_urls
    for revision, (url, other) in enumerate([(first, second), (second, first)] * 3, 2):
        module = make_module("birds", seed=revision)
        response = httpx.post(f"{url}/tasks", content=module, params={"force": True}, timeout=60.0)
        assert (response.status_code, response.json()["revision"]) == (201, revision)
        assert response.json()["replicas"]["all_serve"]
        assert len(response.json()["replicas"]["serving"]) == 2
        assert httpx.get(f"{other}/tasks").json()["revision"] == revision
        answers = {httpx.post(f"{one}/predict", content=PICTURE).text for one in service.admin_urls}
        assert len(answers) == 1
    lines = [json.loads(line) for line in audit_log.read_text().splitlines()]
    assert [one["event"] for one in lines] == ["asked", "done"] * 6


def test_a_process_that_is_killed_is_replaced_while_the_other_answers(
    service: Service, make_module: MakeModule
) -> None:
    """Also when the first of those that come is killed before it is ready, after a longer pause. Meanwhile
    a change waits for nobody who is gone."""
    first, second = service.processes()
    killed_id = own_id(service.admin_urls[1])
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: service.said("server 1 ended with status 137: another one in 1 s") != [])
    wait_until(lambda: killed_id not in {one["replica_id"] for one in replicas(service.url)})
    change = httpx.post(f"{service.admin_urls[0]}/tasks", content=make_module("cars"), timeout=60.0)
    assert [one["is_this"] for one in change.json()["replicas"]["serving"]] == [True]
    assert all(httpx.post(f"{service.url}/predict", content=PICTURE).is_success for _ in range(20))

    wait_until(lambda: len(children(service.process.pid)) == 2)
    (unready,) = set(children(service.process.pid)) - {first}
    os.kill(unready, signal.SIGKILL)
    wait_until(lambda: service.said("server 1 ended with status 137: another one in 2 s") != [])
    assert httpx.post(f"{service.url}/predict", content=PICTURE).is_success

    wait_until(lambda: service.processes()[1] != second, START_TIMEOUT_S)
    assert service.processes()[0] == first
    assert httpx.get(f"{service.admin_urls[1]}/tasks").json()["revision"] == change.json()["revision"]


def test_without_their_supervisor_processes_drain_and_end(service: Service, store: ModelStore) -> None:
    """The last of the tests of this service."""
    under_way = [HalfSent(url) for url in service.admin_urls]
    pids = service.processes()
    service.process.kill()
    wait_until_draining(service)
    assert [one.finish() for one in under_way] == [200, 200]
    wait_until(lambda: not any(map(is_running, pids)))
    assert listed_in(store) == []


# -- the end -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tiny_store: ModelStore, make_module: MakeModule) -> ModelStore:
    """A store with a task."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    return tiny_store


def test_sigterm_answers_what_is_under_way_and_a_second_one_ends_at_once(
    tasks: ModelStore, tmp_path: Path
) -> None:
    with two_processes(tasks, tmp_path, shutdown_timeout_s=3600) as service:
        under_way = [HalfSent(url) for url in service.admin_urls]
        never_sent = HalfSent(service.url)
        pids = service.processes()
        service.process.send_signal(signal.SIGTERM)
        wait_until_draining(service)
        assert [one.finish() for one in under_way] == [200, 200]
        assert service.process.poll() is None
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30.0) == 0, service.log()
        assert not any(map(is_running, pids))
        never_sent.close()
    assert listed_in(tasks) == []


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_reaches_each_process_and_drains_it_once(
    tasks: ModelStore, tmp_path: Path
) -> None:
    admin_port = two_free_ports()
    in_group = ["setsid", "--wait", TOSCA, "serve"]  # the group of a terminal's foreground
    chosen = {"processes": 2, "admin_port": admin_port, "shutdown_grace_s": 60}
    with serving_process(in_group, tasks.url, tmp_path / "log", **chosen) as server:
        service = Service(server, admin_port)
        wait_until(lambda: len(service.processes()) == 2, START_TIMEOUT_S)
        under_way = [HalfSent(url) for url in service.admin_urls]
        os.killpg(os.getpgid(service.processes()[0]), signal.SIGINT)
        wait_until_draining(service)
        assert [one.finish() for one in under_way] == [200, 200]
        assert service.process.wait(30.0) == 0, service.log()
    assert "Traceback" not in service.log()


@pytest.mark.parametrize("is_alone", [True, False])
async def test_a_second_signal_ends_one_of_several_when_the_supervisor_says_so(is_alone: bool) -> None:
    """Its own signal may come after the word of the supervisor that had the same one."""
    app = FastAPI()
    siblings = None if is_alone else cast(Siblings, object())  # nothing is asked of them
    server = Server(uvicorn.Config(app), app, Settings(), siblings)
    server.drain(signal.SIGTERM)
    server.drain(signal.SIGTERM)
    assert not server.force_exit
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit is is_alone
    server.end()
    assert server.force_exit


def test_ctrl_c_while_processes_start_ends_them_without_a_word(tiny_store: ModelStore) -> None:
    command = [TOSCA, "serve", "--store", tiny_store.url, "--port", "0", "--processes", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True) as starting:
        try:
            wait_until(lambda: children(starting.pid) != [], START_TIMEOUT_S)
            os.killpg(starting.pid, signal.SIGINT)
            _, said = starting.communicate(timeout=60.0)
        finally:
            starting.kill()
    assert starting.returncode == 0, said
    assert "Traceback" not in said


# -- starting ----------------------------------------------------------------------------------------------------


def ended(store: ModelStore, **settings: object) -> "subprocess.CompletedProcess[str]":
    variables = {f"TOSCA_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [TOSCA, "serve", "--store", store.url, "--processes", "2"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120.0,
    )


def test_a_port_that_others_share_is_refused(tiny_store: ModelStore) -> None:
    with bind("127.0.0.1", 0, is_shared=True) as taken:
        taken.listen()
        port = port_of(taken)
        result = ended(tiny_store, port=port)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"\nerror: cannot listen on 127.0.0.1:{port}: " in result.stderr
    assert "server-0" not in result.stderr


def test_a_port_is_held_against_everybody_but_its_own() -> None:
    with held("127.0.0.1", 0) as port:
        with pytest.raises(CannotListen), held("127.0.0.1", port):
            pass
        with pytest.raises((CannotListen, OSError)), bind("127.0.0.1", port) as other:
            other.listen()
        with bind("127.0.0.1", port, is_shared=True) as one, bind("127.0.0.1", port, is_shared=True) as two:
            one.listen()
            two.listen()
    with held("127.0.0.1", port) as again:
        assert again == port


def test_a_process_that_cannot_start_ends_the_service_with_its_fault_said_once(
    tiny_store: ModelStore,
) -> None:
    for path in Path(tiny_store.url).glob("backbones/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    result = ended(tiny_store, port=free_port())
    assert result.returncode == 3
    assert result.stderr.count("CorruptStore") >= 1
    assert "server 0 ended with status 3 before it was ready" in result.stderr
    assert "server-1" not in result.stderr


@pytest.mark.slow
def test_a_wrong_setting_is_one_line_of_the_first_process(tiny_store: ModelStore) -> None:
    result = ended(tiny_store, port=free_port(), require_signature=True, tls_key="/a/key")
    assert result.returncode == 1
    assert result.stderr.count("\nerror: TOSCA_TLS_CERTIFICATE and TOSCA_TLS_KEY go together\n") == 1


def test_one_process_is_the_server_itself(tiny_store: ModelStore, tmp_path: Path) -> None:
    with running_server(tiny_store.url, tmp_path / "log", processes=1) as server:
        assert Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text() == ""
        assert replicas(server.url) == []


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, -1, 65, "two"])
def test_numbers_of_processes_that_make_no_sense_are_refused(num: object) -> None:
    with pytest.raises(ValidationError):
        Settings(processes=num)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"replica_heartbeat_s": 0.0}, "TOSCA_REPLICA_HEARTBEAT_S"),
        ({"store_poll_s": 0.0}, "TOSCA_STORE_POLL_S"),
        ({"admin_port": 65535}, "admin ports from 65535"),
    ],
)
def test_settings_with_which_they_would_not_be_one_service_are_refused(
    settings: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InvalidSettings, match=fault):
        check(Settings(processes=2, **settings))
    check(Settings(processes=2, admin_port=65534))


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InvalidSettings, match="needs Linux"):
        check(Settings(processes=2))


def test_without_an_admin_port_metrics_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check(Settings(processes=2, admin_port=9000))
    assert caplog.text == ""
    check(Settings(processes=2))
    assert "/metrics" in caplog.text


def test_processes_in_a_folder_know_each_other_and_share_the_cores() -> None:
    assert Settings(store="a/folder", processes=2).heartbeat_s == 10.0
    assert Settings(store="a/folder", processes=2, replica_heartbeat_s=3.0).heartbeat_s == 3.0
    assert Settings(processes=64).num_decode_threads >= 1
    assert Settings(processes=2, decode_threads=8).num_decode_threads == 8
    assert Settings(processes=1).num_decode_threads == min(8, os.cpu_count() or 1)


def test_pauses_double_until_a_process_was_well_for_long() -> None:
    pauses = [next_pause_s(0.0, 0.0)]
    while len(pauses) < 7:
        pauses.append(next_pause_s(pauses[-1], 10.0))
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert next_pause_s(30.0, 61.0) == 1.0


# -- whom a change waits for ------------------------------------------------------------------------------------------


def test_a_change_waits_for_all_unless_its_client_says_otherwise(join: Join, make_module: MakeModule) -> None:
    """The protocol's changes, too, which cannot say."""
    first, second = join(processes=2), join(processes=2, store_poll_s=0.5)
    changes = [
        lambda: first.post("/tasks", content=make_module("birds")),
        lambda: first.delete("/tasks/birds"),
        lambda: first.post("/revisions/2/rollback"),
        lambda: first.post("/v2/repository/models/birds/unload"),
        lambda: first.post("/v2/repository/models/birds/load"),
    ]
    for revision, change in enumerate(changes, 2):
        response = change()
        assert response.headers["x-revision"] == str(revision), response.text
        assert second.get("/tasks").json()["revision"] == revision
    assert first.delete("/tasks/birds", params={"wait": "this"}).json()["replicas"] is None
    assert len(listed(first)) == 2
