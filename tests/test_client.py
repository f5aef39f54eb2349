"""The Python client: what it sends, which revision it asks for, and that it needs nothing of the service."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pictures import encoded, noise
from scripted_server import CHANGE, PREDICTION, URL, Server, answered, ok, refused

from service.client import AsyncClient, Client, Prediction, Retries, ServerRefused, Wishes

# -- what is sent ------------------------------------------------------------------------------------


def test_only_what_was_wished_for_is_sent() -> None:
    server = Server(answered(), answered())
    plain = server.ask(lambda client: client.predict(b"picture"))
    assert (plain.alternatives[0].label, plain.receipt.revision, plain.prediction_set) == ("bus", 7, None)
    server.ask(lambda client: client.predict(b"picture", task="birds", top_k=3, coverage=0.9))
    assert [str(one.url) for one in server.requests] == [
        f"{URL}/predict",
        f"{URL}/predict?task=birds&top_k=3&coverage=0.9",
    ]


def test_a_key_goes_along_and_names_are_quoted() -> None:
    server = Server(ok(CHANGE))
    with Client(URL, key="tosca_1_x", transport=httpx.MockTransport(server)) as client:
        client.remove_task("a/b?c", reason="ünwanted")
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer tosca_1_x"
    assert request.url.raw_path.startswith(b"/tasks/a%2Fb%3Fc?reason=%C3%BCnwanted")


def test_both_clients_offer_the_same_calls() -> None:
    def offered(kind: type[Any]) -> dict[str, inspect.Signature]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(one) for name, one in methods if not name.startswith("_")}

    assert offered(Client) == offered(AsyncClient)
    assert {"predict", "predict_each", "add_task", "rollback"} <= offered(Client).keys()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.predict(b"picture", task="birds", top_k=2, coverage=0.9, minimum_revision=4),
        lambda client: client.predict_many([b"picture"], Wishes(selection="entropy"), minimum_revision=4),
        lambda client: client.predict_each([b"picture"], Wishes(task="birds")),
        lambda client: client.ready(),
        lambda client: client.tasks(minimum_revision=4),
        lambda client: client.task("a/b", minimum_revision=4),
        lambda client: client.add_task(b"module", dry_run=True, force=True, reason="new", signature="{}"),
        lambda client: client.remove_task("birds", reason="old", wait="all"),
        lambda client: client.replicas(),
        lambda client: client.revisions(3),
        lambda client: client.rollback(3, reason="worse", wait="all"),
    ],
)
def test_both_clients_send_the_same(call: Callable[[Any], Any]) -> None:
    def sent(ask: Callable[[Server], Any]) -> tuple[str, httpx.URL, dict[str, str], bytes]:
        server = Server(refused(501))
        with pytest.raises(ServerRefused):
            ask(server)
        [request] = server.requests
        headers = dict(request.headers)
        kind, _, boundary = headers.get("content-type", "").partition("; boundary=")  # drawn by chance
        body = request.content.replace(boundary.encode(), b"boundary") if boundary else request.content
        return request.method, request.url, headers | {"content-type": kind}, body

    assert sent(lambda server: server.ask(call)) == sent(lambda server: server.ask_async(call))


def test_whom_a_change_waits_for_is_left_to_the_server_unless_it_is_said() -> None:
    for wait in (None, "this", "all"):
        server = Server(refused(501), refused(501), refused(501))
        for call in (
            lambda client, wait=wait: client.add_task(b"module", wait=wait),
            lambda client, wait=wait: client.remove_task("birds", wait=wait),
            lambda client, wait=wait: client.rollback(3, wait=wait),
        ):
            with pytest.raises(ServerRefused):
                server.ask(call)
        assert [request.url.params.get("wait") for request in server.requests] == [wait] * 3


def test_paths_bytes_and_pictures_of_pillow_are_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    data = encoded(image)
    (tmp_path / "bird.png").write_bytes(data)
    server = Server(*(answered() for _ in range(4)))
    for one in (data, tmp_path / "bird.png", str(tmp_path / "bird.png"), image):
        server.ask(lambda client, one=one: client.predict(one))
    assert all(data in request.content for request in server.requests)


def test_many_pictures_go_in_batches_and_come_back_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def labelled(request: httpx.Request) -> httpx.Response:
        pictures = request.read().split(b"picture ")[1:]
        return ok({"predictions": [PREDICTION | {"label": part[:3].decode()} for part in pictures]})

    pictures = (b"picture %03d" % i for i in range(35))
    with Client(URL, transport=httpx.MockTransport(labelled)) as client:
        answers = client.predict_many(pictures, batch_size=4, concurrency=3, progress=True)
    assert [one.label for one in answers] == [f"{i:03d}" for i in range(35)]
    assert "pictures" in (shown := capsys.readouterr()).err and not shown.out

    async def ask() -> list[Prediction]:
        async with AsyncClient(URL, transport=httpx.MockTransport(labelled)) as client:
            listed = [b"picture %03d" % i for i in range(35)]
            return await client.predict_many(listed, Wishes(top_k=2), batch_size=4, concurrency=3)

    assert [one.label for one in asyncio.run(ask())] == [f"{i:03d}" for i in range(35)]


def test_pictures_are_taken_only_as_they_are_needed() -> None:
    taken = 0

    def pictures() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"picture"

    with pytest.raises(ServerRefused):
        Server(refused(422)).ask(
            lambda client: client.predict_many(pictures(), batch_size=10, concurrency=1), Retries.none()
        )
    assert taken <= 20
    with pytest.raises(ValueError, match="batch_size is 0"):
        Server().ask(lambda client: client.predict_many([b"picture"], batch_size=0))


@pytest.mark.parametrize("ask", ["ask", "ask_async"])
@pytest.mark.parametrize("name", ["predict_many", "predict_each"])
def test_no_requests_under_way_answer_nothing(ask: str, name: str) -> None:
    with pytest.raises(ValueError, match="0"):
        getattr(Server(), ask)(lambda client: getattr(client, name)([b"picture"], concurrency=0))


# -- revisions ---------------------------------------------------------------------------------------


def asked_for(server: Server) -> list[str | None]:
    return [one.headers.get("x-minimum-revision") for one in server.requests]


def test_a_call_asks_for_the_revision_it_names_and_for_no_other() -> None:
    tasks = {"revision": 9, "backbone_fingerprint": "b" * 64, "tasks": []}

    def calls(client: Any) -> list[Any]:
        return [
            client.tasks(minimum_revision=8),
            client.predict(b"picture", minimum_revision=7),
            client.predict(b"picture"),
            client.predict_many([b"picture"], minimum_revision=6),
            client.predict_each([b"picture"], minimum_revision=5),
        ]

    async def each(client: Any) -> None:
        for call in calls(client):
            await call

    server, asynchronous = (Server(ok(tasks), *(answered() for _ in range(4))) for _ in range(2))
    server.ask(calls)
    asynchronous.ask_async(each)
    assert asked_for(server) == asked_for(asynchronous) == ["8", "7", None, "6", "5"]


def test_who_reads_its_own_writes_asks_for_the_newest_revision_it_caused_or_saw() -> None:
    server = Server(
        ok(CHANGE),
        ok({"revision": 11, "backbone_fingerprint": "b" * 64, "tasks": []}),
        answered(),
        ok(CHANGE | {"revision": 12}),
        answered(),
        answered(),
    )
    transport = httpx.MockTransport(server)
    with Client(URL, read_your_writes=True, transport=transport) as client:
        client.add_task(b"module")
        client.tasks()
        client.predict(b"picture")  # of revision 7: what was seen before counts
        client.remove_task("birds")
        client.predict(b"picture", minimum_revision=3)
        client.predict(b"picture", minimum_revision=20)
    assert asked_for(server) == [None, "8", "11", "11", "12", "20"]


def test_a_replica_that_is_behind_is_asked_again() -> None:
    server = Server(refused(412, **{"retry-after": "1"}), ok(CHANGE))
    assert server.ask(lambda client: client.remove_task("birds")).revision == 8
    assert server.waits_s == [1.0]


def test_a_change_says_which_replicas_serve_it() -> None:
    replica = {
        "replica_id": "a",
        "is_this": True,
        "is_live": True,
        "revision": 8,
        "age_s": 0.5,
        "lifetime_s": 30.0,
        "address": None,
        "mood": "a field of a later version",
    }
    standing = {"all_serve": False, "serving": [replica], "behind": [replica | {"replica_id": "b"}]}
    server = Server(*(ok(CHANGE | {"replicas": standing}) for _ in range(3)), ok([replica]))

    def calls(client: Client) -> list[Any]:
        changes = [
            client.add_task(b"module", wait="all"),
            client.remove_task("birds", wait="all"),
            client.rollback(3, wait="all"),
        ]
        return [*changes, client.replicas()]

    *changes, replicas = server.ask(calls)
    assert [one.url.params.get("wait") for one in server.requests] == ["all"] * 3 + [None]
    for change in changes:
        assert change.replicas.all_serve is False
        assert [one.replica_id for one in (*change.replicas.serving, *change.replicas.behind)] == ["a", "b"]
    assert [one.replica_id for one in replicas] == ["a"]


# -- what it needs -----------------------------------------------------------------------------------


def test_importing_and_asking_need_nothing_but_httpx() -> None:
    """In a process of its own: no torch, no timm, no web framework, not even NumPy."""
    code = """
import sys
import httpx
before = set(sys.modules)
from service.client import Client, Retries
with Client("http://127.0.0.1:9", retries=Retries.none()) as client:
    try:
        client.predict_many([b"picture"])
    except Exception as fault:
        assert "does not answer" in str(fault), fault
known = {"service", "model_store", "httpx", "httpcore", "anyio", "sniffio", "h11", "certifi"}
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - known - sys.stdlib_module_names))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
