"""Clients that wait for an answer, through the whole service: they leave, or run out of time."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI
from gated import GatedBackbone
from pictures import encoded, noise
from starlette.types import Message

from model_store.backbone import Backbone
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.engine import Engine
from service.problems import CLIENT_CLOSED_REQUEST
from service.settings import Settings

PICTURE = encoded(noise())
INFER = {
    "inputs": [
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(PICTURE).decode()]}
    ]
}
ASKED = {
    "/predict": ("image/png", PICTURE),
    "/v2/models/tosca/infer": ("application/json", json.dumps(INFER).encode()),
}


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> GatedBackbone:
    return GatedBackbone(tiny_backbone)


@pytest.fixture
async def app(
    tiny_store: ModelStore, backbone: GatedBackbone, make_module: Callable[..., bytes]
) -> AsyncIterator[FastAPI]:
    """A service whose device is busy with somebody else's picture until the gate opens."""
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    app = create_app(Settings(store=tiny_store.url, store_poll_s=0.0, cls_cache_bytes=0), backbone)
    async with app.router.lifespan_context(app):
        while backbone.entered.acquire(blocking=False):  # the warm-up's
            pass
        backbone.batch_sizes.clear()
        backbone.gate.clear()
        other = asyncio.create_task(post(app, "/predict", {}))
        await asyncio.to_thread(backbone.entered.acquire)
        try:
            yield app
        finally:
            backbone.gate.set()
            assert (await other).status_code == 200


async def post(app: FastAPI, path: str, headers: dict[str, str]) -> httpx.Response:
    media_type, body = ASKED[path]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, content=body, headers={"content-type": media_type, **headers})


def engine_of(app: FastAPI) -> Engine:
    engine: Engine = app.state.service.engine
    return engine


@pytest.mark.parametrize("path", ASKED)
async def test_a_picture_whose_client_left_costs_no_pass(
    path: str, app: FastAPI, backbone: GatedBackbone
) -> None:
    media_type, body = ASKED[path]
    left = asyncio.Event()
    given: list[Message] = [{"type": "http.request", "body": body}]
    sent: list[Message] = []

    async def receive() -> Message:
        if given:
            return given.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", media_type.encode())],
    }
    engine = engine_of(app)
    asking = asyncio.create_task(app(scope, receive, send))
    while engine.num_queued < 1:
        await asyncio.sleep(0.001)
    assert engine.num_admitted == 2
    left.set()
    async with asyncio.timeout(10.0):  # while the device is still busy
        await asking
    assert sent[0]["status"] == CLIENT_CLOSED_REQUEST
    assert engine.num_admitted == 1
    backbone.gate.set()
    assert (await post(app, "/predict", {})).status_code == 200
    assert backbone.batch_sizes == [1, 1]


@pytest.mark.parametrize("path", ASKED)
async def test_a_request_waits_no_longer_than_it_asks_for(path: str, app: FastAPI) -> None:
    async with asyncio.timeout(10.0):
        response = await post(app, path, {"x-request-timeout": "0.05"})
    assert response.status_code == 504
    assert "not answered within 0.0" in response.text
    assert engine_of(app).num_admitted == 1
