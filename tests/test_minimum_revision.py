"""X-Minimum-Revision: an answer by that revision or a later one, or 412; the store is asked once for all."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from faulty_files import Hook, Outage, WatchedFiles, watch
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.object_files import ObjectFiles
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURE = encoded(noise())


@contextmanager
def behind(
    store: ModelStore, backbone: Backbone, hook: Hook = watch, **changes: object
) -> Iterator[tuple[TestClient, WatchedFiles]]:
    """A replica that never looks into the store by itself."""
    files = WatchedFiles(ObjectFiles(store.url), hook)
    settings = Settings(store=store.url, store_poll_s=0.0, **changes)
    app = create_app(settings, backbone, ModelStore(store.url, files=files))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, files


def publish(store: ModelStore, data: bytes, task: str = "birds") -> int:
    return store.publish(with_task(task, store.put_module(data)), "by another replica").number


def at_least(number: int | str) -> dict[str, str]:
    return {"x-minimum-revision": str(number)}


def test_a_replica_that_is_behind_catches_up(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with behind(tiny_store, tiny_backbone) as (client, files):
        number = publish(tiny_store, make_module("birds"))
        assert client.get("/tasks").json()["revision"] == 1
        answer = client.post("/predict", content=PICTURE, headers=at_least(number))
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["receipt"]["revision"] == number
        files.operations.clear()
        assert client.get("/tasks", headers=at_least(number)).json()["revision"] == number
        assert client.get("/tasks", headers=at_least(1)).json()["revision"] == number
        assert files.operations == []


def test_removals_and_rollbacks_are_caught_up_with_too(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with behind(tiny_store, tiny_backbone) as (client, _), behind(tiny_store, tiny_backbone) as (other, __):
        assert client.post("/tasks", content=make_module("birds")).status_code == 201
        before = client.post("/predict", content=PICTURE).json()["predictions"][0]
        for change, tasks in (
            (lambda: client.delete("/tasks/birds"), []),
            (lambda: client.post("/revisions/2/rollback"), ["birds"]),
        ):
            number = change().headers["x-revision"]
            there = other.get("/tasks", headers=at_least(number)).json()
            assert [one["task"] for one in there["tasks"]] == tasks
        after = other.post("/predict", content=PICTURE).json()["predictions"][0]
        assert {**after, "receipt": None} == {**before, "receipt": None}


def test_what_is_not_in_the_store_is_refused_with_the_revision_served(
    tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    with behind(tiny_store, tiny_backbone) as (client, _):
        for response in (
            client.get("/tasks", headers=at_least(2)),
            client.post("/predict", content=PICTURE, headers=at_least(10**12 - 1)),
        ):
            assert response.status_code == 412
            assert response.headers["content-type"] == "application/problem+json"
            assert response.headers["x-revision"] == "1"
            assert response.headers["retry-after"]
            document = response.json()
            assert document["type"] == "urn:tosca:problem:revision-behind"
            assert document["revision"] == 1
            assert "not in the store" in document["detail"]


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5", "1e3", str(10**12), ""])
def test_what_is_no_revision_number_is_refused(
    given: str, tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    with behind(tiny_store, tiny_backbone) as (client, files):
        files.operations.clear()
        assert client.get("/tasks", headers=at_least(given)).status_code == 422
        assert files.operations == []


def test_while_the_store_is_away_too_new_a_minimum_is_refused_and_the_rest_is_answered(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    outage = Outage()
    with behind(tiny_store, tiny_backbone, outage) as (client, _):
        outage.is_on = True
        number = publish(tiny_store, make_module("birds"))
        refused = client.get("/tasks", headers=at_least(number))
        assert refused.status_code == 412
        assert "away" in refused.json()["detail"]
        assert client.get("/health/ready").json()["is_stale"] is True
        assert client.get("/tasks", headers=at_least(1)).status_code == 200
        outage.is_on = False
        assert client.get("/tasks", headers=at_least(number)).status_code == 200
        assert client.get("/health/ready").json()["is_stale"] is False


def test_a_store_that_hangs_holds_a_request_no_longer_than_allowed(
    tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    let_go = threading.Event()

    def hang(number: int, moment: str, what: str) -> None:
        if moment == "before" and what == "head revisions/000000000002.json":
            let_go.wait(60.0)

    with behind(tiny_store, tiny_backbone, hang, catch_up_timeout_s=0.1) as (client, _):
        try:
            refused = client.get("/tasks", headers=at_least(2))
            assert refused.status_code == 412
            assert "within 0.1 s" in refused.json()["detail"]
            # Neither the event loop nor the engine waits for the store.
            assert client.get("/tasks").status_code == client.get("/health/ready").status_code == 200
        finally:
            let_go.set()


def test_many_requests_cause_few_reads(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    """All that arrive while the store is read share the next read: two at most, however many they are."""
    num_requests = 100
    arrived = threading.Semaphore(0)
    reads: list[str] = []

    def wait_for_all(number: int, moment: str, what: str) -> None:
        if moment == "before" and what.startswith("head revisions/"):
            reads.append(what)
            if len(reads) == 1:
                for _ in range(num_requests):
                    arrived.acquire(timeout=30.0)

    with behind(tiny_store, tiny_backbone, wait_for_all, catch_up_timeout_s=60.0) as (client, _):
        number = publish(tiny_store, make_module("birds"))
        catch_up = client.app.state.service.registry.catch_up

        async def counted(*arguments: Any) -> None:
            arrived.release()
            await catch_up(*arguments)

        client.app.state.service.registry.catch_up = counted
        with ThreadPoolExecutor(num_requests) as pool:
            found = list(
                pool.map(lambda _: client.get("/tasks", headers=at_least(number)), range(num_requests))
            )
    assert {one.json()["revision"] for one in found} == {number}
    numbers = [int(what.removeprefix("head revisions/").removesuffix(".json")) for what in reads]
    assert numbers in ([2, 4, 3], [2, 4, 3, 3]), "one look that finds it, and perhaps another"


def test_only_who_may_ask_makes_the_store_be_read(
    tiny_store: ModelStore, tiny_backbone: Backbone, tmp_path: Any
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text('{"format_version": 1, "keys": []}')
    with behind(tiny_store, tiny_backbone, keys_file=keys) as (client, files):
        files.operations.clear()
        assert client.get("/tasks", headers=at_least(2)).status_code == 401
        assert files.operations == []


def test_the_open_inference_protocol_takes_the_header_too(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with behind(tiny_store, tiny_backbone) as (client, _):
        number = publish(tiny_store, make_module("birds"))
        assert client.get("/v2/models/birds").status_code == 404
        assert client.get("/v2/models/birds", headers=at_least(number)).status_code == 200
        refused = client.get("/v2/models/birds", headers=at_least(number + 1))
        assert (refused.status_code, refused.headers["x-revision"]) == (412, str(number))
        assert refused.json().keys() == {"error"}
        unloaded = client.post("/v2/repository/models/birds/unload")
        assert unloaded.headers["x-revision"] == str(number + 1)
        loaded = client.post("/v2/repository/models/birds/load")
        assert loaded.headers["x-revision"] == str(number + 2)


def test_a_read_that_began_before_a_publication_does_not_answer_who_asks_after_it(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    has_looked, both_wait = threading.Event(), threading.Event()

    def look_and_wait(number: int, moment: str, what: str) -> None:
        if moment == "after" and what.startswith("head revisions/") and not has_looked.is_set():
            has_looked.set()
            assert both_wait.wait(30.0)

    with behind(tiny_store, tiny_backbone, look_and_wait, catch_up_timeout_s=60.0) as (client, _):
        registry = client.app.state.service.registry
        catch_up = registry.catch_up

        async def told(*arguments: Any) -> None:
            if has_looked.is_set():
                both_wait.set()
            await catch_up(*arguments)

        registry.catch_up = told
        with ThreadPoolExecutor(2) as pool:
            early = pool.submit(lambda: client.get("/tasks", headers=at_least(2)))
            assert has_looked.wait(30.0)
            assert publish(tiny_store, make_module("birds")) == 2
            late = pool.submit(lambda: client.get("/tasks", headers=at_least(2)))
            assert early.result().status_code == 412
            assert late.result().json()["revision"] == 2
