"""A replica whose store is behind a broken network: it answers, says so, refuses what it cannot have, recovers."""

import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from moto.server import ThreadedMotoServer
from network_partition import Isolated, isolated
from pictures import encoded, noise
from serving import RunningServer, running_server, serving_process

from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore
from service.client import Client, Retries, ServerRefused

MakeModule = Callable[..., bytes]
PICTURE = encoded(noise())
SETTINGS = {
    "store_poll_s": 0.2,
    "stale_after_s": 2.0,
    "catch_up_timeout_s": 1.0,
    "replica_heartbeat_s": 2.0,
    "log_level": "warning",
}


def client_of(server: RunningServer) -> Client:
    return Client(server.url, retries=Retries.none())


def answer_of(server: RunningServer) -> Any:
    return httpx.post(f"{server.url}/predict", content=PICTURE, timeout=30.0).raise_for_status().json()


def wait_until(is_so: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 90.0
    while not is_so():
        assert time.monotonic() < ends_at, "it did not become so within 90 s"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_replica_cut_off_from_its_store_answers_says_so_and_recovers(
    tiny_artefact: BackboneArtefact,
    make_module: MakeModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with isolated() as host:
        moto = ThreadedMotoServer(ip_address=host.store_host, port=0, verbose=False)
        moto.start()
        try:
            endpoint = f"http://{host.store_host}:{moto.get_host_and_port()[1]}"
            for name, value in {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "AWS_TIMEOUT": "5s",
            }.items():
                monkeypatch.setenv(name, value)
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/tosca", method="PUT"))
            store = ModelStore("s3://tosca/models")
            store.publish_first(store.put_backbone(tiny_artefact))
            tosca = Path(sys.executable).with_name("tosca")
            settings = {**SETTINGS, "host": host.address, "allow_anonymous": "everything"}
            with (
                running_server(store.url, tmp_path / "near", **SETTINGS) as near,
                serving_process(
                    [*host.command, tosca, "serve"],
                    store.url,
                    tmp_path / "far",
                    reached_at=host.address,
                    **settings,
                ) as far,
            ):
                _cut_off_and_back(host, near, far, make_module)
        finally:
            moto.stop()


def _cut_off_and_back(
    host: Isolated, near: RunningServer, far: RunningServer, make_module: MakeModule
) -> None:
    with client_of(near) as here, client_of(far) as there:
        known = here.add_task(make_module("birds", seed=1), wait="all")
        assert known.replicas is not None and known.replicas.all_serve and len(known.replicas.serving) == 2
        (far_id,) = [one.replica_id for one in there.replicas() if one.is_this]
        before = answer_of(far)
        assert before == answer_of(near)

        host.cut()
        missed = here.add_task(make_module("cars", seed=2), force=True)
        assert answer_of(far) == before
        with pytest.raises(ServerRefused) as refused:
            there.tasks(minimum_revision=missed.revision)
        assert (refused.value.status, refused.value.kind) == (412, "revision-behind")
        assert there.tasks(minimum_revision=known.revision).revision == known.revision
        wait_until(lambda: there.ready().is_stale)
        wait_until(lambda: far_id not in {one.replica_id for one in here.replicas() if one.is_live})
        alone = here.remove_task("cars", wait="all")
        assert alone.replicas is not None and alone.replicas.all_serve and len(alone.replicas.serving) == 1
        assert answer_of(far) == before

        host.heal()
        wait_until(lambda: there.tasks().revision == alone.revision)
        wait_until(lambda: not there.ready().is_stale)
        wait_until(lambda: far_id in {one.replica_id for one in here.replicas() if one.is_live})
        again = there.add_task(make_module("cars", seed=2), force=True, wait="all")
        assert again.replicas is not None and again.replicas.all_serve and len(again.replicas.serving) == 2
        assert answer_of(far) == answer_of(near)
