"""Labels that come back: each counts once, for the module that answered, and nothing is kept without bound."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.errors import Conflict
from model_store.store import ModelStore
from service.app import create_app
from service.errors import UnknownAnswer
from service.feedback import GivenAnswer, RecentAnswers, Truth
from service.settings import Settings

MakeModule = Callable[..., bytes]
SPARROW, WREN = Truth(None, "sparrow"), Truth(None, "wren")


def answer(label: str) -> GivenAnswer:
    return GivenAnswer("birds", label, 0.9, "0" * 64)


def test_the_oldest_answers_are_forgotten() -> None:
    recent = RecentAnswers(2)
    for request_id in ("a", "b", "c"):
        recent.remember(request_id, [answer(request_id)])
    assert len(recent) == 2
    with pytest.raises(UnknownAnswer, match="last 2"):
        recent.label("a", 0, SPARROW)
    assert recent.label("c", 0, SPARROW)[0].label == "c"


def test_an_id_that_comes_again_stands_for_its_last_answer_and_is_young_again() -> None:
    recent = RecentAnswers(2)
    for request_id, label in (("a", "sparrow"), ("b", "x"), ("a", "wren"), ("c", "x")):
        recent.remember(request_id, [answer(label)])
    assert recent.label("a", 0, SPARROW)[0].label == "wren"
    with pytest.raises(UnknownAnswer):
        recent.label("b", 0, SPARROW)


def test_an_id_that_comes_again_with_fewer_pictures_leaves_none_of_the_others() -> None:
    recent = RecentAnswers(4)
    recent.remember("a", [answer(label) for label in "uvw"])
    recent.remember("b", [answer(label) for label in "xy"])
    with pytest.raises(UnknownAnswer):
        recent.label("a", 0, SPARROW)
    recent.remember("a", [answer("z")])
    assert len(recent) == 3
    assert recent.label("a", 0, SPARROW)[0].label == "z"
    for index in (1, 2):
        with pytest.raises(UnknownAnswer):
            recent.label("a", index, SPARROW)
    recent.remember("b", [])
    assert len(recent) == 1


def test_the_same_truth_is_new_once_and_another_is_a_conflict() -> None:
    recent = RecentAnswers(2)
    recent.remember("a", [answer("sparrow")])
    assert [recent.label("a", 0, SPARROW)[1] for _ in range(3)] == [True, False, False]
    with pytest.raises(Conflict, match="'sparrow'"):
        recent.label("a", 0, WREN)


def test_none_are_kept_when_none_may_be() -> None:
    recent = RecentAnswers(0)
    recent.remember("a", [answer("sparrow")])
    assert len(recent) == 0


# -- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0)


@pytest.fixture
def client(settings: Settings, tiny_backbone: Backbone, make_module: MakeModule) -> Iterator[TestClient]:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        for task, seed in (("birds", 1), ("cars", 2)):
            assert client.post("/tasks", content=make_module(task, seed=seed)).status_code == 201
        yield client


def ask(client: TestClient, seed: int = 0) -> tuple[str, dict[str, Any]]:
    """The request's id, and what "birds" answers to a picture."""
    response = client.post("/predict", params={"task": "birds"}, content=encoded(noise(seed=seed)))
    prediction: dict[str, Any] = response.json()["predictions"][0]
    return response.headers["x-request-id"], prediction


def tell(client: TestClient, request_id: str, label: str, **more: object) -> dict[str, Any]:
    response = client.post("/feedback", json={"request_id": request_id, "label": label, **more})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def reliability(client: TestClient, task: str = "birds") -> dict[str, Any]:
    [found] = [one["feedback"] for one in client.get("/traffic").json()["tasks"] if one["task"] == task]
    return dict(found)


