"""`tosca keys` and `tosca sign` from the outside."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model_store.errors import InvalidTrust
from model_store.sign_commands import read_signature, sign
from model_store.signatures import Trust
from service.access import Access
from service.key_commands import keys_app
from service.settings import Settings


def run(app: typer.Typer, *arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.output


def test_a_key_is_created_used_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    code, text = run(
        keys_app, "create", "ci", "--scope", "read", "--scope", "admin", "--file", file, "--json"
    )
    assert code == 0
    made = json.loads(text)
    access = Access(Settings(keys_file=file))
    assert access.identify(f"Bearer {made['token']}").scopes == {"admin", "read"}
    code, text = run(keys_app, "list", "--file", file)
    assert code == 0
    assert "ci" in text
    assert made["token"].split("_", 2)[2] not in text
    assert run(keys_app, "revoke", made["key_id"], "--file", file)[0] == 0
    assert json.loads(run(keys_app, "list", "--file", file, "--json")[1]) == []


def test_the_token_is_printed_whole_on_a_line_of_its_own(tmp_path: Path) -> None:
    code, text = run(keys_app, "create", "app", "--scope", "predict", "--file", tmp_path / "keys.json")
    assert code == 0
    token = text.splitlines()[-1]
    assert Access(Settings(keys_file=tmp_path / "keys.json")).identify(f"Bearer {token}").name == "app"


@pytest.mark.parametrize(
    "arguments", [("x",), ("x", "--scope", "root"), ("x", "--scope", "read", "--days", "0")]
)
def test_a_key_without_a_proper_scope_or_life_is_not_made(arguments: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert run(keys_app, "create", *arguments, "--file", file)[0] == 2
    assert not file.exists()


@pytest.fixture
def signing() -> typer.Typer:
    app = typer.Typer()
    app.command()(sign)
    return app


def test_a_module_is_signed_with_a_new_key_and_the_entry_it_prints_is_trusted(
    signing: typer.Typer, tmp_path: Path, make_module: Callable[..., bytes]
) -> None:
    module, key, signers = tmp_path / "birds.safetensors", tmp_path / "ci.pem", tmp_path / "signers.json"
    module.write_bytes(make_module("birds"))
    code, text = run(signing, module, "--key", key, "--new-key", "--name", "ci")
    assert code == 0
    assert key.stat().st_mode & 0o777 == 0o600
    signers.write_text(text)
    signature = read_signature(module)
    sha256 = hashlib.sha256(module.read_bytes()).hexdigest()
    assert Trust.read(signers, is_required=True).signer_of(sha256, [signature]) == "ci"


def test_an_existing_key_is_never_overwritten(signing: typer.Typer, tmp_path: Path) -> None:
    module, key = tmp_path / "m.safetensors", tmp_path / "ci.pem"
    module.write_bytes(b"x")
    key.write_text("precious")
    with pytest.raises(InvalidTrust, match="exists"):
        CliRunner().invoke(signing, [str(module), "--key", str(key), "--new-key"], catch_exceptions=False)
    assert key.read_text() == "precious"


def test_a_damaged_signature_file_is_a_fault_and_a_missing_one_is_none(tmp_path: Path) -> None:
    module = tmp_path / "m.safetensors"
    assert read_signature(module) is None
    (tmp_path / "m.safetensors.sig").write_text("{")
    with pytest.raises(InvalidTrust, match=r"m\.safetensors\.sig"):
        read_signature(module)


def test_a_name_that_no_list_would_take_is_refused_before_anything_is_written(
    signing: typer.Typer, tmp_path: Path
) -> None:
    module, key = tmp_path / "m.safetensors", tmp_path / "ci.pem"
    module.write_bytes(b"x")
    code, _ = run(signing, module, "--key", key, "--new-key", "--name", "my team")
    assert code == 2
    assert list(tmp_path.iterdir()) == [module]


def test_a_signature_file_that_cannot_be_opened_is_a_fault(signing: typer.Typer, tmp_path: Path) -> None:
    module, key = tmp_path / "m.safetensors", tmp_path / "ci.pem"
    module.write_bytes(b"x")
    (tmp_path / "m.safetensors.sig").mkdir()
    with pytest.raises(InvalidTrust, match=r"m\.safetensors\.sig: Is a directory"):
        CliRunner().invoke(signing, [str(module), "--key", str(key), "--new-key"], catch_exceptions=False)
    with pytest.raises(InvalidTrust, match=r"m\.safetensors\.sig"):
        read_signature(module)
