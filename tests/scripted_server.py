"""A server that answers the Python client with one response after another, as a test wants it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from service.client import AsyncClient, Client, Retries

URL = "http://server"
PREDICTION = {
    "task": "birds",
    "label": "owl",
    "confidence": 0.75,
    "task_probability": 0.9,
    "alternatives": [{"task": "cars", "label": "bus", "probability": 0.25, "colour": "added later"}],
    "p_value": 0.5,
    "abstained": False,
    "receipt": {"revision": 7, "module_sha256": "a" * 64, "backbone_fingerprint": "b" * 64},
    "mood": "a field of a later version",
}
CHANGE = {"revision": 8, "published": True, "harmed": [], "impact": []}
OVERLOADED = {"type": "urn:tosca:problem:overloaded", "detail": "256 pictures are waiting", "status": 503}


class Server:
    """Answers with one response after another, and keeps what it was asked."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self._responses = list(responses)
        self.requests: list[httpx.Request] = []
        self.waits_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        response = self._responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return response

    def ask(self, call: Callable[[Any], Any], retries: Retries | None = None) -> Any:
        with Client(
            URL, retries=retries, transport=httpx.MockTransport(self), sleep=self.waits_s.append
        ) as client:
            return call(client)

    def ask_async(self, call: Callable[[Any], Awaitable[Any]], retries: Retries | None = None) -> Any:
        async def wait(seconds: float) -> None:
            self.waits_s.append(seconds)

        async def ask() -> Any:
            transport = httpx.MockTransport(self)
            async with AsyncClient(URL, retries=retries, transport=transport, sleep=wait) as client:
                return await call(client)

        return asyncio.run(ask())


def ok(data: Any) -> httpx.Response:
    return httpx.Response(200, json=data)


def answered(num: int = 1) -> httpx.Response:
    return ok({"predictions": [PREDICTION] * num})


def refused(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=OVERLOADED | {"status": status}, headers=headers)
