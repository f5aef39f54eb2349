"""Signatures of module files: who may vouch, and that nobody else gets a module in."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.errors import InvalidTrust, UntrustedModule
from model_store.publishing import Publisher
from model_store.signatures import (
    Signature,
    Signer,
    SignerList,
    Trust,
    make_private_key,
    public_text,
    read_private_key,
    sign,
)
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
CI, STRANGER = (read_private_key(make_private_key()) for _ in range(2))
SHA = hashlib.sha256(b"a module").hexdigest()


@pytest.fixture
def signers(tmp_path: Path) -> Path:
    path = tmp_path / "signers.json"
    listed = SignerList(signers=(Signer(name="ci", public_key=public_text(CI.public_key())),))
    path.write_text(listed.model_dump_json())
    return path


@pytest.fixture
def trust(signers: Path) -> Trust:
    return Trust.read(signers, is_required=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_trusted_signature_names_its_signer(trust: Trust) -> None:
    assert trust.signer_of(SHA, [sign(SHA, STRANGER), sign(SHA, CI)]) == "ci"


def test_a_signature_counts_for_its_module_its_key_and_its_bytes(trust: Trust) -> None:
    good, strange = sign(SHA, CI), sign(SHA, STRANGER)
    forged = [
        sign(digest(b"another"), CI),
        strange,
        strange.model_copy(update={"key_id": good.key_id}),
        good.model_copy(update={"signature": "A" * 86 + "=="}),
        good.model_copy(update={"signature": "!" * 88}),
        sign(digest(b"another"), CI).model_copy(update={"module_sha256": SHA}),
    ]
    for one in forged:
        with pytest.raises(UntrustedModule):
            trust.signer_of(SHA, [one])
    with pytest.raises(UntrustedModule):
        trust.signer_of(SHA, [])
    assert trust.signer_of(SHA, [*forged, good]) == "ci"


def test_where_none_is_required_an_unsigned_module_has_no_signer(signers: Path) -> None:
    trust = Trust.read(signers, is_required=False)
    assert trust.signer_of(SHA, [sign(SHA, STRANGER)]) is None
    assert trust.signer_of(SHA, [sign(SHA, CI)]) == "ci"


def test_a_signer_may_have_an_old_key_and_a_new_one(tmp_path: Path) -> None:
    keys = [CI, STRANGER]
    listed = SignerList(
        signers=tuple(Signer(name="ci", public_key=public_text(key.public_key())) for key in keys)
    )
    (tmp_path / "signers.json").write_text(listed.model_dump_json())
    trust = Trust.read(tmp_path / "signers.json", is_required=True)
    assert [trust.signer_of(SHA, [sign(SHA, key)]) for key in keys] == ["ci", "ci"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"signers": [{"name": "x", "public_key": "short"}]}',
        json.dumps({"signers": [{"name": "x", "public_key": "!" * 44}]}),
        json.dumps({"signers": [], "extra": 1}),
    ],
)
def test_a_list_of_signers_that_cannot_be_used_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "signers.json"
    path.write_text(content)
    with pytest.raises(InvalidTrust, match=r"signers\.json"):
        Trust.read(path, is_required=True)


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN PRIVATE KEY-----", b"\xff"])
def test_what_is_no_key_signs_nothing(pem: bytes) -> None:
    with pytest.raises(InvalidTrust):
        read_private_key(pem)


def test_a_required_signature_is_asked_of_files_and_of_the_store(
    tiny_store: ModelStore, trust: Trust, make_module: MakeModule
) -> None:
    publisher = Publisher(tiny_store, trust=trust)
    data = make_module("birds")
    before = publisher.active
    with pytest.raises(UntrustedModule):
        publisher.register(data)
    with pytest.raises(UntrustedModule):
        publisher.register(data, signature=sign(digest(data), STRANGER))
    assert publisher.active is before
    assert tiny_store.head_number() == 1
    publisher.register(data, signature=sign(digest(data), CI))
    assert publisher.active.bank.signers == {digest(data): "ci"}
    assert Publisher(tiny_store, trust=trust).active.bank.signers == {digest(data): "ci"}  # kept in the store
    publisher.remove("birds")
    assert publisher.active.bank.signers == {}
    publisher.rollback(2)
    assert publisher.active.bank.signers == {digest(data): "ci"}


def test_a_second_writer_cannot_smuggle_an_unsigned_module_in(
    tiny_store: ModelStore, trust: Trust, make_module: MakeModule
) -> None:
    publisher = Publisher(tiny_store, trust=trust)
    other = ModelStore(tiny_store.url)
    other.publish(with_task("birds", other.put_module(make_module("birds"))), "smuggled")
    with pytest.raises(UntrustedModule):
        publisher.refresh()
    assert publisher.active.revision.number == 1


def test_a_signature_that_does_not_hold_is_in_the_way_of_no_other(
    tiny_store: ModelStore, trust: Trust, make_module: MakeModule
) -> None:
    data = make_module("birds")
    good = sign(digest(data), CI)
    publisher = Publisher(tiny_store)
    publisher.register(data, signature=good.model_copy(update={"signature": "A" * 86 + "=="}))
    publisher.remove("birds")
    assert Publisher(tiny_store, trust=trust).register(data, signature=good).published
    restarted = Publisher(ModelStore(tiny_store.url), trust=trust)
    assert restarted.active.bank.signers == {digest(data): "ci"}


def test_signatures_of_older_stores_are_read(tiny_store: ModelStore) -> None:
    folder = Path(tiny_store.url) / "signatures" / SHA
    folder.mkdir(parents=True)
    older = sign(SHA, CI)
    (folder / f"{older.key_id}.json").write_text(older.model_dump_json())
    tiny_store.put_signature(sign(SHA, STRANGER))
    assert sorted(one.key_id for one in tiny_store.signatures(SHA)) == sorted(
        [older.key_id, sign(SHA, STRANGER).key_id]
    )


def test_a_damaged_signature_in_the_store_is_no_signature(tiny_store: ModelStore) -> None:
    tiny_store.put_signature(sign(SHA, CI))
    folder = Path(tiny_store.url) / "signatures" / SHA
    (folder / "junk.json").write_text("{")
    (folder / "empty.json").write_text("")
    assert tiny_store.signatures(SHA) == [sign(SHA, CI)]


def test_over_http_the_signature_is_a_header_and_the_signer_is_listed_and_in_the_receipt(
    tiny_store: ModelStore, tiny_backbone: Backbone, signers: Path, make_module: MakeModule
) -> None:
    settings = Settings(
        store=tiny_store.url, store_poll_s=0.0, trusted_signers=signers, require_signature=True
    )
    data = make_module("birds")
    with TestClient(create_app(settings, tiny_backbone)) as client:

        def post(signature: str | None) -> int:
            headers = {"x-module-signature": signature} if signature else {}
            return client.post("/tasks", content=data, headers=headers).status_code

        assert post(None) == 422
        assert post("junk") == 422
        assert post(sign(digest(data), STRANGER).model_dump_json()) == 422
        assert client.get("/tasks").json()["tasks"] == []
        assert post(sign(digest(data), CI).model_dump_json()) == 201
        assert client.get("/tasks/birds").json()["signer"] == "ci"
        [answer] = client.post("/predict", content=encoded(noise())).json()["predictions"]
        assert answer["receipt"]["signer"] == "ci"


def test_an_active_module_can_be_signed_later(
    tiny_store: ModelStore, trust: Trust, make_module: MakeModule
) -> None:
    data = make_module("birds")
    publisher = Publisher(tiny_store)
    publisher.register(data)
    publisher.register(data, signature=sign(digest(data), CI), dry_run=True)
    assert tiny_store.signatures(digest(data)) == []
    assert not publisher.register(data, signature=sign(digest(data), CI)).published
    assert Publisher(tiny_store, trust=trust).active.bank.signers == {digest(data): "ci"}


@pytest.mark.parametrize("by_reference", [False, True])
def test_over_http_too_an_active_module_can_be_signed_later(
    by_reference: bool, tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    data = make_module("birds")
    signature = sign(digest(data), CI)
    headers = {"x-module-signature": signature.model_dump_json()}
    body = {"json": {"module_sha256": digest(data)}} if by_reference else {"content": data}
    with TestClient(create_app(Settings(store=tiny_store.url, store_poll_s=0.0), tiny_backbone)) as client:
        assert client.post("/tasks", content=data).status_code == 201
        dry_run = client.post("/tasks", params={"dry_run": True}, headers=headers, **body)
        assert dry_run.status_code == 200 and tiny_store.signatures(digest(data)) == []
        assert client.post("/tasks", headers=headers, **body).status_code == 200
    assert tiny_store.signatures(digest(data)) == [signature]


def test_a_signature_is_kept_in_a_documented_form() -> None:
    assert set(json.loads(sign(SHA, CI).model_dump_json())) == set(Signature.model_fields)
