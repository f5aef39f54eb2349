"""The Python client: what it sends, what it asks again, and that it needs nothing of the service."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from pictures import encoded, noise
from serving import RunningServer, running_server
from typer.testing import CliRunner

from model_store.backbone import BackboneArtefact
from model_store.errors import InvalidImage
from model_store.store import ModelStore, with_task
from service.client import (
    AsyncClient,
    Client,
    ClientError,
    Prediction,
    Retries,
    ServerRefused,
    ServerUnreachable,
    Wishes,
)
from service.commands import predict
from service.keys import SCOPES, change_keys, make_key, now_utc
from service.remote_commands import remote_app

MakeModule = Callable[..., bytes]
URL = "http://server"
PREDICTION = {
    "task": "birds",
    "label": "owl",
    "confidence": 0.75,
    "task_probability": 0.9,
    "alternatives": [{"task": "cars", "label": "bus", "probability": 0.25, "colour": "added later"}],
    "p_value": 0.5,
    "abstained": False,
    "receipt": {"revision": 7, "module_sha256": "a" * 64, "backbone_fingerprint": "b" * 64},
    "mood": "a field of a later version",
}
CHANGE = {"revision": 8, "published": True, "harmed": [], "impact": []}
OVERLOADED = {"type": "urn:tosca:problem:overloaded", "detail": "256 pictures are waiting", "status": 503}

# -- what is asked again -----------------------------------------------------------------------------------


class Server:
    """Answers with one response after another, and keeps what it was asked."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self._responses = list(responses)
        self.requests: list[httpx.Request] = []
        self.waits_s: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        response = self._responses.pop(0)
        if isinstance(response, Exception):
            raise response
        return response

    def ask(self, call: Callable[[Any], Any], retries: Retries | None = None) -> Any:
        with Client(
            URL, retries=retries, transport=httpx.MockTransport(self), sleep=self.waits_s.append
        ) as client:
            return call(client)

    def ask_async(self, call: Callable[[Any], Awaitable[Any]], retries: Retries | None = None) -> Any:
        async def wait(seconds: float) -> None:
            self.waits_s.append(seconds)

        async def ask() -> Any:
            transport = httpx.MockTransport(self)
            async with AsyncClient(URL, retries=retries, transport=transport, sleep=wait) as client:
                return await call(client)

        return asyncio.run(ask())


def ok(data: Any) -> httpx.Response:
    return httpx.Response(200, json=data)


def answered(num: int = 1) -> httpx.Response:
    return ok({"predictions": [PREDICTION] * num})


def refused(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=OVERLOADED | {"status": status}, headers=headers)


def test_a_refusal_for_now_is_asked_again_when_the_server_says() -> None:
    for ask in ("ask", "ask_async"):
        server = Server(refused(**{"retry-after": "3"}), refused(429, **{"retry-after": "1"}), answered())
        answer = getattr(server, ask)(lambda client: client.predict(b"picture"))
        assert (answer.label, server.waits_s) == ("owl", [3.0, 1.0])
        assert (
            server.requests[0].content.count(b"picture") == server.requests[2].content.count(b"picture") == 1
        )


def test_without_a_word_of_the_server_waits_double_and_differ() -> None:
    server = Server(*(refused() for _ in range(4)), answered())
    server.ask(lambda client: client.predict(b"picture"))
    for wait_s, longest_s in zip(server.waits_s, (0.2, 0.4, 0.8, 1.6), strict=True):
        assert longest_s / 2 <= wait_s <= longest_s
    again = Server(refused(), answered())
    again.ask(lambda client: client.predict(b"picture"))
    assert again.waits_s[0] != server.waits_s[0]


def test_a_date_counts_from_that_of_the_response() -> None:
    dates = {"date": "Fri, 01 Jan 2016 00:00:00 GMT", "retry-after": "Fri, 01 Jan 2016 00:00:07 GMT"}
    server = Server(refused(**dates), answered())
    server.ask(lambda client: client.predict(b"picture"))
    assert server.waits_s == [7.0]


@pytest.mark.parametrize("retry_after", ["Fri, 01 Jan 2016 00:00:00 GMT", "soon", "-1"])
def test_any_retry_after_is_understood_or_left_aside(retry_after: str) -> None:
    server = Server(refused(**{"retry-after": retry_after}), answered())
    server.ask(lambda client: client.predict(b"picture"))
    assert 0.0 <= sum(server.waits_s) <= 0.2


