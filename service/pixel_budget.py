"""How many bytes of pixels may be decoded at once, over all requests."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from model_store.errors import ImageTooLarge
from service.errors import DeadlineExceeded


class PixelBudget:
    """Memory for decoding, shared by the threads of the decode pool.

    What does not fit now waits, first come, first served: behind a large picture the small ones wait too,
    so that nobody waits for ever. Nobody can wait for each other: whoever has room is decoding.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Bytes taken now."""
        return self._num_bytes

    @property
    def num_waiting(self) -> int:
        """Pictures that do not fit now."""
        return len(self._waiting)

    @contextlib.contextmanager
    def room(self, num_bytes: int, deadline: float) -> Iterator[None]:
        """Room for `num_bytes` while the block runs, waited for until `deadline` on the monotonic clock.

        Raises ImageTooLarge when there will never be so much, and DeadlineExceeded.
        """
        if num_bytes > self._max_bytes:
            raise ImageTooLarge(
                f"image needs {num_bytes} bytes of memory while it is decoded, the limit is {self._max_bytes}"
            )
        self._take(num_bytes, deadline)
        try:
            yield
        finally:
            with self._changed:
                self._num_bytes -= num_bytes
                self._changed.notify_all()

    def _take(self, num_bytes: int, deadline: float) -> None:
        place = object()

        def fits() -> bool:
            return self._waiting[0] is place and self._num_bytes + num_bytes <= self._max_bytes

        with self._changed:
            self._waiting.append(place)
            try:
                if not self._changed.wait_for(fits, deadline - time.monotonic()):
                    raise DeadlineExceeded(f"waited for {num_bytes} bytes to decode in until the deadline")
                self._num_bytes += num_bytes
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()  # somebody else is first now
