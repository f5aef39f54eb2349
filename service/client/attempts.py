"""One call from its first attempt to its result: a conversation that both clients only carry out."""

import json
from collections.abc import Generator
from typing import Any, TypeVar

import httpx

from service.client.calls import Call
from service.client.errors import ClientError, ServerRefused, ServerUnreachable
from service.client.retries import Retries, retry_after_s

Result = TypeVar("Result")
_NOT_DONE = (412, 429)  # refused before anything is done: behind the revision asked for, too many
_NOT_NOW = 503
# Faults before anything was sent: the call was not done.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def attempts(
    call: Call[Result], retries: Retries, server: str
) -> Generator[float, httpx.Response | httpx.HTTPError, Result]:
    """Yields seconds to wait before each attempt, is sent its outcome, and returns the result.

    Raises ServerRefused and ServerUnreachable.
    """
    outcome = yield 0.0
    waited_s = 0.0
    attempt = 1
    while True:
        if isinstance(outcome, httpx.HTTPError):
            fault: Exception = ServerUnreachable(f"server {server} does not answer: {outcome}")
            may_repeat = isinstance(outcome, _NOT_SENT) or call.is_repeatable
            wanted_s = None
        elif outcome.is_success:
            return _parsed(call, outcome, server)
        else:
            fault = ServerRefused.of(outcome.status_code, _document(outcome), outcome.text)
            status = outcome.status_code
            may_repeat = status in _NOT_DONE or (status == _NOT_NOW and call.is_repeatable)
            wanted_s = retry_after_s(outcome.headers)
        wait_s = retries.wait_s(attempt, wanted_s, waited_s) if may_repeat else None
        if wait_s is None:
            raise fault
        waited_s += wait_s
        attempt += 1
        outcome = yield wait_s


def _parsed(call: Call[Result], response: httpx.Response, server: str) -> Result:
    try:
        return call.parse(response.json())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ClientError(f"server {server} gives an answer to {call.path} that is not TOSCA's") from error


def _document(response: httpx.Response) -> Any:
    try:
        return response.json()
    except json.JSONDecodeError:
        return None


def client_options(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    """What both kinds of httpx client are made with: one pool of connections, kept open."""
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": timeout_s,
    }


def request_options(call: Call[Any]) -> dict[str, Any]:
    return {
        "params": dict(call.query),
        "content": call.content,
        "files": None if call.files is None else list(call.files),
        "headers": dict(call.headers),
    }
