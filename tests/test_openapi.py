"""The OpenAPI document against the service: schemathesis makes requests of it and judges every answer."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import running_server

from model_store.store import ModelStore, with_task
from service.keys import SCOPES, change_keys, make_key, now_utc
from service.openapi import openapi_document

TOOL = Path(".tosca/api-tools/bin/schemathesis")
CONFIG = Path("tests/schemathesis.toml")
MAX_EXAMPLES = 60


def test_the_document_of_the_repository_is_that_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says; `make openapi` writes it anew."""
    monkeypatch.setenv("TOSCA_ADMIN_PORT", "8001")
    assert Path("docs/openapi.json").read_text() == openapi_document(), "run `make openapi`"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not TOOL.exists(), reason="`make test-api` installs schemathesis")
def test_every_answer_fits_the_document(
    tiny_store: ModelStore, make_module: Callable[..., bytes], tmp_path: Path
) -> None:
    """Valid, invalid and unauthorised requests of every operation, and sequences of them."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    keys_file = tmp_path / "keys.json"
    key, token = make_key("schemathesis", SCOPES, now=now_utc())
    change_keys(keys_file, lambda _: (key,))
    with running_server(tiny_store.url, tmp_path / "log", keys_file=keys_file, log_level="warning") as server:
        command = [TOOL, "--config-file", CONFIG, "run", f"{server.url}/openapi.json"]
        command += ["--continue-on-failure"]
        command += ["--header", f"Authorization: Bearer {token}"]
        command += ["--max-examples", str(MAX_EXAMPLES), "--phases", "examples,coverage,fuzzing,stateful"]
        command += ["--suppress-health-check", "all", "--no-color"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    summary = result.stdout[result.stdout.find("SUMMARY") :]
    print(json.dumps({"exit": result.returncode, "summary": summary.splitlines()}))
    assert result.returncode == 0, result.stdout[-20_000:]
    assert "Tested: " in summary
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log[-5000:]
