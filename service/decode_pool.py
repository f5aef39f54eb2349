"""From pictures to what waits for the device, in a bounded pool of threads.

A thread of the pool hands what is ready to the device itself: by way of the event loop, every picture would
wait twice for whatever the loop is at.
"""
# B batch, H height, W width, D features

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

from model_store.compute_threads import use_one_compute_thread
from model_store.decoding import ImageLimits
from model_store.deferred import NotInMemory, from_memory_alone
from model_store.errors import ToscaError
from model_store.preprocess import Preprocessing, open_picture
from service.cls_cache import ClsCache
from service.device_queue import Waiting
from service.loader import make_readers
from service.metrics import Metrics
from service.pixel_budget import PixelBudget
from service.questions import Question, TimedAnswer, check_finite
from service.timings import Interval, Timings
from service.turns import wait_for_turns


class DecodePool:
    """Decodes pictures beside the device; answers those whose CLS vector is known."""

    def __init__(
        self,
        num_threads: int,
        preprocessing: Preprocessing,
        limits: ImageLimits,
        budget: PixelBudget,
        cache: ClsCache,
        metrics: Metrics,
        submit: Callable[[Sequence[Waiting]], None],
    ) -> None:
        """`submit` takes pictures to the device; it is called from the pool's threads."""
        self.budget = budget
        self._preprocessing = preprocessing
        self._limits = limits
        self._cache = cache
        self._metrics = metrics
        self._submit = submit
        self._threads = ThreadPoolExecutor(num_threads, "decode", _begin_decoding)
        self._readers = make_readers()

    def stop(self) -> None:
        """Finish what was begun."""
        self._threads.shutdown()
        self._readers.shutdown()

    def send(self, pictures: Sequence[bytes] | Tensor, question: Question, deadline: float) -> list[Waiting]:
        """The places in the house of encoded pictures or [B, 3, H, W] uint8 pixels; each place's future gets
        the answer.

        The device sees none of them before all are decoded: when one cannot be, all futures get its fault,
        and no pass is spent on the others.
        """
        request = _Request([Waiting(question, deadline, picture) for picture in pictures], self._submit)
        for place in range(len(request.entries)):
            self._threads.submit(self._from_memory, partial(self._prepare, request, place))
        return request.entries

    def send_vectors(self, cls_BD: Tensor, question: Question) -> "Future[list[TimedAnswer]]":
        """Answers to [B, D] float32 CLS vectors, which need no device."""
        answers: Future[list[TimedAnswer]] = Future()
        work = partial(self._answer_vectors, answers, cls_BD, question, time.monotonic())
        self._threads.submit(self._from_memory, work)
        return answers

    def _from_memory(self, work: Callable[[], None]) -> None:
        """Do what needs no module that must be read; others shall not wait for the store."""
        try:
            with from_memory_alone():
                work()
        except NotInMemory:
            self._readers.submit(work)

    def _prepare(self, request: "_Request", place: int) -> None:
        """Raises NotInMemory, and is to be called again then."""
        entry = request.entries[place]
        fault = None
        try:
            if (picture := entry.picture) is not None:  # else its client left
                self._decode(entry, picture)
                entry.picture = None
        except NotInMemory:
            raise
        except Exception as error:  # of whatever kind, it is this picture's
            fault = _without_frames(error) if isinstance(error, ToscaError) else error
        request.tell_ready(place, fault)

    def _decode(self, entry: Waiting, picture: bytes | Tensor) -> None:
        """Give an entry its pixels, or its answer where the CLS vector of its picture is known."""
        started = time.monotonic()
        # No picture file begins like the key of pixels, so neither can stand for the other.
        data = picture if isinstance(picture, bytes) else b"pixels:" + picture.numpy().tobytes()
        entry.key = self._cache.key(data)
        if (cls_D := self._cache.get(entry.key)) is not None:
            entry.known = self._answer_known(cls_D[None], entry.question, started)[0]
            return
        if isinstance(picture, bytes):
            opened = open_picture(picture, self._preprocessing, self._limits)
            with self.budget.room(opened.peak_bytes, entry.deadline):
                entry.pixels = opened.load()
        else:
            entry.pixels = picture
        entry.decode = Interval(started, time.monotonic())

    def _answer_vectors(
        self, answers: "Future[list[TimedAnswer]]", cls_BD: Tensor, question: Question, began_at: float
    ) -> None:
        """Raises NotInMemory, and is to be called again then."""
        if answers.cancelled():
            return
        try:
            given = self._answer_known(cls_BD, question, began_at)
        except NotInMemory:
            raise
        except Exception as error:
            tell = partial(answers.set_exception, error)
        else:
            tell = partial(answers.set_result, given)
        if answers.set_running_or_notify_cancel():
            tell()

    def _answer_known(self, cls_BD: Tensor, question: Question, began_at: float) -> list[TimedAnswer]:
        """Answers that need no pass. A bank never changes: it may be asked beside the inference threads.
        Raises NotInMemory."""
        answering_at = time.monotonic()
        answers, modules = question.answer(cls_BD)
        for answer in answers:
            check_finite(answer)
        selection = Interval(answering_at, time.monotonic())
        self._metrics.time_answers(selection, modules)
        timings = Timings(Interval(began_at, answering_at), None, None, selection, modules, batch_size=0)
        return [TimedAnswer(answer, timings, cls_D) for answer, cls_D in zip(answers, cls_BD, strict=True)]


def _begin_decoding() -> None:
    use_one_compute_thread()
    wait_for_turns()


def _without_frames(fault: ToscaError) -> ToscaError:
    """A fault of a picture without the frames that it came from. They hold the picture, and the future that
    the fault is for: a circle of megabytes, which would wait for the garbage collector."""
    fault.__cause__ = fault.__context__ = None
    return fault.with_traceback(None)


class _Request:
    """The pictures of one request; the thread that has the last of them ready sends them on together."""

    def __init__(self, entries: list[Waiting], submit: Callable[[Sequence[Waiting]], None]) -> None:
        self.entries = entries
        self._submit = submit
        self._faults: dict[int, Exception] = {}
        self._num_unready = len(entries)
        self._lock = threading.Lock()

    def tell_ready(self, place: int, fault: Exception | None) -> None:
        with self._lock:
            if fault is not None:
                self._faults[place] = fault
            self._num_unready -= 1
            if self._num_unready:
                return
        if self._faults:
            self._refuse()
            return
        for entry in self.entries:
            if entry.known is not None and entry.future.set_running_or_notify_cancel():
                entry.future.set_result(entry.known)
        if wanted := [one for one in self.entries if one.known is None and not one.future.cancelled()]:
            self._submit(wanted)

    def _refuse(self) -> None:
        place = min(self._faults)
        fault = self._faults[place]
        if isinstance(fault, ToscaError) and len(self.entries) > 1:
            fault = type(fault)(f"picture {place}: {fault}")
        for entry in self.entries:
            if entry.future.set_running_or_notify_cancel():
                entry.future.set_exception(fault)
