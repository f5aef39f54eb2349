"""The direct route against FastAPI's own: the same answers, and the same refusals in the same words."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.keys import SCOPES, change_keys, make_key, now_utc
from service.routes import predict
from service.routes.direct import Ahead, DirectRoute
from service.schemas.predict import PredictResponse
from service.settings import Settings

URL = "http://127.0.0.1:8000"
PNG = encoded(noise(0))
VARYING = ("x-request-id", "content-length")
WRONG_KEY = {"authorization": "Bearer wrong"}
NO_TIME = {"x-request-timeout": "-1"}
QUERIES = (
    "",
    "top_k=1",
    "top_k=3&timings=true&return_cls=1",
    "task=birds&selection=lda&coverage=0.5",
    "selection=entropy",
    "unknown=1&top_k=2",
    "top_k=1&top_k=2",
    "task=",
    "task=nobody",
    "top_k=0",
    "top_k=-1",
    "top_k=two",
    "top_k=2.5",
    "top_k=",
    "top_k=1000",
    "top_k=one&top_k=2",
    "selection=published",
    "selection=",
    "coverage=0",
    "coverage=1",
    "coverage=nan",
    "coverage=much",
    "timings=maybe",
    "timings=",
    "return_cls=2",
    "timings=maybe&top_k=two&selection=none",
    "top_k=%zz",
    "TOP_K=0",
)
HEADERS: tuple[dict[str, str], ...] = (
    {},
    {"x-request-timeout": "5"},
    {"x-request-timeout": "soon"},
    {"x-request-timeout": ""},
    {"content-type": "text/plain"},
    {"content-type": "application/json"},
    {"authorization": "Basic abc"},
    WRONG_KEY,
    {"origin": "https://elsewhere.example"},
    {"x-minimum-revision": "1"},
    {"x-minimum-revision": "99"},
    {"x-minimum-revision": "0"},
    {"x-minimum-revision": "new"},
    {"x-minimum-revision": ""},
    {**WRONG_KEY, "x-minimum-revision": "new"},
    {**WRONG_KEY, "x-minimum-revision": "99"},
)


@pytest.fixture
def settings(tiny_store: ModelStore, make_module: Callable[..., bytes]) -> Settings:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    return Settings(store=tiny_store.url, store_poll_s=0.0)


def test_answers_and_refusals_are_those_of_fastapi(settings: Settings, tiny_backbone: Backbone) -> None:
    asked = [({}, query, PNG) for query in QUERIES] + [(headers, "top_k=2", PNG) for headers in HEADERS]
    # The caller is judged before the parameters, those before the time it may take, that before the body.
    asked += [({**WRONG_KEY, **NO_TIME}, "top_k=two", b""), (NO_TIME, "top_k=two", b""), (NO_TIME, "", b"")]
    asked += [({"x-minimum-revision": "new"}, "top_k=two&timings=maybe", PNG)]
    direct, solved = told_by_both(settings, tiny_backbone, asked)
    assert direct == solved
    assert {status for status, _, _ in direct} == {200, 401, 403, 404, 412, 415, 422}


def test_keys_and_their_scopes_count_as_with_fastapi(
    settings: Settings, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    tokens = {}
    for scope in SCOPES:
        key, tokens[scope] = make_key(scope, (scope,), now=now_utc())
        change_keys(tmp_path / "keys", lambda keys, made=key: (*keys, made))
    settings = settings.model_copy(update={"keys_file": tmp_path / "keys"})
    bearers = [{"authorization": f"Bearer {token}"} for token in tokens.values()]
    direct, solved = told_by_both(
        settings, tiny_backbone, [(headers, "top_k=0", PNG) for headers in ({}, WRONG_KEY, *bearers)]
    )
    assert direct == solved
    assert [status for status, _, _ in direct] == [401, 401, 422, 403, 403]


@pytest.mark.parametrize("path", ["/predict", "/predict/", "/predictions"])
def test_other_methods_and_paths_are_refused_as_by_fastapi(
    path: str, settings: Settings, tiny_backbone: Backbone
) -> None:
    methods = ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST")
    direct, solved = (
        [client.request(one, path, content=PNG, follow_redirects=False) for one in methods]
        for client in both(settings, tiny_backbone)
    )
    for ours, theirs in zip(direct, solved, strict=True):
        assert (ours.status_code, ours.headers.get("allow")) == (
            theirs.status_code,
            theirs.headers.get("allow"),
        )
        assert ours.headers.get("location") == theirs.headers.get("location")


def test_what_answers_is_ahead_of_fastapi_and_counted(settings: Settings, tiny_backbone: Backbone) -> None:
    app = create_app(settings, tiny_backbone)
    assert isinstance(app.router.routes[0], Ahead)
    assert "/predict" in app.openapi()["paths"]
    with TestClient(app, base_url=URL) as client:
        assert client.post("/predict", content=PNG).is_success
        counted = client.get("/metrics").text
    assert 'tosca_request_duration_seconds_count{method="POST",route="/predict",status="200"} 1.0' in counted


Asked = tuple[dict[str, str], str, bytes]
Told = tuple[int, dict[str, str], object]


def told_by_both(settings: Settings, backbone: Backbone, asked: list[Asked]) -> tuple[list[Told], list[Told]]:
    """What the direct route says, and what a plain route with the same endpoint says."""
    direct, solved = (told(client, asked) for client in both(settings, backbone))
    return direct, solved


def both(settings: Settings, backbone: Backbone) -> Iterator[TestClient]:
    """A client of the direct route, and one of a plain route with the same endpoint."""
    with TestClient(create_app(settings, backbone), base_url=URL) as client:
        yield client
    with pytest.MonkeyPatch.context() as patch:
        documented = next(route for route in predict.router.routes if isinstance(route, APIRoute))
        assert type(documented) is DirectRoute
        plain = APIRouter()
        plain.add_api_route(
            "/predict",
            predict.predict,
            methods=["POST"],
            response_model=PredictResponse,
            response_model_exclude_none=True,
        )
        patch.setattr(predict, "router", plain)
        with TestClient(create_app(settings, backbone), base_url=URL) as client:
            yield client


def told(client: TestClient, asked: list[Asked]) -> list[Told]:
    """Answers without the ids, times and lengths that no two of them share."""
    answers: list[Told] = []
    for headers, query, body in asked:
        response = client.post(f"/predict?{query}", content=body, headers=headers)
        document: dict[str, Any] = response.json()
        document.pop("request_id", None)
        for one in document.get("timings", ()):
            one.update({name: 0.0 for name in one if name.endswith("_ms")})
        shared = {name: value for name, value in response.headers.items() if name not in VARYING}
        answers.append((response.status_code, shared, document))
    return answers
