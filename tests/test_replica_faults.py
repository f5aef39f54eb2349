"""Faults across replicas: real processes on one store, killed under load, writing at once, joining in a burst."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from churn import find_mismatches
from pictures import encoded, noise
from serving import RunningServer, running_server

from model_store.backbone import Backbone, BackboneArtefact
from model_store.store import ModelStore, with_task
from service.client import Client, Retries

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(i % 3, seed=i)) for i in range(6)]
# A record lapses after three heartbeats and a second.
SETTINGS = {"store_poll_s": 0.2, "replica_heartbeat_s": 1.0, "log_level": "warning"}
Start = Callable[[], RunningServer]


@dataclass(frozen=True)
class Pair:
    """Two replicas of one store."""

    store: ModelStore
    folder: Path
    first: RunningServer
    second: RunningServer

    @contextmanager
    def joined_by_another(self) -> Iterator[RunningServer]:
        with running_server(self.store.url, self.folder / "another", **SETTINGS) as server:
            yield server


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("replicas")
    store = ModelStore(folder / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(with_task("base", store.put_module(make_module("base", seed=9))), "add base")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running_server(store.url, folder / name, **SETTINGS))
            for name in ("first", "second")
        ]
        yield Pair(store, folder, *servers)


def client_of(server: RunningServer) -> Client:
    return Client(server.url, retries=Retries.none())


def exact_answers(server: RunningServer, minimum_revision: int) -> list[Any]:
    """Every answer as it comes over the wire, all its digits included."""
    headers = {"x-minimum-revision": str(minimum_revision)}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60.0) as client:
        return [client.post("/predict", content=one).raise_for_status().json() for one in PICTURES]


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < ends_at, "it did not become so within a minute"
        time.sleep(0.05)


def test_writers_on_two_replicas_lose_nothing_and_leave_no_gap(pair: Pair, make_module: MakeModule) -> None:
    before = pair.store.require_head()
    names = {pair.first: [f"f{i}" for i in range(8)], pair.second: [f"s{i}" for i in range(8)]}
    acknowledged: list[int] = []

    def write(server: RunningServer) -> None:
        with client_of(server) as client:
            for i, name in enumerate(names[server]):
                acknowledged.append(client.add_task(make_module(name, seed=i), force=True).revision)

    writers = [threading.Thread(target=write, args=(server,)) for server in names]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    assert sorted(acknowledged) == list(range(before.number + 1, before.number + 17))
    head = pair.store.require_head()
    assert head.number == before.number + 16
    assert set(head.tasks) == {*before.tasks, *names[pair.first], *names[pair.second]}
    assert exact_answers(pair.first, head.number) == exact_answers(pair.second, head.number)


def test_removal_and_rollback_reach_every_replica(pair: Pair, make_module: MakeModule) -> None:
    with client_of(pair.first) as first, client_of(pair.second) as second:
        added = first.add_task(make_module("here", seed=3), force=True, wait="all")
        removed = second.remove_task("here", wait="all")
        back = first.rollback(added.revision, wait="all")
        gone = second.rollback(removed.revision, wait="all")
        for change in (added, removed, back, gone):
            assert change.replicas is not None and change.replicas.all_serve
            assert len(change.replicas.serving) == 2
        assert {first.tasks().revision, second.tasks().revision} == {gone.revision}
        assert "here" not in {one.task for one in second.tasks().tasks}


def test_a_replica_that_joins_in_a_burst_of_registrations_ends_like_the_others(
    pair: Pair, make_module: MakeModule
) -> None:
    modules = [make_module(f"burst{i % 5}", seed=i) for i in range(10)]
    stop = threading.Event()
    revisions: list[int] = []

    def register() -> None:
        with client_of(pair.first) as client:
            for i in range(1000):
                if stop.is_set():
                    return
                revisions.append(client.add_task(modules[i % 10], force=True).revision)

    burst = threading.Thread(target=register)
    burst.start()
    try:
        with pair.joined_by_another() as another:
            num_before = len(revisions)
            wait_until(lambda: len(revisions) > num_before + 5 or not burst.is_alive())
            stop.set()
            burst.join()
            assert num_before > 0
            answers = [exact_answers(one, revisions[-1]) for one in (pair.first, pair.second, another)]
            assert answers[0] == answers[1] == answers[2]
            assert answers[0][0]["predictions"][0]["receipt"]["revision"] == revisions[-1]
            with client_of(another) as client:
                assert {one.revision for one in client.replicas() if one.is_this} == {revisions[-1]}
    finally:
        stop.set()
        burst.join()


@dataclass
class Load:
    """Clients that know two servers, as a load balancer does: who gives no answer is asked no more."""

    urls: Sequence[str]
    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_failed_over: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, offset: int) -> None:
        urls = list(self.urls)
        with httpx.Client(timeout=60.0) as client:
            number = offset
            while not self.stop.is_set():
                index, number = number % len(PICTURES), number + 1
                url = urls[number % len(urls)]
                # Bytes behind the picture's end make it one that no cache has seen.
                content = PICTURES[index] + number.to_bytes(8, "big")
                try:
                    response = client.post(f"{url}/predict", content=content, params={"top_k": 1})
                except httpx.TransportError:
                    if len(urls) == 1:
                        self.failures.append("no replica answers")
                        return
                    urls.remove(url)
                    self.num_failed_over += 1
                    continue
                if response.is_success:
                    self.answers.append((index, response.json()["predictions"][0]))
                else:
                    self.failures.append(f"{response.status_code} {response.text}")


def test_a_replica_killed_under_load_takes_no_acknowledged_change_with_it(
    pair: Pair, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    """Its clients are answered by the other, its record lapses, and nobody waits for it any more."""
    modules = [make_module(f"killed{i}", seed=i) for i in range(4)]
    acknowledged: list[tuple[int, str]] = []
    with pair.joined_by_another() as doomed:
        load = Load([pair.first.url, doomed.url])
        clients = [threading.Thread(target=load.ask, args=(1000 * i,)) for i in range(3)]
        for one in clients:
            one.start()

        def change() -> None:
            with httpx.Client(base_url=doomed.url, timeout=60.0) as client:
                for i in range(1000):
                    task = f"killed{i % 4}"
                    try:
                        response = client.post("/tasks", content=modules[i % 4], params={"force": True})
                        acknowledged.append((response.json()["revision"], task))
                        client.delete(f"/tasks/{task}")
                    except httpx.TransportError:
                        return

        changing = threading.Thread(target=change)
        changing.start()
        try:
            wait_until(lambda: len(acknowledged) >= 6)
            with client_of(doomed) as client:
                (doomed_id,) = [one.replica_id for one in client.replicas() if one.is_this]
            doomed.process.send_signal(signal.SIGKILL)
            changing.join(60.0)
            with client_of(pair.first) as client:
                wait_until(
                    lambda: doomed_id not in {one.replica_id for one in client.replicas() if one.is_live}
                )
                assert doomed_id in {one.replica_id for one in client.replicas()}
                waited = client.add_task(make_module("afterwards", seed=1), force=True, wait="all")
        finally:
            load.stop.set()
            for one in clients:
                one.join(60.0)
    assert waited.replicas is not None and waited.replicas.all_serve
    assert len(waited.replicas.serving) == 2
    assert load.failures == []
    assert load.num_failed_over == len(clients)
    for revision, task in acknowledged:
        assert task in pair.store.revision(revision).tasks
    assert find_mismatches(pair.store, tiny_backbone, PICTURES, load.answers) == []
