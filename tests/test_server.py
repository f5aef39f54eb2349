"""The process around the application, without one of its own."""

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from fastapi import FastAPI
from serving import free_port
from starlette.datastructures import State
from starlette.types import Message

from model_store.store import ModelStore
from service.server import Server, config_of
from service.settings import Settings
from service.web import CloseWhenDraining


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads have policies of their own on Linux alone")
@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_event_loop_waits_for_its_turn_where_passes_need_the_processors(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(self: uvicorn.Server, sockets: object = None) -> None:
        backbone = SimpleNamespace(device=torch.device(device))
        app.state.service = SimpleNamespace(engine=SimpleNamespace(backbone=backbone))

    def policy_of_a_server() -> int:
        asyncio.run(Server(uvicorn.Config(app), app, Settings()).startup())
        return os.sched_getscheduler(0)

    monkeypatch.setattr(uvicorn.Server, "startup", start)
    app = FastAPI()
    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as thread:  # whose policy ends with it
        policy = thread.submit(policy_of_a_server).result()
    assert policy == (os.SCHED_BATCH if device == "cpu" else before)
    assert os.sched_getscheduler(0) == before


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


def test_times_below_a_second_are_not_none_at_all() -> None:
    settings = Settings(keep_alive_s=0.5, shutdown_timeout_s=0.9)
    config = config_of(settings, FastAPI(), lambda _: None)
    assert config.timeout_keep_alive == config.timeout_graceful_shutdown == 1


async def test_what_is_cut_at_the_end_of_a_drain_is_refused() -> None:
    waiting = asyncio.Event()
    sent: list[Message] = []

    async def app(*_: object) -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError("nothing is read for a refusal")

    async def send(message: Message) -> None:
        sent.append(message)

    draining = State({"service": SimpleNamespace(is_draining=True)})
    scope = {"type": "http", "method": "POST", "path": "/predict"}
    answering = asyncio.create_task(CloseWhenDraining(app, draining)(scope, receive, send))
    await waiting.wait()
    answering.cancel()
    await answering
    start, body = sent
    assert start["status"] == 503
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["type"] == "urn:tosca:problem:shutting-down"
