"""The model store, on a local folder and on an S3 server: nothing is lost, nothing is overwritten."""

import datetime
import itertools
import json
import os
import socket
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_files import WatchedFiles, watch
from moto.server import ThreadedMotoServer

from model_store.backbone import BackboneArtefact
from model_store.errors import (
    Conflict,
    CorruptStore,
    StoreUnavailable,
    UnknownBackbone,
    UnknownModule,
    UnknownRevision,
    UnknownTask,
)
from model_store.object_files import ObjectFiles
from model_store.revision import Revision, read_log_file
from model_store.store import ModelStore, with_task, without_task

SHA = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store."""
    if request.param == "folder":
        return str(tmp_path / "store")
    endpoint = request.getfixturevalue("s3_endpoint")
    request.getfixturevalue("s3_credentials")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    bucket = f"tosca-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"))
    return f"s3://{bucket}/models"


@pytest.fixture
def store(url: str, tiny_artefact: BackboneArtefact) -> ModelStore:
    """A store with the tiny backbone, at revision 1."""
    store = ModelStore(url, author="tests")
    store.publish_first(store.put_backbone(tiny_artefact))
    return store


@pytest.fixture
def local(tmp_path: Path, tiny_artefact: BackboneArtefact) -> ModelStore:
    store = ModelStore(tmp_path / "local")
    store.publish_first(store.put_backbone(tiny_artefact))
    return store


def other_backbone(artefact: BackboneArtefact) -> BackboneArtefact:
    """The same weights with another crop: another fingerprint."""
    preprocessing = artefact.manifest.preprocessing.model_copy(update={"crop_fraction": 0.5})
    return BackboneArtefact(
        artefact.manifest.model_copy(update={"preprocessing": preprocessing}), artefact.weights
    )


# -- modules and backbones ---------------------------------------------------------------------------


def test_a_module_reads_back_as_it_was_put(store: ModelStore) -> None:
    data = b"module" * 1000
    sha256 = store.put_module(data)
    assert store.module(sha256) == data


def test_putting_the_same_module_again_changes_nothing(store: ModelStore) -> None:
    assert store.put_module(b"same") == store.put_module(b"same")
    assert store.module(store.put_module(b"same")) == b"same"
    assert store.put_module(b"other") != store.put_module(b"same")


def test_an_object_that_exists_is_never_overwritten(store: ModelStore) -> None:
    assert store._files.put_new("modules/x", b"first") is True
    assert store._files.put_new("modules/x", b"second") is False
    assert store._files.get("modules/x") == b"first"


@pytest.mark.parametrize("is_new", [True, False], ids=["written now", "written by one who was killed"])
def test_what_is_put_is_flushed_with_every_folder_that_leads_to_it(
    is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    root = tmp_path / "store"
    files = ObjectFiles(str(root))
    path = root / "modules/a/x"
    if not is_new:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"whole")
    assert files.put_new("modules/a/x", b"whole") is is_new
    assert flushed == [one.stat().st_ino for one in (path, root / "modules/a", root / "modules", root)]


def test_records_of_replicas_alone_are_overwritten_and_removed(store: ModelStore) -> None:
    """In folders and on S3: overwritten, listed with the storage's time, read again when changed, removed."""
    store.replicas.write("a", 1, 30.0)
    store.replicas.write("b", 1, 30.0)
    other = ModelStore(store.url)
    assert [(one.record.revision, one.is_live) for one in other.replicas.all()] == [(1, True)] * 2
    store.replicas.write("a", 2, 30.0, "http://a")
    assert [one.record.revision for one in other.replicas.all()] == [2, 1]
    assert all(one.age_s < 30.0 for one in store.replicas.all())
    store.replicas.remove("a")
    store.replicas.remove("never there")
    assert [one.record.replica_id for one in other.replicas.all()] == ["b"]


def test_an_unknown_module_is_named(store: ModelStore) -> None:
    with pytest.raises(UnknownModule, match=f"holds no module {SHA}"):
        store.module(SHA)


def test_a_backbone_reads_back_as_it_was_put(store: ModelStore, tiny_artefact: BackboneArtefact) -> None:
    fingerprint = tiny_artefact.manifest.fingerprint
    assert store.backbone(fingerprint) == tiny_artefact
    assert store.backbone_manifest(fingerprint) == tiny_artefact.manifest
    assert store.put_backbone(tiny_artefact) == fingerprint
    assert store.backbones() == [tiny_artefact.manifest]


def test_an_unknown_backbone_is_named(store: ModelStore) -> None:
    with pytest.raises(UnknownBackbone, match=f"holds no backbone {SHA}"):
        store.backbone(SHA)
    with pytest.raises(UnknownBackbone):
        store.publish_first(SHA)


