"""What Ray Serve is told about a replica, and what it asks one; without a cluster."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fastapi.testclient import TestClient
from pictures import encoded, noise
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.app import create_app
from service.errors import EngineStopped, InvalidSettings
from service.exposition import gather, render
from service.settings import Settings

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from service.ray_commands import environment_variable, ray_app
from service.ray_metrics import RayMetrics
from service.ray_serving import Arguments, build_app, check_engine, deployment_options, replica_settings

LOCAL = {"host": "127.0.0.1"}
ROOT = Path(__file__).parents[1]


def options(**given: Any) -> dict[str, Any]:
    arguments = Arguments(settings=LOCAL, **given)
    return deployment_options(arguments, replica_settings(arguments))


@pytest.mark.parametrize(("num_cpus", "num_threads"), [(0.5, 1), (1, 1), (3.5, 3), (4, 4)])
def test_threads_of_a_replica_keep_to_its_processors(num_cpus: float, num_threads: int) -> None:
    settings = replica_settings(Arguments(num_cpus=num_cpus, settings=LOCAL))
    assert (settings.torch_threads, settings.decode_threads) == (num_threads, num_threads)


def test_threads_that_were_asked_for_are_left_as_they_are() -> None:
    settings = replica_settings(Arguments(num_cpus=4, settings={**LOCAL, "torch_threads": 2}))
    assert (settings.torch_threads, settings.decode_threads) == (2, 4)


def test_replicas_may_share_a_gpu() -> None:
    assert options(num_gpus=0.5, num_cpus=2)["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.5}


def test_variables_are_handed_on_to_the_replicas_by_name_or_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    given = dict(map(environment_variable, ["AWS_REGION", "AWS_ENDPOINT_URL=http://a=b"]))
    assert given == {"AWS_REGION": "eu-central-1", "AWS_ENDPOINT_URL": "http://a=b"}
    assert options(env=given)["ray_actor_options"]["runtime_env"] == {"env_vars": given}
    with pytest.raises(typer.BadParameter, match="NOT_SET"):
        environment_variable("NOT_SET")


def test_a_most_of_replicas_turns_autoscaling_on() -> None:
    assert options(replicas=3)["num_replicas"] == 3
    varying = options(min_replicas=2, max_replicas=4)
    assert "num_replicas" not in varying
    scaling = varying["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 16.0)


@pytest.mark.parametrize(
    "given",
    [
        {"replicas": 2, "max_replicas": 3},
        {"min_replicas": 3, "max_replicas": 2},
        {"min_replicas": 2},
        {"num_cpus": 0},
        {"colour": "blue"},
    ],
)
def test_arguments_that_contradict_each_other_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Arguments(**given)


def test_ray_lets_in_more_than_the_service_takes_so_that_the_service_refuses() -> None:
    room = Settings().max_queued_images
    assert options()["max_ongoing_requests"] > room
    assert options()["max_queued_requests"] > room
    with pytest.raises(InvalidSettings, match="TOSCA_MAX_QUEUED_IMAGES"):
        options(max_ongoing_requests=room)


@pytest.mark.parametrize("name", ["admin_port", "grpc_port", "processes"])
def test_what_a_process_with_ports_of_its_own_has_cannot_be_had(name: str) -> None:
    with pytest.raises(InvalidSettings, match=name.upper()):
        build_app(Arguments(settings={**LOCAL, name: 2}))


def test_a_replica_whose_proxy_may_be_reached_by_strangers_wants_keys() -> None:
    with pytest.raises(InvalidSettings, match="no keys file"):
        create_app(replica_settings(Arguments()))


def test_a_replica_is_healthy_while_its_engine_is(tiny_store: ModelStore, tiny_backbone: Backbone) -> None:
    settings = Settings(store=tiny_store.url)
    app = create_app(settings, tiny_backbone)
    check_engine(app, settings)  # not started: Ray Serve waits for the lifespan
    with TestClient(app):
        check_engine(app, settings)
        app.state.service.engine._inference.stop()
        with pytest.raises(EngineStopped):
            check_engine(app, settings)
        check_engine(app, settings.model_copy(update={"exit_when_dead": False}))


def test_every_sample_of_the_exposition_is_handed_to_ray_with_its_replica(
    tiny_store: ModelStore, tiny_backbone: Backbone, make_module: Callable[..., bytes]
) -> None:
    """Under one set of tags for each name, as Ray wants it, and with the values of /metrics."""
    given: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    class Recording:
        def __init__(self, name: str, _: str, tags: tuple[str, ...]) -> None:
            self._name, self._tags = name, set(tags)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == self._tags
            given[self._name, frozenset(tags.items())] = value

    app = create_app(Settings(store=tiny_store.url), tiny_backbone)
    with TestClient(app) as client:
        client.post("/tasks", content=make_module("birds"))
        client.post("/predict", content=encoded(noise()))
        state = app.state.service
        families = [*state.engine.telemetry.metrics.registry.collect(), *gather(state)]
        RayMetrics("r1", Recording).publish(families)
        RayMetrics("r1").publish(families)  # Ray has nothing against their names and tags
    text = render(state.engine.telemetry.metrics, []).decode()
    expected = {
        (one.name, frozenset({**one.labels, "replica": "r1"}.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name.startswith("tosca_")
    }
    assert expected and {name: given[name] for name in expected} == expected
    assert given["tosca_task_images_total", frozenset({("task", "birds"), ("replica", "r1")})] == 1.0


@pytest.fixture
def from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("TOSCA_STORE", "TOSCA_HOST", "TOSCA_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path


def test_the_config_file_carries_the_settings_and_paths_that_hold_elsewhere(
    from_elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOSCA_STORE_POLL_S", "0.5")
    monkeypatch.setenv("TOSCA_KEYS_FILE", "keys.json")
    command = [
        "ray",
        "deploy",
        "--config",
        "--store",
        "s",
        "--replicas",
        "2",
        "--gpus",
        "0.5",
        "--port",
        "9000",
    ]
    app = typer.Typer()
    app.add_typer(ray_app, name="ray")
    written = CliRunner().invoke(app, command, catch_exceptions=False)
    document = yaml.safe_load(written.output)
    (application,) = ServeDeploySchema(**document).applications
    assert document["http_options"]["port"] == 9000
    assert application.args == {
        "replicas": 2,
        "num_gpus": 0.5,
        "settings": {
            "store": str(from_elsewhere / "s"),
            "host": "127.0.0.1",
            "store_poll_s": 0.5,
            "keys_file": str(from_elsewhere / "keys.json"),
        },
    }


def test_the_example_in_the_repository_deploys() -> None:
    document = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    (application,) = ServeDeploySchema(**document).applications
    build_app(Arguments(**application.args))
    assert application.import_path == "service.ray_serving:build_app"
