"""Processor time that the service spends on a request beside decoding and the backbone's pass.

Pictures are posted raw over kept-alive connections to a server that knows their CLS vectors, so that a
request costs all but those two: HTTP, access, admission, hashing, queues, the bank's answer, JSON. Counted
is processor time of the whole process, kernel included, which other work on the machine hardly touches; the
baseline is a FastAPI handler that reads the body and returns an answer from memory.

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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import running_server, serving_process

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "request_path.json"
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "5"))
REQUESTS = int(os.environ.get("TOSCA_BENCH_REQUESTS", "2000"))
CLIENTS = 8
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main() -> None:
    about = machine()
    pictures = [path.read_bytes() for path in sorted((DEMO / "demo" / "digits" / "test").glob("*/*"))[:8]]
    milliseconds: dict[str, list[float]] = {"tosca": [], "bare_fastapi": []}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.peers.bare_fastapi"]
        few = {"torch_threads": 1}
        with (
            running_server(str(DEMO / "store"), log, **few) as ours,
            serving_process(command, "", log) as bare,
        ):
            for number in range(ROUNDS + 1):  # the first round warms up
                for name, server in (("tosca", ours), ("bare_fastapi", bare)):
                    took = asyncio.run(measure(server.url, server.process.pid, pictures))
                    if number > 0:
                        milliseconds[name].append(took)
    medians = {name: round(statistics.median(values), 3) for name, values in milliseconds.items()}
    result = {
        "cpu_ms_a_request": medians,
        "over_bare_fastapi_ms": round(medians["tosca"] - medians["bare_fastapi"], 3),
        "rounds": ROUNDS,
        "requests_a_round": REQUESTS,
        "all": milliseconds,
        "machine": about,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


async def measure(url: str, pid: int, pictures: list[bytes]) -> float:
    """Milliseconds of processor time a request."""
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:

        async def ask(number: int) -> None:
            for i in range(number):
                response = await client.post("/predict", content=pictures[i % len(pictures)])
                response.raise_for_status()

        await ask(len(pictures))
        before = cpu_seconds(pid)
        await asyncio.gather(*(ask(REQUESTS // CLIENTS) for _ in range(CLIENTS)))
        return 1e3 * (cpu_seconds(pid) - before) / (REQUESTS // CLIENTS * CLIENTS)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


if __name__ == "__main__":
    main()
