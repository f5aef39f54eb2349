"""`tosca push` and `tosca pull` from the outside, against the stand-in hub."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hub_server import Hub, Repository, running_hub
from typer.testing import CliRunner, Result

from model_store.backbone import BackboneArtefact
from model_store.errors import HubUnavailable, InvalidTrust, UnknownTask
from model_store.hub_commands import pull, push
from model_store.publishing import Publisher
from model_store.signatures import (
    Signature,
    Signer,
    SignerList,
    make_private_key,
    public_text,
    read_private_key,
    sign,
)
from model_store.store import ModelStore

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MakeModule = Callable[..., bytes]
Run = Callable[..., Result]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("TOSCA_STORE", "TOSCA_TRUSTED_SIGNERS", "TOSCA_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def tosca() -> Run:
    app = typer.Typer()
    app.command()(push)
    app.command()(pull)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(one) for one in arguments])

    return run


@pytest.fixture
def filled(tiny_store: ModelStore, make_module: MakeModule) -> ModelStore:
    """A store with tasks birds and ants."""
    publisher = Publisher(tiny_store)
    publisher.register(make_module("birds"), force=True)
    publisher.register(make_module("ants", seed=1), force=True)
    return tiny_store


@pytest.fixture
def fresh(tmp_path: Path, tiny_artefact: BackboneArtefact) -> ModelStore:
    """Another store with the same backbone and no task."""
    store = ModelStore(tmp_path / "fresh")
    store.publish_first(store.put_backbone(tiny_artefact))
    return store


def signed_by(key: Any, module: bytes) -> Signature:
    return sign(hashlib.sha256(module).hexdigest(), key)


def signers_file(path: Path, key: Any) -> Path:
    entry = Signer(name="ci", public_key=public_text(key.public_key()))
    path.write_text(SignerList(signers=(entry,)).model_dump_json())
    return path


def test_a_store_is_pushed_and_another_pulls_it_whole(
    hub: Hub, tosca: Run, filled: ModelStore, tmp_path: Path
) -> None:
    arguments = ("push", "me/all", "--task", "birds", "--task", "ants", "--backbone", "--json")
    pushed = tosca(*arguments, "--license", "mit", "--store", filled.url)
    assert pushed.exit_code == 0
    assert json.loads(pushed.stdout)["commit"] == hub.repositories["me/all"].commits[-1][0]
    assert hub.repositories["me/all"].private
    other = tmp_path / "other"
    assert tosca("pull", "me/all", "--backbone", "--store", other).exit_code == 0
    pulled = tosca("pull", "me/all", "--force", "--store", other, "--json")
    assert pulled.exit_code == 0
    assert [one["task"] for one in json.loads(pulled.stdout)["tasks"]] == ["ants", "birds"]
    mine, theirs = ModelStore(other).require_head(), filled.require_head()
    assert (mine.tasks, mine.backbone_fingerprint) == (theirs.tasks, theirs.backbone_fingerprint)
    assert mine.reason == "pull me/all"


def test_one_task_is_pulled_by_its_digest_or_not_at_all(
    hub: Hub, tosca: Run, filled: ModelStore, fresh: ModelStore
) -> None:
    tosca("push", "me/all", "--task", "birds", "--store", filled.url)
    wanted = ("pull", "me/all", "--task", "birds", "--store", fresh.url, "--sha256")
    wrong = tosca(*wanted, "0" * 64)
    assert wrong.exit_code == 1 and "expected 000000" in " ".join(wrong.output.split())
    assert fresh.require_head().tasks == {}
    assert tosca(*wanted, filled.require_head().tasks["birds"]).exit_code == 0
    assert set(fresh.require_head().tasks) == {"birds"}


def test_checked_files_can_be_written_instead(
    hub: Hub, tosca: Run, filled: ModelStore, fresh: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    tosca("push", "me/all", "--task", "birds", "--store", filled.url)
    result = tosca("pull", "me/all", "--output", tmp_path / "files", "--store", fresh.url)
    assert result.exit_code == 0
    assert (tmp_path / "files/birds.safetensors").read_bytes() == make_module("birds")
    assert fresh.head_number() == 1


# -- checks ------------------------------------------------------------------------------------------


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "0 bytes are fewer"),
    "cut short": (lambda data: data[:-100], "does not match its own digest"),
    "damaged": (damaged, "does not match its own digest"),
    "another kind of file": (lambda _: b"\x80\x04K\x01." * 100, "header"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_changes_nothing_and_stops_no_other(
    name: str, hub: Hub, tosca: Run, fresh: ModelStore, make_module: MakeModule
) -> None:
    change, fault = BAD_FILES[name]
    hub.repositories["me/all"] = held = Repository(private=False)
    held.commit(
        {
            "ants.safetensors": change(make_module("ants", seed=1)),
            "birds.safetensors": make_module("birds"),
            "not a task.safetensors": make_module("birds"),
        }
    )
    result = tosca("pull", "me/all", "--store", fresh.url, "--json")
    assert result.exit_code == 1
    ants, birds = json.loads(result.stdout)["tasks"]
    assert fault in ants["fault"] and birds["revision"] == 2
    assert set(fresh.require_head().tasks) == {"birds"}


def test_a_file_under_another_name_is_refused(
    hub: Hub, tosca: Run, fresh: ModelStore, make_module: MakeModule
) -> None:
    hub.repositories["me/all"] = held = Repository(private=False)
    held.commit({"cats.safetensors": make_module("birds")})
    result = tosca("pull", "me/all", "--store", fresh.url)
    assert result.exit_code == 1 and "cats.safetensors holds task 'birds'" in result.output
    assert fresh.require_head().tasks == {}


def test_a_module_of_another_backbone_is_refused(
    hub: Hub, tosca: Run, filled: ModelStore, tmp_path: Path, tiny_artefact: BackboneArtefact
) -> None:
    tosca("push", "me/all", "--task", "birds", "--store", filled.url)
    preprocessing = tiny_artefact.manifest.preprocessing.model_copy(update={"crop_fraction": 0.5})
    manifest = tiny_artefact.manifest.model_copy(update={"preprocessing": preprocessing})
    other = ModelStore(tmp_path / "other")
    other.publish_first(other.put_backbone(BackboneArtefact(manifest, tiny_artefact.weights)))
    result = tosca("pull", "me/all", "--store", other.url)
    assert result.exit_code == 1 and "backbone" in result.output
    assert other.require_head().tasks == {}


def test_a_required_signature_is_required_of_a_hub_too(
    hub: Hub, tosca: Run, filled: ModelStore, fresh: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    trusted, stranger = read_private_key(make_private_key()), read_private_key(make_private_key())
    signers = signers_file(tmp_path / "signers.json", trusted)
    for key in (trusted, stranger):
        good = signed_by(key, make_module("birds"))
        filled.put_signature(good)
        filled.put_signature(good.model_copy(update={"signature": "A" * 86 + "=="}))
    filled.put_signature(signed_by(stranger, make_module("ants", seed=1)))
    tosca("push", "me/all", "--task", "birds", "--task", "ants", "--store", filled.url)
    demanding = ("--trusted-signers", signers, "--require-signature")
    for output in ((), ("--output", tmp_path / "files")):
        result = tosca("pull", "me/all", "--store", fresh.url, *demanding, *output)
        assert result.exit_code == 1 and "ants: module" in result.output
        assert "has no valid signature of the 1 trusted signers" in " ".join(result.output.split())
    assert set(fresh.require_head().tasks) == {"birds"}
    assert [one.name for one in (tmp_path / "files").iterdir()] == ["birds.safetensors"]
    kept = fresh.signatures(fresh.require_head().tasks["birds"])
    assert kept == [signed_by(trusted, make_module("birds"))], "so that a server with the same list loads it"


def test_a_false_signature_beside_a_true_one_does_no_harm(
    hub: Hub, tosca: Run, fresh: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    key = read_private_key(make_private_key())
    birds = make_module("birds")
    true = signed_by(key, birds)
    false = true.model_copy(update={"signature": signed_by(key, b"other").signature})
    hub.repositories["me/all"] = held = Repository(private=False)
    names = ("birds.safetensors.0.sig", "birds.safetensors.1.sig")
    beside = {name: one.model_dump_json().encode() for name, one in zip(names, (false, true), strict=True)}
    held.commit({"birds.safetensors": birds} | beside)
    signers = signers_file(tmp_path / "signers.json", key)
    demanding = ("--trusted-signers", signers, "--require-signature", "--store", fresh.url)
    assert tosca("pull", "me/all", *demanding).exit_code == 0
    assert fresh.signatures(fresh.require_head().tasks["birds"]) == [true]


def test_signatures_cannot_be_required_of_nobody(hub: Hub, tosca: Run, fresh: ModelStore) -> None:
    hub.repositories["me/all"] = Repository(private=False)
    hub.repositories["me/all"].commit({"birds.safetensors": b""})
    result = tosca("pull", "me/all", "--store", fresh.url, "--require-signature")
    assert isinstance(result.exception, InvalidTrust)


def test_what_cannot_be_pushed_or_pulled_is_named(
    hub: Hub, tosca: Run, filled: ModelStore, fresh: ModelStore
) -> None:
    nothing = tosca("push", "me/all", "--store", filled.url)
    assert nothing.exit_code == 2 and "name a task, or --backbone" in nothing.output
    absent = tosca("push", "me/all", "--task", "cats", "--store", filled.url)
    assert isinstance(absent.exception, UnknownTask) and hub.repositories == {}
    unknown = tosca("pull", "me/none", "--store", fresh.url)
    assert isinstance(unknown.exception, HubUnavailable)
    tosca("push", "me/all", "--task", "birds", "--task", "ants", "--store", filled.url)
    several = tosca("pull", "me/all", "--sha256", "0" * 64, "--store", fresh.url)
    assert several.exit_code == 2 and "name one task" in several.output
    hub.repositories["me/empty"] = Repository(private=False)
    assert "holds no module files" in str(tosca("pull", "me/empty", "--store", fresh.url).exception)
