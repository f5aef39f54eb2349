"""Load from a process of its own: pictures posted to /predict, latencies in one line of JSON.

Closed loop (`--clients 64`): each client sends its next request when it has its answer. Open loop
(`--rate 30`): pictures leave at random times of a Poisson process whatever the server does, and a latency
counts from the time at which its picture was due, so that a slow server cannot slow its own load.

Example: python benchmarks/load.py http://127.0.0.1:9000 --pictures FOLDER --seconds 10 --clients 64
"""

import argparse
import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1024
_NUMBER_BYTES = 8
_BOUNDARY = b"----pictures----"
_PART_HEADERS = (
    b'Content-Disposition: form-data; name="pictures"; filename="p.jpg"\r\nContent-Type: image/jpeg'
)


class Connection(asyncio.Protocol):
    """A connection that is kept alive, with one request under way at a time.

    The load shares the processors with what it measures, so it takes as little of them as it can: requests
    are made of bytes, and answers are parsed by the C library that servers use.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.WriteTransport | None = None
        self._status: asyncio.Future[int] | None = None
        self.is_open = False

    async def post(self, request: bytes) -> int:
        """The status of the answer, once all of it is there. Raises ConnectionError."""
        assert self._transport is not None, "connected before it is used"
        self._status = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._status

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._status is not None and not self._status.done():
            self._status.set_result(self._parser.get_status_code())

    def connection_lost(self, _: Exception | None) -> None:
        self.is_open = False
        if self._status is not None and not self._status.done():
            self._status.set_exception(ConnectionResetError("closed before the answer was there"))


class Load:
    """Latencies in seconds of the answers to pictures that never repeat."""

    def __init__(self, url: str, pictures: list[bytes], pictures_a_request: int = 1) -> None:
        address = urlsplit(url)
        self._host, self._port, self._netloc = address.hostname, address.port, address.netloc
        self._pictures = itertools.cycle(pictures)
        self._pictures_a_request = pictures_a_request
        self._number = itertools.count(int(time.time_ns()))
        self._idle: list[Connection] = []
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self.latencies: list[float] = []
        self.num_failed = 0

    async def ask(self, due: float) -> None:
        """Post the next pictures. Bytes after the end of a JPEG make it one that no cache has seen."""
        pictures = [
            next(self._pictures) + next(self._number).to_bytes(_NUMBER_BYTES, "big")
            for _ in range(self._pictures_a_request)
        ]
        request = _request(self._netloc, pictures)
        try:
            async with self._places, asyncio.timeout(TIMEOUT_S):
                status = await self._post(request)
        except (OSError, TimeoutError):
            status = 0
        if status == 200:
            self.latencies.append(time.perf_counter() - due)
        else:
            self.num_failed += 1

    async def _post(self, request: bytes) -> int:
        connection = await self._connection()
        try:
            status = await connection.post(request)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return status

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port)
        return connection

    def close(self) -> None:
        """Close what is kept open."""
        while self._idle:
            self._idle.pop().close()

    async def closed(self, clients: int, seconds: float) -> None:
        ends_at = time.perf_counter() + seconds

        async def client() -> None:
            while (now := time.perf_counter()) < ends_at:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def open(self, rate: float, seconds: float, seed: int) -> None:
        generator = random.Random(seed)
        due = time.perf_counter()
        ends_at = due + seconds
        tasks = []
        while (due := due + generator.expovariate(rate)) < ends_at:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(due)))
        await asyncio.gather(*tasks)


def _request(host: str, pictures: list[bytes]) -> bytes:
    """A whole request: one picture as it is, several as a form."""
    media_type, body = "image/jpeg", pictures[0]
    if len(pictures) > 1:
        media_type = f"multipart/form-data; boundary={_BOUNDARY.decode()}"
        parts = [b"--%s\r\n%s\r\n\r\n%s\r\n" % (_BOUNDARY, _PART_HEADERS, one) for one in pictures]
        body = b"".join(parts) + b"--%s--\r\n" % _BOUNDARY
    lines = (
        "POST /predict HTTP/1.1",
        f"host: {host}",
        f"content-type: {media_type}",
        f"content-length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def run(given: argparse.Namespace) -> dict[str, float]:
    pictures = [one.read_bytes() for one in sorted(given.pictures.iterdir())]
    load = Load(given.url, pictures, given.pictures_a_request)
    await load.closed(given.clients or 8, given.warm_up)
    load.latencies.clear()
    load.close()  # the slowest answer may have kept others idle for so long that the server closes them now
    started, cpu_before = time.perf_counter(), time.process_time()
    if given.rate:
        await load.open(given.rate, given.seconds, given.seed)
    else:
        await load.closed(given.clients, given.seconds)
    seconds = time.perf_counter() - started
    cpu_s = time.process_time() - cpu_before
    load.close()
    ordered = sorted(load.latencies) or [float("nan")]
    return {
        "images_per_s": given.pictures_a_request * len(load.latencies) / seconds,
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "num_answers": len(load.latencies),
        "num_failed": load.num_failed,
        "load_cpu_ms_a_request": 1e3 * cpu_s / max(1, len(load.latencies)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of encoded pictures")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second, open loop")
    parser.add_argument("--pictures-a-request", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(uvloop.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
