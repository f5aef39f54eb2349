"""Load from a process of its own: pictures posted to /predict, latencies in one line of JSON.

Closed loop (`--clients 64`): each client sends its next picture when it has its answer. Open loop
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

import aiohttp

TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1024


class Load:
    """Latencies in seconds of the answers to pictures that never repeat."""

    def __init__(self, url: str, pictures: list[bytes], session: aiohttp.ClientSession) -> None:
        self._url = f"{url}/predict"
        self._pictures = itertools.cycle(pictures)
        self._session = session
        self._number = itertools.count(int(time.time_ns()))
        self.latencies: list[float] = []
        self.num_failed = 0

    async def ask(self, due: float) -> None:
        """Post the next picture. Bytes after the end of a JPEG make it one that no cache has seen."""
        body = next(self._pictures) + next(self._number).to_bytes(8, "big")
        try:
            async with self._session.post(
                self._url, data=body, headers={"content-type": "image/jpeg"}
            ) as response:
                await response.read()
                if response.status != 200:
                    self.num_failed += 1
                    return
        except (aiohttp.ClientError, TimeoutError):
            self.num_failed += 1
            return
        self.latencies.append(time.perf_counter() - due)

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


async def run(given: argparse.Namespace) -> dict[str, float]:
    pictures = [one.read_bytes() for one in sorted(given.pictures.iterdir())]
    connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(given.url, pictures, session)
        await load.closed(given.clients or 8, given.warm_up)
        load.latencies.clear()
        started = time.perf_counter()
        if given.rate:
            await load.open(given.rate, given.seconds, given.seed)
        else:
            await load.closed(given.clients, given.seconds)
        seconds = time.perf_counter() - started
    ordered = sorted(load.latencies) or [float("nan")]
    return {
        "images_per_s": len(load.latencies) / seconds,
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "num_answers": len(load.latencies),
        "num_failed": load.num_failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of encoded pictures")
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="pictures a second, open loop")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
