"""BentoML with its adaptive batching: one service takes HTTP, a second owns decoding and the backbone.

Example: python -m benchmarks.peers.bento_ml --store .tosca/store --port 9000 --threads 2
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import bentoml
from fastapi import FastAPI, Request

from benchmarks.peers.answering import Answering
from benchmarks.peers.arguments import Arguments, parse

_VARIABLE = "PEER_ARGUMENTS"
_TRAFFIC = {"timeout": 120, "max_concurrency": 256}
_QUIET = {"access": {"enabled": False}}
front = FastAPI()


def _arguments() -> Arguments:
    return Arguments(**json.loads(os.environ[_VARIABLE]))


# BentoML imports this module again in its processes, where the arguments are known.
_WORKERS = _arguments().workers if _VARIABLE in os.environ else 1
_MAX_BATCH_SIZE = _arguments().max_batch_size if _VARIABLE in os.environ else 8


@bentoml.service(workers=_WORKERS, traffic=_TRAFFIC, logging=_QUIET)
class Passes:
    def __init__(self) -> None:
        arguments = _arguments()
        threads = arguments.threads // arguments.workers
        self._answering = Answering(arguments, threads, arguments.max_batch_size)
        self._decoders = ThreadPoolExecutor(threads)

    @bentoml.api(batchable=True, max_batch_size=_MAX_BATCH_SIZE, max_latency_ms=60_000)
    def answer(self, pictures: list[bytes]) -> list[dict[str, Any]]:
        return self._answering.answer(list(self._decoders.map(self._answering.decode, pictures)))


@bentoml.service(workers=_WORKERS, traffic=_TRAFFIC, logging=_QUIET)
@bentoml.asgi_app(front)
class Front:
    passes = bentoml.depends(Passes)

    @front.get("/health/ready")
    async def ready(self) -> dict[str, str]:
        return {"status": "ready"}

    @front.post("/predict")
    async def predict(self, request: Request) -> dict[str, Any]:
        return {"predictions": await self.passes.to_async.answer([await request.body()])}


if __name__ == "__main__":
    given = parse()
    os.environ[_VARIABLE] = json.dumps(asdict(given))
    os.environ["BENTOML_DO_NOT_TRACK"] = "1"
    service = "benchmarks.peers.bento_ml:Front"
    os.execv(
        sys.executable,
        [sys.executable, "-m", "bentoml", "serve", service, "--port", str(given.port), "--working-dir", "."],
    )
