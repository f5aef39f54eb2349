"""A store whose files are damaged: what was changed is found out and named, and files beside them do no harm."""

import itertools
import json
from pathlib import Path

import pytest
from stores import SHA

from model_store.backbone import BackboneArtefact
from model_store.errors import CorruptStore
from model_store.revision import read_log_file
from model_store.store import ModelStore, with_task


def test_a_damaged_module_is_refused(tiny_store: ModelStore) -> None:
    sha256 = tiny_store.put_module(b"module")
    (Path(tiny_store.url) / f"modules/{sha256}.safetensors").write_bytes(b"modulE")
    with pytest.raises(CorruptStore, match=f"module {sha256} reads back with SHA-256"):
        tiny_store.module(sha256)


def test_damaged_backbone_weights_are_refused(
    tiny_store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    fingerprint = tiny_artefact.manifest.fingerprint
    weights = Path(tiny_store.url) / f"backbones/{fingerprint}/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptStore, match="backbone weights have SHA-256"):
        tiny_store.backbone(fingerprint)
    weights.unlink()
    with pytest.raises(CorruptStore, match="has a manifest but no weights"):
        tiny_store.backbone(fingerprint)


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b'{"format_version": 2}', b"\xff\xfe"])
def test_a_damaged_backbone_manifest_is_refused(
    content: bytes, tiny_store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    fingerprint = tiny_artefact.manifest.fingerprint
    (Path(tiny_store.url) / f"backbones/{fingerprint}/manifest.json").write_bytes(content)
    with pytest.raises(CorruptStore, match="is no backbone manifest"):
        tiny_store.backbone(fingerprint)


def test_a_manifest_under_another_name_is_refused(
    tiny_store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    tiny_store._files.put_new(
        f"backbones/{SHA}/manifest.json", tiny_artefact.manifest.model_dump_json().encode()
    )
    with pytest.raises(CorruptStore, match=f"describes backbone {tiny_artefact.manifest.fingerprint}"):
        tiny_store.backbone_manifest(SHA)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 40, b"[]", b'{"number": 1}', b"\xff", b"[" * 10_000],
    ids=["empty", "zeros", "list", "incomplete", "not UTF-8", "nested"],
)
def test_an_unreadable_revision_is_a_corrupt_store(content: bytes, tiny_store: ModelStore) -> None:
    (Path(tiny_store.url) / "revisions/000000000001.json").write_bytes(content)
    with pytest.raises(CorruptStore, match="revision 1 cannot be read"):
        tiny_store.head()


def test_a_revision_under_another_number_is_a_corrupt_store(tiny_store: ModelStore) -> None:
    first = Path(tiny_store.url) / "revisions/000000000001.json"
    (first.parent / "000000000002.json").write_bytes(first.read_bytes())
    with pytest.raises(CorruptStore, match="revision 2 calls itself 1"):
        tiny_store.head()


@pytest.mark.parametrize("field", ["task name", "digest", "unknown field"])
def test_a_revision_with_a_hostile_content_is_a_corrupt_store(field: str, tiny_store: ModelStore) -> None:
    path = Path(tiny_store.url) / "revisions/000000000001.json"
    content = json.loads(path.read_bytes())
    del content["digest"]
    content |= {
        "task name": {"tasks": {"../x": SHA}},
        "digest": {"tasks": {"birds": "../../etc/passwd"}},
        "unknown field": {"command": "rm"},
    }[field]
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptStore, match="revision 1 cannot be read"):
        tiny_store.head()


def test_a_revision_without_a_digest_is_read(tiny_store: ModelStore) -> None:
    """Revisions of before there was one."""
    written = tiny_store.publish(with_task("birds", SHA), 'a "reason",\n  "digest": "x')
    path = Path(tiny_store.url) / "revisions/000000000002.json"
    content = json.loads(path.read_bytes())
    assert len(content.pop("digest")) == 64
    path.write_text(json.dumps(content))
    assert tiny_store.revision(2) == written


def test_every_flipped_bit_of_a_revision_is_found_out(tiny_store: ModelStore) -> None:
    tiny_store.publish(with_task("birds", SHA), "a reason")
    data = (Path(tiny_store.url) / "revisions/000000000002.json").read_bytes()
    assert read_log_file(data) == tiny_store.revision(2)
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        with pytest.raises(ValueError):
            read_log_file(bytes(flipped))


def test_other_files_beside_the_revisions_are_ignored(tiny_store: ModelStore) -> None:
    for name in ("README.md", "000000000009.json.tmp", "latest.json", ".000000000007.json.swp"):
        (Path(tiny_store.url) / "revisions" / name).write_text("{}")
    assert tiny_store.head_number() == 1
