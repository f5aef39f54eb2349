"""A plain FastAPI handler as a careful engineer writes it first: pictures are decoded in the thread pool, one
thread runs the backbone, a picture a pass.

Example: python -m benchmarks.peers.plain_fastapi --store .tosca/store --port 9000 --threads 2
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from benchmarks.peers.answering import Answering
from benchmarks.peers.arguments import Arguments, parse


def create_app(arguments: Arguments) -> FastAPI:
    app = FastAPI()
    answering = Answering(arguments, arguments.threads, max_batch_size=1)
    decoders = ThreadPoolExecutor(arguments.threads)
    device = ThreadPoolExecutor(1)

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(decoders, answering.decode, await request.body())
        return {"predictions": await loop.run_in_executor(device, answering.answer, [pixels])}

    return app


if __name__ == "__main__":
    given = parse()
    uvicorn.run(create_app(given), port=given.port, log_level="warning", access_log=False)
