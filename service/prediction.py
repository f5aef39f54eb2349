"""What every way of asking for a prediction shares: admission, limits, and the time that is left."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from model_store.bank import ModuleBank
from model_store.errors import InvalidRequest
from model_store.selection import Selection
from service.engine import Engine
from service.errors import DeadlineExceeded
from service.questions import Question, TimedAnswer
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a client wants its pictures answered."""

    task: str | None = None
    top_k: int = 5
    selection: Selection = "lda"
    coverage: float | None = None
    every_label: bool = False  # of the named task, however improbable


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A request for predictions from its admission to its answer: the bank it captured, its deadline."""

    engine: Engine
    settings: Settings
    bank: ModuleBank
    timeout_s: float
    started_at: float

    @classmethod
    def admit(cls, engine: Engine, settings: Settings, bank: ModuleBank, timeout_s: float) -> "Inquiry":
        """Capture `bank` if there is room, before a body is read for nothing.

        Raises Overloaded, ShuttingDown and EngineStopped.
        """
        started_at = time.monotonic()
        engine.check_room()
        return cls(engine, settings, bank, timeout_s, started_at)

    def check_count(self, num_pictures: int) -> None:
        """Raises InvalidRequest for more pictures than one request may have, or than may ever wait."""
        limit = min(self.settings.max_images_per_request, self.settings.max_queued_images)
        if num_pictures > limit:
            raise InvalidRequest(f"{num_pictures} pictures in one request, at most {limit} are allowed")

    def check_top_k(self, top_k: int) -> None:
        """Raises InvalidRequest for a longer list of alternatives than a client may ask for."""
        limit = self.settings.max_top_k
        if top_k > limit:
            raise InvalidRequest(f"top_k is {top_k}, at most {limit} is allowed")

    async def answer(self, pictures: Sequence[bytes] | Tensor, wishes: Wishes) -> list[TimedAnswer]:
        """The engine's answers, in order; see Engine.answer for what `pictures` may be and what is raised."""
        self.check_count(len(pictures))
        left_s = self.timeout_s - (time.monotonic() - self.started_at)
        if left_s <= 0.0:
            raise DeadlineExceeded(f"the body took all of the {self.timeout_s:g} s")
        question = Question(
            self.bank,
            wishes.selection,
            wishes.task,
            wishes.top_k,
            wishes.every_label,
            wishes.coverage,
            self.settings.abstain_level,
        )
        return await self.engine.answer(pictures, question, left_s)
