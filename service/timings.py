"""When each stage of a picture's way began and ended."""

from dataclasses import dataclass
from typing import NamedTuple


class Interval(NamedTuple):
    """From one reading of the monotonic clock to another, in seconds."""

    began_at: float
    ended_at: float

    @property
    def duration_s(self) -> float:
        return self.ended_at - self.began_at


@dataclass(frozen=True, slots=True)
class Timings:
    """The stages of one picture; the pass and what follows it are those of its batch.

    A picture whose CLS vector was known has neither queue nor backbone and a `batch_size` of 0; otherwise
    that is the number of pictures in the pass. `modules` lies within `selection`.
    """

    decode: Interval
    queue: Interval | None
    backbone: Interval | None
    selection: Interval
    modules: Interval
    batch_size: int

    @property
    def is_known(self) -> bool:
        """Whether the picture's CLS vector was known, so that it needed no pass."""
        return self.batch_size == 0
