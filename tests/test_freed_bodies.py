"""A request that is refused takes its body with it at once, without waiting for the garbage collector.

The collector comes after many small objects were made, and a few large bodies are gigabytes before that.
"""

import asyncio
import base64
import gc
import json
import os
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from pictures import encoded, noise
from starlette.types import Message

from model_store.store import ModelStore
from service.settings import Settings

SIZE = 4 * 2**20
JUNK = os.urandom(SIZE)
TIMES = 8
LEFT = SIZE  # less than one of the bodies
PATIENCE = 500  # looks, while a thread of a pool is still putting the last body down
BODIES = {
    "no picture": (JUNK, "application/octet-stream", 415),
    "a picture cut short": (encoded(noise(size=(1300, 1300)))[:SIZE], "image/png", 422),
    "base64 of no picture": (
        json.dumps({"images": [base64.b64encode(JUNK).decode()]}).encode(),
        "application/json",
        415,
    ),
    "one of two": (
        json.dumps({"images": [base64.b64encode(JUNK).decode()] * 2}).encode(),
        "application/json",
        415,
    ),
    "no base64": (json.dumps({"images": ["*" * SIZE]}).encode(), "application/json", 422),
}


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0, cls_cache_bytes=0)


@pytest.fixture
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.usefixtures("_without_collector")
def test_a_refused_body_is_freed_at_once(name: str, client: TestClient) -> None:
    body, media_type, status = BODIES[name]
    assert ask(client, body, media_type) == status
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(TIMES):
        assert ask(client, body, media_type) == status
    for _ in range(PATIENCE):
        if tracemalloc.get_traced_memory()[0] - before < LEFT:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{tracemalloc.get_traced_memory()[0] - before} bytes are left")


def ask(client: TestClient, body: bytes, media_type: str) -> int:
    """The status of a prediction, asked of the application itself: HTTP clients leave circles of their own."""
    status = 0
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()  # the client stays for its answer
        return messages.pop()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    async def post() -> None:
        headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/predict",
            "raw_path": b"/predict",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
            "state": {},
        }
        await client.app(scope, receive, send)

    assert client.portal is not None
    client.portal.call(post)
    return status
