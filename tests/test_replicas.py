"""Replicas of one store: who is known to whom, for how long, by which clock, and what a change waits for."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_files import Hook, Outage, WatchedFiles, watch
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.object_files import ObjectFiles
from model_store.replicas import ReplicaRecords
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
Join = Callable[..., TestClient]
PICTURE = encoded(noise())


# -- records ---------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def records_of(folder: Path, hook: Hook = watch, clock: Clock | None = None) -> ReplicaRecords:
    return ReplicaRecords(WatchedFiles(ObjectFiles(str(folder)), hook), clock or Clock())


def stamp(folder: Path, replica_id: str, modified_at: float) -> None:
    """As if the storage had written the record then."""
    os.utime(folder / f"replicas/{replica_id}.json", (modified_at, modified_at))


def live(records: ReplicaRecords) -> set[str]:
    return {one.record.replica_id for one in records.all() if one.is_live}


def test_a_record_is_overwritten_and_removed(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    records.write("a", 1, 30.0, "http://a")
    records.write("a", 2, 30.0)
    (found,) = records_of(tmp_path).all()
    assert (found.record.replica_id, found.record.revision, found.record.address) == ("a", 2, None)
    records.remove("a")
    records.remove("a")
    assert records.all() == []


def test_a_record_is_live_for_as_long_as_it_says_itself(tmp_path: Path) -> None:
    """By the storage's clock, which the own record shows; a second more, which object stores do not tell."""
    clock = Clock()
    records = records_of(tmp_path, clock=clock)
    for replica_id, lifetime_s in (("short", 10.0), ("long", 100.0), ("own", 5.0)):
        records.write(replica_id, 1, lifetime_s)
        stamp(tmp_path, replica_id, 50_000.0)  # the storage's clock shows 1970
    assert live(records) == {"short", "long", "own"}
    clock.now += 10.9
    assert live(records) == {"short", "long"}
    clock.now += 0.2
    assert live(records) == {"long"}
    clock.now += 91.0
    assert live(records) == set()


