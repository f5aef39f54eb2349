"""The budget for decoded pixels: never exceeded, always given back, first come first served."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from pictures import encoded, noise

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.errors import ImageTooLarge, InvalidImage
from model_store.module_file import read_module
from model_store.preprocess import open_picture
from model_store.store import ModelStore
from service.app import create_app
from service.engine import Engine
from service.errors import DeadlineExceeded, InvalidSettings
from service.pixel_budget import PixelBudget
from service.questions import Question
from service.settings import Settings

FAR = 60.0


def in_a_minute() -> float:
    return time.monotonic() + FAR


def wait_until(condition: Callable[[], bool]) -> None:
    """Without sleeping, but not for ever."""
    ends_at = in_a_minute()
    while not condition():
        assert time.monotonic() < ends_at


# -- the budget ------------------------------------------------------------------------------------------


def test_what_will_never_fit_is_refused_at_once() -> None:
    with pytest.raises(ImageTooLarge, match="101 bytes"), PixelBudget(100).room(101, in_a_minute()):
        raise AssertionError


def test_room_comes_back_from_a_block_that_fails() -> None:
    budget = PixelBudget(100)
    for _ in range(3):
        with pytest.raises(KeyError), budget.room(100, in_a_minute()):
            assert budget.num_bytes == 100
            raise KeyError
    assert budget.num_bytes == 0


def test_what_does_not_fit_now_waits_until_it_does() -> None:
    budget, entered = PixelBudget(100), threading.Event()

    def second() -> None:
        with budget.room(60, in_a_minute()):
            entered.set()

    with ThreadPoolExecutor() as pool:
        with budget.room(50, in_a_minute()):
            waiting = pool.submit(second)
            wait_until(lambda: budget.num_waiting == 1)
            assert not entered.is_set()
        waiting.result(FAR)
    assert entered.is_set() and (budget.num_bytes, budget.num_waiting) == (0, 0)


def test_a_wait_ends_with_the_deadline_and_leaves_no_trace() -> None:
    budget = PixelBudget(100)
    with budget.room(50, in_a_minute()):
        with pytest.raises(DeadlineExceeded), budget.room(60, time.monotonic()):
            raise AssertionError
        assert (budget.num_bytes, budget.num_waiting) == (50, 0)
        with budget.room(50, time.monotonic()):
            assert budget.num_bytes == 100
    assert budget.num_bytes == 0


def test_small_ones_do_not_overtake_a_large_one() -> None:
    budget, order = PixelBudget(100), []

    def take(name: str, num_bytes: int) -> None:
        with budget.room(num_bytes, in_a_minute()):
            order.append(name)

    with ThreadPoolExecutor() as pool:
        with budget.room(50, in_a_minute()):
            large = pool.submit(take, "large", 100)
            wait_until(lambda: budget.num_waiting == 1)
            small = pool.submit(take, "small", 10)
            wait_until(lambda: budget.num_waiting == 2)
            assert order == []
        large.result(FAR)
        small.result(FAR)
    assert order == ["large", "small"]


def test_one_who_gives_up_lets_the_next_one_in() -> None:
    budget = PixelBudget(100)

    def take(num_bytes: int, deadline: float) -> None:
        with budget.room(num_bytes, deadline):
            pass

    with ThreadPoolExecutor() as pool, budget.room(50, in_a_minute()):
        impatient = pool.submit(take, 100, time.monotonic() + 0.2)
        wait_until(lambda: budget.num_waiting == 1)
        small = pool.submit(take, 10, in_a_minute())
        with pytest.raises(DeadlineExceeded):
            impatient.result(FAR)
        small.result(FAR)  # although the first 50 bytes are still taken


# -- the engine ------------------------------------------------------------------------------------------


class WatchedBudget(PixelBudget):
    """Remembers the most bytes that were taken at once."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.most_bytes = 0

    def _take(self, num_bytes: int, deadline: float) -> None:
        super()._take(num_bytes, deadline)
        self.most_bytes = max(self.most_bytes, self.num_bytes)


PICTURES = [encoded(noise(seed=i, size=(200, 150))) for i in range(12)]


