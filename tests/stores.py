"""Stores in a local folder and on an S3 server: empty ones, and ones with a backbone."""

import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore

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
