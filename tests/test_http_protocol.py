"""One connection after another to a small application: what the protocol does around it."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.http_protocol import bounded_protocol
from service.settings import Settings

TIMEOUT_S = 0.2
SETTINGS = Settings(
    max_header_bytes=8192, header_timeout_s=TIMEOUT_S, body_timeout_s=TIMEOUT_S, keep_alive_s=TIMEOUT_S
)


def answering(answer: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await answer(Request(scope, receive)))(scope, receive, send)

    return app


@asynccontextmanager
async def connected(
    answer: Callable[[Request], Awaitable[Response]], buffer_bytes: int | None = None
) -> AsyncIterator[tuple[socket.socket, ServerState]]:
    """A client's socket, and the state of the server at its other end."""
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(answering(answer), log_config=None, ws="none", timeout_keep_alive=1)
    state = ServerState()
    protocol = bounded_protocol(SETTINGS)
    listening, client = socket.create_server(("127.0.0.1", 0)), socket.socket()
    if buffer_bytes is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    client.setblocking(False)
    server = await loop.create_server(lambda: protocol(config, state, {}, loop), sock=listening)
    try:
        await loop.sock_connect(client, listening.getsockname())
        yield client, state
    finally:
        client.close()
        server.close()
        await until(lambda: not state.connections)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not is_so():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("wishes", ["keep-alive", "close"])
async def test_an_answer_that_nobody_takes_holds_no_connection(wishes: str) -> None:
    """It fits into the server's buffer, so that nothing waits for it but the end of the connection."""

    async def answer(_: Request) -> Response:
        return Response(b"x" * 60_000)

    async with connected(answer, buffer_bytes=2048) as (client, state):
        head = f"GET / HTTP/1.1\r\nHost: x\r\nConnection: {wishes}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(client, head.encode())
        await until(lambda: state.total_requests == 1)
        await until(lambda: not state.connections)


async def test_the_chunks_of_a_read_are_handed_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the event loop something: a body of very small ones would hold up everybody else."""
    handed_on: list[bytes] = []
    uvicorns = HttpToolsProtocol.on_body

    def on_body(self: HttpToolsProtocol, body: bytes) -> None:
        handed_on.append(body)
        uvicorns(self, body)

    async def answer(request: Request) -> Response:
        return Response(await request.body())

    monkeypatch.setattr(HttpToolsProtocol, "on_body", on_body)
    async with connected(answer) as (client, state):
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = b"5\r\nhello\r\n" * 1000 + b"0\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(client, head + chunks)
        await until(lambda: state.total_requests == 1)
    assert b"".join(handed_on) == b"hello" * 1000
    assert len(handed_on) < 20


async def received(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    pieces = []
    with suppress(ConnectionResetError):
        async with asyncio.timeout(20.0):
            while piece := await asyncio.get_running_loop().sock_recv(client, 65536):
                pieces.append(piece)
    return b"".join(pieces)


def answer_nobody(has_begun: asyncio.Event) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that waits until its client has left."""

    async def answer(request: Request) -> Response:
        has_begun.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return Response()

    return answer


async def test_the_head_of_a_second_request_has_its_time_after_the_first_answer() -> None:
    async def answer(_: Request) -> Response:
        await asyncio.sleep(2 * TIMEOUT_S)
        return Response(b"first")

    async with connected(answer) as (client, _):
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(client, request + request[:-2])
        came = await received(client)
    assert re.findall(rb"HTTP/1\.1 (\d+)", came) == [b"200", b"408"]


@pytest.mark.parametrize("second", [b"GET / HTTP/1.1\r\nX: " + b"a" * 10_000, b"no HTTP\r\n\r\n"])
async def test_a_refusal_is_never_taken_for_the_answer_of_an_earlier_request(second: bytes) -> None:
    has_begun = asyncio.Event()
    async with connected(answer_nobody(has_begun)) as (client, _):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await has_begun.wait()
        await loop.sock_sendall(client, second)
        assert await received(client) == b""


async def test_a_request_before_others_learns_that_its_client_left() -> None:
    """Else its answer would be written to a closed connection, which looks like a bug of ours."""
    has_begun = asyncio.Event()
    async with connected(answer_nobody(has_begun)) as (client, state):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        await has_begun.wait()
        client.close()
        await until(lambda: not state.connections and not state.tasks)
