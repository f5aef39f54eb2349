"""How much of a request only one thread can do: processor time of the event loop's thread and of the others.

As in benchmarks/request_path.py, pictures are posted whose CLS vectors the server knows, so that a request
costs all but decoding and the pass. Processor time is read for each thread of the process (Linux); the event
loop is its first.

TOSCA_BENCH_ROUNDS (5), TOSCA_BENCH_REQUESTS (2000 a round).
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import httpx

from benchmarks.machine import machine
from benchmarks.request_path import CLIENTS, DEMO, REQUESTS, ROUNDS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import running_server

RESULT = Path(__file__).parent / "results" / "request_threads.json"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main() -> None:
    about = machine()
    pictures = [path.read_bytes() for path in sorted((DEMO / "demo" / "digits" / "test").glob("*/*"))[:8]]
    rounds = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(str(DEMO / "store"), Path(folder) / "log", torch_threads=1) as server,
    ):
        for _ in range(ROUNDS + 1):
            before = thread_seconds(server.process.pid)
            asyncio.run(post(server.url, pictures))
            after = thread_seconds(server.process.pid)
            spent = {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
            loop = spent.pop(server.process.pid)
            rounds.append(
                {"event_loop": 1e3 * loop / REQUESTS, "other": 1e3 * sum(spent.values()) / REQUESTS}
            )
    loop_ms, other_ms = (
        statistics.median(one[name] for one in rounds[1:])  # the first round warms up
        for name in ("event_loop", "other")
    )
    result = {
        "cpu_ms_a_request": {"event_loop": round(loop_ms, 3), "other": round(other_ms, 3)},
        "event_loop_share": round(loop_ms / (loop_ms + other_ms), 3),
        "rounds": ROUNDS,
        "requests_a_round": REQUESTS,
        "machine": about,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


async def post(url: str, pictures: list[bytes]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:

        async def ask() -> None:
            for i in range(REQUESTS // CLIENTS):
                response = await client.post("/predict", content=pictures[i % len(pictures)])
                response.raise_for_status()

        await asyncio.gather(*(ask() for _ in range(CLIENTS)))


def thread_seconds(pid: int) -> dict[int, float]:
    """User and system time of every thread of a process so far; the first thread has the process's number."""
    seconds = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        seconds[int(task.name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return seconds


if __name__ == "__main__":
    main()