def test_attempts_and_waits_are_bounded() -> None:
    server = Server(*(refused() for _ in range(9)))
    with pytest.raises(ServerRefused, match="256 pictures are waiting"):
        server.ask(lambda client: client.predict(b"picture"), Retries(max_attempts=3))
    assert len(server.requests) == 3
    patient = Server(refused(**{"retry-after": "3600"}))
    with pytest.raises(ServerRefused):
        patient.ask(lambda client: client.predict(b"picture"))
    assert patient.waits_s == []
    once = Server(refused())
    with pytest.raises(ServerRefused):
        once.ask(lambda client: client.predict(b"picture"), Retries.none())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 500, 504])
def test_other_refusals_are_final_and_say_why(status: int) -> None:
    document = {"type": "urn:tosca:problem:unknown-task", "detail": "no such task", "request_id": "order-66"}
    server = Server(httpx.Response(status, json=document))
    with pytest.raises(ServerRefused) as caught:
        server.ask(lambda client: client.task("owls"))
    refusal = caught.value
    assert (refusal.status, refusal.kind, refusal.detail) == (status, "unknown-task", "no such task")
    assert (refusal.request_id, str(refusal)) == ("order-66", f"{status}: no such task")


def test_a_broken_connection_is_tried_again_only_where_that_is_safe() -> None:
    broken = httpx.ReadError("connection reset")
    server = Server(broken, answered())
    assert server.ask(lambda client: client.predict(b"picture")).label == "owl"
    for call in (lambda client: client.remove_task("birds"), lambda client: client.rollback(3)):
        server = Server(broken)
        with pytest.raises(ServerUnreachable, match="connection reset"):
            server.ask(call)
        with pytest.raises(ServerRefused):  # it may have been done
            Server(refused()).ask(call)
        assert Server(httpx.ConnectError("refused"), ok(CHANGE)).ask(call).revision == 8  # nothing was sent
        assert Server(refused(429), ok(CHANGE)).ask(call).revision == 8  # refused before anything was done


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"hello": 1}'])
def test_another_servers_answer_is_named_as_such(body: bytes) -> None:
    with pytest.raises(ClientError, match="not TOSCA's"):
        Server(httpx.Response(200, content=body)).ask(lambda client: client.tasks())
    with pytest.raises(ServerRefused, match="502"):
        Server(httpx.Response(502, content=body)).ask(lambda client: client.tasks())


# -- what is sent ------------------------------------------------------------------------------------------


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


# -- revisions ---------------------------------------------------------------------------------------------


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


