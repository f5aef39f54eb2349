"""The process around the application, without one of its own."""

import gc
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI

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
