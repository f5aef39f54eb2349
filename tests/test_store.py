"""The model store, on a local folder and on an S3 server: nothing is lost, nothing is overwritten."""

import os
import socket
from pathlib import Path

import pytest
from stores import SHA, s3_credentials, s3_endpoint, store, url

from model_store.backbone import BackboneArtefact
from model_store.errors import (
    Conflict,
    CorruptStore,
    StoreUnavailable,
    UnknownBackbone,
    UnknownModule,
    UnknownRevision,
)
from model_store.object_files import ObjectFiles
from model_store.store import ModelStore, with_task

__all__ = ["s3_credentials", "s3_endpoint", "store", "url"]  # fixtures


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


# -- the backbone of a store -------------------------------------------------------------------------


def other_backbone(artefact: BackboneArtefact) -> BackboneArtefact:
    """The same weights with another crop: another fingerprint."""
    preprocessing = artefact.manifest.preprocessing.model_copy(update={"crop_fraction": 0.5})
    return BackboneArtefact(
        artefact.manifest.model_copy(update={"preprocessing": preprocessing}), artefact.weights
    )


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
def test_a_read_only_folder_is_unavailable(tiny_store: ModelStore) -> None:
    modules = Path(tiny_store.url) / "modules"
    modules.mkdir(exist_ok=True)
    modules.chmod(0o500)
    try:
        with pytest.raises(StoreUnavailable, match="does not answer"):
            tiny_store.put_module(b"module")
    finally:
        modules.chmod(0o700)


def test_a_folder_that_is_in_the_way_is_unavailable(tiny_store: ModelStore) -> None:
    (Path(tiny_store.url) / "modules").write_text("a file where a folder should be")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        tiny_store.put_module(b"module")


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
