"""What is asked again, how often, and after which wait."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
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

    def wait_s(self, attempt: int, wanted_s: float | None, waited_s: float) -> float | None:
        """Seconds to wait after attempt number `attempt` (from 1) failed; None to give up.

        `wanted_s` is what the server asks for, if it does; `waited_s` what the call has waited before.
        """
        if attempt >= self.max_attempts:
            return None
        if wanted_s is None:
            wanted_s = self.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311
        return wanted_s if waited_s + wanted_s <= self.max_wait_s else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait (RFC 9110); None where it does not say, or not how it should.

    A date counts from that of the response, so that the client's clock does not matter.
    """
    retry_after = headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        wanted, sent = (parsedate_to_datetime(one) for one in (retry_after, headers.get("date", "")))
        return max(0.0, (wanted - sent).total_seconds())
    except (TypeError, ValueError):
        return None
