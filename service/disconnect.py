"""Work for a client is dropped when the client leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

Result = TypeVar("Result")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client of a request whose body was read leaves.

    Raises ClientDisconnect then, and whatever `work` raises otherwise.
    """
    this = asyncio.current_task()
    assert this is not None, "a coroutine runs in a task"
    leaving = asyncio.create_task(_until_left(request))
    has_left = is_over = False

    def stop(_: asyncio.Task[None]) -> None:
        nonlocal has_left
        if not is_over:
            has_left = True
            this.cancel()

    leaving.add_done_callback(stop)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and this.uncancel() == 0:  # else the server cancels, too
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        leaving.cancel()


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