def test_a_backbone_without_manifest_is_not_listed(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    """A crash between the weights and the manifest leaves this."""
    store._files.put_new(f"backbones/{SHA}/weights.safetensors", b"half")
    assert store.backbones() == [tiny_artefact.manifest]


def test_a_corrupt_backbone_is_not_kept(store: ModelStore, tiny_artefact: BackboneArtefact) -> None:
    broken = BackboneArtefact(tiny_artefact.manifest, tiny_artefact.weights[:-1])
    with pytest.raises(CorruptStore, match="backbone weights have SHA-256"):
        store.put_backbone(broken)


def test_an_empty_store_has_nothing(url: str) -> None:
    empty = ModelStore(url)
    assert empty.head() is None and empty.head_number() == 0
    assert empty.backbones() == [] and empty.revisions() == []
    with pytest.raises(UnknownRevision, match="has no backbone yet: run `tosca backbone add`"):
        empty.require_head()


# -- damaged files -----------------------------------------------------------------------------------


def test_a_damaged_module_is_refused(local: ModelStore) -> None:
    sha256 = local.put_module(b"module")
    (Path(local.url) / f"modules/{sha256}.safetensors").write_bytes(b"modulE")
    with pytest.raises(CorruptStore, match=f"module {sha256} reads back with SHA-256"):
        local.module(sha256)


def test_damaged_backbone_weights_are_refused(local: ModelStore, tiny_artefact: BackboneArtefact) -> None:
    fingerprint = tiny_artefact.manifest.fingerprint
    weights = Path(local.url) / f"backbones/{fingerprint}/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptStore, match="backbone weights have SHA-256"):
        local.backbone(fingerprint)
    weights.unlink()
    with pytest.raises(CorruptStore, match="has a manifest but no weights"):
        local.backbone(fingerprint)


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b'{"format_version": 2}', b"\xff\xfe"])
def test_a_damaged_backbone_manifest_is_refused(
    content: bytes, local: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    fingerprint = tiny_artefact.manifest.fingerprint
    (Path(local.url) / f"backbones/{fingerprint}/manifest.json").write_bytes(content)
    with pytest.raises(CorruptStore, match="is no backbone manifest"):
        local.backbone(fingerprint)


def test_a_manifest_under_another_name_is_refused(local: ModelStore, tiny_artefact: BackboneArtefact) -> None:
    local._files.put_new(f"backbones/{SHA}/manifest.json", tiny_artefact.manifest.model_dump_json().encode())
    with pytest.raises(CorruptStore, match=f"describes backbone {tiny_artefact.manifest.fingerprint}"):
        local.backbone_manifest(SHA)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 40, b"[]", b'{"number": 1}', b"\xff", b"[" * 10_000],
    ids=["empty", "zeros", "list", "incomplete", "not UTF-8", "nested"],
)
def test_an_unreadable_revision_is_a_corrupt_store(content: bytes, local: ModelStore) -> None:
    (Path(local.url) / "revisions/000000000001.json").write_bytes(content)
    with pytest.raises(CorruptStore, match="revision 1 cannot be read"):
        local.head()


def test_a_revision_under_another_number_is_a_corrupt_store(local: ModelStore) -> None:
    first = Path(local.url) / "revisions/000000000001.json"
    (first.parent / "000000000002.json").write_bytes(first.read_bytes())
    with pytest.raises(CorruptStore, match="revision 2 calls itself 1"):
        local.head()


@pytest.mark.parametrize("field", ["task name", "digest", "unknown field"])
def test_a_revision_with_a_hostile_content_is_a_corrupt_store(field: str, local: ModelStore) -> None:
    path = Path(local.url) / "revisions/000000000001.json"
    content = json.loads(path.read_bytes())
    del content["digest"]
    content |= {
        "task name": {"tasks": {"../x": SHA}},
        "digest": {"tasks": {"birds": "../../etc/passwd"}},
        "unknown field": {"command": "rm"},
    }[field]
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptStore, match="revision 1 cannot be read"):
        local.head()


def test_a_revision_without_a_digest_is_read(local: ModelStore) -> None:
    """Revisions of before there was one."""
    written = local.publish(with_task("birds", SHA), 'a "reason",\n  "digest": "x')
    path = Path(local.url) / "revisions/000000000002.json"
    content = json.loads(path.read_bytes())
    assert len(content.pop("digest")) == 64
    path.write_text(json.dumps(content))
    assert local.revision(2) == written


def test_every_flipped_bit_of_a_revision_is_found_out(local: ModelStore) -> None:
    local.publish(with_task("birds", SHA), "a reason")
    data = (Path(local.url) / "revisions/000000000002.json").read_bytes()
    assert read_log_file(data) == local.revision(2)
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        with pytest.raises(ValueError):
            read_log_file(bytes(flipped))


