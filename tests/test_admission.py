"""Admission: what is let in, what is refused with which status, and when to come back."""

import asyncio
import base64
import itertools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest
from pictures import encoded, noise
from starlette.datastructures import State
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from model_store.backbone import Backbone
from model_store.errors import ImageTooLarge, InvalidRequest, ToscaError
from model_store.store import ModelStore, with_task
from service import errors as service_faults
from service.admission import DrainRate, KeyQuota, deadline_s
from service.app import create_app
from service.bodies import LimitBodies
from service.errors import BodyTimeout, BodyTooLarge, Overloaded, TooManyRequests
from service.payloads import decode_base64
from service.problems import STATUS_OF, problem_of, status_of
from service.settings import Settings
from service.shedding import ShedLoad

MakeModule = Callable[..., bytes]


# -- the drain rate --------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_drain_time_is_what_waits_over_the_rate_measured() -> None:
    clock = Clock()
    drain = DrainRate(initial_s=9.0, clock=clock)
    for _ in range(100):  # one picture every 0.25 s, four inside all the time
        drain.enter(4 - drain.num_inside)
        clock.now += 0.25
        drain.leave(1, is_answered=True)
    assert drain.seconds_each == pytest.approx(0.25)
    assert drain.drain_s == pytest.approx(3 * 0.25)


def test_a_batch_counts_by_its_pictures() -> None:
    clock = Clock()
    drain = DrainRate(initial_s=9.0, clock=clock)
    for _ in range(64):
        drain.enter(8)
        clock.now += 2.0
        drain.leave(8, is_answered=True)
    assert drain.seconds_each == pytest.approx(0.25)


def test_idle_time_and_refused_pictures_say_nothing_of_the_rate() -> None:
    clock = Clock()
    drain = DrainRate(initial_s=9.0, clock=clock)
    for _ in range(64):
        drain.enter(1)
        clock.now += 0.5
        drain.leave(1, is_answered=True)
        clock.now += 3600.0
        drain.enter(1)
        clock.now += 10.0
        drain.leave(1, is_answered=False)
    assert drain.seconds_each == pytest.approx(0.5)
    assert drain.drain_s == 0.0


# -- one key's share, one request's time -----------------------------------------------------------------


def test_a_key_has_so_many_requests_under_way_and_no_more() -> None:
    quota = KeyQuota(2)
    with quota.place("a", 1.0), quota.place("a", 1.0):
        with pytest.raises(TooManyRequests) as refusal, quota.place("a", 7.0):
            pass
        assert refusal.value.retry_after_s == 7.0
        with quota.place("b", 1.0):
            pass
        with quota.place(None, 1.0), quota.place(None, 1.0), quota.place(None, 1.0):
            pass
    with quota.place("a", 1.0), quota.place("a", 1.0):
        pass


def test_a_failed_request_gives_its_place_back() -> None:
    quota = KeyQuota(1)
    for _ in range(3):
        with pytest.raises(KeyError), quota.place("a", 1.0):
            raise KeyError


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 30.0), ("5", 5.0), ("0.25", 0.25), ("1e9", 120.0), ("inf", 120.0), ("120.5", 120.0)],
)
def test_a_deadline_is_what_was_asked_for_within_the_limit(header: str | None, seconds: float) -> None:
    assert deadline_s(header, Settings()) == seconds


@pytest.mark.parametrize("header", ["", "0", "-1", "nan", "soon", "5 s", "1" * 5000 + "x"])
def test_a_deadline_that_is_no_time_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequest, match="X-Request-Timeout"):
        deadline_s(header, Settings())


# -- bodies ----------------------------------------------------------------------------------------------


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def call(limits: LimitBodies, chunks: list[bytes], headers: dict[str, str] | None = None) -> int:
    """The status that `limits` answers a body of these chunks with; its faults come through."""
    messages = iter(
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    )
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0)
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await limits({"type": "http", "path": "/predict", "headers": raw}, receive, send)
    return sent[0]["status"]


