"""The client for ordinary code."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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


class Client:
    """A server's API. Keeps its connections, so use one for many calls; threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries | None = None,
        read_your_writes: bool = False,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`url` is that of the main port, or of the admin port for changes where a server has one.

        `key` is an API key; `timeout_s` bounds each wait for the network. With `read_your_writes` every
        answer is of the newest revision that this client has caused or seen, or of a later one, whichever
        replica gives it. `transport` replaces the network, with whatever httpx takes.
        """
        self._url = url
        self._retries = retries or Retries()
        self._sleep = sleep
        self._freshness = Freshness(is_remembered=read_your_writes)
        self._http = httpx.Client(**client_options(url, key, timeout_s), transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- answers -------------------------------------------------------------------------------------

    def predict(
        self,
        picture: Picture,
        *,
        task: str | None = None,
        top_k: int | None = None,
        selection: str | None = None,
        coverage: float | None = None,
        minimum_revision: int | None = None,
    ) -> Prediction:
        """The answer to one picture: encoded bytes, a path, or a picture of Pillow.

        `task` answers alone if given; `top_k` bounds the alternatives; `coverage` adds a prediction set.
        The answer is of revision `minimum_revision` or a later one, else ServerRefused (412).
        """
        wishes = Wishes(task, top_k, selection, coverage)
        return self._run(calls.predict([read_picture(picture)], wishes), minimum_revision)[0]

    def predict_many(
        self,
        pictures: Iterable[Picture],
        wishes: Wishes = Wishes(),  # noqa: B008 - immutable
        *,
        batch_size: int = 16,
        concurrency: int = 2,
        progress: bool = False,
        minimum_revision: int | None = None,
    ) -> list[Prediction]:
        """The answers to any number of pictures, in order: `batch_size` a request, `concurrency` requests
        under way. `progress` shows a bar on standard error.

        A picture that the server cannot read raises ServerRefused, which counts within its request.
        """

        def ask(batch: list[Picture]) -> list[Prediction]:
            return self._run(calls.predict([read_picture(one) for one in batch], wishes), minimum_revision)

        return self._in_batches(ask, pictures, batch_size, concurrency, progress)

    def predict_each(
        self,
        pictures: Iterable[Picture],
        wishes: Wishes = Wishes(),  # noqa: B008 - immutable
        *,
        batch_size: int = 16,
        concurrency: int = 2,
        progress: bool = False,
        minimum_revision: int | None = None,
    ) -> list[Prediction | ServerRefused]:
        """As `predict_many`, but in the place of a picture that the server cannot read stands the refusal."""

        def ask(batch: list[Picture]) -> list[Prediction | ServerRefused]:
            data = [read_picture(one) for one in batch]
            try:
                return [*self._run(calls.predict(data, wishes), minimum_revision)]
            except ServerRefused as refusal:
                if not refusal.concerns_a_picture:
                    raise
                if len(batch) == 1:
                    return [refusal]
            # One unreadable picture refuses its whole request: ask for each alone.
            return [answer for one in data for answer in ask([one])]

        return self._in_batches(ask, pictures, batch_size, concurrency, progress)

    def _in_batches(
        self,
        ask: Callable[[list[Picture]], list[Result]],
        pictures: Iterable[Picture],
        batch_size: int,
        concurrency: int,
        progress: bool,
    ) -> list[Result]:
        answers: list[Result] = []
        under_way: deque[Future[list[Result]]] = deque()
        with ThreadPoolExecutor(concurrency) as pool, counting(pictures, progress=progress) as count:

            def take() -> None:
                answered = under_way.popleft().result()
                answers.extend(answered)
                count(len(answered))

            try:
                for batch in in_batches(pictures, batch_size):
                    if len(under_way) >= concurrency:
                        take()
                    under_way.append(pool.submit(ask, batch))
                while under_way:
                    take()
            finally:
                for one in under_way:
                    one.cancel()
        return answers

    # -- tasks ---------------------------------------------------------------------------------------

    def ready(self) -> Readiness:
        """What the server answers with; ServerRefused while it starts or stops."""
        return self._run(calls.ready())

    def tasks(self, *, minimum_revision: int | None = None) -> Tasks:
        return self._run(calls.tasks(), minimum_revision)

    def task(self, name: str, *, minimum_revision: int | None = None) -> Task:
        return self._run(calls.task(name), minimum_revision)

    def add_task(
        self,
        module: bytes | str | os.PathLike[str],
        *,
        dry_run: bool = False,
        force: bool = False,
        reason: str = "",
        signature: str | None = None,
        wait: Wait | None = None,
    ) -> Change:
        """Register a module file, by its bytes or path; with `dry_run` only measure its impact.

        `signature` is the JSON that `tosca sign` writes. Refused where other tasks would be harmed, unless
        `force` is set. With wait="all" the answer comes when every live replica serves the change, or says
        which do not; `timeout_s` of the client must be longer than the server waits.
        """
        call = calls.add_task(
            module, dry_run=dry_run, force=force, reason=reason, signature=signature, wait=wait
        )
        return self._run(call)

    def remove_task(self, name: str, *, reason: str = "", wait: Wait | None = None) -> Change:
        return self._run(calls.remove_task(name, reason, wait))

    def replicas(self) -> list[Replica]:
        """The servers of the same store that keep a record there, those that are gone included."""
        return self._run(calls.replicas())

    def revisions(self, limit: int = 50) -> list[Revision]:
        """The newest revisions, newest first."""
        return self._run(calls.revisions(limit))

    def rollback(self, number: int, *, reason: str = "", wait: Wait | None = None) -> Change:
        """Publish the task set of revision `number` as a new revision."""
        return self._run(calls.rollback(number, reason, wait))

    def _run(self, call: Call[Result], minimum_revision: int | None = None) -> Result:
        call = self._freshness.asked(call, minimum_revision)
        options = request_options(call)
        conversation = attempts(call, self._retries, self._url)
        wait_s = next(conversation)
        while True:
            if wait_s:
                self._sleep(wait_s)
            try:
                outcome: httpx.Response | httpx.HTTPError = self._http.request(
                    call.method, call.path, **options
                )
            except httpx.HTTPError as fault:
                outcome = fault
            try:
                wait_s = conversation.send(outcome)
            except StopIteration as end:
                result: Result = end.value
                return self._freshness.seen(call, result)
