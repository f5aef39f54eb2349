"""Which stream of the device takes which of the pictures that wait for it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from service.device_queue import ALONE_FOR_S, Batch, DeviceQueue, Waiting
from service.questions import Question

FAR = 60.0


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pictures(number: int) -> list[Waiting]:
    return [Waiting(cast(Question, None), deadline=FAR, key=bytes([i])) for i in range(number)]


def keys(entries: list[Waiting]) -> list[int]:
    return [one.key[0] for one in entries]


def taken(queue: DeviceQueue) -> list[int]:
    """The next batch, whose pass ends at once if it has the whole device."""
    batch = take(queue)
    if batch.stream is None:
        queue.finish(batch)
    return keys(batch.entries)


def take(queue: DeviceQueue) -> Batch:
    batch = queue.take(stream=1)
    assert batch is not None
    return batch


def test_one_stream_takes_all_that_fits_a_pass() -> None:
    queue = DeviceQueue(1, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(6))
    assert [taken(queue), taken(queue)] == [[0, 1, 2, 3], [4, 5]]
    assert len(queue) == 0


def test_streams_share_what_is_waiting_and_leave_some_for_the_next() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(12))
    # A quarter each time, rounded up: two streams, two parts a stream.
    assert [len(taken(queue)) for _ in range(6)] == [3, 3, 2, 1, 1, 1]


def test_a_deep_queue_fills_the_passes_of_all_streams() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(40))
    assert [taken(queue), taken(queue)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_every_picture_is_taken_once_and_in_the_order_in_which_it_came() -> None:
    queue = DeviceQueue(4, max_batch_size=3, max_wait_s=0.0)
    seen: list[int] = []
    lock = threading.Lock()

    def stream() -> None:
        while True:
            with lock:  # so that batches are noted in the order in which they were taken
                if (batch := queue.take(stream=1)) is None:
                    return
                seen.extend(keys(batch.entries))
            queue.finish(batch)

    entries = pictures(200)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream) for _ in range(4)]
        for i in range(0, 200, 5):
            queue.put(entries[i : i + 5])
        queue.close()
        for one in streams:
            one.result(FAR)
    assert seen == list(range(200))


# -- the whole device --------------------------------------------------------------------------------


def test_a_picture_that_is_alone_has_the_whole_device() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(1))
    assert take(queue).stream is None


@pytest.mark.parametrize(("seconds", "is_whole"), [(0.9 * ALONE_FOR_S, False), (1.1 * ALONE_FOR_S, True)])
def test_after_pictures_came_together_the_next_ones_have_streams_for_a_while(
    seconds: float, is_whole: bool
) -> None:
    clock = Clock()
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0, clock=clock)
    queue.put(pictures(2))
    for _ in range(2):
        batch = take(queue)
        assert batch.stream == 1
        queue.finish(batch)
    clock.now += seconds
    queue.put(pictures(1))
    assert take(queue).stream == (None if is_whole else 1)


def test_a_picture_beside_a_pass_has_a_stream() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(2))
    assert [take(queue).stream, take(queue).stream] == [1, 1]


def test_nothing_begins_beside_a_pass_of_the_whole_device() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(1))
    whole = take(queue)
    assert whole.stream is None
    queue.put(pictures(3))
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(take, queue)
        with pytest.raises(TimeoutError):
            later.result(0.05)
        queue.leave_device(whole)  # its answers are still to be given
        assert later.result(FAR).stream == 1
    queue.finish(whole)


def test_a_client_that_asks_again_while_its_answer_is_given_still_comes_alone() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(1))
    answering = take(queue)
    queue.leave_device(answering)
    queue.put(pictures(1))
    assert take(queue).stream is None


# -- waiting for a batch, and the end ----------------------------------------------------------------


def test_a_device_that_waits_gets_the_pictures_that_come_meanwhile() -> None:
    queue = DeviceQueue(1, max_batch_size=3, max_wait_s=FAR)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(taken, queue)
        for one in pictures(3):
            queue.put([one])
        assert batch.result(FAR) == [0, 1, 2]


def test_a_closed_queue_is_emptied_and_then_ends_its_streams() -> None:
    queue = DeviceQueue(2, max_batch_size=4, max_wait_s=FAR)
    queue.put(pictures(2))
    queue.close()
    assert [taken(queue), taken(queue), queue.take(stream=1)] == [[0], [1], None]


def test_what_is_cleared_is_not_taken() -> None:
    queue = DeviceQueue(1, max_batch_size=4, max_wait_s=0.0)
    queue.put(pictures(3))
    assert keys(queue.clear()) == [0, 1, 2]
    queue.close()
    assert queue.take(stream=1) is None


def test_the_oldest_batch_tells_whether_the_device_hangs() -> None:
    clock = Clock()
    queue = DeviceQueue(2, max_batch_size=1, max_wait_s=0.0, clock=clock)
    queue.put(pictures(2))
    first = take(queue)
    clock.now += 3.0
    take(queue)
    clock.now += 1.0
    queue.leave_device(first)
    assert queue.longest_running_s == 4.0
    queue.finish(first)
    assert queue.longest_running_s == 1.0
