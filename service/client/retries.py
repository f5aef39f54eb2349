"""What is asked again, how often, and after which wait."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Retries:
    """At most `max_attempts` of a call and `max_wait_s` of waiting between them all together.

    The wait is what the server asks for (Retry-After), else it doubles from `first_wait_s`, shortened at
    random so that clients refused together do not come back together.
    """

    max_attempts: int = 5
    max_wait_s: float = 30.0
    first_wait_s: float = 0.2

    @classmethod
    def none(cls) -> "Retries":
        """Every fault at once."""
        return cls(max_attempts=1)

    def wait_s(self, attempt: int, retry_after: str | None, waited_s: float) -> float | None:
        """Seconds to wait after attempt number `attempt` (from 1) failed; None to give up."""
        if attempt >= self.max_attempts:
            return None
        wanted = _seconds(retry_after)
        if wanted is None:
            wanted = self.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311
        return wanted if waited_s + wanted <= self.max_wait_s else None


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date (RFC 9110); None when it is neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
