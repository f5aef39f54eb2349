"""Changes of tasks over HTTP: registered, replaced, removed, rolled back; and what is freed and found afterwards."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
from small_service import picture, settings
from starlette.testclient import TestClient
from synthetic import make_features

from model_store.backbone import Backbone
from model_store.publishing import Publisher
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from training.trainer import train_task

MakeModule = Callable[..., bytes]
__all__ = ["settings"]  # a fixture


def test_registering_replaces_and_reports_what_it_replaced(
    client: TestClient, make_module: MakeModule
) -> None:
    before = client.get("/tasks/birds").json()["module_sha256"]
    response = client.post("/tasks", content=make_module("birds", seed=5), params={"reason": "retrained"})
    assert response.status_code == 201, response.text
    assert response.json()["replaced_sha256"] == before
    assert client.get("/tasks/birds").json()["module_sha256"] != before
    assert client.get("/revisions").json()[0]["reason"] == "retrained"


def test_registering_the_active_file_again_changes_nothing(
    client: TestClient, make_module: MakeModule
) -> None:
    revision = client.get("/tasks").json()["revision"]
    response = client.post("/tasks", content=make_module("birds", seed=1))
    assert response.status_code == 200
    assert response.json()["published"] is False
    assert client.get("/tasks").json()["revision"] == revision


def test_dry_run_reports_the_impact_and_changes_nothing(client: TestClient, make_module: MakeModule) -> None:
    before = client.get("/tasks").json()
    response = client.post("/tasks", params={"dry_run": True}, content=make_module("planes", seed=3))
    assert response.status_code == 200
    impact = {one["task"]: one for one in response.json()["impact"]}
    assert impact.keys() == {"birds", "cars", "planes"}
    assert impact["planes"]["before"] is None
    assert impact["birds"]["before"]["num_vectors"] > 0
    assert client.get("/tasks").json() == before


def test_harmful_registration_is_refused_unless_forced(client: TestClient, tiny_backbone: Backbone) -> None:
    twin = _twin_of_birds(tiny_backbone)
    refused = client.post("/tasks", content=twin)
    assert refused.status_code == 409, refused.text
    assert refused.json()["type"] == "urn:tosca:problem:harms-other-tasks"
    assert "twins" not in [one["task"] for one in client.get("/tasks").json()["tasks"]]
    forced = client.post("/tasks", content=twin, params={"force": True})
    assert forced.status_code == 201
    assert forced.json()["harmed"] == ["birds"]


def _twin_of_birds(tiny_backbone: Backbone) -> bytes:
    """The task `birds` under another name and with other labels: a perfect competitor."""
    birds = make_features("birds", seed=1, per_class=8)
    twins = replace(
        birds, name="twins", labels=tuple(label.replace("birds", "twins") for label in birds.labels)
    )
    return train_task("twins", twins, tiny_backbone.manifest, seed=1).data


def wait_for_the_loader(client: TestClient) -> None:
    """Until everything is done that was asked of its thread before."""
    assert client.portal is not None
    client.portal.call(client.app.state.service.registry.read, lambda _: None)  # type: ignore[attr-defined]


def test_the_bank_before_a_change_is_freed(client: TestClient, make_module: MakeModule) -> None:
    registry = client.app.state.service.registry  # type: ignore[attr-defined]
    assert client.post("/predict", content=picture()).status_code == 200
    before = weakref.ref(registry.active.bank)
    assert client.post("/tasks", content=make_module("planes", seed=3)).status_code == 201
    assert client.post("/predict", content=picture()).status_code == 200
    wait_for_the_loader(client)
    gc.collect()
    assert before() is None


def test_freed_memory_is_given_back_after_a_change(
    client: TestClient, make_module: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_the_loader(client)
    given_back: list[int] = []
    served = client.app.state.service.registry  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "service.registry.give_back_memory", lambda: given_back.append(served.active.revision.number)
    )
    change = client.post("/tasks", content=make_module("planes", seed=3)).json()
    wait_for_the_loader(client)
    assert given_back == [change["revision"]]
    assert client.post("/tasks", content=make_module("planes", seed=3)).json()["published"] is False
    wait_for_the_loader(client)
    assert len(given_back) == 1


def test_module_files_also_come_as_multipart_and_by_reference(
    client: TestClient, make_module: MakeModule, tiny_store: ModelStore
) -> None:
    response = client.post("/tasks", files={"module": ("planes.safetensors", make_module("planes", seed=3))})
    assert response.status_code == 201
    sha256 = tiny_store.put_module(make_module("ships", seed=4))
    response = client.post("/tasks", json={"module_sha256": sha256})
    assert response.status_code == 201
    assert client.get("/tasks/ships").json()["module_sha256"] == sha256


def test_removing_a_task_restores_earlier_answers_bit_for_bit(
    client: TestClient, make_module: MakeModule
) -> None:
    pictures = [picture(seed) for seed in range(5)]

    def answers() -> list[dict[str, object]]:
        found = [client.post("/predict", content=one).json()["predictions"][0] for one in pictures]
        return [{**one, "receipt": one["receipt"]["module_sha256"]} for one in found]

    before = answers()
    assert client.post("/tasks", content=make_module("planes", seed=3)).status_code == 201
    assert client.delete("/tasks/planes").status_code == 200
    assert answers() == before


def test_rollback_brings_back_an_old_set_as_a_new_revision(client: TestClient) -> None:
    old = client.get("/tasks").json()
    assert client.delete("/tasks/cars").json()["published"] is True
    response = client.post(f"/revisions/{old['revision']}/rollback")
    assert response.status_code == 200
    now = client.get("/tasks").json()
    assert now["tasks"] == old["tasks"]
    assert now["revision"] == old["revision"] + 2


def test_restart_finds_every_acknowledged_registration(
    client: TestClient, settings: Settings, tiny_backbone: Backbone
) -> None:
    before = client.get("/tasks").json()
    with TestClient(create_app(settings, tiny_backbone)) as again:
        assert again.get("/tasks").json() == before


def test_revisions_of_other_writers_are_taken_over(
    client: TestClient, tiny_store: ModelStore, make_module: MakeModule
) -> None:
    Publisher(tiny_store).register(make_module("ships", seed=4))
    response = client.post("/tasks", content=make_module("planes", seed=3))  # follows before it publishes
    assert response.status_code == 201
    assert {one["task"] for one in client.get("/tasks").json()["tasks"]} == {
        "birds",
        "cars",
        "planes",
        "ships",
    }
