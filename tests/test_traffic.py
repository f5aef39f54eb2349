"""What is known of each task's traffic: every answer counted once, nothing kept of a task that is gone."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.answers import Answer, Receipt
from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.module_file import read_module
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from service.traffic import Traffic

MakeModule = Callable[..., bytes]
MakeBank = Callable[..., ModuleBank]


def answer(task: str, confidence: float = 0.95, p_value: float = 0.5, *, abstained: bool = False) -> Answer:
    receipt = Receipt(1, "0" * 64, "0" * 64)
    return Answer(task, f"{task}-0", confidence, 1.0, (), p_value, abstained, None, receipt, 1)


def new_traffic(max_tasks: int = 10) -> Traffic:
    return Traffic(max_tasks, drift_window=100, drift_alarm_rate=1e-3)


@pytest.fixture
def make_bank(make_module: MakeModule, tiny_backbone: Backbone) -> MakeBank:
    def make(revision: int, **seed_of_task: int) -> ModuleBank:
        files = [read_module(make_module(task, seed=seed), "cpu") for task, seed in seed_of_task.items()]
        return ModuleBank.build(
            [file.module for file in files],
            revision=revision,
            backbone_fingerprint=tiny_backbone.fingerprint,
            feature_dim=tiny_backbone.feature_dim,
        )

    return make


def test_counts_and_histogram_by_task(make_bank: MakeBank) -> None:
    traffic, bank = new_traffic(), make_bank(1, birds=1, cars=2)
    for confidence in (0.0, 0.09, 0.1, 0.999, 1.0):
        traffic.record(bank, answer("birds", confidence), is_new=True)
    traffic.record(bank, answer("cars", abstained=True), is_new=True)
    (first, birds), (second, cars) = traffic.tasks()
    assert (first, second) == ("birds", "cars")
    assert birds.tally.confidence_histogram == [3, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert (birds.tally.num_images, birds.tally.num_abstained) == (5, 0)
    assert (cars.tally.num_images, cars.tally.num_abstained) == (1, 1)
    assert (traffic.total.num_images, traffic.total.num_abstained) == (6, 1)


def test_a_removed_task_leaves_nothing_and_comes_back_empty(make_bank: MakeBank) -> None:
    traffic, with_both = new_traffic(), make_bank(1, birds=1, cars=2)
    traffic.record(with_both, answer("birds"), is_new=True)
    traffic.follow(make_bank(2, cars=2))
    assert traffic.tasks() == []
    traffic.record(with_both, answer("birds"), is_new=True)  # a request that was admitted before
    assert traffic.tasks() == []
    assert traffic.total.num_images == 2
    traffic.record(make_bank(3, birds=1, cars=2), answer("birds"), is_new=True)
    assert [(task, one.tally.num_images) for task, one in traffic.tasks()] == [("birds", 1)]


def test_a_replaced_module_begins_its_own_drift_and_reliability(make_bank: MakeBank) -> None:
    traffic, before, after = new_traffic(), make_bank(1, birds=1), make_bank(2, birds=5)
    for _ in range(30):
        traffic.record(before, answer("birds", p_value=1.0 / 13.0), is_new=True)
    (_, birds), *_ = traffic.tasks()
    birds.reliability.add(0.9, is_correct=True)
    assert (drift := birds.drift.judge()) is not None
    assert drift.is_drifting
    traffic.record(after, answer("birds"), is_new=True)
    traffic.record(before, answer("birds", p_value=1.0 / 13.0), is_new=True)  # admitted before
    assert (drift := birds.drift.judge()) is not None
    assert (drift.num_pictures, drift.is_drifting) == (1, False)
    assert birds.reliability.num_labels == 0
    assert birds.tally.num_images == 32


def test_tasks_beyond_the_limit_are_counted_together_until_a_place_is_free(make_bank: MakeBank) -> None:
    traffic, bank = new_traffic(max_tasks=1), make_bank(1, birds=1, cars=2)
    for task in ("birds", "cars", "cars"):
        traffic.record(bank, answer(task), is_new=True)
    assert [task for task, _ in traffic.tasks()] == ["birds"]
    assert traffic.others.num_images == 2
    traffic.record(make_bank(2, cars=2), answer("cars"), is_new=True)
    assert [(task, one.tally.num_images) for task, one in traffic.tasks()] == [("cars", 1)]


def test_pictures_seen_before_say_nothing_about_drift(make_bank: MakeBank) -> None:
    traffic, bank = new_traffic(), make_bank(1, birds=1)
    traffic.record(bank, answer("birds"), is_new=True)
    for _ in range(50):
        traffic.record(bank, answer("birds", p_value=1.0 / 13.0), is_new=False)
    (_, birds), *_ = traffic.tasks()
    assert (drift := birds.drift.judge()) is not None
    assert drift.num_pictures == 1
    assert birds.tally.num_images == 51


# -- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def client(tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule) -> Iterator[TestClient]:
    settings = Settings(store=tiny_store.url, store_poll_s=0.0)
    with TestClient(create_app(settings, tiny_backbone)) as client:
        for task, seed in (("birds", 1), ("cars", 2)):
            assert client.post("/tasks", content=make_module(task, seed=seed)).status_code == 201
        yield client


def by_task(client: TestClient) -> dict[str, Any]:
    return {one["task"]: one for one in client.get("/traffic").json()["tasks"]}


def test_every_answered_picture_is_in_the_traffic(client: TestClient) -> None:
    begun = datetime.now(UTC)
    tasks = []
    for seed in range(6):
        response = client.post("/predict", content=encoded(noise(seed=seed)))
        tasks.append(response.json()["predictions"][0]["task"])
    client.post("/predict", params={"task": "cars"}, content=encoded(noise(seed=0)))
    tasks.append("cars")
    assert client.post("/predict", content=b"no picture").status_code == 415
    report = client.get("/traffic").json()
    assert datetime.fromisoformat(report["since"]) <= begun
    assert report["images"] == 7
    assert report["other_images"] == 0
    assert {one["task"]: one["images"] for one in report["tasks"]} == {
        task: tasks.count(task) for task in set(tasks)
    }
    assert sum(one["share"] for one in report["tasks"]) == pytest.approx(1.0)
    for one in report["tasks"]:
        assert sum(one["confidence_histogram"]) == one["images"]
        assert one["feedback"] == {"labels": 0, "accuracy": None, "ece": None}
    assert sum(one["drift"]["samples"] for one in report["tasks"]) == 6  # the last picture was known


def test_removing_a_task_removes_its_traffic_at_once(client: TestClient) -> None:
    client.post("/predict", params={"task": "birds"}, content=encoded(noise()))
    assert set(by_task(client)) == {"birds"}
    assert client.delete("/tasks/birds").status_code == 200
    report = client.get("/traffic").json()
    assert report["tasks"] == []
    assert report["images"] == 1


def test_without_traffic_the_report_is_empty(client: TestClient) -> None:
    report = client.get("/traffic").json()
    assert (report["images"], report["abstained"], report["tasks"]) == (0, 0, [])
