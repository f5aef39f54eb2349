"""From pictures to answers: decode in a bounded pool, then one thread that owns the device.

    admission → decode + preprocess (pool) → queue → inference thread: backbone once, bank answers
                └── CLS vector known: bank answers, on the pool

Batching is work-conserving: whenever the device is idle it takes what is waiting, up to the batch size.
Every waiter gets an answer or an exception; a request that left is dropped before it costs a pass; one
bad picture never fails its neighbours.
"""
# B batch

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from model_store.answers import Answer
from model_store.backbone import Backbone
from model_store.bank import ModuleBank, Stage
from model_store.errors import ToscaError
from model_store.preprocess import open_picture
from model_store.selection import Selection
from service.admission import DrainRate
from service.cls_cache import ClsCache
from service.errors import (
    DeadlineExceeded,
    DeviceOutOfMemory,
    EngineStopped,
    InvalidSettings,
    NotFinite,
    Overloaded,
    ShuttingDown,
)
from service.feedback import RecentAnswers
from service.pixel_budget import PixelBudget
from service.request_context import current_request
from service.settings import Settings
from service.telemetry import Telemetry
from service.timings import Interval, Timings
from service.traffic import Traffic

log = logging.getLogger("tosca.engine")


@dataclass(frozen=True, slots=True)
class Question:
    """How a request wants its pictures answered, and the bank it was admitted with."""

    bank: ModuleBank
    selection: Selection = "lda"
    task: str | None = None
    top_k: int = 5
    coverage: float | None = None
    abstain_level: float = 0.0

    def answer(self, cls_BD: Tensor) -> tuple[list[Answer], Interval]:
        """What the bank answers, whether a pass or a cache gave the vectors; and when its modules ran."""
        ended_at: dict[Stage, float] = {}
        answers = self.bank.answer(
            cls_BD,
            selection=self.selection,
            task=self.task,
            top_k=self.top_k,
            coverage=self.coverage,
            abstain_level=self.abstain_level,
            on_stage=lambda stage: ended_at.update({stage: time.monotonic()}),
        )
        return answers, Interval(ended_at["selected"], ended_at["evaluated"])


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    answer: Answer
    timings: Timings
    cls_D: Tensor  # float32, on the CPU


@dataclass(slots=True)
class _Entry:
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


