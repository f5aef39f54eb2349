"""Ray Serve with its dynamic batching: a proxy process takes HTTP, one replica decodes and owns the backbone.

Example: python -m benchmarks.peers.ray_serve --store .tosca/store --port 9000 --threads 2
"""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.peers.answering import Answering
from benchmarks.peers.arguments import Arguments, parse

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["PYTHONPATH"] = str(Path.cwd())  # for the replica, a process of its own

import ray
from ray import serve
from starlette.requests import Request

BATCH_TIMEOUT_S = 0.002
MAX_ONGOING = 256


@serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 1})
class TaskAnswers:
    def __init__(self, arguments: Arguments) -> None:
        self._answering = Answering(arguments, arguments.threads, arguments.max_batch_size)
        self._decoders = ThreadPoolExecutor(arguments.threads)
        self._device = ThreadPoolExecutor(1)
        self._answer_batch.set_max_batch_size(arguments.max_batch_size)

    async def __call__(self, request: Request) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        body = await request.body()
        pixels = await loop.run_in_executor(self._decoders, self._answering.decode, body)
        return {"predictions": [await self._answer_batch(pixels)]}

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=BATCH_TIMEOUT_S)
    async def _answer_batch(self, pixels: list[Any]) -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device, self._answering.answer, pixels)


if __name__ == "__main__":
    given = parse()
    ray.init(num_cpus=given.threads, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(TaskAnswers.bind(given), route_prefix="/predict")
    signal.signal(signal.SIGTERM, lambda *_: ray.shutdown() or os._exit(0))
    signal.pause()