def test_other_files_beside_the_revisions_are_ignored(local: ModelStore) -> None:
    for name in ("README.md", "000000000009.json.tmp", "latest.json", ".000000000007.json.swp"):
        (Path(local.url) / "revisions" / name).write_text("{}")
    assert local.head_number() == 1


# -- revisions ---------------------------------------------------------------------------------------


def test_the_first_revision_has_a_backbone_and_no_tasks(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    head = store.require_head()
    assert (head.number, head.parent, dict(head.tasks)) == (1, None, {})
    assert head.backbone_fingerprint == tiny_artefact.manifest.fingerprint
    assert head.author == "tests"
    assert head.created_at.tzinfo is not None
    assert head.created_at <= datetime.datetime.now(datetime.UTC)


def test_publishing_adds_the_next_revision(store: ModelStore) -> None:
    second = store.publish(with_task("birds", SHA), "a reason")
    assert (second.number, second.parent, dict(second.tasks)) == (2, 1, {"birds": SHA})
    assert second.reason == "a reason"
    assert store.head() == second == store.revision(2)
    third = store.publish(with_task("ants", SHA), "another")
    assert list(third.tasks) == ["ants", "birds"]
    assert store.revision(2) == second


def test_another_process_sees_the_same_revisions(store: ModelStore) -> None:
    store.publish(with_task("birds", SHA), "")
    assert ModelStore(store.url).revisions() == store.revisions()


def test_revisions_are_listed_newest_first_without_gaps(store: ModelStore) -> None:
    for i in range(6):
        store.publish(with_task(f"task{i}", SHA), f"{i}")
    assert [one.number for one in store.revisions()] == [7, 6, 5, 4, 3, 2, 1]
    assert [one.number for one in store.revisions(limit=3)] == [7, 6, 5]


def test_the_head_is_found_from_any_known_number(store: ModelStore) -> None:
    for i in range(12):
        store.publish(with_task(f"task{i}", SHA), "")
    assert {store.head_number(known) for known in range(14)} == {13}


def test_looking_for_something_new_is_one_small_request(local: ModelStore) -> None:
    """However long the log is; behind it, steps that double and halve find the newest."""
    for number in range(2, 6):
        local.publish(lambda revision, number=number: {f"task{number}": SHA}, "test")
    files = WatchedFiles(ObjectFiles(local.url), watch)
    store = ModelStore(local.url, files=files)
    assert store.head_number(known=5) == 5
    assert files.operations == ["head revisions/000000000006.json"]
    for _ in range(2):
        local.publish(lambda _: {}, "something new")
    files.operations.clear()
    assert store.head_number(known=5) == 7
    assert files.operations == [f"head revisions/{number:012}.json" for number in (6, 8, 7)]


def test_the_end_of_a_long_log_takes_few_requests(tmp_path: Path) -> None:
    class Long(ObjectFiles):
        num_asked = 0

        def exists(self, path: str) -> bool:
            self.num_asked += 1
            return int(Path(path).stem) <= 123_456

        def names(self, folder: str, after: str | None = None) -> Iterator[str]:
            yield from (f"{number:012}.json" for number in range(1, 1001))
            raise AssertionError("only the first page is listed")

    files = Long(str(tmp_path))
    assert ModelStore(str(tmp_path), files=files).head_number() == 123_456
    assert 0 < files.num_asked < 40


@pytest.mark.parametrize("number", [0, -1, 2, 10**15])
def test_an_unknown_revision_is_named(number: int, store: ModelStore) -> None:
    with pytest.raises(UnknownRevision, match=f"has no revision {number}"):
        store.revision(number)


def test_removing_an_unknown_task_is_refused(store: ModelStore) -> None:
    with pytest.raises(UnknownTask, match="task 'birds' is not active in revision 1"):
        store.publish(without_task("birds"), "")
    assert store.head_number() == 1


def test_a_removed_task_comes_back_with_the_old_set(store: ModelStore) -> None:
    with_birds = store.publish(with_task("birds", SHA), "")
    removed = store.publish(without_task("birds"), "")
    assert dict(removed.tasks) == {}
    back = store.publish(lambda _: with_birds.tasks, "roll back to revision 2")
    assert (back.number, dict(back.tasks)) == (4, {"birds": SHA})


def test_publishing_on_a_stale_parent_is_a_conflict(store: ModelStore) -> None:
    first = store.require_head()
    store.publish(with_task("birds", SHA), "")
    with pytest.raises(Conflict, match="revision 2 was published by another writer meanwhile"):
        store.publish_after(first, {"cars": SHA}, None, "")
    assert dict(store.require_head().tasks) == {"birds": SHA}


def test_a_writer_that_lost_the_race_applies_its_change_to_the_new_head(store: ModelStore) -> None:
    def late(revision: Revision) -> dict[str, str]:
        if revision.number == 1:
            ModelStore(store.url).publish(with_task("birds", SHA), "faster")
        return {**revision.tasks, "cars": SHA}

    assert dict(store.publish(late, "slower").tasks) == {"birds": SHA, "cars": SHA}


def test_a_writer_that_always_loses_gives_up(store: ModelStore) -> None:
    rival = ModelStore(store.url)

    def overtaken(revision: Revision) -> dict[str, str]:
        rival.publish(with_task(f"task{revision.number}", SHA), "")
        return dict(revision.tasks)

    with pytest.raises(Conflict, match="gave up after 3 attempts"):
        store.publish(overtaken, "", attempts=3)


def test_no_change_of_two_racing_writers_is_lost(store: ModelStore) -> None:
    barrier = threading.Barrier(2)

    def write(writer: str) -> None:
        opened = ModelStore(store.url, author=writer)
        barrier.wait()
        for i in range(20):
            opened.publish(with_task(f"{writer}-{i}", SHA), f"{writer} {i}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["a", "b"]))
    revisions = store.revisions()
    assert [one.number for one in revisions] == list(range(41, 0, -1))
    assert set(revisions[0].tasks) == {f"{writer}-{i}" for writer in "ab" for i in range(20)}
    for newer, older in itertools.pairwise(revisions):
        assert len(newer.tasks) == len(older.tasks) + 1 and older.tasks.items() <= newer.tasks.items()


# -- the backbone of a store -------------------------------------------------------------------------


def test_publishing_the_same_backbone_again_changes_nothing(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    store.publish(with_task("birds", SHA), "")
    assert store.publish_first(tiny_artefact.manifest.fingerprint).number == 2
    assert store.head_number() == 2


def test_the_backbone_may_change_while_no_task_is_active(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    fingerprint = store.put_backbone(other_backbone(tiny_artefact))
    changed = store.publish_first(fingerprint)
    assert (changed.number, changed.backbone_fingerprint, dict(changed.tasks)) == (2, fingerprint, {})
    assert {one.fingerprint for one in store.backbones()} == {fingerprint, tiny_artefact.manifest.fingerprint}


def test_the_backbone_may_not_change_under_active_tasks(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    store.publish(with_task("birds", SHA), "")
    fingerprint = store.put_backbone(other_backbone(tiny_artefact))
    with pytest.raises(Conflict, match=r"the 1 active tasks of .* belong to backbone"):
        store.publish_first(fingerprint)
    assert store.require_head().backbone_fingerprint == tiny_artefact.manifest.fingerprint


# -- opening -----------------------------------------------------------------------------------------


def test_a_folder_is_created_and_found_under_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_artefact: BackboneArtefact
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    ModelStore("new/store").put_module(b"module")
    assert len(list((tmp_path / "new/store/modules").iterdir())) == 1
    sha256 = ModelStore("~/new/store").put_module(b"module")
    for spelling in (tmp_path / "new/store", f"file://{tmp_path}/new/store", "./new/../new/store"):
        assert ModelStore(spelling).module(sha256) == b"module"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        ModelStore(tmp_path / "file")


@pytest.mark.parametrize("url", ["ftp://host/x", "nonsense://x", "s3://", "://"])
def test_an_unusable_url_is_refused(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        ModelStore(url)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_unavailable(local: ModelStore) -> None:
    modules = Path(local.url) / "modules"
    modules.mkdir(exist_ok=True)
    modules.chmod(0o500)
    try:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            local.put_module(b"module")
    finally:
        modules.chmod(0o700)


def test_a_folder_that_is_in_the_way_is_unavailable(local: ModelStore) -> None:
    (Path(local.url) / "modules").write_text("a file where a folder should be")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        local.put_module(b"module")


def test_a_bucket_that_is_not_there_is_unavailable(
    s3_endpoint: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with pytest.raises(StoreUnavailable, match="s3://no-such-bucket/models does not answer"):
        ModelStore("s3://no-such-bucket/models").put_module(b"module")


def test_an_endpoint_that_may_not_be_used_is_unavailable(
    s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreUnavailable, match="s3://bucket/models does not answer"):
        ModelStore("s3://bucket/models").head()


@pytest.mark.slow  # obstore tries ten times, with growing pauses
def test_an_endpoint_that_is_not_there_is_unavailable(
    s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound but not listening: every connection is refused at once
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StoreUnavailable, match="s3://bucket/models does not answer") as refusal:
            ModelStore("s3://bucket/models").head()
    assert "\n" not in str(refusal.value)


def test_a_path_that_no_folder_can_have_is_no_store() -> None:
    with pytest.raises(StoreUnavailable, match="File name too long"):
        ModelStore("a" * 300)


def test_a_relative_store_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    files = ObjectFiles("store")
    monkeypatch.chdir(tmp_path / "there")
    assert files.put_new("modules/a", b"data")
    assert (tmp_path / "here/store/modules/a").read_bytes() == b"data"
