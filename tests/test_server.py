"""The process around the application, without one of its own."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from serving import free_port

from model_store.store import ModelStore
from service.server import Server
from service.settings import Settings


@pytest.fixture
def collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
async def test_the_collector_looks_no_more_at_what_the_start_has_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(self: uvicorn.Server, sockets: object = None) -> None:
        made.append([])

    made: list[list[object]] = []
    monkeypatch.setattr(uvicorn.Server, "startup", start)
    app = FastAPI()
    await Server(uvicorn.Config(app), app, Settings()).startup()
    watched = [id(one) for one in gc.get_objects()]
    assert id(made) not in watched and id(made[0]) not in watched


def test_main_and_admin_port_have_two_numbers_on_two_addresses_too(tiny_store: ModelStore) -> None:
    port = free_port()
    settings = {"host": "127.0.0.2", "port": port, "admin_host": "127.0.0.1", "admin_port": port}
    ended = subprocess.run(
        [Path(sys.executable).with_name("tosca"), "serve", "--store", tiny_store.url],
        env={**os.environ, **{f"TOSCA_{name.upper()}": str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=60.0,
    )
    assert ended.returncode != 0
    assert f"both {port}" in ended.stderr
