"""Answers of the HTTP service over a real (tiny) backbone, a real store and real module files."""

import base64
from collections.abc import Callable

import pytest
from small_service import picture, settings
from starlette.testclient import TestClient

from model_store.backbone import Backbone

MakeModule = Callable[..., bytes]
__all__ = ["settings"]  # a fixture


# -- pictures ----------------------------------------------------------------------------------------


def test_raw_multipart_and_json_bodies_get_the_same_answer(client: TestClient) -> None:
    data = picture()
    raw = client.post("/predict", content=data, headers={"content-type": "image/png"})
    untyped = client.post("/predict", content=data)
    multipart = client.post("/predict", files={"image": ("a.png", data)})
    encoded = client.post("/predict", json={"images": [base64.b64encode(data).decode()]})
    assert raw.status_code == 200, raw.text
    assert raw.json() == untyped.json() == multipart.json() == encoded.json()


def test_answers_keep_the_order_of_the_pictures(client: TestClient) -> None:
    pictures = [picture(seed) for seed in range(6)]
    alone = [client.post("/predict", content=one).json()["predictions"][0] for one in pictures]
    together = client.post("/predict", files=[("image", one) for one in pictures]).json()["predictions"]
    for one, other in zip(alone, together, strict=True):
        assert (one["task"], one["label"]) == (other["task"], other["label"])
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-5)


def test_receipt_names_revision_module_and_backbone(client: TestClient, tiny_backbone: Backbone) -> None:
    answer = client.post("/predict", content=picture()).json()["predictions"][0]
    tasks = client.get("/tasks").json()
    modules = {one["task"]: one["module_sha256"] for one in tasks["tasks"]}
    assert answer["receipt"] == {
        "revision": tasks["revision"],
        "module_sha256": modules[answer["task"]],
        "backbone_fingerprint": tiny_backbone.fingerprint,
    }


def test_named_task_answers_with_its_own_labels(client: TestClient) -> None:
    for task in ("birds", "cars"):
        answer = client.post("/predict", params={"task": task}, content=picture()).json()["predictions"][0]
        assert answer["task"] == task
        assert answer["label"].startswith(task)
        assert answer["task_probability"] == 1.0


def test_top_k_bounds_the_list_and_one_means_no_alternatives(client: TestClient) -> None:
    answer = client.post("/predict", params={"top_k": 1}, content=picture()).json()["predictions"][0]
    assert answer["alternatives"] == []
    answer = client.post("/predict", params={"top_k": 3}, content=picture()).json()["predictions"][0]
    listed = [answer["confidence"], *(one["probability"] for one in answer["alternatives"])]
    assert len(listed) <= 3
    assert listed == sorted(listed, reverse=True)


def test_entropy_selection_is_available_per_request(client: TestClient) -> None:
    response = client.post("/predict", params={"selection": "entropy"}, content=picture())
    assert response.status_code == 200
    assert 0.0 < response.json()["predictions"][0]["confidence"] <= 1.0


def test_answers_say_how_typical_the_picture_is_and_whether_to_rely_on_them(client: TestClient) -> None:
    [answer] = client.post("/predict", content=picture()).json()["predictions"]
    assert 0.0 < answer["p_value"] <= 1.0 and answer["abstained"] == (answer["p_value"] <= 0.02)
    assert "prediction_set" not in answer


def test_a_task_states_its_abstain_level_and_label_space(client: TestClient, make_module: MakeModule) -> None:
    strict = make_module("birds", seed=1, abstain_level=1.0, label_space="animals")
    assert client.post("/tasks", content=strict).status_code == 201
    task = client.get("/tasks/birds").json()
    assert (task["abstain_level"], task["label_space"]) == (1.0, "animals")
    [answer] = client.post("/predict", content=picture(), params={"task": "birds"}).json()["predictions"]
    assert answer["abstained"]
    [other] = client.post("/predict", content=picture(), params={"task": "cars"}).json()["predictions"]
    assert other["abstained"] == (other["p_value"] <= 0.02)


def test_a_prediction_set_comes_with_a_coverage(client: TestClient) -> None:
    asked = {"coverage": 0.5}
    [answer] = client.post("/predict", content=picture(), params=asked).json()["predictions"]
    listed = [one["probability"] for one in answer["prediction_set"]]
    assert listed == sorted(listed, reverse=True)
    encoded = base64.b64encode(picture()).decode()
    again = client.post("/predict", json={"images": [encoded], **asked}).json()["predictions"]
    assert again == [answer]
    impossible = client.post("/predict", content=picture(), params={"coverage": 0.99999})
    assert impossible.status_code == 422 and "calibration vectors" in impossible.json()["detail"]
    assert client.post("/predict", content=picture(), params={"coverage": 1.0}).status_code == 422


