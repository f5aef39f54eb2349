"""Reading one's own writes: which revision a call asks for at least, and which one its answer is of."""

import threading
from dataclasses import replace
from typing import TypeVar

from service.client.calls import Call

Result = TypeVar("Result")


class Freshness:
    """The newest revision that a client has caused or seen, asked for ever after; threads may share it."""

    def __init__(self, *, is_remembered: bool) -> None:
        """Without `is_remembered` only those revisions are asked for that a call names."""
        self._is_remembered = is_remembered
        self._newest = 0
        self._lock = threading.Lock()

    def asked(self, call: Call[Result], minimum_revision: int | None) -> Call[Result]:
        """The call with the revision that its answer must have at least."""
        minimum = max(self._newest, minimum_revision or 0)
        if not minimum:
            return call
        return replace(call, headers={**call.headers, "x-minimum-revision": str(minimum)})

    def seen(self, call: Call[Result], result: Result) -> Result:
        """Remember the revision of a result, and hand the result on."""
        if self._is_remembered and call.revision_of is not None:
            with self._lock:
                self._newest = max(self._newest, call.revision_of(result))
        return result
