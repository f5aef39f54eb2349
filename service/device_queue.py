"""Decoded pictures waiting for the device, and which of them a free stream takes.

Work-conserving: a stream that is free takes its share of what is waiting, up to the batch size. A picture
that is alone in the house has the whole device, if pictures have come alone for a while: its pass is
shorter then, but two such passes are longer than two side by side.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.questions import Question, TimedAnswer
from service.timings import Interval

# How long pictures must have come alone for the next one to get the whole device.
ALONE_FOR_S = 0.2
# What is waiting is divided into so many parts a stream, of which a free stream takes one. A deep queue makes
# large batches, which are efficient; in a short one no picture waits for a pass of its batch-mates.
_PARTS_A_STREAM = 2
_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
_NEVER = Interval(0.0, 0.0)


@dataclass(slots=True)
class Waiting:
    """A picture's place in the house: first it waits to be decoded, then for the device."""

    question: Question
    deadline: float
    picture: bytes | Tensor | None = None  # as it came, until it is decoded
    key: bytes = b""  # in the CLS cache
    pixels: Tensor = _NO_PIXELS
    decode: Interval = _NEVER
    known: TimedAnswer | None = None  # where the cache had its CLS vector
    future: "Future[TimedAnswer]" = field(default_factory=Future)

    def drop(self) -> None:
        """Nobody waits for it: unless its pass has begun, its memory is free at once."""
        if self.future.cancel():
            self.picture, self.pixels = None, _NO_PIXELS


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one pass is about."""

    entries: list[Waiting]
    stream: int | None  # None: the pass has the whole device
    began_at: float


class DeviceQueue:
    """Pictures in the order in which they came, for threads that each run one stream of the device."""

    def __init__(
        self,
        num_streams: int,
        max_batch_size: int,
        max_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A pass takes at most `max_batch_size` pictures, and waits `max_wait_s` for them to come."""
        self._num_streams = num_streams
        self._parts = 1 if num_streams == 1 else _PARTS_A_STREAM * num_streams
        self._max_batch_size = max_batch_size
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waiting: deque[Waiting] = deque()
        self._on_device: set[Batch] = set()
        self._unfinished: set[Batch] = set()
        self._crowded_at = -float("inf")  # when a picture last found another one in the house
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Pictures waiting, about."""
        return len(self._waiting)

    def put(self, entries: Sequence[Waiting]) -> None:
        with self._changed:
            if len(entries) > 1 or self._waiting or self._on_device:
                self._crowded_at = self._clock()
            self._waiting.extend(entries)
            self._changed.notify(len(entries))

    def take(self, stream: int) -> Batch | None:
        """The next batch for a stream, once there is one and a place on the device for it; None when the
        queue is closed and everything was taken. What is taken leaves the device, and is finished."""
        with self._changed:
            self._changed.wait_for(self._may_begin)
            if self._max_wait_s and len(self._waiting) < self._max_batch_size:
                self._changed.wait_for(self._is_full, self._max_wait_s)
                self._changed.wait_for(self._may_begin)  # another stream may have taken them
            if not self._waiting:
                return None
            now = self._clock()
            is_whole = self._num_streams == 1 or self._is_alone(now)
            share = -(-len(self._waiting) // self._parts)
            entries = [self._waiting.popleft() for _ in range(min(share, self._max_batch_size))]
            batch = Batch(entries, None if is_whole else stream, now)
            self._on_device.add(batch)
            self._unfinished.add(batch)
            return batch

    def leave_device(self, batch: Batch) -> None:
        """Its pass is over, and answers are given: others may have its place. Once or more often."""
        with self._changed:
            if batch not in self._on_device:
                return
            self._on_device.remove(batch)
            if batch.stream is None:
                self._changed.notify_all()

    def finish(self, batch: Batch) -> None:
        """Whatever became of it, it is over."""
        self.leave_device(batch)
        with self._changed:
            self._unfinished.remove(batch)

    def close(self) -> None:
        """Let what is waiting be taken, and then end those who ask for more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Waiting]:
        """All that is waiting, taken out."""
        with self._changed:
            cleared = list(self._waiting)
            self._waiting.clear()
            return cleared

    @property
    def longest_running_s(self) -> float:
        """For how long the oldest batch has not been finished; 0 where there is none."""
        with self._changed:
            now = self._clock()
            return max((now - one.began_at for one in self._unfinished), default=0.0)

    def _may_begin(self) -> bool:
        if self._waiting:
            return not any(one.stream is None for one in self._on_device)
        return self._closed

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._max_batch_size or self._closed

    def _is_alone(self, now: float) -> bool:
        return len(self._waiting) == 1 and not self._on_device and now - self._crowded_at > ALONE_FOR_S
