"""`tosca doctor`: what is broken is found, named and told by the exit status; nothing is changed by looking."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from certificates import self_signed
from tosca_command import call_tosca

from model_store import checkup
from model_store.checkup import Finding, check_machine, check_packages, check_store, examine
from model_store.publishing import Publisher
from model_store.signatures import Signer, SignerList, make_private_key, public_text, read_private_key
from model_store.store import ModelStore
from service.checkup import findings as check_service
from service.keys import change_keys, make_key

MakeModule = Callable[..., bytes]


def found(findings: Any, name: str) -> Finding:
    [one] = [one for one in findings if one.name == name]
    return one


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE", "KEYS_FILE", "HOST", "PORT", "TRUSTED_SIGNERS"):
        monkeypatch.delenv(f"TOSCA_{name}", raising=False)
    monkeypatch.setenv("TOSCA_PORT", "9")  # nobody listens there


@pytest.fixture
def store(tiny_store: ModelStore, make_module: MakeModule) -> ModelStore:
    Publisher(tiny_store).register(make_module("birds"))
    return tiny_store


# -- the command -------------------------------------------------------------------------------------


def test_a_sound_installation_is_told_so(store: ModelStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_tosca("doctor", "--store", store.url, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {one["area"] for one in report["findings"]} == {"packages", "machine", "store", "service"}
    assert "broken" not in {one["state"] for one in report["findings"]}


def test_something_broken_is_told_by_the_exit_status(
    store: ModelStore, capsys: pytest.CaptureFixture[str]
) -> None:
    [module] = Path(store.url).glob("modules/*")
    module.write_bytes(module.read_bytes()[:-1] + b"!")
    assert call_tosca("doctor", "--store", store.url) == 1
    printed = capsys.readouterr()
    [line] = [one for one in printed.out.splitlines() if one.startswith("broken\t")]
    assert line.split("\t")[1:3] == ["store", "task birds"] and "SHA-256" in line
    assert "broken: 1" in printed.err
    assert call_tosca("doctor", "--store", store.url, "--json") == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_looking_changes_nothing(store: ModelStore, tmp_path: Path) -> None:
    def state() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    examine(store.url)
    assert state() == before
    examine(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


# -- packages and machine ----------------------------------------------------------------------------


def test_a_package_that_is_missing_is_broken_or_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkup.importlib.metadata.version

    def version(name: str) -> str:
        if name in ("torch", "openvino"):
            raise checkup.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(checkup.importlib.metadata, "version", version)
    findings = list(check_packages())
    assert found(findings, "torch").state == "broken"
    assert found(findings, "openvino").state == "note" and "[openvino]" in found(findings, "openvino").detail
    assert found(findings, "timm").state == "ok"


def test_more_threads_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(check_machine(), "threads").state == "ok"
    monkeypatch.setattr(checkup.torch, "get_num_threads", lambda: 4096)
    assert found(check_machine(), "threads").state == "warning"


def test_the_machine_is_described() -> None:
    findings = list(check_machine())
    assert "torch-float32" in found(findings, "runtimes").detail.split()
    assert found(findings, "device").detail.startswith(("cpu: ", "cuda: "))


# -- the store ---------------------------------------------------------------------------------------


def test_a_store_is_described(store: ModelStore) -> None:
    findings = list(check_store(store.url))
    assert found(findings, "revision").detail.startswith("2 by ")
    assert "vit_tiny_patch16_224" in found(findings, "backbone").detail
    assert found(findings, "tasks").detail.startswith("1 whole")
    assert found(findings, "runtime").state == "warning", "the tiny backbone was never tuned"


def test_a_tuned_store_names_its_runtime_and_misses_its_export(
    tiny_store: ModelStore, tiny_tuned: Any
) -> None:
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    runtime = found(check_store(tiny_store.url), "runtime")
    assert runtime.state == "ok" and runtime.detail.startswith("onnxruntime-float32")
    [export] = Path(tiny_store.url).glob("backbones/*/exports/*")
    export.unlink()
    assert found(check_store(tiny_store.url), "runtime").state == "broken"


def test_a_damaged_backbone_is_broken(store: ModelStore) -> None:
    [weights] = Path(store.url).glob("backbones/*/weights.safetensors")
    weights.write_bytes(b"nothing")
    assert found(check_store(store.url), "backbone").state == "broken"


def test_a_module_that_is_gone_is_broken(store: ModelStore) -> None:
    [module] = Path(store.url).glob("modules/*")
    module.unlink()
    findings = list(check_store(store.url))
    assert found(findings, "task birds").state == "broken"
    assert "tasks" not in {one.name for one in findings}


def test_a_damaged_history_is_broken(store: ModelStore) -> None:
    max(Path(store.url).glob("revisions/*")).write_text("{")
    assert found(check_store(store.url), "revision").state == "broken"


def test_a_full_disk_is_warned_of(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GB free" in found(check_store(store.url), "disk").detail
    monkeypatch.setattr(checkup, "_LOW_DISK_BYTES", 2**62)
    assert found(check_store(store.url), "disk").state == "warning"


def test_a_store_without_anything_says_what_to_do(tmp_path: Path) -> None:
    [missing] = check_store(str(tmp_path / "nowhere"))
    assert missing.state == "warning" and "tosca backbone add" in missing.detail
    assert found(check_store(str(tmp_path)), "revision").state == "warning"


# -- the service -------------------------------------------------------------------------------------


def test_wrong_settings_are_named_as_they_are_set(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSCA_MAX_BATCH_SIZE", "many")
    assert found(check_service(store.url), "TOSCA_MAX_BATCH_SIZE").state == "broken"


def test_a_server_open_to_strangers_is_broken(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(check_service(store.url), "keys").state == "note"
    monkeypatch.setenv("TOSCA_HOST", "0.0.0.0")
    access = found(check_service(store.url), "access")
    assert access.state == "broken" and "TOSCA_KEYS_FILE" in access.detail


def test_keys_are_counted_and_expired_ones_told_apart(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    file = tmp_path / "keys.json"
    monkeypatch.setenv("TOSCA_KEYS_FILE", str(file))
    old, _ = make_key("old", ("read",), now=now, expires_at=now - timedelta(days=1))
    change_keys(file, lambda _: (old,))
    assert found(check_service(store.url), "keys").state == "warning", "nobody can get in"
    new, _ = make_key("new", ("read",), now=now)
    change_keys(file, lambda keys: (*keys, new))
    keys = found(check_service(store.url), "keys")
    assert keys.state == "ok" and keys.detail.startswith("1 in") and keys.detail.endswith("1 expired")
    file.write_text("{")
    assert found(check_service(store.url), "access").state == "broken"


@pytest.mark.parametrize(("days", "state"), [(90, "ok"), (3, "warning"), (-1, "broken")])
def test_a_certificate_is_looked_at_before_it_ends(
    days: int, state: str, store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed(tmp_path, timedelta(days=days))
    monkeypatch.setenv("TOSCA_TLS_CERTIFICATE", str(certificate))
    monkeypatch.setenv("TOSCA_TLS_KEY", str(key))
    assert found(check_service(store.url), "certificate").state == state


def test_a_list_of_signers_is_read(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signers = tmp_path / "signers.json"
    monkeypatch.setenv("TOSCA_TRUSTED_SIGNERS", str(signers))
    assert found(check_service(store.url), "signers").state == "broken"
    signer = Signer(name="ci", public_key=public_text(read_private_key(make_private_key()).public_key()))
    signers.write_text(SignerList(signers=(signer,)).model_dump_json())
    assert found(check_service(store.url), "signers").detail.startswith("1 trusted")


class _Health(BaseHTTPRequestHandler):
    answer: ClassVar[dict[str, Any]]
    status: ClassVar[int]

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Health]]:
    """Something that answers /health/ready as the test says, on the port of the settings."""
    health = type("Health", (_Health,), {"answer": {}, "status": 200})
    with ThreadingHTTPServer(("127.0.0.1", 0), health) as listening:
        monkeypatch.setenv("TOSCA_PORT", str(listening.server_port))
        thread = Thread(target=listening.serve_forever)
        thread.start()
        yield health
        listening.shutdown()
        thread.join()


def ready(revision: int, staleness_s: float = 0.0, fault: str | None = None) -> dict[str, Any]:
    told = {"revision": revision, "staleness_s": staleness_s, "store_fault": fault, "is_stale": False}
    kept = {"backbone": "vit", "backbone_fingerprint": "0" * 64, "num_tasks": 1}
    return {"status": "ready", "device": "cpu", "runtime": "torch-float32", **kept, **told}


def test_a_running_server_is_asked_how_far_behind_it_is(store: ModelStore, server: type[_Health]) -> None:
    server.answer = ready(2)
    findings = list(check_service(store.url))
    assert found(findings, "server").state == found(findings, "staleness").state == "ok"
    server.answer = ready(1, staleness_s=1000.0)
    assert found(check_service(store.url), "staleness").state == "warning"
    server.answer = ready(2, fault="the bucket is gone")
    assert "the bucket is gone" in found(check_service(store.url), "staleness").detail


def test_a_server_that_is_not_ready_is_broken(store: ModelStore, server: type[_Health]) -> None:
    server.status, server.answer = 503, {"detail": "not ready"}
    assert found(check_service(store.url), "server").state == "broken"


def test_another_program_on_the_port_is_warned_of(store: ModelStore, server: type[_Health]) -> None:
    server.answer = {"hello": "world"}
    assert found(check_service(store.url), "server").state == "warning"


def test_nobody_on_the_port_is_no_fault(store: ModelStore) -> None:
    assert found(check_service(store.url), "server").state == "note"