@pytest.fixture(scope="module")
def bank(tiny_backbone: Backbone, make_module: Callable[..., bytes]) -> ModuleBank:
    return ModuleBank.build(
        [read_module(make_module("birds", seed=1)).module],
        revision=3,
        backbone_fingerprint=tiny_backbone.fingerprint,
        feature_dim=tiny_backbone.feature_dim,
    )


@pytest.fixture
def engine(tiny_backbone: Backbone) -> Iterator[Engine]:
    """Four decoding threads, and room for one of PICTURES at a time."""
    settings = Settings(max_batch_size=4, decode_threads=4, cls_cache_bytes=0)
    with Engine(tiny_backbone, settings) as engine:
        engine._decoders.budget = WatchedBudget(peak_bytes(tiny_backbone, PICTURES[0]))
        yield engine


def peak_bytes(backbone: Backbone, data: bytes) -> int:
    return open_picture(data, backbone.preprocessing, Settings().image_limits).peak_bytes


async def test_more_pictures_than_fit_are_all_answered_and_never_exceed_it(
    engine: Engine, bank: ModuleBank
) -> None:
    answers = await asyncio.gather(
        *(engine.answer([one], Question(bank)) for one in PICTURES), engine.answer(PICTURES, Question(bank))
    )
    assert [len(one) for one in answers] == [1] * len(PICTURES) + [len(PICTURES)]
    assert engine.pixel_budget.most_bytes == peak_bytes(engine.backbone, PICTURES[0])
    assert engine.pixel_budget.num_bytes == 0


async def test_a_picture_broken_amid_its_pixels_gives_its_room_back(engine: Engine, bank: ModuleBank) -> None:
    broken = PICTURES[0][: len(PICTURES[0]) // 2]
    assert peak_bytes(engine.backbone, broken) == peak_bytes(engine.backbone, PICTURES[0])
    for _ in range(3):
        with pytest.raises(InvalidImage, match="cannot be decoded"):
            await engine.answer([broken], Question(bank))
    assert engine.pixel_budget.num_bytes == 0
    assert await engine.answer([PICTURES[1]], Question(bank))


async def test_a_request_cancelled_amid_decoding_gives_its_room_back(
    engine: Engine, bank: ModuleBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        assert go_on.wait(FAR)
        raise InvalidImage("nobody hears of it")

    monkeypatch.setattr("model_store.preprocess.to_pixels", slow)
    request = asyncio.create_task(engine.answer([PICTURES[0]], Question(bank)))
    await asyncio.to_thread(inside.wait, FAR)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert engine.pixel_budget.num_bytes > 0  # the thread is still at it, so the memory is still taken
    monkeypatch.undo()
    go_on.set()
    assert await engine.answer([PICTURES[1]], Question(bank))
    assert engine.pixel_budget.num_bytes == 0


async def test_a_wait_for_room_ends_with_the_deadline_of_its_request(
    engine: Engine, bank: ModuleBank
) -> None:
    with engine.pixel_budget.room(1, in_a_minute()), pytest.raises(DeadlineExceeded):
        await engine.answer([PICTURES[0]], Question(bank), timeout_s=0.05)
    assert await engine.answer([PICTURES[0]], Question(bank))


def test_a_budget_that_the_queue_alone_exceeds_is_no_setting(tiny_backbone: Backbone) -> None:
    waiting = 3 * 32 * 32 * (10 + 4)
    sizes = {"max_batch_size": 4, "max_queued_images": 10}
    with pytest.raises(InvalidSettings, match="TOSCA_MAX_DECODED_BYTES"):
        Engine(tiny_backbone, Settings(max_decoded_bytes=waiting, **sizes))
    assert Engine(tiny_backbone, Settings(max_decoded_bytes=waiting + 1, **sizes)).pixel_budget.num_bytes == 0


def test_over_http_a_picture_that_never_fits_is_a_413(
    tiny_store: ModelStore, tiny_backbone: Backbone
) -> None:
    settings = Settings(store=tiny_store.url, store_poll_s=0.0, max_decoded_bytes=4 * 2**20)
    with TestClient(create_app(settings, tiny_backbone)) as client:
        response = client.post("/predict", content=encoded(noise(size=(1000, 1000))))
    assert response.status_code == 413
    assert response.json()["type"] == "urn:tosca:problem:image-too-large"
    assert "while it is decoded" in response.json()["detail"]
