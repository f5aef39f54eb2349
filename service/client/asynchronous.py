"""The client for asyncio; `service.client.synchronous` documents the calls, which are the same."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import TypeVar

import httpx

from service.client import calls
from service.client.attempts import attempts, client_options, request_options
from service.client.batches import counting, in_batches
from service.client.calls import Call, Picture, Wait, Wishes, read_picture
from service.client.errors import ServerRefused
from service.client.freshness import Freshness
from service.client.results import Change, Prediction, Readiness, Replica, Revision, Task, Tasks
from service.client.retries import Retries

Result = TypeVar("Result")


class AsyncClient:
    """A server's API. Keeps its connections, so use one for many calls of one event loop."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
        read_your_writes: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._url = url
        self._retries = retries or Retries()
        self._sleep = sleep
        self._freshness = Freshness(is_remembered=read_your_writes)
        self._http = httpx.AsyncClient(**client_options(url, key, timeout_s), transport=transport)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # -- answers -------------------------------------------------------------------------------------

    async def predict(
        self,
        picture: Picture,
        *,
        task: str | None = None,
        top_k: int | None = None,
        selection: str | None = None,
        coverage: float | None = None,
        minimum_revision: int | None = None,
    ) -> Prediction:
        wishes = Wishes(task, top_k, selection, coverage)
        data = await asyncio.to_thread(read_picture, picture)
        return (await self._run(calls.predict([data], wishes), minimum_revision))[0]

    async def predict_many(
        self,
        pictures: Iterable[Picture],
        wishes: Wishes = Wishes(),  # noqa: B008 - immutable
        *,
        batch_size: int = 16,
        concurrency: int = 2,
        progress: bool = False,
        minimum_revision: int | None = None,
    ) -> list[Prediction]:
        async def ask(batch: list[Picture]) -> list[Prediction]:
            data = await asyncio.to_thread(lambda: [read_picture(one) for one in batch])
            return await self._run(calls.predict(data, wishes), minimum_revision)

        return await self._in_batches(ask, pictures, batch_size, concurrency, progress)

    async def predict_each(
        self,
        pictures: Iterable[Picture],
        wishes: Wishes = Wishes(),  # noqa: B008 - immutable
        *,
        batch_size: int = 16,
        concurrency: int = 2,
        progress: bool = False,
        minimum_revision: int | None = None,
    ) -> list[Prediction | ServerRefused]:
        async def ask(batch: list[Picture]) -> list[Prediction | ServerRefused]:
            data = await asyncio.to_thread(lambda: [read_picture(one) for one in batch])
            try:
                return [*await self._run(calls.predict(data, wishes), minimum_revision)]
            except ServerRefused as refusal:
                if not refusal.concerns_a_picture:
                    raise
                if len(batch) == 1:
                    return [refusal]
            # One unreadable picture refuses its whole request: ask for each alone.
            return [answer for one in data for answer in await ask([one])]

        return await self._in_batches(ask, pictures, batch_size, concurrency, progress)

    async def _in_batches(
        self,
        ask: Callable[[list[Picture]], Awaitable[list[Result]]],
        pictures: Iterable[Picture],
        batch_size: int,
        concurrency: int,
        progress: bool,
    ) -> list[Result]:
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, at least 1 is needed")
        batches = enumerate(in_batches(pictures, batch_size))
        answered: dict[int, list[Result]] = {}
        with counting(pictures, progress=progress) as count:

            async def work() -> None:
                for i, batch in batches:
                    answered[i] = await ask(batch)
                    count(len(batch))

            workers = [asyncio.create_task(work()) for _ in range(concurrency)]
            try:
                await asyncio.gather(*workers)  # not a TaskGroup, which would wrap the fault
            finally:
                for one in workers:
                    one.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [one for _, batch in sorted(answered.items()) for one in batch]

    # -- tasks ---------------------------------------------------------------------------------------

    async def ready(self) -> Readiness:
        return await self._run(calls.ready())

    async def tasks(self, *, minimum_revision: int | None = None) -> Tasks:
        return await self._run(calls.tasks(), minimum_revision)

    async def task(self, name: str, *, minimum_revision: int | None = None) -> Task:
        return await self._run(calls.task(name), minimum_revision)

    async def add_task(
        self,
        module: bytes | str | os.PathLike[str],
        *,
        dry_run: bool = False,
        force: bool = False,
        reason: str = "",
        signature: str | None = None,
        wait: Wait | None = None,
    ) -> Change:
        call = await asyncio.to_thread(
            calls.add_task,
            module,
            dry_run=dry_run,
            force=force,
            reason=reason,
            signature=signature,
            wait=wait,
        )
        return await self._run(call)

    async def remove_task(self, name: str, *, reason: str = "", wait: Wait | None = None) -> Change:
        return await self._run(calls.remove_task(name, reason, wait))

    async def replicas(self) -> list[Replica]:
        return await self._run(calls.replicas())

    async def revisions(self, limit: int = 50) -> list[Revision]:
        return await self._run(calls.revisions(limit))

    async def rollback(self, number: int, *, reason: str = "", wait: Wait | None = None) -> Change:
        return await self._run(calls.rollback(number, reason, wait))

    async def _run(self, call: Call[Result], minimum_revision: int | None = None) -> Result:
        call = self._freshness.asked(call, minimum_revision)
        options = request_options(call)
        conversation = attempts(call, self._retries, self._url)
        wait_s = next(conversation)
        while True:
            if wait_s:
                await self._sleep(wait_s)
            try:
                outcome: httpx.Response | httpx.HTTPError = await self._http.request(
                    call.method, call.path, **options
                )
            except httpx.HTTPError as fault:
                outcome = fault
            try:
                wait_s = conversation.send(outcome)
            except StopIteration as end:
                result: Result = end.value
                return self._freshness.seen(call, result)