def test_accuracy_and_calibration_come_from_the_labels(client: TestClient) -> None:
    confidences, rights = [], []
    for seed in range(4):
        request_id, prediction = ask(client, seed)
        is_right = seed != 3
        told = tell(client, request_id, prediction["label"] if is_right else "birds-nobody-knows")
        assert told == {
            "task": "birds",
            "label": prediction["label"],
            "confidence": prediction["confidence"],
            "correct": is_right,
            "counted": True,
        }
        confidences.append(prediction["confidence"])
        rights.append(is_right)
    found = reliability(client)
    assert (found["labels"], found["accuracy"]) == (4, 0.75)
    gap: dict[int, float] = {}
    for confidence, is_right in zip(confidences, rights, strict=True):
        bin_ = min(int(confidence * 15 - 1e-12), 14)
        gap[bin_] = gap.get(bin_, 0.0) + is_right - confidence
    assert found["ece"] == pytest.approx(sum(map(abs, gap.values())) / 4)
    text = client.get("/metrics").text
    assert 'tosca_task_feedback_labels_total{task="birds"} 4.0' in text
    assert 'tosca_task_feedback_accuracy_ratio{task="birds"} 0.75' in text


def test_told_twice_counts_once_and_another_label_is_refused(client: TestClient) -> None:
    request_id, prediction = ask(client)
    assert tell(client, request_id, prediction["label"])["counted"]
    assert not tell(client, request_id, prediction["label"])["counted"]
    changed = client.post("/feedback", json={"request_id": request_id, "label": "another"})
    assert changed.status_code == 409
    assert reliability(client)["labels"] == 1


def test_pictures_of_one_request_are_told_apart(client: TestClient) -> None:
    pictures = [("image", encoded(noise(colour))) for colour in range(3)]
    response = client.post("/predict", params={"task": "birds"}, files=pictures)
    request_id = response.headers["x-request-id"]
    for i, prediction in enumerate(response.json()["predictions"]):
        assert tell(client, request_id, prediction["label"], index=i)["correct"]
    beyond = client.post("/feedback", json={"request_id": request_id, "index": 3, "label": "x"})
    assert beyond.status_code == 404
    assert beyond.json()["type"] == "urn:tosca:problem:unknown-answer"
    again = client.post("/predict", headers={"x-request-id": request_id}, content=encoded(noise()))
    assert again.headers["x-request-id"] == request_id
    stale = client.post("/feedback", json={"request_id": request_id, "index": 2, "label": "x"})
    assert stale.status_code == 404


def test_the_right_label_of_the_wrong_task_is_wrong(client: TestClient) -> None:
    request_id, prediction = ask(client)
    assert not tell(client, request_id, prediction["label"], task="cars")["correct"]
    request_id, prediction = ask(client)
    assert tell(client, request_id, prediction["label"], task="birds")["correct"]


def test_tasks_of_one_label_space_may_answer_for_each_other(
    settings: Settings, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        for task, seed in (("birds", 1), ("birds-at-night", 2)):
            module = make_module(task, seed=seed, label_space="birds")
            assert client.post("/tasks", content=module).status_code == 201
        request_id, prediction = ask(client)
        assert tell(client, request_id, prediction["label"], task="birds-at-night")["correct"]


def test_a_module_replaced_meanwhile_is_not_judged_by_its_predecessor(
    client: TestClient, make_module: MakeModule
) -> None:
    request_id, prediction = ask(client)
    assert client.post("/tasks", content=make_module("birds", seed=9)).status_code == 201
    told = tell(client, request_id, prediction["label"])
    assert told["correct"]
    assert not told["counted"]
    assert reliability(client) == {"labels": 0, "accuracy": None, "ece": None}


def test_a_task_removed_meanwhile_stays_gone(client: TestClient) -> None:
    request_id, prediction = ask(client)
    client.delete("/tasks/birds")
    assert not tell(client, request_id, prediction["label"])["counted"]
    assert client.get("/traffic").json()["tasks"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"label": "x"},
        {"request_id": "a"},
        {"request_id": "a", "label": ""},
        {"request_id": "a", "label": "x" * 257},
        {"request_id": "a b", "label": "x"},
        {"request_id": "a", "label": "x", "index": -1},
        {"request_id": "a", "label": "x", "task": "no/task"},
        {"request_id": "a", "label": "x", "more": 1},
    ],
)
def test_feedback_that_cannot_be_meant_is_refused(body: dict[str, object], client: TestClient) -> None:
    response = client.post("/feedback", json=body)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


def test_feedback_is_json_and_small(client: TestClient) -> None:
    assert client.post("/feedback", content=b"x").status_code == 415
    headers = {"content-type": "application/json"}
    assert client.post("/feedback", content=b" " * 20_000, headers=headers).status_code == 413
