"""Refusals over HTTP: whatever is wrong with a request, a problem document says so, and nothing is changed."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from small_service import picture, settings
from starlette.testclient import TestClient
from synthetic import make_features

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings
from training.trainer import train_task

MakeModule = Callable[..., bytes]
__all__ = ["settings"]  # a fixture


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


def test_after_a_bug_the_answer_says_that_its_connection_closes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("service.routes.traffic.TrafficOut.of", fail)
    response = client.get("/traffic")
    assert response.status_code == 500
    assert response.headers["connection"] == "close"
