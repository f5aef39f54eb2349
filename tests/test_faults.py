"""What goes wrong outside, and what must hold all the same: nothing acknowledged is lost, old answers go on."""

import hashlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from faulty_files import Hook, Moment, Outage, WatchedFiles, failing_at, watch
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.errors import CorruptStore, StoreUnavailable
from model_store.object_files import ObjectFiles
from model_store.publishing import Publisher
from model_store.revision import Revision
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURE = encoded(noise())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def birds(make_module: MakeModule) -> bytes:
    return make_module("birds", seed=1)


@pytest.fixture
def cars(make_module: MakeModule) -> bytes:
    return make_module("cars", seed=2)


@pytest.fixture
def store(tiny_store: ModelStore, birds: bytes) -> ModelStore:
    """Revision 2 has the task birds."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(birds)), "add birds")
    return tiny_store


def opened(store: ModelStore, hook: Hook) -> tuple[ModelStore, WatchedFiles]:
    files = WatchedFiles(ObjectFiles(store.url), hook)
    return ModelStore(store.url, files=files), files


def copy_of(store: ModelStore, folder: Path) -> ModelStore:
    shutil.copytree(store.url, folder)
    return ModelStore(folder)


def operations_of_a_registration(store: ModelStore, data: bytes, scratch: Path) -> list[str]:
    """What a registration asks of the storage, from opening the store on."""
    watched, files = opened(copy_of(store, scratch), watch)
    Publisher(watched).register(data, force=True)
    return files.operations


# -- a registration that is interrupted ------------------------------------------------------------------


def test_a_registration_writes_the_module_and_then_its_revision(
    store: ModelStore, cars: bytes, tmp_path: Path
) -> None:
    operations = operations_of_a_registration(store, cars, tmp_path / "scratch")
    puts = [one for one in operations if one.startswith("put")]
    assert puts == [f"put modules/{digest(cars)}.safetensors", "put revisions/000000000003.json"]
    assert operations[-2:] == puts


def test_killed_at_any_step_a_registration_is_there_or_was_never_asked_for(
    store: ModelStore, birds: bytes, cars: bytes, tmp_path: Path
) -> None:
    """kill -9 before and after every operation: afterwards the old set or the new one, whole, and writable."""
    operations = operations_of_a_registration(store, cars, tmp_path / "scratch")
    module = tmp_path / "cars.safetensors"
    module.write_bytes(cars)
    left = tmp_path / "left"
    script = [sys.executable, Path(__file__).with_name("stopping_writer.py")]
    subprocess.run([*script, store.url, module, left, str(len(operations))], check=True, timeout=120)
    old, new = {"birds": digest(birds)}, {"birds": digest(birds), "cars": digest(cars)}
    found = {}
    for folder in left.iterdir():
        publisher = Publisher(ModelStore(folder))  # reads and checks every file
        found[folder.name] = dict(publisher.active.revision.tasks)
        publisher.register(cars, force=True)
        assert publisher.active.revision.tasks == new
        assert publisher.store.head_number() == 3
    last = len(operations) - 1
    assert {name for name, tasks in found.items() if tasks == new} == {f"{last}-after"}
    assert all(tasks in (old, new) for tasks in found.values())
    assert len(found) == 2 * len(operations)


@pytest.mark.parametrize("when", ["before", "after"])
def test_whatever_operation_fails_a_registration_happens_wholly_or_not_at_all(
    when: Moment, store: ModelStore, birds: bytes, cars: bytes, tmp_path: Path
) -> None:
    watched, files = opened(copy_of(store, tmp_path / "scratch"), watch)
    publisher = Publisher(watched)
    first = len(files.operations)
    publisher.register(cars, force=True)
    for failing in range(first, len(files.operations)):
        copied = copy_of(store, tmp_path / f"{failing}")
        watched, _ = opened(copied, failing_at(failing, when))
        publisher = Publisher(watched)
        before = publisher.active
        with pytest.raises(StoreUnavailable):
            publisher.register(cars, force=True)
        assert publisher.active is before
        whole = {"birds": digest(birds), "cars": digest(cars)}
        on_disk = Publisher(copied).active.revision.tasks
        assert on_disk in (before.revision.tasks, whole)
        publisher.register(cars, force=True)  # asked for again, it is there once
        assert publisher.active.revision.tasks == whole
        assert copied.head_number() == 3


# -- the store is away, full or read-only: the service goes on -------------------------------------------


@contextmanager
def service(store: ModelStore, backbone: Backbone, hook: Hook, **changes: object) -> Iterator[TestClient]:
    watched, _ = opened(store, hook)
    settings = Settings(store=store.url, **{"store_poll_s": 0.0, **changes})
    with TestClient(create_app(settings, backbone, watched), raise_server_exceptions=False) as client:
        yield client


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_so():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not become so within 12 s")


def test_while_the_store_is_away_answers_go_on_and_readiness_says_so(
    store: ModelStore, tiny_backbone: Backbone, cars: bytes
) -> None:
    outage = Outage()
    with service(store, tiny_backbone, outage, store_poll_s=0.01) as client:
        before = client.post("/predict", content=PICTURE).json()
        assert client.get("/health/ready").json()["is_stale"] is False
        outage.is_on = True
        wait_until(lambda: client.get("/health/ready").json()["is_stale"])
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert "away" in ready.json()["store_fault"]
        assert client.post("/predict", content=PICTURE).json() == before
        refused = client.post("/tasks", content=cars)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        other = ModelStore(store.url)
        other.publish(with_task("cars", other.put_module(cars)), "by another, meanwhile")
        outage.is_on = False
        wait_until(lambda: client.get("/tasks").json()["revision"] == 3)
        ready = client.get("/health/ready").json()
        assert (ready["is_stale"], ready["store_fault"]) == (False, None)


def test_a_store_that_takes_no_writes_refuses_changes_and_nothing_else(
    store: ModelStore, tiny_backbone: Backbone, cars: bytes
) -> None:
    with service(store, tiny_backbone, Outage(is_on=True, only="put")) as client:
        before = client.post("/predict", content=PICTURE).json()
        for response in (client.post("/tasks", content=cars), client.delete("/tasks/birds")):
            assert response.status_code == 503
            assert response.json()["type"] == "urn:tosca:problem:store-unavailable"
        assert client.get("/tasks").json()["revision"] == 2
        assert client.post("/predict", content=PICTURE).json() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_refuses_the_change_and_loses_nothing(
    store: ModelStore, small_disk: Path, birds: bytes, cars: bytes
) -> None:
    copied = copy_of(store, small_disk / "store")
    publisher = Publisher(copied)
    filler = small_disk / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"\0" * 2**16)
            file.flush()
    with pytest.raises(StoreUnavailable, match="No space"):
        publisher.register(cars, force=True)
    assert Publisher(copied).active.revision.tasks == {"birds": digest(birds)}
    assert not list(Path(copied.url).glob(f"modules/{digest(cars)}.safetensors"))
    filler.unlink()
    publisher.register(cars, force=True)
    assert Publisher(copied).active.revision.number == 3


@pytest.mark.slow
def test_a_read_only_disk_refuses_the_change_and_answers_on(
    store: ModelStore, small_disk: Path, tiny_backbone: Backbone, cars: bytes
) -> None:
    copied = copy_of(store, small_disk / "store")
    with TestClient(create_app(Settings(store=copied.url), tiny_backbone)) as client:
        before = client.post("/predict", content=PICTURE).json()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        assert client.post("/tasks", content=cars).status_code == 503
        assert client.post("/predict", content=PICTURE).json() == before
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert client.post("/tasks", content=cars, params={"force": True}).status_code == 201


# -- files that were damaged -----------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "another module": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_module_is_not_served_by_who_starts_and_not_taken_over_by_who_runs(
    damage: str, store: ModelStore, tiny_backbone: Backbone, cars: bytes
) -> None:
    with service(store, tiny_backbone, watch, store_poll_s=0.01) as client:
        sha256 = store.put_module(cars)
        path = Path(store.url) / f"modules/{sha256}.safetensors"
        path.write_bytes(DAMAGES[damage](cars))
        store.publish(with_task("cars", sha256), "a module that does not read back")
        wait_until(lambda: client.get("/health/ready").json()["store_fault"] is not None)
        assert sha256[:12] in client.get("/health/ready").json()["store_fault"]
        assert client.get("/tasks").json()["revision"] == 2
        assert client.post("/predict", content=PICTURE).status_code == 200
        with pytest.raises(CorruptStore, match=sha256):
            Publisher(ModelStore(store.url))
        path.write_bytes(cars)  # repaired
        wait_until(lambda: client.get("/tasks").json()["revision"] == 3)
        assert client.get("/health/ready").json()["is_stale"] is False


@pytest.mark.parametrize("content", [b"", b"{", b'{"number": 3}', b"\xff\xff"])
def test_a_damaged_revision_is_not_taken_over(
    content: bytes, store: ModelStore, tiny_backbone: Backbone
) -> None:
    with service(store, tiny_backbone, watch, store_poll_s=0.01) as client:
        (Path(store.url) / "revisions/000000000003.json").write_bytes(content)
        wait_until(lambda: client.get("/health/ready").json()["store_fault"] is not None)
        assert client.get("/tasks").json()["revision"] == 2
        assert client.post("/predict", content=PICTURE).status_code == 200


# -- clocks ----------------------------------------------------------------------------------------------


def test_a_wall_clock_that_jumps_changes_no_order(store: ModelStore, birds: bytes, cars: bytes) -> None:
    """Revisions are ordered by number: one from 1970 after one from 2100 is the newer."""
    head = store.require_head()
    for number, year, tasks in ((3, 2100, {}), (4, 1970, {"cars": store.put_module(cars)})):
        revision = Revision(
            number=number,
            backbone_fingerprint=head.backbone_fingerprint,
            tasks=tasks,
            reason="a clock that jumped",
            author="test",
            created_at=datetime(year, 1, 1, tzinfo=UTC),
        )
        (Path(store.url) / f"revisions/{number:012d}.json").write_text(revision.model_dump_json())
    publisher = Publisher(store)
    assert publisher.active.revision.number == 4
    publisher.register(birds, force=True)
    assert publisher.active.revision.number == 5
    assert set(publisher.active.revision.tasks) == {"birds", "cars"}


def test_only_dates_that_people_read_come_from_the_wall_clock() -> None:
    """Who may call it: log lines, revisions, tunings, the expiry of keys, which is a date by its nature, since
    when traffic is counted, how old `tosca doctor` says a revision is, and when a replica wrote its record."""
    allowed = {"service/audit.py", "service/logs.py", "service/keys.py", "model_store/store.py"}
    allowed |= {"model_store/measuring.py", "model_store/checkup.py", "service/traffic.py"}
    allowed |= {"model_store/replicas.py"}
    root = Path(__file__).parents[1]
    found = {
        str(path.relative_to(root))
        for package in ("service", "model_store")
        for path in (root / package).rglob("*.py")
        if any(call in path.read_text() for call in ("time.time(", "datetime.now(", "utcnow("))
    }
    assert found <= allowed