class Engine:
    """Answers pictures on one device. Start and stop it as a context manager."""

    def __init__(self, backbone: Backbone, settings: Settings, telemetry: Telemetry | None = None) -> None:
        self.backbone = backbone
        self.telemetry = telemetry or Telemetry()
        self._settings = settings
        on_cuda = backbone.device.type == "cuda"
        self.max_batch_size = settings.max_batch_size or (64 if on_cuda else 8)
        self.cache = ClsCache(settings.cls_cache_bytes, backbone.fingerprint, backbone.variant)
        self.traffic = Traffic(settings.max_tracked_tasks, settings.drift_window, settings.drift_alarm_rate)
        self.recent = RecentAnswers(settings.max_recent_answers)
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self.pixel_budget = self._budget_beside_queue()
        self._decoders = ThreadPoolExecutor(settings.num_decode_threads, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._drain = DrainRate()
        self._busy_since: float | None = None
        self._stopping = False
        self._has_died = False

    def __enter__(self) -> "Engine":
        if self._settings.torch_threads:
            torch.set_num_threads(self._settings.torch_threads)
        self._warm_up()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._queue.put(None)
        self._thread.join()
        self._decoders.shutdown()

    @property
    def is_alive(self) -> bool:
        """False when the inference thread has died or one pass has taken longer than `stall_after_s`."""
        busy_since = self._busy_since
        stalled = busy_since is not None and time.monotonic() - busy_since > self._settings.stall_after_s
        return self._thread.is_alive() and not self._has_died and not stalled

    @property
    def num_admitted(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._drain.num_inside

    @property
    def num_queued(self) -> int:
        """Pictures decoded and waiting for the device, about."""
        return self._queue.qsize()

    @property
    def drain_s(self) -> float:
        """Seconds until what is waiting now will be answered, at the rate measured last."""
        return self._drain.drain_s

    def check_room(self, num_pictures: int = 1) -> None:
        """Raise ShuttingDown, EngineStopped or Overloaded if `answer` would for so many more pictures."""
        if self._stopping:
            raise ShuttingDown("the service is shutting down")
        if self._has_died:
            raise EngineStopped("the inference thread has died; the process must be started again")
        limit = self._settings.max_queued_images
        if self.num_admitted + num_pictures > limit:
            raise Overloaded(
                f"{self.num_admitted} pictures are waiting, at most {limit} may", retry_after_s=self.drain_s
            )

    async def answer(
        self,
        pictures: Sequence[bytes] | Tensor,
        question: Question,
        timeout_s: float | None = None,
    ) -> list[TimedAnswer]:
        """Answer encoded pictures, [B, 3, H, W] uint8 pixels as the backbone takes them, or [B, D] float32
        CLS vectors, in order, within `timeout_s` or the default. Called on the event loop.

        Raises Overloaded, ShuttingDown, EngineStopped, DeadlineExceeded, InvalidImage and UnknownTask.
        Cancelling the call takes its pictures out of the queue.
        """
        timeout_s = self._settings.request_timeout_s if timeout_s is None else timeout_s
        if question.task is not None:
            question.bank.module(question.task)  # raises UnknownTask before anything is decoded
        self.check_room(len(pictures))
        self._drain.enter(len(pictures))
        is_answered = False
        try:
            async with asyncio.timeout(timeout_s):
                answers = await self._answer_admitted(pictures, question, timeout_s)
            is_answered = True
            self._record(answers, question.bank)
            return answers
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"not answered within {timeout_s:g} s; {self.num_admitted} pictures were waiting"
            ) from error
        finally:
            self._drain.leave(len(pictures), is_answered=is_answered)

    async def _answer_admitted(
        self, pictures: Sequence[bytes] | Tensor, question: Question, timeout_s: float
    ) -> list[TimedAnswer]:
        deadline = time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        if isinstance(pictures, Tensor) and pictures.dim() == 2:
            return await loop.run_in_executor(self._decoders, self._answer_known, pictures, question)
        prepared = await asyncio.gather(
            *(
                loop.run_in_executor(self._decoders, self._prepare, one, question, deadline)
                for one in pictures
            ),
            return_exceptions=True,
        )
        for i, one in enumerate(prepared):
            if isinstance(one, BaseException):
                if isinstance(one, ToscaError) and len(pictures) > 1:
                    raise type(one)(f"picture {i}: {one}") from one
                raise one
        entries = [one for one in prepared if isinstance(one, _Entry)]
        for entry in entries:
            self._queue.put(entry)
        if self._has_died:
            self._fail_waiting()  # the thread may have died before these were queued
        try:
            computed = iter(await asyncio.gather(*(asyncio.wrap_future(entry.future) for entry in entries)))
        finally:
            for entry in entries:  # after a fault or a cancellation, the rest need no pass
                entry.drop()
        return [one if isinstance(one, TimedAnswer) else next(computed) for one in prepared]

    def _record(self, answers: Sequence[TimedAnswer], bank: ModuleBank) -> None:
        context = current_request.get()
        for i, one in enumerate(answers):
            self.telemetry.tell_picture(one.timings, one.answer.num_modules_evaluated)
            self.traffic.record(bank, one.answer, is_new=not one.timings.is_known)
            if context is not None:
                sha256 = bank.module(one.answer.task).sha256
                self.recent.remember(context.request_id, i, one.answer, sha256)

    def _budget_beside_queue(self) -> PixelBudget:
        """What `max_decoded_bytes` leaves for decoding when as many decoded pictures as may are waiting, and
        a pass has a batch whose clients left."""
        num_held = self._settings.max_queued_images + self.max_batch_size
        held_bytes = num_held * self.backbone.preprocessing.pixels_bytes
        max_bytes = self._settings.max_decoded_bytes
        if max_bytes <= held_bytes:
            raise InvalidSettings(
                f"TOSCA_MAX_DECODED_BYTES is {max_bytes}: the {num_held} pictures that may wait for the "
                f"device take {held_bytes} alone"
            )
        return PixelBudget(max_bytes - held_bytes)

    # -- the decode pool -----------------------------------------------------------------------------

    def _prepare(
        self, picture: bytes | Tensor, question: Question, deadline: float
    ) -> "_Entry | TimedAnswer":
        """A picture ready for the device, or its answer where its CLS vector is known."""
        started = time.monotonic()
        # No picture file begins like the key of pixels, so neither can stand for the other.
        data = picture if isinstance(picture, bytes) else b"pixels:" + picture.numpy().tobytes()
        key = self.cache.key(data)
        if (cls_D := self.cache.get(key)) is not None:
            return self._answer_known(cls_D[None], question, started)[0]
        if isinstance(picture, bytes):
            opened = open_picture(picture, self.backbone.preprocessing, self._settings.image_limits)
            with self.pixel_budget.room(opened.peak_bytes, deadline):
                pixels = opened.load()
        else:
            pixels = picture
        return _Entry(key, pixels, question, Interval(started, time.monotonic()), deadline)

    def _answer_known(
        self, cls_BD: Tensor, question: Question, began_at: float | None = None
    ) -> list[TimedAnswer]:
        """Answers that need no pass. A bank never changes, so it may be asked beside the inference thread."""
        answering_at = time.monotonic()
        answers, modules = question.answer(cls_BD)
        for answer in answers:
            _check_finite(answer)
        selection = Interval(answering_at, time.monotonic())
        self.telemetry.metrics.time_answers(selection, modules)
        decode = Interval(answering_at if began_at is None else began_at, answering_at)
        timings = Timings(decode, None, None, selection, modules, batch_size=0)
        return [TimedAnswer(answer, timings, cls_D) for answer, cls_D in zip(answers, cls_BD, strict=True)]

    # -- the inference thread ------------------------------------------------------------------------

    def _warm_up(self) -> None:
        size = (3, self.backbone.preprocessing.height, self.backbone.preprocessing.width)
        for batch_size in self._warm_sizes():
            started = time.monotonic()
            self.backbone.embed(torch.zeros((batch_size, *size), dtype=torch.uint8)).cpu()
            self._drain = DrainRate((time.monotonic() - started) / batch_size)

    def _warm_sizes(self) -> list[int]:
        """Batch sizes whose first pass would be slow: the runtime's buckets, else powers of two."""
        buckets = self.backbone.batch_buckets or tuple(2**i for i in range(self.max_batch_size.bit_length()))
        return sorted({size for size in buckets if size < self.max_batch_size} | {self.max_batch_size})

    def _run(self) -> None:
        batch: list[_Entry] | None = []
        try:
            while (batch := self._collect()) is not None:
                self._busy_since = time.monotonic()
                self._execute(batch)
                self._busy_since = None
        except BaseException:  # nobody is left to see it: delivered to the waiters, and to is_alive
            log.critical("the inference thread has died", exc_info=True)
            self._has_died = True
            self._fail_waiting(batch or [])

    def _fail_waiting(self, batch: Sequence[_Entry] = ()) -> None:
        waiting = list(batch)
        while not self._queue.empty():
            if (entry := self._queue.get()) is not None:
                waiting.append(entry)
        for entry in waiting:
            if not entry.future.done():
                entry.future.set_exception(EngineStopped("the inference thread has died"))

    def _collect(self) -> list[_Entry] | None:
        """What is waiting, at least one entry; None when stopped and everything is answered."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        closes_at = time.monotonic() + self._settings.max_wait_s
        while len(batch) < self.max_batch_size:
            try:
                entry = self._queue.get(timeout=max(0.0, closes_at - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                self._queue.put(None)  # answer this batch first
                break
            batch.append(entry)
        return batch

    def _execute(self, batch: list[_Entry]) -> None:
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

    def _pass(self, live: list[_Entry]) -> None:
        """One pass of the backbone, and the answers. A pass that fails is taken again in parts: in halves
        when the device is out of memory, else one by one, so that only the guilty picture fails."""
        started = time.monotonic()
        try:
            cls_BD = self._embed(live)
        except torch.OutOfMemoryError as error:
            size = -(-len(live) // 2)
            fault: Exception = DeviceOutOfMemory(f"the device is out of memory: {error}", self.drain_s)
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

    def _answer_pass(self, live: list[_Entry], cls_BD: Tensor, started: float) -> None:
        backbone = Interval(started, time.monotonic())
        self.telemetry.metrics.time_pass(backbone, len(live))
        rows = sorted(range(len(live)), key=lambda i: _group_key(live[i].question))
        for _, group in groupby(rows, key=lambda i: _group_key(live[i].question)):
            self._answer_group(live, list(group), cls_BD, backbone)

    def _embed(self, live: list[_Entry]) -> Tensor:
        """[B, D] CLS vectors on the CPU. The same picture twice is computed once, and so is one that
        another batch computed while this one was waiting."""
        known = {entry.key: self.cache.peek(entry.key) for entry in live}
        missing = {entry.key: entry.pixels for entry in live if known[entry.key] is None}
        if missing:
            fresh_BD = self.backbone.embed(torch.stack(list(missing.values()))).cpu()
            for key, cls_D in zip(missing, fresh_BD, strict=True):
                known[key] = cls_D
                self.cache.put(key, cls_D)
        return torch.stack([cls_D for entry in live if (cls_D := known[entry.key]) is not None])

    def _answer_group(self, live: list[_Entry], rows: list[int], cls_BD: Tensor, backbone: Interval) -> None:
        question = live[rows[0]].question
        answering = time.monotonic()
        try:
            answers, modules = question.answer(cls_BD[rows])
        except Exception as error:  # delivered to the waiters
            for row in rows:
                live[row].future.set_exception(error)
            return
        selection = Interval(answering, time.monotonic())
        self.telemetry.metrics.time_answers(selection, modules)
        for row, answer in zip(rows, answers, strict=True):
            entry = live[row]
            try:
                _check_finite(answer)
            except NotFinite as fault:
                entry.future.set_exception(fault)
                continue
            queue = Interval(entry.decode.ended_at, backbone.began_at)
            timings = Timings(entry.decode, queue, backbone, selection, modules, len(live))
            entry.future.set_result(TimedAnswer(answer, timings, cls_BD[row]))


def _group_key(question: Question) -> tuple[int, str, str, int, float]:
    """Equal for questions that one call of their bank can answer; the abstain level is the server's."""
    coverage = question.coverage or 0.0
    return question.bank.revision, question.selection, question.task or "", question.top_k, coverage


def _check_finite(answer: Answer) -> None:
    """Raises NotFinite when one of an answer's probabilities is no number."""
    listed = (*answer.alternatives, *(answer.prediction_set or ()))
    probabilities = (
        answer.confidence,
        answer.task_probability,
        answer.p_value,
        *(one.probability for one in listed),
    )
    if not all(math.isfinite(one) for one in probabilities):
        raise NotFinite(f"module {answer.receipt.module_sha256[:12]}… gives no number for this picture")
