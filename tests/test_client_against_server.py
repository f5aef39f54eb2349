"""The Python client and the commands built on it, against a real server."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pictures import encoded, noise
from serving import RunningServer, running_server
from typer.testing import CliRunner

from model_store.backbone import BackboneArtefact
from model_store.errors import InvalidImage
from model_store.store import ModelStore, with_task
from service.client import AsyncClient, Client, Prediction, Retries, ServerRefused, ServerUnreachable
from service.commands import predict
from service.keys import SCOPES, change_keys, make_key, now_utc
from service.remote_commands import remote_app

MakeModule = Callable[..., bytes]


# -- the client --------------------------------------------------------------------------------------


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


# -- the commands built on it ------------------------------------------------------------------------


@pytest.fixture
def cars_file(make_module: MakeModule, tmp_path: Path) -> Path:
    """A module file of the task "cars"."""
    path = tmp_path / "cars.safetensors"
    path.write_bytes(make_module("cars", seed=2))
    return path


def test_tosca_remote_shows_and_changes_a_server(served: tuple[RunningServer, str], cars_file: Path) -> None:
    server, key = served

    def remote(*arguments: object) -> Any:
        options = ["--server", server.url, "--key", key, "--json"]
        result = CliRunner().invoke(remote_app, [*map(str, arguments), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    before = remote("status")["revision"]
    assert not remote("add", cars_file, "--dry-run")["published"]
    assert remote("add", cars_file, "--reason", "more traffic")["revision"] == before + 1
    assert [one["task"] for one in remote("tasks")["tasks"]] == ["birds", "cars"]
    assert remote("remove", "cars")["published"]
    assert [one["reason"] for one in remote("revisions", "--limit", 2)] == ["remove cars", "more traffic"]
    assert remote("rollback", before + 1)["published"]
    assert remote("rollback", before)["published"]


def test_tosca_remote_prints_tables_for_people(served: tuple[RunningServer, str], cars_file: Path) -> None:
    server, key = served
    variables = {"TOSCA_SERVER": server.url, "TOSCA_API_KEY": key}
    for arguments, expected in (
        (("status",), "ready: revision"),
        (("tasks",), "birds"),
        (("revisions",), "add birds"),
        (("add", str(cars_file), "--dry-run"), "nothing published"),
    ):
        result = CliRunner().invoke(remote_app, arguments, env=variables, catch_exceptions=False)
        assert result.exit_code == 0 and expected in result.output


def test_tosca_remote_waits_for_replicas_and_fails_when_some_do_not_follow(
    served: tuple[RunningServer, str], cars_file: Path
) -> None:
    server, key = served
    variables = {"TOSCA_SERVER": server.url, "TOSCA_API_KEY": key}

    def remote(*arguments: str) -> Any:
        return CliRunner().invoke(remote_app, arguments, env=variables, catch_exceptions=False)

    waited = remote("add", str(cars_file), "--wait")
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
