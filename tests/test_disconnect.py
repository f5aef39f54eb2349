"""Work is for clients that are there."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from service.disconnect import while_connected


def request(*messages: Message) -> tuple[Request, asyncio.Event]:
    """A request whose body was read; its client leaves when the event is set."""
    left = asyncio.Event()
    rest = list(messages)

    async def receive() -> Message:
        if rest:
            return rest.pop(0)
        await left.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive), left


async def test_the_result_comes_through_and_nothing_is_left_running() -> None:
    asked, _ = request()

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await while_connected(asked, work()) == 7
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_client_that_leaves_as_its_answer_is_there_cancels_nothing_else() -> None:
    asked, left = request()

    async def work() -> int:
        await asyncio.sleep(0)  # the client is waited for
        left.set()
        await asyncio.sleep(0)  # and has left
        return 7

    assert await while_connected(asked, work()) == 7
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_fault_of_the_work_comes_through() -> None:
    asked, _ = request()

    async def work() -> None:
        raise ValueError("no such task")

    with pytest.raises(ValueError, match="no such task"):
        await while_connected(asked, work())


async def test_work_stops_when_its_client_leaves() -> None:
    asked, left = request({"type": "http.request", "body": b"", "more_body": False})
    stopped = asyncio.Event()

    async def work() -> None:
        left.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with pytest.raises(ClientDisconnect):
        await while_connected(asked, work())
    assert stopped.is_set()


async def test_work_stops_when_the_server_cancels_the_request() -> None:
    asked, _ = request()
    started, stopped = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    whole = asyncio.create_task(while_connected(asked, work()))
    await started.wait()
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert stopped.is_set()


async def test_a_server_that_cancels_what_a_client_has_left_cancels_it() -> None:
    asked, left = request()
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            whole.cancel()

    whole = asyncio.create_task(while_connected(asked, work()))
    await started.wait()
    left.set()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert whole.cancelled()
