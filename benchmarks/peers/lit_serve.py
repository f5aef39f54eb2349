"""LitServe with its dynamic batching: worker processes have a backbone each, pictures are decoded in them.

Example: python -m benchmarks.peers.lit_serve --store .tosca/store --port 9000 --threads 2
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import litserve
from fastapi import Body

from benchmarks.peers.answering import Answering
from benchmarks.peers.arguments import Arguments, parse

BATCH_TIMEOUT_S = 0.002
RawBody = Annotated[bytes, Body(media_type="image/jpeg")]  # cheaper than its usual JSON or multipart


class TaskAnswers(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, arguments: Arguments) -> None:
        super().__init__(
            max_batch_size=arguments.max_batch_size, batch_timeout=BATCH_TIMEOUT_S, api_path="/predict"
        )
        self._arguments = arguments

    def setup(self, device: str) -> None:  # noqa: ARG002  (named by LitServe)
        arguments = self._arguments
        threads = arguments.threads // arguments.workers
        self._answering = Answering(arguments, threads, arguments.max_batch_size)
        self._decoders = ThreadPoolExecutor(threads)

    def decode_request(self, request: RawBody) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[Any]:
        return list(self._decoders.map(self._answering.decode, inputs))

    def predict(self, pixels: Sequence[Any]) -> list[dict[str, Any]]:
        return self._answering.answer(pixels)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {"predictions": [output]}


if __name__ == "__main__":
    given = parse()
    server = litserve.LitServer(
        TaskAnswers(given), accelerator="cpu", workers_per_device=given.workers, timeout=120
    )
    server.run(port=given.port, generate_client_file=False, log_level="warning")