def limits_of(**changes: object) -> LimitBodies:
    chosen = {"limit_of": lambda *_: 100, "timeout_s": 60.0, "max_buffered_bytes": 1000, **changes}
    return LimitBodies(read_all, **chosen)


async def test_a_body_may_have_as_many_bytes_as_its_limit() -> None:
    assert await call(limits_of(), [b"x" * 50, b"x" * 50]) == 200
    with pytest.raises(BodyTooLarge):
        await call(limits_of(), [b"x" * 50, b"x" * 51])


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    with pytest.raises(BodyTooLarge, match="101 bytes"):
        await call(limits_of(), [], {"content-length": "101"})
    with pytest.raises(BodyTooLarge):
        await call(limits_of(), [], {"content-length": "9" * 5000})


async def test_bodies_together_are_bounded_and_their_room_comes_back() -> None:
    limits = limits_of(limit_of=lambda *_: 600, max_buffered_bytes=1000)
    results = await asyncio.gather(
        *(call(limits, [b"x" * 200] * 3) for _ in range(3)), return_exceptions=True
    )
    assert any(isinstance(one, Overloaded) for one in results)
    assert 200 in results
    for _ in range(3):
        assert await call(limits, [b"x" * 600]) == 200


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(BodyTimeout):
        await limits_of(timeout_s=0.01)({"type": "http", "path": "/", "headers": []}, never, never)


# -- base64 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 786_431, 786_432, 786_433, 2_000_000])
async def test_base64_in_slices_equals_base64_at_once(size: int) -> None:
    data = bytes(itertools.islice(itertools.cycle(range(256)), size))
    assert await decode_base64([base64.b64encode(data).decode()], 2**22) == [data]


@pytest.mark.parametrize(
    "text",
    ["A", "AA=", "AAAA=", "====", "A===", "AA==AAAA", "AAA\n", "AA-_", "ÄAAA", "A" * 2**20 + "AA==AAAA"],
)
async def test_what_is_no_base64_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"images\.1 is not base64"):
        await decode_base64(["AAAA", text], 2**22)


async def test_base64_of_too_large_a_picture_is_refused_before_decoding() -> None:
    with pytest.raises(ImageTooLarge):
        await decode_base64(["!" * 200], 100)


# -- the table -------------------------------------------------------------------------------------------


