"""The load of the benchmarks, against a server on loopback that answers as it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from benchmarks.load import Load

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


@contextlib.asynccontextmanager
async def answering(answers: Sequence[bytes], bodies: list[bytes]) -> AsyncIterator[str]:
    """A server that gives these answers in turn, the last for ever; an empty one closes the connection."""
    left = list(answers)
    serving: list[asyncio.Task[object] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                answer = left.pop(0) if len(left) > 1 else left[0]
                for i in range(0, len(answer), 7):  # in pieces, as networks deliver them
                    writer.write(answer[i : i + 7])
                    await writer.drain()
                if answer in (b"", LAST):
                    break
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
        await asyncio.gather(*(one for one in serving if one is not None))


async def ask(load: Load, num: int) -> None:
    for _ in range(num):
        await load.ask(due=0.0)
    load.close()


async def test_whole_answers_count_however_they_are_framed() -> None:
    async with answering([OK, CHUNKED, LAST, OK], bodies := []) as url:
        load = Load(url, [b"picture"])
        await ask(load, 4)
    assert (len(load.latencies), load.num_failed) == (4, 0)
    assert all(body.startswith(b"picture") for body in bodies)


async def test_no_picture_repeats() -> None:
    async with answering([OK], bodies := []) as url:
        await ask(Load(url, [b"one", b"other"]), 8)
    assert len(set(bodies)) == 8


async def test_refusals_and_lost_connections_are_failures_and_no_latencies() -> None:
    async with answering([REFUSAL, b"", b"nonsense\r\n\r\n", OK], []) as url:
        load = Load(url, [b"picture"])
        await ask(load, 4)
    assert (len(load.latencies), load.num_failed) == (1, 3)


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    async with answering([OK], []) as url:
        load = Load(url, [b"picture"])
    await ask(load, 1)
    assert (len(load.latencies), load.num_failed) == (0, 1)
