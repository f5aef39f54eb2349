"""The threads that own the device, one a stream: batches of what waits, passes of the backbone, answers.

Every waiter gets an answer or an exception; one that was dropped before its pass costs none; one bad picture
never fails its neighbours.
"""
# B batch

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.deferred import NotInMemory, from_memory_alone
from model_store.preprocess import stack_pixels
from service.cls_cache import ClsCache
from service.device_queue import Batch, DeviceQueue, Waiting
from service.errors import DeadlineExceeded, DeviceOutOfMemory, EngineStopped, NotFinite
from service.loader import make_readers
from service.metrics import Metrics
from service.questions import TimedAnswer, check_finite
from service.timings import Interval, Timings

log = logging.getLogger("tosca.engine")


class Inference:
    """Answers decoded pictures, begun in the order in which they come. Start it, submit to it, stop it."""

    def __init__(
        self,
        backbone: Backbone,
        cache: ClsCache,
        metrics: Metrics,
        *,
        max_batch_size: int,
        max_wait_s: float,
        drain_s: Callable[[], float],
    ) -> None:
        """A pass takes at most `max_batch_size` pictures and waits `max_wait_s` for them; `drain_s` tells
        when a client that was refused for want of memory may come again."""
        self._backbone = backbone
        self._cache = cache
        self._metrics = metrics
        self._max_batch_size = max_batch_size
        self._drain_s = drain_s
        self._queue = DeviceQueue(backbone.num_streams, max_batch_size, max_wait_s)
        self._threads = [
            threading.Thread(target=self._run, args=(stream,), name=f"inference-{stream}", daemon=True)
            for stream in range(backbone.num_streams)
        ]
        self._num_compute_threads = 1  # what the starting thread has, once it starts
        self._readers = make_readers()
        self.has_died = False

    def start(self) -> None:
        self._num_compute_threads = torch.get_num_threads()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Answer what was submitted, and end."""
        self._queue.close()
        for thread in self._threads:
            thread.join()
        self._readers.shutdown()

    def submit(self, entries: Sequence[Waiting]) -> None:
        self._queue.put(entries)
        if self.has_died:
            self._fail_waiting()  # it may have died before these were queued

    @property
    def num_queued(self) -> int:
        """Pictures waiting for the device, about."""
        return len(self._queue)

    def is_alive(self, stall_after_s: float) -> bool:
        """False when a thread has died or one pass has taken longer than `stall_after_s`."""
        stalled = self._queue.longest_running_s > stall_after_s
        return all(one.is_alive() for one in self._threads) and not self.has_died and not stalled

    def warm_up(self) -> float:
        """Passes of every batch size whose first would be slow, on all streams side by side, as they will
        serve; seconds a picture of the largest. Called before the start."""
        each_s = 0.0
        num_streams = self._backbone.num_streams
        size = (3, self._backbone.preprocessing.height, self._backbone.preprocessing.width)
        if num_streams > 1:
            self._embed_pixels(torch.zeros((1, *size), dtype=torch.uint8), None)  # of the whole device
        for batch_size in self._warm_sizes():
            # The backbone gives each stream an equal part.
            pixels_BCHW = torch.zeros((num_streams * batch_size, *size), dtype=torch.uint8)
            started = time.monotonic()
            self._embed_pixels(pixels_BCHW, None)
            each_s = (time.monotonic() - started) / len(pixels_BCHW)
        return each_s

    def _warm_sizes(self) -> list[int]:
        """Batch sizes whose first pass would be slow: the runtime's buckets, else powers of two."""
        largest = self._max_batch_size
        buckets = self._backbone.batch_buckets or tuple(2**i for i in range(largest.bit_length()))
        return sorted({size for size in buckets if size < largest} | {largest})

    def _run(self, stream: int) -> None:
        batch: Batch | None = None
        try:
            torch.set_num_threads(self._num_compute_threads)  # whatever other threads have set for themselves
            while (batch := self._queue.take(stream)) is not None:
                try:
                    self._execute(batch)
                finally:
                    self._queue.finish(batch)
                batch = None  # else its bank would live until this thread has another
        except BaseException:  # nobody is left to see it: delivered to the waiters, and to is_alive
            log.critical("an inference thread has died", exc_info=True)
            self.has_died = True
            self._fail_waiting(batch.entries if batch else [])

    def _fail_waiting(self, batch: Sequence[Waiting] = ()) -> None:
        for entry in (*batch, *self._queue.clear()):
            if not entry.future.done():
                entry.future.set_exception(EngineStopped("an inference thread has died"))

    def _execute(self, batch: Batch) -> None:
        started = time.monotonic()
        live = []
        for entry in batch.entries:
            if not entry.future.set_running_or_notify_cancel():
                continue  # its client left
            if entry.deadline < started:
                entry.future.set_exception(DeadlineExceeded("waited in the queue until its deadline"))
                continue
            live.append(entry)
        if live:
            self._pass(live, batch)

    def _pass(self, live: list[Waiting], batch: Batch) -> None:
        """One pass of the backbone over what is left of a batch, and the answers. A pass that fails is taken
        again in parts: in halves when the device is out of memory, else one by one, so that only the guilty
        picture fails."""
        started = time.monotonic()
        try:
            cls_BD = self._embed(live, batch.stream)
        except torch.OutOfMemoryError as error:
            size = -(-len(live) // 2)
            fault: Exception = DeviceOutOfMemory(f"the device is out of memory: {error}", self._drain_s())
        except Exception as error:  # delivered to the waiters
            size, fault = 1, error
        else:
            self._queue.leave_device(batch)
            self._answer_pass(live, cls_BD, started)
            return
        if len(live) == 1:
            live[0].future.set_exception(fault)
            return
        # Outside the handlers, whose tracebacks hold the tensors of the failed pass.
        for start in range(0, len(live), size):
            self._pass(live[start : start + size], batch)

    def _answer_pass(self, live: list[Waiting], cls_BD: Tensor, started: float) -> None:
        backbone = Interval(started, time.monotonic())
        self._metrics.time_pass(backbone, len(live))
        rows = sorted(range(len(live)), key=lambda i: live[i].question.kind)
        for _, group in groupby(rows, key=lambda i: live[i].question.kind):
            some = list(group)
            entries, cls_ND = [live[i] for i in some], cls_BD[some]
            try:
                with from_memory_alone():
                    self._answer_group(entries, cls_ND, backbone, len(live))
            except NotInMemory:  # the device shall not wait for the store
                self._readers.submit(self._answer_elsewhere, entries, cls_ND, backbone, len(live))

    def _answer_elsewhere(
        self, entries: list[Waiting], cls_ND: Tensor, backbone: Interval, batch_size: int
    ) -> None:
        """On a reader's thread, which nobody watches: whatever happens is told to the waiters."""
        try:
            self._answer_group(entries, cls_ND, backbone, batch_size)
        except BaseException as error:
            for entry in entries:
                if not entry.future.done():
                    entry.future.set_exception(error)
            raise

    def _embed(self, live: list[Waiting], stream: int | None) -> Tensor:
        """[B, D] CLS vectors on the CPU. The same picture twice is computed once, and so is one that
        another batch computed while this one was waiting."""
        known = {entry.key: self._cache.peek(entry.key) for entry in live}
        missing = {entry.key: entry.pixels for entry in live if known[entry.key] is None}
        if missing:
            fresh_BD = self._embed_pixels(stack_pixels(list(missing.values())), stream)
            for key, cls_D in zip(missing, fresh_BD, strict=True):
                known[key] = cls_D
                self._cache.put(key, cls_D)
        return torch.stack([cls_D for entry in live if (cls_D := known[entry.key]) is not None])

    def _embed_pixels(self, pixels_BCHW: Tensor, stream: int | None) -> Tensor:
        """[B, D] CLS vectors on the CPU, by a stream of the device or the whole of it."""
        if stream is None:
            return self._backbone.embed(pixels_BCHW).cpu()
        return self._backbone.embed_on(stream, pixels_BCHW).cpu()

    def _answer_group(
        self, entries: list[Waiting], cls_ND: Tensor, backbone: Interval, batch_size: int
    ) -> None:
        """Answers to one kind of question, or what went wrong, to all its waiters. Raises NotInMemory."""
        answering = time.monotonic()
        try:
            answers, modules = entries[0].question.answer(cls_ND)
        except NotInMemory:
            raise
        except Exception as error:  # delivered to the waiters
            for entry in entries:
                entry.future.set_exception(error)
            return
        selection = Interval(answering, time.monotonic())
        self._metrics.time_answers(selection, modules)
        for entry, answer, cls_D in zip(entries, answers, cls_ND, strict=True):
            try:
                check_finite(answer)
            except NotFinite as fault:
                entry.future.set_exception(fault)
                continue
            queue = Interval(entry.decode.ended_at, backbone.began_at)
            timings = Timings(entry.decode, queue, backbone, selection, modules, batch_size)
            entry.future.set_result(TimedAnswer(answer, timings, cls_D))