def all_faults(root: type[ToscaError] = ToscaError) -> Iterator[type[ToscaError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from all_faults(kind)


def test_every_fault_a_request_can_meet_has_its_status() -> None:
    not_over_http = {
        "HubUnavailable",
        "InvalidBackbone",
        "InvalidDataset",
        "InvalidKeys",
        "InvalidSettings",
        "CannotListen",
    }
    ours = [kind for kind in all_faults() if kind.__module__ in ("model_store.errors", "service.errors")]
    assert {
        kind.__name__ for kind in ours if not any(one in STATUS_OF for one in kind.__mro__)
    } == not_over_http


@pytest.mark.parametrize(
    ("fault", "status", "retry_after"),
    [
        (service_faults.Overloaded("full", 12.3), 503, "13"),
        (service_faults.DeviceOutOfMemory("full", 0.0), 503, "1"),
        (service_faults.TooManyRequests("many", 2.0), 429, "2"),
        (service_faults.ShuttingDown("bye"), 503, "5"),
        (service_faults.EngineStopped("dead"), 503, "5"),
        (service_faults.DeadlineExceeded("late"), 504, None),
        (service_faults.BodyTooLarge("big"), 413, None),
        (service_faults.BodyTimeout("slow"), 408, None),
        (service_faults.NotFinite("nan"), 500, None),
        (service_faults.UnsupportedMediaType("text"), 415, None),
    ],
)
def test_a_refusal_says_when_to_come_back(fault: ToscaError, status: int, retry_after: str | None) -> None:
    response = problem_of(fault, "/predict")
    assert response.status_code == status_of(fault) == status
    assert response.headers.get("retry-after") == retry_after
    assert json.loads(response.body)["status"] == status


# -- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def client(tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule) -> Iterator[TestClient]:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    settings = Settings(
        store=tiny_store.url, store_poll_s=0.0, max_body_bytes=2**21, max_images_per_request=4
    )
    with TestClient(create_app(settings, tiny_backbone), raise_server_exceptions=False) as client:
        yield client


def problem_type(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return str(response.json()["type"]).removeprefix("urn:tosca:problem:")


def test_a_deadline_that_has_passed_is_a_504(client: TestClient) -> None:
    response = client.post("/predict", content=encoded(noise()), headers={"x-request-timeout": "1e-9"})
    assert response.status_code == 504
    assert problem_type(response) == "deadline-exceeded"
    good = client.post("/predict", content=encoded(noise()), headers={"x-request-timeout": "20"})
    assert good.status_code == 200
    bad = client.post("/predict", content=encoded(noise()), headers={"x-request-timeout": "never"})
    assert bad.status_code == 422


def test_a_full_service_refuses_before_it_reads_the_body(client: TestClient) -> None:
    engine = client.app.state.service.engine
    engine._drain.enter(256)
    response = client.post("/predict", content=b"not even looked at", params={"top_k": "neither is this"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert client.get("/predict").status_code == 405
    assert client.get("/tasks").status_code == 200
    engine._drain.leave(256, is_answered=False)
    assert client.post("/predict", content=encoded(noise())).status_code == 200


def test_more_pictures_than_may_ever_wait_are_not_told_to_come_again(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    settings = Settings(store=tiny_store.url, store_poll_s=0.0, max_queued_images=2)
    with TestClient(create_app(settings, tiny_backbone)) as client:
        files = [("image", encoded(noise()))]
        assert client.post("/predict", files=3 * files).status_code == 422
        assert client.post("/predict", files=2 * files).status_code == 200


async def test_a_refusal_asks_neither_for_the_body_nor_for_anything_behind_it() -> None:
    def check_room() -> None:
        raise Overloaded("full", retry_after_s=7.0)

    async def untouched(*_: object) -> Message:
        raise AssertionError("refused before this")

    state = State({"service": SimpleNamespace(engine=SimpleNamespace(check_room=check_room))})
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    await ShedLoad(untouched, state)(scope, untouched, send)
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"7") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["type"] == "urn:tosca:problem:overloaded"
    with pytest.raises(AssertionError, match="refused before this"):
        await ShedLoad(untouched, state)({**scope, "path": "/tasks"}, untouched, send)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"images": [' + b'"",' * 500_000 + b'""]}', "more than the 772 elements"),
        (b'{"images": [' + b"0," * 900_000 + b"0]}", "more than the 772 elements"),
        (
            b'{"images": ["AAAA"], ' + b",".join(b'"k%d": 0' % i for i in range(50_000)) + b"}",
            "more than the 772",
        ),
        (b"[" * 2_000_000, "recursion limit"),
        (b'{"images":' * 100_000 + b"0" + b"}" * 100_000, "recursion limit"),
    ],
    ids=["many strings", "many numbers", "many names", "deep lists", "deep objects"],
)
def test_json_that_would_keep_the_parser_busy_is_refused(body: bytes, fault: str, client: TestClient) -> None:
    response = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert problem_type(response) == "invalid-request"
    assert fault in response.json()["detail"]


def test_json_has_a_limit_of_its_own(tiny_store: ModelStore, tiny_backbone: Backbone) -> None:
    settings = Settings(store=tiny_store.url, store_poll_s=0.0, max_json_bytes=1000)
    with TestClient(create_app(settings, tiny_backbone)) as client:
        as_json = {"headers": {"content-type": "application/json; charset=utf-8"}}
        assert client.post("/predict", content=b" " * 1001, **as_json).status_code == 413
        assert client.post("/tasks", content=b" " * 1001, **as_json).status_code == 413
        assert client.post("/predict", content=b" " * 1000, **as_json).status_code == 422
        assert client.post("/predict", content=b" " * 1001).status_code == 415


def test_a_problem_carries_the_id_of_its_request(client: TestClient) -> None:
    response = client.post("/predict", content=b"junk", headers={"x-request-id": "order-66"})
    assert response.json()["request_id"] == response.headers["x-request-id"] == "order-66"