@pytest.mark.parametrize("written_at", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z"])
def test_the_clocks_of_writers_do_not_matter(written_at: str, tmp_path: Path) -> None:
    records_of(tmp_path).write("other", 1, 30.0)
    path = tmp_path / "replicas/other.json"
    year = written_at[:4]
    text = path.read_text()
    path.write_text(text.replace(text.split('"written_at":"')[1][:4], year))
    assert year in path.read_text()
    reader = records_of(tmp_path)
    reader.write("own", 1, 30.0)
    assert live(reader) == {"other", "own"}
    now = time.time()
    stamp(tmp_path, "other", now - 40.0)
    stamp(tmp_path, "own", now)
    assert live(reader) == {"own"}


def test_who_writes_no_record_goes_by_its_own_clock(tmp_path: Path) -> None:
    records_of(tmp_path).write("a", 1, 30.0)
    assert live(records_of(tmp_path)) == {"a"}
    stamp(tmp_path, "a", time.time() - 40.0)
    assert live(records_of(tmp_path)) == set()


def test_only_records_that_changed_are_read_again(tmp_path: Path) -> None:
    files = WatchedFiles(ObjectFiles(str(tmp_path)), watch)
    reader, writer = ReplicaRecords(files), records_of(tmp_path)
    for replica_id in ("a", "b"):
        writer.write(replica_id, 1, 30.0)
    reader.all()
    files.operations.clear()
    reader.all()
    assert files.operations == ["list replicas"]
    writer.write("b", 2, 30.0)
    assert [one.record.revision for one in reader.all()] == [1, 2]
    assert files.operations[1:] == ["list replicas", "get replicas/b.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b'{"format_version":2}', b'{"replica_id":"../x","revision":1,"lifetime_s":1}'],
)
def test_a_record_that_says_nothing_we_understand_is_left_out(content: bytes, tmp_path: Path) -> None:
    records = records_of(tmp_path)
    records.write("a", 1, 30.0)
    (tmp_path / "replicas/b.json").write_bytes(content)
    assert live(records) == {"a"}


def test_a_record_under_another_name_is_left_out(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    records.write("a", 1, 30.0)
    (tmp_path / "replicas/b.json").write_bytes((tmp_path / "replicas/a.json").read_bytes())
    assert [one.record.replica_id for one in records.all()] == ["a"]


def test_records_of_the_dead_are_removed_after_a_while(tmp_path: Path) -> None:
    records = records_of(tmp_path)
    now = time.time()
    for replica_id, age_s in (("dead", 200.0), ("lapsed", 100.0), ("own", 0.0)):
        records.write(replica_id, 1, 30.0)
        stamp(tmp_path, replica_id, now - age_s)
    assert records.collect(keep_s=100.0) == 1
    assert [one.record.replica_id for one in records.all()] == ["lapsed", "own"]
    assert live(records) == {"own"}


# -- the service -----------------------------------------------------------------------------------------


@contextmanager
def replica(
    store: ModelStore, backbone: Backbone, hook: Hook = watch, **changes: object
) -> Iterator[TestClient]:
    files = WatchedFiles(ObjectFiles(store.url), hook)
    settings = Settings(store=store.url, **{"store_poll_s": 0.0, "replica_heartbeat_s": 10.0, **changes})
    app = create_app(settings, backbone, ModelStore(store.url, files=files))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def join(tiny_store: ModelStore, tiny_backbone: Backbone) -> Iterator[Join]:
    """`join(store_poll_s=0.02)`: another replica of the tiny store, until the test ends."""
    with ExitStack() as replicas:

        def start(hook: Hook = watch, **changes: object) -> TestClient:
            return replicas.enter_context(replica(tiny_store, tiny_backbone, hook, **changes))

        yield start


def wait_until(is_so: Callable[[], bool], longest_s: float = 30.0) -> None:
    ends_at = time.monotonic() + longest_s
    while not is_so():
        assert time.monotonic() < ends_at, f"it did not become so within {longest_s:g} s"
        time.sleep(0.01)


def listed(client: TestClient) -> list[dict[str, Any]]:
    response = client.get("/replicas")
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()
    return found


def test_replicas_know_of_each_other_from_their_start_to_their_end(
    join: Join, tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    first = join(replica_address="http://first:8000")
    with replica(tiny_store, tiny_backbone) as second:
        for client in (first, second):
            assert len(listed(client)) == 2
            assert [one["is_this"] for one in listed(client)].count(True) == 1
            assert all(one["is_live"] and one["revision"] == 1 for one in listed(client))
        assert {one["address"] for one in listed(second)} == {"http://first:8000", None}
    (left,) = listed(first)
    assert left["is_this"]


def test_a_replica_tells_at_once_that_it_serves_another_revision(join: Join, make_module: MakeModule) -> None:
    first, second = join(), join(replica_heartbeat_s=3600.0)
    assert second.post("/tasks", content=make_module("birds")).status_code == 201
    wait_until(lambda: [one["revision"] for one in listed(first) if not one["is_this"]] == [2])


def test_without_heartbeats_nothing_is_written(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with replica(tiny_store, tiny_backbone, replica_heartbeat_s=0.0) as client:
        assert client.post("/tasks", content=make_module("birds")).status_code == 201
        assert listed(client) == []
    assert not (Path(tiny_store.url) / "replicas").exists()


def test_heartbeats_are_for_object_stores_unless_asked_for() -> None:
    assert Settings(store="a/folder").heartbeat_s == Settings(store="file:///a/folder").heartbeat_s == 0.0
    assert Settings(store="s3://bucket/models").heartbeat_s == 10.0
    assert Settings(store="s3://bucket/models", replica_heartbeat_s=0.0).heartbeat_s == 0.0
    assert Settings(store="a/folder", replica_heartbeat_s=5.0).heartbeat_s == 5.0


def test_a_store_that_takes_no_writes_is_served_and_said_so_once(
    join: Join, tiny_store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Outage(is_on=True, only="overwrite")
    client = join(outage, replica_heartbeat_s=0.01, store_poll_s=0.01)
    tiny_store.publish(lambda _: {}, "something new")
    wait_until(lambda: client.get("/tasks").json()["revision"] == 2)
    assert listed(client) == []
    assert "\ntosca_replica_record_fault 1.0\n" in client.get("/metrics").text
    said = [one for one in caplog.records if "other replicas do not know of this one" in one.message]
    assert len(said) == 1
    outage.is_on = False
    wait_until(lambda: len(listed(client)) == 1)
    assert "\ntosca_replica_record_fault 0.0\n" in client.get("/metrics").text


def test_records_left_behind_are_collected_by_who_starts(join: Join, tiny_store: ModelStore) -> None:
    tiny_store.replicas.write("left-behind", 1, 1.0)
    stamp(Path(tiny_store.url), "left-behind", time.time() - 7200.0)
    (only,) = listed(join())
    assert only["is_this"]


def test_records_that_may_not_be_removed_stay_and_nothing_else_happens(
    join: Join, tiny_store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_store.replicas.write("left-behind", 1, 1.0)
    stamp(Path(tiny_store.url), "left-behind", time.time() - 7200.0)
    client = join(Outage(is_on=True, only="delete"))
    assert [one["is_live"] for one in listed(client)].count(True) == 1
    assert len(listed(client)) == 2
    assert "\ntosca_replica_record_fault 0.0\n" in client.get("/metrics").text
    assert "stay: no answer" in caplog.text


def test_a_replica_knows_of_itself_what_its_record_does_not_say_yet(
    join: Join, make_module: MakeModule
) -> None:
    outage = Outage(only="overwrite")
    client = join(outage)
    outage.is_on = True
    assert client.post("/tasks", content=make_module("birds")).status_code == 201
    assert [one["revision"] for one in listed(client)] == [2]


def test_the_lag_counts_revisions_that_are_known_and_not_served(join: Join, tiny_store: ModelStore) -> None:
    outage = Outage(only="get revisions/")
    client = join(outage, store_poll_s=0.01)
    outage.is_on = True
    for _ in range(3):
        tiny_store.publish(lambda _: {}, "not to be read yet")
    wait_until(lambda: "\ntosca_revision_lag 3.0\n" in client.get("/metrics").text)
    outage.is_on = False
    wait_until(lambda: "\ntosca_revision_lag 0.0\n" in client.get("/metrics").text)


# -- wait=all --------------------------------------------------------------------------------------------


def ids(standing: dict[str, Any], which: str) -> set[str]:
    return {one["replica_id"] for one in standing[which]}


def own_id(client: TestClient) -> str:
    (own,) = [one["replica_id"] for one in listed(client) if one["is_this"]]
    assert isinstance(own, str)
    return own


def test_a_change_that_waits_is_answered_when_every_replica_serves_it(
    join: Join, make_module: MakeModule
) -> None:
    """Adding, replacing, adding the same again, removing and rolling back."""
    first = join()
    others = [join(store_poll_s=0.05) for _ in range(2)]
    everybody = {own_id(one) for one in (first, *others)}
    changes = [
        lambda: first.post("/tasks", params={"wait": "all"}, content=make_module("birds", seed=1)),
        lambda: first.post("/tasks", params={"wait": "all"}, content=make_module("birds", seed=2)),
        lambda: first.post("/tasks", params={"wait": "all"}, content=make_module("birds", seed=2)),
        lambda: first.delete("/tasks/birds", params={"wait": "all"}),
        lambda: first.post("/revisions/2/rollback", params={"wait": "all"}),
    ]
    expected = [(201, 2), (201, 3), (200, 3), (200, 4), (200, 5)]
    for change, (status, revision) in zip(changes, expected, strict=True):
        response = change()
        assert (response.status_code, response.json()["revision"]) == (status, revision), response.text
        assert response.headers["x-revision"] == str(revision)
        standing = response.json()["replicas"]
        assert (standing["all_serve"], standing["behind"], standing["fault"]) == (True, [], None)
        assert ids(standing, "serving") == everybody
        answers = {one.post("/predict", content=PICTURE).text for one in (first, *others) if revision != 4}
        assert len(answers) <= 1
        assert all(one.get("/tasks").json()["revision"] == revision for one in others)


def test_a_change_that_waited_in_vain_is_done_and_says_who_is_behind(
    join: Join, make_module: MakeModule
) -> None:
    first, second = join(replica_wait_s=2.0), join()  # which does not follow
    response = first.post("/tasks", params={"wait": "all"}, content=make_module("birds"))
    assert response.status_code == 201
    standing = response.json()["replicas"]
    assert standing["all_serve"] is False
    assert (ids(standing, "serving"), ids(standing, "behind")) == ({own_id(first)}, {own_id(second)})
    assert first.get("/tasks").json()["revision"] == 2


def test_a_request_waits_no_longer_than_it_may_take(join: Join, make_module: MakeModule) -> None:
    """Without its own deadline this would wait for an hour. On a slow machine the change takes all of it."""
    first = join(replica_wait_s=3600.0)
    join()
    timeout = {"x-request-timeout": "0.5"}
    response = first.post("/tasks", params={"wait": "all"}, content=make_module("birds"), headers=timeout)
    assert response.status_code == 201
    assert response.json()["replicas"]["all_serve"] is False


def test_a_replica_that_lapses_is_waited_for_no_more(
    join: Join, tiny_store: ModelStore, make_module: MakeModule
) -> None:
    tiny_store.replicas.write("killed", 1, 1.0)
    first = join(replica_wait_s=60.0)
    response = first.post("/tasks", params={"wait": "all"}, content=make_module("birds"))
    assert response.json()["replicas"]["all_serve"] is True
    assert [one["is_live"] for one in listed(first) if one["replica_id"] == "killed"] == [False]


def test_where_records_cannot_be_read_the_change_is_done_and_says_so(
    join: Join, make_module: MakeModule
) -> None:
    outage = Outage(only="list replicas")
    client = join(outage, replica_wait_s=2.0)
    outage.is_on = True
    response = client.post("/tasks", params={"wait": "all"}, content=make_module("birds"))
    assert response.status_code == 201
    standing = response.json()["replicas"]
    assert (standing["all_serve"], standing["serving"], standing["behind"]) == (False, [], [])
    assert "away" in standing["fault"]
    assert client.get("/replicas").status_code == 503


def test_waiting_for_replicas_that_nobody_knows_is_refused_before_anything_is_done(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with replica(tiny_store, tiny_backbone, replica_heartbeat_s=0.0) as client:
        refused = client.post("/tasks", params={"wait": "all"}, content=make_module("birds"))
        assert refused.status_code == 422
        assert "TOSCA_REPLICA_HEARTBEAT_S" in refused.json()["detail"]
        assert client.get("/tasks").json()["revision"] == 1


def test_a_dry_run_waits_for_nobody(join: Join, make_module: MakeModule) -> None:
    first = join(replica_wait_s=3600.0)
    join()
    params = {"wait": "all", "dry_run": "true"}
    response = first.post("/tasks", params=params, content=make_module("birds"))
    assert (response.status_code, response.json()["replicas"]) == (200, None)


def test_who_starts_serves_what_was_published_before_its_record_was_seen(
    join: Join, tiny_store: ModelStore
) -> None:
    """A revision that appears between the loading of the bank and the first record is taken over at once."""

    def publish_meanwhile(number: int, moment: str, what: str) -> None:
        if moment == "after" and what.startswith("overwrite replicas/") and tiny_store.head_number() == 1:
            tiny_store.publish(lambda _: {}, "just before the record was seen")

    assert join(publish_meanwhile).get("/tasks").json()["revision"] == 2