# -- a real server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> Iterator[tuple[RunningServer, str]]:
    """A server with the task "birds", and a key for it."""
    folder = tmp_path_factory.mktemp("served")
    store = ModelStore(folder / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(with_task("birds", store.put_module(make_module("birds", seed=1))), "add birds")
    key, token = make_key("client", SCOPES, now=now_utc())
    change_keys(folder / "keys.json", lambda _: (key,))
    settings = {"keys_file": folder / "keys.json", "replica_heartbeat_s": 60.0, "replica_wait_s": 0.5}
    with running_server(store.url, folder / "log", **settings) as server:
        yield server, token


def test_everything_the_client_offers_works(
    served: tuple[RunningServer, str], make_module: MakeModule
) -> None:
    server, key = served
    with Client(server.url, key=key) as client:
        state = client.ready()
        assert (state.num_tasks, state.is_stale) == (1, False)
        planned = client.add_task(make_module("cars", seed=2), dry_run=True)
        assert not planned.published and {one.task for one in planned.impact} == {"birds", "cars"}
        added = client.add_task(make_module("cars", seed=2), reason="more traffic")
        assert added.published and added.revision == state.revision + 1
        assert [one.task for one in client.tasks().tasks] == ["birds", "cars"]
        assert client.task("cars").labels == ("cars-0", "cars-1", "cars-2")
        answer = client.predict(noise(), coverage=0.5)
        assert answer.receipt.revision == added.revision and answer.prediction_set is not None
        assert client.revisions(1)[0].reason == "more traffic"
        assert client.remove_task("cars").published
        assert client.rollback(added.revision).published
        assert client.rollback(state.revision).published
        with pytest.raises(ServerRefused) as caught:
            client.task("cars")
        assert caught.value.kind == "unknown-task" and caught.value.request_id


def test_an_unreadable_picture_is_refused_in_its_place(served: tuple[RunningServer, str]) -> None:
    server, key = served
    sound = [encoded(noise(colour)) for colour in range(4)]
    mixed = [*sound[:2], b"no picture", *sound[2:]]
    with Client(server.url, key=key) as client:
        answers = client.predict_each(mixed, batch_size=3)
        assert [isinstance(one, ServerRefused) for one in answers] == [False, False, True, False, False]
        with pytest.raises(ServerRefused, match="picture 2"):
            client.predict_many(mixed, batch_size=3)

    async def ask() -> list[Prediction | ServerRefused]:
        async with AsyncClient(server.url, key=key) as client:
            return await client.predict_each(mixed, batch_size=3)

    again = asyncio.run(ask())
    assert [type(one) for one in again] == [type(one) for one in answers]


def test_connections_are_kept(served: tuple[RunningServer, str]) -> None:
    server, key = served
    with Client(server.url, key=key) as client:
        for _ in range(5):
            client.tasks()
        assert len(client._http._transport._pool.connections) == 1


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with (
        Client("http://127.0.0.1:9", retries=Retries(max_attempts=2, first_wait_s=0.0)) as client,
        pytest.raises(ServerUnreachable, match=r"http://127\.0\.0\.1:9 does not answer"),
    ):
        client.ready()


# -- the commands built on it --------------------------------------------------------------------------------


def test_tosca_remote_shows_and_changes_a_server(
    served: tuple[RunningServer, str], make_module: MakeModule, tmp_path: Path
) -> None:
    server, key = served
    module = tmp_path / "cars.safetensors"
    module.write_bytes(make_module("cars", seed=2))

    def remote(*arguments: object) -> Any:
        options = ["--server", server.url, "--key", key, "--json"]
        result = CliRunner().invoke(remote_app, [*map(str, arguments), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    before = remote("status")["revision"]
    assert not remote("add", module, "--dry-run")["published"]
    assert remote("add", module, "--reason", "more traffic")["revision"] == before + 1
    assert [one["task"] for one in remote("tasks")["tasks"]] == ["birds", "cars"]
    assert remote("remove", "cars")["published"]
    assert [one["reason"] for one in remote("revisions", "--limit", 2)] == ["remove cars", "more traffic"]
    assert remote("rollback", before + 1)["published"]
    assert remote("rollback", before)["published"]


def test_tosca_remote_prints_tables_for_people(
    served: tuple[RunningServer, str], make_module: MakeModule, tmp_path: Path
) -> None:
    server, key = served
    module = tmp_path / "cars.safetensors"
    module.write_bytes(make_module("cars", seed=2))
    variables = {"TOSCA_SERVER": server.url, "TOSCA_API_KEY": key}
    for arguments, expected in (
        (("status",), "ready: revision"),
        (("tasks",), "birds"),
        (("revisions",), "add birds"),
        (("add", str(module), "--dry-run"), "nothing published"),
    ):
        result = CliRunner().invoke(remote_app, arguments, env=variables, catch_exceptions=False)
        assert result.exit_code == 0 and expected in result.output


def test_tosca_remote_waits_for_replicas_and_fails_when_some_do_not_follow(
    served: tuple[RunningServer, str], make_module: MakeModule, tmp_path: Path
) -> None:
    server, key = served
    module = tmp_path / "cars.safetensors"
    module.write_bytes(make_module("cars", seed=2))
    variables = {"TOSCA_SERVER": server.url, "TOSCA_API_KEY": key}

    def remote(*arguments: str) -> Any:
        return CliRunner().invoke(remote_app, arguments, env=variables, catch_exceptions=False)

    waited = remote("add", str(module), "--wait")
    assert waited.exit_code == 0 and "served by 1 replica" in waited.output
    records = ModelStore(server.log.parent / "store").replicas
    records.write("sleeper", 1, 3600.0)
    listed = remote("replicas")
    assert listed.exit_code == 0 and "sleeper" in listed.output
    in_vain = remote("remove", "cars", "--wait")
    assert in_vain.exit_code == 1 and "published as revision" in in_vain.output
    assert "not served yet by sleeper, which is at revision 1" in in_vain.output
    records.remove("sleeper")


def test_tosca_predict_asks_a_server(served: tuple[RunningServer, str], tmp_path: Path) -> None:
    server, key = served
    for colour in range(3):
        (tmp_path / f"{colour}.png").write_bytes(encoded(noise(colour)))
    app = typer.Typer()
    app.command()(predict)
    paths = [str(one) for one in sorted(tmp_path.iterdir())]
    options = ["--server", server.url, "--key", key, "--coverage", "0.5", "--json"]
    result = CliRunner().invoke(app, [*paths, *options], catch_exceptions=False)
    answers = json.loads(result.stdout)
    assert [one["picture"] for one in answers] == paths
    assert all(one["receipt"]["revision"] and one["prediction_set"] is not None for one in answers)
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(InvalidImage, match=r"3\.png: "):
        unreadable = [*paths, str(tmp_path / "3.png"), *options]
        CliRunner().invoke(app, unreadable, catch_exceptions=False)


# -- what it needs -----------------------------------------------------------------------------------------


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
