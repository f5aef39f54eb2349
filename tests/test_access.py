"""Access: who gets in, with which key, on which port; and that no secret stays anywhere."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.access import Access, is_loopback
from service.app import create_admin_app, create_app
from service.errors import Forbidden, InvalidKeys, InvalidSettings, Unauthenticated
from service.keys import SCOPES, ApiKey, Scope, change_keys, make_key, read_keys, split_token, without_key
from service.planes import Planes
from service.settings import Settings

MakeModule = Callable[..., bytes]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def add_key(path: Path, name: str, *scopes: Scope, expires_at: datetime | None = None) -> str:
    key, token = make_key(name, scopes, now=NOW, expires_at=expires_at)
    change_keys(path, lambda keys: (*keys, key))
    return token


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


# -- keys at rest ----------------------------------------------------------------------------------------


def test_the_file_keeps_no_secret(keys_file: Path) -> None:
    token = add_key(keys_file, "ci", "admin")
    secret = split_token(token)[1]
    assert len(secret) == 43  # 256 bits, base64url
    assert secret not in keys_file.read_text()
    assert read_keys(keys_file)[0].fits(secret)


def test_only_the_owner_may_read_the_file(keys_file: Path) -> None:
    add_key(keys_file, "ci", "admin")
    assert keys_file.stat().st_mode & 0o777 == 0o600


def test_a_change_that_fails_leaves_the_file_as_it_was(keys_file: Path) -> None:
    add_key(keys_file, "ci", "admin")
    before = keys_file.read_bytes()
    with pytest.raises(InvalidKeys, match="no key has the id"):
        change_keys(keys_file, without_key("0" * 12))
    assert keys_file.read_bytes() == before
    assert {one.name for one in keys_file.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_tokens_differ_and_name_their_key(keys_file: Path) -> None:
    tokens = [add_key(keys_file, "ci", "predict") for _ in range(20)]
    assert len(set(tokens)) == 20
    assert [split_token(one)[0] for one in tokens] == [one.key_id for one in read_keys(keys_file)]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 2}', b'{"keys": [{"name": "x"}]}'])
def test_an_unreadable_file_is_refused_at_start(content: bytes, keys_file: Path) -> None:
    keys_file.write_bytes(content)
    with pytest.raises(InvalidKeys, match=r"keys\.json"):
        Access(Settings(keys_file=keys_file))


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "../x", "x" * 65])
def test_a_hostile_name_gets_no_key(name: str) -> None:
    with pytest.raises(InvalidKeys):
        make_key(name, ("predict",), now=NOW)


# -- who is it -------------------------------------------------------------------------------------------


def test_a_key_is_known_by_its_token_and_by_nothing_else(keys_file: Path) -> None:
    token, other = add_key(keys_file, "ci", "admin", "read"), add_key(keys_file, "app", "predict")
    access = Access(Settings(keys_file=keys_file))
    assert access.identify(f"Bearer {token}").name == "ci"
    assert access.identify(f"bearer {other}").scopes == {"predict"}
    key_id, secret = split_token(token)
    wrong = (
        f"tosca_{key_id}_{split_token(other)[1]}",  # another key's secret
        f"tosca_{'0' * 12}_{secret}",
        token[:-1],
        token + "x",
        secret,
        "",
        "ÿ" * 50,
    )
    for one in wrong:
        with pytest.raises(Unauthenticated):
            access.identify(f"Bearer {one}")
    for one in (f"Basic {token}", token, "Bearer", "Bearer "):
        with pytest.raises(Unauthenticated):
            access.identify(one)


def test_an_expired_key_is_refused_from_its_moment_on(keys_file: Path) -> None:
    token = add_key(keys_file, "ci", "read", expires_at=NOW + timedelta(days=1))
    time = [NOW]
    access = Access(Settings(keys_file=keys_file), clock=lambda: time[0])
    assert access.identify(f"Bearer {token}").name == "ci"
    time[0] += timedelta(days=1)
    with pytest.raises(Unauthenticated):
        access.identify(f"Bearer {token}")


def test_keys_are_rotated_without_a_restart(keys_file: Path) -> None:
    old = add_key(keys_file, "ci", "admin")
    access = Access(Settings(keys_file=keys_file))
    new = add_key(keys_file, "ci", "admin")
    assert access.identify(f"Bearer {old}").name == access.identify(f"Bearer {new}").name == "ci"
    change_keys(keys_file, without_key(split_token(old)[0]))
    assert access.identify(f"Bearer {new}").name == "ci"
    with pytest.raises(Unauthenticated):
        access.identify(f"Bearer {old}")


def test_a_file_that_breaks_keeps_its_keys_and_one_that_goes_takes_them(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = add_key(keys_file, "ci", "read")
    access = Access(Settings(keys_file=keys_file))
    keys_file.write_text("{")
    assert access.identify(f"Bearer {token}").name == "ci"
    assert "keeping the 1 keys" in caplog.text
    keys_file.unlink()
    with pytest.raises(Unauthenticated):
        access.identify(f"Bearer {token}")


def test_a_caller_may_do_what_the_key_says(keys_file: Path) -> None:
    for scope in SCOPES:
        access = Access(Settings(keys_file=keys_file))
        caller = access.identify(f"Bearer {add_key(keys_file, 'x', scope)}")
        for other in SCOPES:
            if other == scope:
                access.check(caller, other)
            else:
                with pytest.raises(Forbidden, match=other):
                    access.check(caller, other)


# -- without a key ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_without_keys_nobody_else_can_reach_the_server_unless_that_was_said(host: str) -> None:
    with pytest.raises(InvalidSettings, match="TOSCA_ALLOW_ANONYMOUS"):
        Access(Settings(host=host))
    with pytest.raises(InvalidSettings):
        Access(Settings(admin_host=host, admin_port=1))
    assert Access(Settings(host=host, allow_anonymous="predict")).identify(None).scopes == {"predict"}
    assert Access(Settings(host=host, allow_anonymous="everything")).identify(None).scopes == set(SCOPES)


def test_open_until_there_are_keys_means_closed_when_there_are(keys_file: Path) -> None:
    opened = Settings(host="0.0.0.0", allow_anonymous="without-keys")
    assert Access(opened).identify(None).scopes == set(SCOPES)
    closed = Settings(host="0.0.0.0", allow_anonymous="without-keys", keys_file=keys_file)
    assert Access(closed).identify(None).scopes == set()


def test_on_loopback_everything_is_open_until_there_are_keys(keys_file: Path) -> None:
    assert Access(Settings()).identify(None).scopes == set(SCOPES)
    assert Access(Settings(keys_file=keys_file)).identify(None).scopes == set()
    both = Access(Settings(keys_file=keys_file, allow_anonymous="predict"))
    assert both.identify(None).scopes == {"predict"}


def test_a_server_that_nobody_can_use_does_not_start() -> None:
    with pytest.raises(InvalidSettings, match="TOSCA_KEYS_FILE"):
        Access(Settings(allow_anonymous="nothing"))


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert all(is_loopback(one) for one in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(one) for one in ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.org", ""))


@pytest.mark.parametrize(
    ("origin", "host", "is_allowed"),
    [
        (None, "localhost:8000", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://evil.org", "localhost:8000", False),
        ("http://evil.org:8000", "evil.org:8000", False),  # a name made to point at 127.0.0.1
        ("http://localhost:3000", "localhost:8000", False),
        ("null", "localhost:8000", False),
        ("http://[", "localhost:8000", False),
        ("http://[x]:80", "[x]:80", False),
        ("https://ours.org", "localhost:8000", True),
    ],
)
def test_pages_of_other_sites_cannot_use_a_visitors_open_server(
    origin: str | None, host: str, is_allowed: bool
) -> None:
    access = Access(Settings(cors_origins=("https://ours.org",)))
    if is_allowed:
        access.check_origin(access.identify(None), origin, host)
    else:
        with pytest.raises(Forbidden, match="origin"):
            access.check_origin(access.identify(None), origin, host)


# -- over HTTP -------------------------------------------------------------------------------------------

ROUTES: list[tuple[str, str, Scope]] = [
    ("POST", "/predict", "predict"),
    ("POST", "/feedback", "predict"),
    ("GET", "/tasks", "read"),
    ("GET", "/tasks/birds", "read"),
    ("GET", "/traffic", "read"),
    ("GET", "/replicas", "read"),
    ("GET", "/metrics", "read"),
    ("POST", "/tasks", "admin"),
    ("DELETE", "/tasks/birds", "admin"),
    ("GET", "/revisions", "admin"),
    ("POST", "/revisions/1/rollback", "admin"),
    ("GET", "/v2", "read"),
    ("GET", "/v2/models/birds", "read"),
    ("GET", "/v2/models/birds/versions/1", "read"),
    ("GET", "/v2/models/birds/ready", "read"),
    ("GET", "/v2/models/birds/versions/1/ready", "read"),
    ("POST", "/v2/models/birds/infer", "predict"),
    ("POST", "/v2/models/birds/versions/1/infer", "predict"),
    ("POST", "/v2/repository/index", "read"),
    ("POST", "/v2/repository/models/birds/load", "admin"),
    ("POST", "/v2/repository/models/birds/unload", "admin"),
]


@pytest.fixture
def settings(tiny_store: ModelStore, keys_file: Path) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0, keys_file=keys_file)


@pytest.fixture
def client(settings: Settings, tiny_backbone: Backbone, make_module: MakeModule) -> Iterator[TestClient]:
    with TestClient(create_app(settings, tiny_backbone), raise_server_exceptions=False) as client:
        token = add_key(settings.keys_file, "setup", "admin")
        assert client.post("/tasks", content=make_module("birds"), headers=bearer(token)).status_code == 201
        yield client


def test_every_route_but_health_is_in_the_table(client: TestClient) -> None:
    documented = {
        (method.upper(), path.format(task="birds", number=1, name="birds", version=1))
        for path, item in client.get("/openapi.json").json()["paths"].items()
        for method in item
        if not path.startswith(("/health", "/v2/health"))
    }
    assert documented == {(method, path) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_a_route_wants_its_scope(
    method: str, path: str, scope: Scope, client: TestClient, keys_file: Path
) -> None:
    missing = client.request(method, path)
    assert missing.status_code == 401
    assert missing.headers["www-authenticate"] == 'Bearer realm="tosca"'
    wrong = client.request(method, path, headers=bearer("tosca_000000000000_x"))
    assert wrong.status_code == 401
    assert 'error="invalid_token"' in wrong.headers["www-authenticate"]
    others = [one for one in SCOPES if one != scope]
    lacking = client.request(method, path, headers=bearer(add_key(keys_file, "app", *others)))
    assert lacking.status_code == 403
    assert f'scope="{scope}"' in lacking.headers["www-authenticate"]
    right = client.request(method, path, headers=bearer(add_key(keys_file, "app", scope)))
    assert right.status_code not in (401, 403)
    for response in (missing, wrong, lacking):
        if path.startswith("/v2"):
            assert response.json().keys() == {"error"}
        else:
            assert response.headers["content-type"] == "application/problem+json"


def test_health_needs_no_key(client: TestClient) -> None:
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_a_key_that_crowds_is_told_when_to_come_back_and_others_are_served(
    client: TestClient, keys_file: Path
) -> None:
    crowding, other = add_key(keys_file, "crowd", "predict"), add_key(keys_file, "other", "predict")
    quota = client.app.state.service.quota
    with ExitStack() as under_way:
        for _ in range(Settings().max_requests_per_key):
            under_way.enter_context(quota.place(split_token(crowding)[0], 1.0))
        refused = client.post("/predict", content=encoded(noise()), headers=bearer(crowding))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["type"] == "urn:tosca:problem:too-many-requests"
        assert client.post("/predict", content=encoded(noise()), headers=bearer(other)).status_code == 200
    assert client.post("/predict", content=encoded(noise()), headers=bearer(crowding)).status_code == 200


def test_what_a_key_does_carries_its_name(
    client: TestClient, keys_file: Path, make_module: MakeModule
) -> None:
    headers = bearer(add_key(keys_file, "release-bot", "admin"))
    assert client.post("/tasks", content=make_module("cars", seed=2), headers=headers).status_code == 201
    assert client.delete("/tasks/cars", headers=headers).status_code == 200
    authors = [one["author"] for one in client.get("/revisions", headers=headers).json()[:3]]
    assert authors == ["release-bot", "release-bot", "setup"]


def test_no_token_is_in_any_log(
    client: TestClient, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = add_key(keys_file, "app", "predict")
    for one in (token, token + "x"):
        client.post("/predict", content=encoded(noise()), headers=bearer(one), params={"task": "nobody"})
    text = "\n".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
    assert "/predict" in text
    assert split_token(token)[1] not in text


def test_an_admin_port_takes_the_changes_off_the_main_one(
    settings: Settings, tiny_backbone: Backbone, keys_file: Path, make_module: MakeModule
) -> None:
    separate = settings.model_copy(update={"admin_port": 9999})
    main = create_app(separate, tiny_backbone)
    planes = Planes(main)
    planes.put(9999, create_admin_app(separate, main))
    headers = bearer(add_key(keys_file, "ops", *SCOPES))
    with TestClient(planes, base_url="http://testserver:8000") as client:
        admin = "http://testserver:9999"
        for method, path, scope in ROUTES:
            if path.startswith("/v2"):
                continue
            here = client.request(method, path, headers=headers).status_code
            there = client.request(method, f"{admin}{path}", headers=headers).status_code
            assert (here in (404, 405)) == (scope == "admin" or path == "/tasks/birds"), (method, path, here)
            assert (there == 404) == (path == "/tasks/birds"), (method, path, there)
        load = "/v2/repository/models/birds/load"
        assert client.post(load, headers=headers).json() == {"error": "Not Found"}
        assert "no task 'birds'" in client.post(f"{admin}{load}", headers=headers).json()["error"]
        added = client.post(f"{admin}/tasks", content=make_module("birds"), headers=headers)
        assert added.status_code == 201
        assert client.get("/tasks", headers=headers).json()["revision"] == added.json()["revision"]
        assert client.post("/predict", content=encoded(noise()), headers=headers).status_code == 200
        for one in ("", admin):
            assert client.get(f"{one}/health/ready").status_code == 200


def test_pages_and_documents_are_closed_to_strangers_by_default(
    settings: Settings, tiny_backbone: Backbone
) -> None:
    preflight = {"origin": "https://ours.org", "access-control-request-method": "POST"}
    with TestClient(create_app(settings, tiny_backbone)) as client:
        assert "access-control-allow-origin" not in client.options("/predict", headers=preflight).headers
        page = client.get("/docs")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
    opened = settings.model_copy(update={"cors_origins": ("https://ours.org",), "show_docs": False})
    with TestClient(create_app(opened, tiny_backbone)) as client:
        allowed = client.options("/predict", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://ours.org"
        other = client.options("/predict", headers={**preflight, "origin": "https://evil.org"})
        assert "access-control-allow-origin" not in other.headers
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_a_key_is_kept_in_a_documented_form(keys_file: Path) -> None:
    add_key(keys_file, "ci", "read", expires_at=NOW)
    kept = json.loads(keys_file.read_text())
    assert kept["format_version"] == 1
    assert set(kept["keys"][0]) == set(ApiKey.model_fields)
    assert keys_file.stat().st_size < 1000
