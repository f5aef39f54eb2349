"""From pictures to answers: decode in a bounded pool, then the threads that own the device.

    admission → decode + preprocess (pool) → queue → inference threads: backbone once, bank answers
                └── CLS vector known: bank answers, on the pool

Every picture gets an answer or an exception; one whose client left is dropped before it costs a pass.
"""
# B batch

import asyncio
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.runtimes.runtime import runtime_kind
from service.admission import DrainRate
from service.cls_cache import ClsCache
from service.decode_pool import DecodePool
from service.errors import DeadlineExceeded, EngineStopped, InvalidSettings, Overloaded, ShuttingDown
from service.feedback import GivenAnswer, RecentAnswers
from service.inference import Inference
from service.pixel_budget import PixelBudget
from service.questions import Question, TimedAnswer
from service.request_context import current_request
from service.settings import Settings
from service.telemetry import Telemetry
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
        self._drain = DrainRate()
        self._inference = Inference(
            backbone,
            self.cache,
            self.telemetry.metrics,
            max_batch_size=self.max_batch_size,
            max_wait_s=settings.max_wait_s,
            drain_s=lambda: self.drain_s,
        )
        self._decoders = DecodePool(
            settings.num_decode_threads,
            backbone.preprocessing,
            settings.image_limits,
            self._budget_beside_queue(),
            self.cache,
            self.telemetry.metrics,
            self._inference.submit,
        )
        self._stopping = False

    def __enter__(self) -> "Engine":
        on_cuda = self.backbone.device.type == "cuda"
        if on_cuda or runtime_kind(self.backbone.runtime_name).engine != "torch":
            # The passes have threads of their own, or none; beside them, those of torch wait for each other
            # at every operation of the bank, and spin meanwhile (docs/experiments.md).
            torch.set_num_threads(1)
        elif self._settings.torch_threads:
            torch.set_num_threads(self._settings.torch_threads)
        self._drain = DrainRate(self._inference.warm_up())
        self._inference.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._decoders.stop()
        self._inference.stop()

    @property
    def is_alive(self) -> bool:
        """False when an inference thread has died or one pass has taken longer than `stall_after_s`."""
        return self._inference.is_alive(self._settings.stall_after_s)

    @property
    def num_admitted(self) -> int:
        """Pictures admitted and not yet answered."""
        return self._drain.num_inside

    @property
    def pixel_budget(self) -> PixelBudget:
        """What decoding takes of memory."""
        return self._decoders.budget

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
            raise EngineStopped("an inference thread has died; the process must be started again")
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
        if isinstance(pictures, Tensor) and pictures.dim() == 2:
            return await asyncio.wrap_future(self._decoders.send_vectors(pictures, question))
        entries = self._decoders.send(pictures, question, time.monotonic() + timeout_s)
        try:
            futures = [asyncio.wrap_future(entry.future) for entry in entries]
            return [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)
        finally:
            for entry in entries:  # after a fault or a cancellation, the rest need no pass
                entry.drop()

    def _record(self, answers: Sequence[TimedAnswer], bank: ModuleBank) -> None:
        for one in answers:
            self.telemetry.tell_picture(one.timings, one.answer.num_modules_evaluated)
            self.traffic.record(bank, one.answer, is_new=not one.timings.is_known)
        context = current_request.get()
        if context is not None:
            given = [
                GivenAnswer(
                    one.answer.task,
                    one.answer.label,
                    one.answer.confidence,
                    bank.module(one.answer.task).sha256,
                )
                for one in answers
            ]
            self.recent.remember(context.request_id, given)

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
