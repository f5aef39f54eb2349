"""Clients of the Open Inference Protocol as their makers ship them, against a server in its own process.

They need other versions of our dependencies, so they run in an environment of their own.
"""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import running_server

from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore, with_task
from service.keys import SCOPES, change_keys, make_key, now_utc
from service.open_inference import inference_pb2

PYTHON = Path(".tosca/protocol-clients/bin/python").absolute()
FOLDER = Path("tests/protocol_clients")

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="`make test` installs the clients: make .tosca/protocol-clients/.installed"
)


@pytest.fixture(scope="module")
def addresses(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_artefact: BackboneArtefact,
    make_module: Callable[..., bytes],
) -> Iterator[dict[str, str]]:
    """A server with two tasks and an API key, as environment variables for the clients."""
    folder = tmp_path_factory.mktemp("protocol")
    store = ModelStore(folder / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    for task, seed in (("birds", 1), ("cars", 2)):
        store.publish(with_task(task, store.put_module(make_module(task, seed=seed))), f"add {task}")
    key, token = make_key("clients", SCOPES, now=now_utc())
    change_keys(folder / "keys.json", lambda _: (key,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        grpc_port = probe.getsockname()[1]
    settings = {"keys_file": folder / "keys.json", "grpc_port": grpc_port}
    with running_server(store.url, folder / "log", **settings) as server:
        yield {
            "TOSCA_TEST_HTTP": server.url.removeprefix("http://"),
            "TOSCA_TEST_GRPC": f"127.0.0.1:{grpc_port}",
            "TOSCA_TEST_KEY": token,
            "TOSCA_TEST_PROTO": inference_pb2.DESCRIPTOR.serialized_pb.hex(),
        }
    assert "Traceback" not in (log := (folder / "log").read_text()), log[-5000:]


@pytest.mark.parametrize("clients", ["triton_http.py", "triton_grpc.py", "kserve_clients.py"])
def test_an_unmodified_client_finds_what_it_expects(clients: str, addresses: dict[str, str]) -> None:
    command = [PYTHON, "-m", "pytest", "-c", "pytest.ini", "--confcutdir", ".", clients]
    result = subprocess.run(
        command,
        cwd=FOLDER,
        env={"PATH": "", **addresses},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    print(result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5000:]
