"""From pictures to answers: decode in a bounded pool, then one thread that owns the device.

    admission → decode + preprocess (pool) → queue → inference thread: backbone once, bank answers
                └── CLS vector known: bank answers, on the pool

Every picture gets an answer or an exception; one whose client left is dropped before it costs a pass.
"""
# B batch

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.compute_threads import use_one_compute_thread
from model_store.errors import ToscaError
from model_store.preprocess import open_picture
from model_store.runtimes.runtime import runtime_kind
from service.admission import DrainRate
from service.cls_cache import ClsCache
from service.errors import DeadlineExceeded, EngineStopped, InvalidSettings, Overloaded, ShuttingDown
from service.feedback import RecentAnswers
from service.inference import InferenceThread, Waiting
from service.pixel_budget import PixelBudget
from service.questions import Question, TimedAnswer, check_finite
from service.request_context import current_request
from service.settings import Settings
from service.telemetry import Telemetry
from service.timings import Interval, Timings
from service.traffic import Traffic


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
        self.pixel_budget = self._budget_beside_queue()
        self._decoders = ThreadPoolExecutor(settings.num_decode_threads, "decode", use_one_compute_thread)
        self._drain = DrainRate()
        self._inference = InferenceThread(
            backbone,
            self.cache,
            self.telemetry.metrics,
            max_batch_size=self.max_batch_size,
            max_wait_s=settings.max_wait_s,
            drain_s=lambda: self.drain_s,
        )
        self._stopping = False

    def __enter__(self) -> "Engine":
        if runtime_kind(self.backbone.runtime_name).engine != "torch":
            # The passes have threads of their own; beside them, those of torch wait for each other at every
            # operation of the bank, and spin meanwhile (docs/experiments.md).
            torch.set_num_threads(1)
        elif self._settings.torch_threads:
            torch.set_num_threads(self._settings.torch_threads)
        self._drain = DrainRate(self._inference.warm_up())
        self._inference.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._inference.stop()
        self._decoders.shutdown()

    @property
    def is_alive(self) -> bool:
        """False when the inference thread has died or one pass has taken longer than `stall_after_s`."""
        return self._inference.is_alive(self._settings.stall_after_s)

    @property
    def num_admitted(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._drain.num_inside

    @property
    def num_queued(self) -> int:
        """Pictures decoded and waiting for the device, about."""
        return self._inference.num_queued

    @property
    def drain_s(self) -> float:
        """Seconds until what is waiting now will be answered, at the rate measured last."""
        return self._drain.drain_s

    def check_room(self, num_pictures: int = 1) -> None:
        """Raise ShuttingDown, EngineStopped or Overloaded if `answer` would for so many more pictures."""
        if self._stopping:
            raise ShuttingDown("the service is shutting down")
        if self._inference.has_died:
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
        entries = [one for one in prepared if isinstance(one, Waiting)]
        self._inference.submit(entries)
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
    ) -> "Waiting | TimedAnswer":
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
        return Waiting(key, pixels, question, Interval(started, time.monotonic()), deadline)

    def _answer_known(
        self, cls_BD: Tensor, question: Question, began_at: float | None = None
    ) -> list[TimedAnswer]:
        """Answers that need no pass. A bank never changes, so it may be asked beside the inference thread."""
        answering_at = time.monotonic()
        answers, modules = question.answer(cls_BD)
        for answer in answers:
            check_finite(answer)
        selection = Interval(answering_at, time.monotonic())
        self.telemetry.metrics.time_answers(selection, modules)
        decode = Interval(answering_at if began_at is None else began_at, answering_at)
        timings = Timings(decode, None, None, selection, modules, batch_size=0)
        return [TimedAnswer(answer, timings, cls_D) for answer, cls_D in zip(answers, cls_BD, strict=True)]
