"""How much is let in: requests a key may have under way, how long one may take, and when to come back."""

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from model_store.errors import InvalidRequest
from service.errors import TooManyRequests
from service.settings import Settings

_WINDOW = 64  # answers


class DrainRate:
    """How fast answers leave, measured over the last ones; idle time does not count."""

    def __init__(self, initial_s: float = 0.1, clock: Callable[[], float] = time.monotonic) -> None:
        """`initial_s`: seconds a picture, until any was answered."""
        self._clock = clock
        self._gaps_s: deque[float] = deque([initial_s], maxlen=_WINDOW)
        self._since: float | None = None  # the last answer, or the end of idleness
        self._num_inside = 0

    @property
    def num_inside(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._num_inside

    @property
    def seconds_each(self) -> float:
        return sum(self._gaps_s) / len(self._gaps_s)

    @property
    def drain_s(self) -> float:
        """Seconds until all that is inside will have left, at the measured rate."""
        return self._num_inside * self.seconds_each

    def enter(self, num: int) -> None:
        if self._num_inside == 0:
            self._since = self._clock()
        self._num_inside += num

    def leave(self, num: int, *, is_answered: bool) -> None:
        """`num` pictures are gone; those answered say how fast the service is."""
        assert num <= self._num_inside, "more left than came"
        self._num_inside -= num
        if not is_answered:
            return
        now = self._clock()
        elapsed = now - (self._since if self._since is not None else now)
        self._since = now
        self._gaps_s.extend([elapsed / num] * min(num, _WINDOW))


class KeyQuota:
    """Requests under way by key; callers without one share nothing and are bounded by the queue alone."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_by_key: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, key_id: str | None, retry_after_s: float) -> Iterator[None]:
        """A place for one request while the block runs. Raises TooManyRequests."""
        if key_id is None:
            yield
            return
        if self._num_by_key[key_id] >= self._max_requests:
            raise TooManyRequests(
                f"this key has {self._max_requests} requests under way, which is the limit", retry_after_s
            )
        self._num_by_key[key_id] += 1
        try:
            yield
        finally:
            self._num_by_key[key_id] -= 1
            if not self._num_by_key[key_id]:
                del self._num_by_key[key_id]


def deadline_s(header: str | None, settings: Settings) -> float:
    """Seconds a prediction may take: as X-Request-Timeout asks for, but no more than allowed.

    Raises InvalidRequest when the header is no positive number.
    """
    if header is None:
        return settings.request_timeout_s
    try:
        wanted = float(header)
    except ValueError:
        wanted = math.nan
    if not wanted > 0.0:
        raise InvalidRequest(f"X-Request-Timeout is {header[:32]!r}: expected seconds, more than 0")
    return min(wanted, settings.max_request_timeout_s)
