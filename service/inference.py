"""The one thread that owns the device: batches of what is waiting, a pass of the backbone, the answers.

Batching is work-conserving: whenever the device is idle it takes what is waiting, up to the batch size. Every
waiter gets an answer or an exception; one that was dropped before its pass costs none; one bad picture never
fails its neighbours.
"""
# B batch

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.compute_threads import use_one_compute_thread
from model_store.deferred import NotInMemory, from_memory_alone
from service.cls_cache import ClsCache
from service.errors import DeadlineExceeded, DeviceOutOfMemory, EngineStopped, NotFinite
from service.metrics import Metrics
from service.questions import Question, TimedAnswer, check_finite
from service.timings import Interval, Timings

log = logging.getLogger("tosca.engine")
# Threads that answer questions whose modules must be read first.
_NUM_READERS = 4


@dataclass(slots=True)
class Waiting:
    """One picture waiting for the device."""

    key: bytes  # in the CLS cache
    pixels: Tensor
    question: Question
    decode: Interval
    deadline: float
    future: "Future[TimedAnswer]" = field(default_factory=Future)

    def drop(self) -> None:
        """Nobody waits for it: unless its pass has begun, its memory is free at once."""
        if self.future.cancel():
            self.pixels = torch.empty(0)


class InferenceThread:
    """Answers decoded pictures in the order in which they come. Start it, submit to it, stop it."""

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
        self._max_wait_s = max_wait_s
        self._drain_s = drain_s
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._num_compute_threads = 1  # what the starting thread has, once it starts
        self._readers = ThreadPoolExecutor(_NUM_READERS, "module-reader", use_one_compute_thread)
        self._busy_since: float | None = None
        self.has_died = False

    def start(self) -> None:
        self._num_compute_threads = torch.get_num_threads()
        self._thread.start()

    def stop(self) -> None:
        """Answer what was submitted, and end."""
        self._queue.put(None)
        self._thread.join()
        self._readers.shutdown()

    def submit(self, entries: Sequence[Waiting]) -> None:
        for entry in entries:
            self._queue.put(entry)
        if self.has_died:
            self._fail_waiting()  # it may have died before these were queued

    @property
    def num_queued(self) -> int:
        """Pictures waiting for the device, about."""
        return self._queue.qsize()

    def is_alive(self, stall_after_s: float) -> bool:
        """False when the thread has died or one pass has taken longer than `stall_after_s`."""
        busy_since = self._busy_since
        stalled = busy_since is not None and time.monotonic() - busy_since > stall_after_s
        return self._thread.is_alive() and not self.has_died and not stalled

    def warm_up(self) -> float:
        """Passes of every batch size whose first would be slow; seconds a picture of the largest."""
        each_s = 0.0
        size = (3, self._backbone.preprocessing.height, self._backbone.preprocessing.width)
        for batch_size in self._warm_sizes():
            started = time.monotonic()
            self._backbone.embed(torch.zeros((batch_size, *size), dtype=torch.uint8)).cpu()
            each_s = (time.monotonic() - started) / batch_size
        return each_s

    def _warm_sizes(self) -> list[int]:
        """Batch sizes whose first pass would be slow: the runtime's buckets, else powers of two."""
        largest = self._max_batch_size
        buckets = self._backbone.batch_buckets or tuple(2**i for i in range(largest.bit_length()))
        return sorted({size for size in buckets if size < largest} | {largest})

    def _run(self) -> None:
        batch: list[Waiting] | None = []
        try:
            torch.set_num_threads(self._num_compute_threads)  # whatever other threads have set for themselves
            while (batch := self._collect()) is not None:
                self._busy_since = time.monotonic()
                self._execute(batch)
                self._busy_since = None
        except BaseException:  # nobody is left to see it: delivered to the waiters, and to is_alive
            log.critical("the inference thread has died", exc_info=True)
            self.has_died = True
            self._fail_waiting(batch or [])

    def _fail_waiting(self, batch: Sequence[Waiting] = ()) -> None:
        waiting = list(batch)
        while not self._queue.empty():
            if (entry := self._queue.get()) is not None:
                waiting.append(entry)
        for entry in waiting:
            if not entry.future.done():
                entry.future.set_exception(EngineStopped("the inference thread has died"))

    def _collect(self) -> list[Waiting] | None:
        """What is waiting, at least one entry; None when stopped and everything is answered."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        closes_at = time.monotonic() + self._max_wait_s
        while len(batch) < self._max_batch_size:
            try:
                entry = self._queue.get(timeout=max(0.0, closes_at - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                self._queue.put(None)  # answer this batch first
                break
            batch.append(entry)
        return batch

    def _execute(self, batch: list[Waiting]) -> None:
        started = time.monotonic()
        live = []
        for entry in batch:
            if not entry.future.set_running_or_notify_cancel():
                continue  # its client left
            if entry.deadline < started:
                entry.future.set_exception(DeadlineExceeded("waited in the queue until its deadline"))
                continue
            live.append(entry)
        if live:
            self._pass(live)

    def _pass(self, live: list[Waiting]) -> None:
        """One pass of the backbone, and the answers. A pass that fails is taken again in parts: in halves
        when the device is out of memory, else one by one, so that only the guilty picture fails."""
        started = time.monotonic()
        try:
            cls_BD = self._embed(live)
        except torch.OutOfMemoryError as error:
            size = -(-len(live) // 2)
            fault: Exception = DeviceOutOfMemory(f"the device is out of memory: {error}", self._drain_s())
        except Exception as error:  # delivered to the waiters
            size, fault = 1, error
        else:
            self._answer_pass(live, cls_BD, started)
            return
        if len(live) == 1:
            live[0].future.set_exception(fault)
            return
        # Outside the handlers, whose tracebacks hold the tensors of the failed pass.
        for start in range(0, len(live), size):
            self._pass(live[start : start + size])

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

    def _embed(self, live: list[Waiting]) -> Tensor:
        """[B, D] CLS vectors on the CPU. The same picture twice is computed once, and so is one that
        another batch computed while this one was waiting."""
        known = {entry.key: self._cache.peek(entry.key) for entry in live}
        missing = {entry.key: entry.pixels for entry in live if known[entry.key] is None}
        if missing:
            fresh_BD = self._backbone.embed(torch.stack(list(missing.values()))).cpu()
            for key, cls_D in zip(missing, fresh_BD, strict=True):
                known[key] = cls_D
                self._cache.put(key, cls_D)
        return torch.stack([cls_D for entry in live if (cls_D := known[entry.key]) is not None])

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