def test_timings_are_given_when_asked_for(client: TestClient) -> None:
    assert "timings" not in client.post("/predict", content=picture(99)).json()
    timings = client.post("/predict", params={"timings": True}, content=picture()).json()["timings"]
    assert timings[0].keys() == {
        "decode_ms",
        "queue_ms",
        "backbone_ms",
        "selection_ms",
        "batch_size",
        "modules_evaluated",
    }
    assert timings[0]["batch_size"] == 1


# -- CLS vectors in place of pictures ----------------------------------------------------------------


def kept(client: TestClient, data: bytes) -> dict[str, object]:
    """An answer with its CLS vectors, as a client keeps it."""
    response = client.post("/predict", params={"return_cls": True}, content=data)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_kept_vector_gets_the_answer_of_its_picture(client: TestClient, tiny_backbone: Backbone) -> None:
    answer = kept(client, picture())
    assert answer["backbone_fingerprint"] == tiny_backbone.fingerprint
    body = {"cls": answer["cls"], "backbone_fingerprint": answer["backbone_fingerprint"]}
    again = client.post("/predict", json=body)
    assert again.status_code == 200, again.text
    assert again.json()["predictions"] == answer["predictions"]
    assert "cls" not in again.json()


def test_a_kept_vector_is_answered_by_new_tasks_too(client: TestClient, make_module: MakeModule) -> None:
    answer = kept(client, picture())
    assert client.post("/tasks", content=make_module("planes", seed=3)).status_code == 201
    body = {key: answer[key] for key in ("cls", "backbone_fingerprint")} | {"task": "planes"}
    assert client.post("/predict", json=body).json()["predictions"][0]["task"] == "planes"


def test_vectors_of_another_backbone_are_refused(client: TestClient) -> None:
    body = {"cls": kept(client, picture())["cls"], "backbone_fingerprint": "0" * 64}
    refused = client.post("/predict", json=body)
    assert refused.status_code == 409
    assert "computed by backbone 0000" in refused.json()["detail"]


BAD_VECTORS = {
    "too short": ([[0.5] * 191], "cls.0 has 191 numbers, expected 192"),
    "too long": ([[0.5] * 192, [0.5] * 193], "cls.1 has 193 numbers, expected 192"),
    "empty": ([[]], "cls.0 has 0 numbers"),
    "none": ([], "at least 1 item"),
    "too large": ([[1e30] * 192], "beyond ±10000"),
    "words": ([["much"] * 192], "valid number"),
    "too many": ([[0.5] * 192] * 9, "more than the 1544 elements"),
}


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_a_vector_that_cannot_be_one_is_refused(
    name: str, client: TestClient, tiny_backbone: Backbone
) -> None:
    vectors, fault = BAD_VECTORS[name]
    body = {"cls": vectors, "backbone_fingerprint": tiny_backbone.fingerprint}
    refused = client.post("/predict", json=body)
    assert refused.status_code == 422, refused.text
    assert fault in refused.json()["detail"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(number: str, client: TestClient, tiny_backbone: Backbone) -> None:
    body = (
        f'{{"cls": [[{", ".join([number] * 192)}]], "backbone_fingerprint": "{tiny_backbone.fingerprint}"}}'
    )
    refused = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 422


@pytest.mark.parametrize("body", [{}, {"images": ["AA=="], "cls": [[1.0]]}, {"cls": [[1.0]]}])
def test_pictures_and_vectors_are_two_forms(body: dict[str, object], client: TestClient) -> None:
    refused = client.post("/predict", json=body)
    assert refused.status_code == 422
    assert "go together" in refused.json()["detail"] or "either images or cls" in refused.json()["detail"]


# -- the service itself ------------------------------------------------------------------------------


def test_health_tells_alive_from_ready(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    ready = client.get("/health/ready").json()
    assert ready["num_tasks"] == 2
    assert ready["revision"] == client.get("/tasks").json()["revision"]


def test_openapi_describes_bodies_answers_and_refusals(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    assert {"image/jpeg", "multipart/form-data", "application/json"} <= predict["requestBody"][
        "content"
    ].keys()
    assert "application/problem+json" in predict["responses"]["422"]["content"]
    assert document["components"]["schemas"]["Prediction"]["properties"]["label"]["examples"]
