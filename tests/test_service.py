"""The HTTP service over a real (tiny) backbone, a real store and real module files."""

import base64
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from synthetic import make_features

from model_store.backbone import Backbone
from model_store.publishing import Publisher
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from training.trainer import train_task

MakeModule = Callable[..., bytes]


def picture(seed: int = 0, size: tuple[int, int] = (40, 48), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0, max_images_per_request=8, max_body_bytes=2**20)


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


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


BAD_PREDICTIONS: list[tuple[str, dict[str, object], int, str]] = [
    ("empty body", {"content": b""}, 422, "invalid-request"),
    ("text", {"content": b"hello"}, 415, "unsupported-image-format"),
    (
        "wrong content type",
        {"content": b"hello", "headers": {"content-type": "text/html"}},
        415,
        "unsupported-media-type",
    ),
    ("pdf", {"content": b"%PDF-1.7 ..."}, 415, "unsupported-image-format"),
    ("svg", {"content": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, 415, "unsupported-image-format"),
    ("truncated png", {"content": picture()[:200]}, 422, "invalid-image"),
    ("truncated jpeg", {"content": picture(kind="JPEG")[:300]}, 422, "invalid-image"),
    ("too many bytes", {"content": b"\xff" * (2**20 + 1)}, 413, "body-too-large"),
    ("elongated", {"content": picture(size=(1, 60000))}, 413, "image-too-large"),
    ("unknown task", {"content": picture(), "params": {"task": "nobody"}}, 404, "unknown-task"),
    ("top_k zero", {"content": picture(), "params": {"top_k": 0}}, 422, "invalid-request"),
    ("top_k huge", {"content": picture(), "params": {"top_k": 10**6}}, 422, "invalid-request"),
    ("top_k text", {"content": picture(), "params": {"top_k": "many"}}, 422, "invalid-request"),
    ("unknown selection", {"content": picture(), "params": {"selection": "magic"}}, 422, "invalid-request"),
    (
        "json that is none",
        {"content": b"{", "headers": {"content-type": "application/json"}},
        422,
        "invalid-request",
    ),
    ("json without images", {"json": {}}, 422, "invalid-request"),
    ("json with no image", {"json": {"images": []}}, 422, "invalid-request"),
    (
        "json with an unknown field",
        {"json": {"images": [_base64(picture())], "colour": 1}},
        422,
        "invalid-request",
    ),
    ("json that is not base64", {"json": {"images": ["%%%"]}}, 422, "invalid-request"),
    ("json list", {"json": [1, 2]}, 422, "invalid-request"),
    (
        "deep json",
        {"content": b"[" * 5000, "headers": {"content-type": "application/json"}},
        422,
        "invalid-request",
    ),
    ("too many images", {"files": [("image", picture()) for _ in range(9)]}, 422, "invalid-request"),
    (
        "multipart without file",
        {"content": b"--x--\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        422,
        "invalid-request",
    ),
    (
        "multipart without boundary",
        {"content": b"abc", "headers": {"content-type": "multipart/form-data"}},
        422,
        "invalid-request",
    ),
    (
        "one bad of two",
        {"files": [("image", picture()), ("image", b"junk")]},
        415,
        "unsupported-image-format",
    ),
]


@pytest.mark.parametrize(
    ("request_", "status", "kind"),
    [row[1:] for row in BAD_PREDICTIONS],
    ids=[row[0] for row in BAD_PREDICTIONS],
)
def test_bad_prediction_requests_get_a_problem_document(
    client: TestClient, request_: dict[str, object], status: int, kind: str
) -> None:
    response = client.post("/predict", **request_)
    _assert_problem(response, status, kind, "/predict")
    assert client.post("/predict", content=picture()).status_code == 200  # and nobody else is hurt


BAD_MODULES: list[tuple[str, dict[str, object], int, str]] = [
    ("empty body", {"content": b""}, 422, "invalid-request"),
    ("text", {"content": b"hello world"}, 422, "invalid-module"),
    ("a picture", {"content": picture()}, 422, "invalid-module"),
    (
        "wrong content type",
        {"content": b"x", "headers": {"content-type": "text/plain"}},
        415,
        "unsupported-media-type",
    ),
    ("unknown reference", {"json": {"module_sha256": "0" * 64}}, 404, "unknown-module"),
    ("malformed reference", {"json": {"module_sha256": "../../etc/passwd"}}, 422, "invalid-request"),
    ("two files", {"files": [("module", b"a"), ("module", b"b")]}, 422, "invalid-request"),
]


@pytest.mark.parametrize(
    ("request_", "status", "kind"), [row[1:] for row in BAD_MODULES], ids=[row[0] for row in BAD_MODULES]
)
def test_bad_registrations_get_a_problem_document_and_change_nothing(
    client: TestClient, request_: dict[str, object], status: int, kind: str
) -> None:
    before = client.get("/tasks").json()
    _assert_problem(client.post("/tasks", **request_), status, kind, "/tasks")
    assert client.get("/tasks").json() == before


def test_damaged_module_files_change_nothing(
    client: TestClient, make_module: MakeModule, tiny_store: ModelStore
) -> None:
    good = make_module("planes", seed=3)
    before = client.get("/tasks").json()
    files = set(Path(tiny_store.url).rglob("*"))
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x40
    for bad in (good[:-1], good[: len(good) // 2], bytes(flipped), good + b"\0"):
        _assert_problem(client.post("/tasks", content=bad), 422, None, "/tasks")
    assert client.get("/tasks").json() == before
    assert set(Path(tiny_store.url).rglob("*")) == files


def test_module_for_another_backbone_is_refused(
    client: TestClient, make_module: MakeModule, tiny_backbone: Backbone
) -> None:
    other = tiny_backbone.manifest.model_copy(update={"weights_sha256": "0" * 64})
    stranger = train_task("planes", make_features("planes"), other).data
    _assert_problem(client.post("/tasks", content=stranger), 409, "fingerprint-mismatch", "/tasks")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/tasks/nobody", 404),
        ("DELETE", "/tasks/nobody", 404),
        ("POST", "/revisions/999/rollback", 404),
        ("POST", "/revisions/0/rollback", 422),
        ("POST", "/revisions/x/rollback", 422),
        ("GET", "/revisions?limit=0", 422),
        ("GET", "/nowhere", 404),
        ("GET", "/predict", 405),
        ("PUT", "/tasks", 405),
    ],
)
def test_bad_addresses_get_a_problem_document(
    client: TestClient, method: str, path: str, status: int
) -> None:
    _assert_problem(client.request(method, path), status, None, path.split("?")[0])


def test_predicting_without_tasks_says_what_to_do(settings: Settings, tiny_backbone: Backbone) -> None:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        response = client.post("/predict", content=picture())
        _assert_problem(response, 422, "invalid-request", "/predict")
        assert "register" in response.json()["detail"]


def _assert_problem(response: object, status: int, kind: str | None, instance: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["instance"] == instance
    assert body["detail"]
    if kind is not None:
        assert body["type"] == f"urn:tosca:problem:{kind}"


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


def test_after_a_bug_the_answer_says_that_its_connection_closes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("service.routes.traffic.TrafficOut.of", fail)
    response = client.get("/traffic")
    assert response.status_code == 500
    assert response.headers["connection"] == "close"
