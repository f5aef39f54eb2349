"""Prometheus metrics: what is exported, that it counts what happened, and that no label grows without bound."""

from collections.abc import Callable
from pathlib import Path

import pytest
from exposed import families, label_names, make_traffic
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.app import create_admin_app, create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
OF_LIBRARIES = {"process": "Of the process.", "python": "Of the interpreter."}
DOCUMENT = Path(__file__).parents[1] / "docs/monitoring.md"


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0)


def ask(client: TestClient, seed: int = 0, **query: str) -> None:
    response = client.post("/predict", params=query, content=encoded(noise(seed=seed)))
    assert response.status_code == 200, response.text


def samples(client: TestClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by the name of the series and its label values, in the order of their names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families(client)
        for sample in family.samples
    }


def table_of(client: TestClient) -> list[str]:
    """The rows of docs/monitoring.md for what is exported: name, type, labels, meaning."""
    rows = []
    for family in families(client):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        meaning = OF_LIBRARIES.get(family.name.partition("_")[0], family.documentation)
        name = family.name if family.name.endswith(suffix) else f"{family.name}{suffix}"
        rows.append(f"| `{name}` | {family.type} | {', '.join(sorted(label_names(family)))} | {meaning} |")
    return sorted(rows)


def test_table_in_the_document_is_what_is_exported(client: TestClient) -> None:
    make_traffic(client, "birds")
    prefixes = ("| `tosca_", "| `process_", "| `python_")
    table = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(prefixes)]
    exported = table_of(client)
    assert table == exported, "docs/monitoring.md should have\n" + "\n".join(exported)


def test_names_follow_the_conventions(client: TestClient) -> None:
    """Base units, no abbreviated or milli units, counters end in _total."""
    for family in families(client):
        assert family.name.startswith(("tosca_", "process_", "python_"))
        assert not family.name.endswith(("_ms", "_milliseconds", "_kb", "_megabytes", "_percent"))
        assert family.documentation
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_stages_and_batches_are_measured_by_picture_and_by_pass(client: TestClient) -> None:
    pictures = [("image", encoded(noise(seed=seed))) for seed in range(3)]
    assert client.post("/predict", files=pictures).status_code == 200
    ask(client, seed=0)  # known: no decoding, no pass
    found = samples(client)
    assert found["tosca_decode_duration_seconds_count", ()] == 3
    assert found["tosca_queue_wait_seconds_count", ()] == 3
    assert found["tosca_batch_images_sum", ()] == 3
    assert found["tosca_backbone_duration_seconds_count", ()] == found["tosca_batch_images_count", ()]
    assert found["tosca_evaluated_modules_count", ()] == 4
    for stage in ("decode_duration", "backbone_duration", "selection_duration", "modules_duration"):
        assert found[f"tosca_{stage}_seconds_sum", ()] > 0.0
    assert (
        found["tosca_selection_duration_seconds_count", ()]
        == found["tosca_modules_duration_seconds_count", ()]
        >= 2
    )
    assert found["tosca_cls_cache_hits_total", ()] == 1
    assert found["tosca_cls_cache_misses_total", ()] == 3
    assert found["tosca_cls_cache_entries", ()] == 3
    assert found["tosca_cls_cache_bytes", ()] > 3 * 192 * 4
    assert found["tosca_admitted_images", ()] == 0


def test_requests_by_route_and_refusals_by_reason(client: TestClient) -> None:
    ask(client)
    client.get("/tasks/nothing")
    client.get("/tasks/neither")
    client.post("/predict", content=b"no picture")
    client.request("BREW", "/pot")
    found = samples(client)
    assert found["tosca_request_duration_seconds_count", ("POST", "/predict", "200")] == 1
    assert found["tosca_request_duration_seconds_count", ("GET", "/tasks/{task}", "404")] == 2
    assert found["tosca_request_duration_seconds_count", ("POST", "/predict", "415")] == 1
    assert found["tosca_request_duration_seconds_count", ("other", "none", "404")] == 1
    assert found["tosca_refusals_total", ("unknown-task",)] == 2
    assert found["tosca_refusals_total", ("unsupported-image-format",)] == 1
    assert found["tosca_refusals_total", ("http",)] == 1


def test_a_bug_is_counted_as_one(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("service.routes.traffic.TrafficOut.of", fail)
    assert client.get("/traffic").status_code == 500
    assert samples(client)["tosca_refusals_total", ("internal",)] == 1


def test_what_clients_send_makes_no_new_series(client: TestClient) -> None:
    ask(client, task="birds")
    client.get("/tasks/nothing")
    client.request("BREW", "/pot")
    client.get("/metrics")
    before = set(samples(client))
    for i in range(20):
        client.get(f"/tasks/unknown-{i}")
        client.request(f"BREW{i}", f"/pot/{i}")
        client.post("/predict", params={"task": "birds", "top_k": i + 1}, content=encoded(noise()))
    assert set(samples(client)) == before


def test_changes_are_measured_by_outcome(client: TestClient, make_module: MakeModule) -> None:
    client.post("/tasks", content=b"no module")
    client.delete("/tasks/birds")
    client.post("/revisions/1/rollback")
    found = samples(client)
    assert found["tosca_change_duration_seconds_count", ("register", "done")] == 2
    assert found["tosca_change_duration_seconds_count", ("register", "refused")] == 1
    assert found["tosca_change_duration_seconds_count", ("remove", "done")] == 1
    assert found["tosca_change_duration_seconds_count", ("roll back", "done")] == 1
    assert found["tosca_revision", ()] == client.get("/health/ready").json()["revision"]
    assert found["tosca_tasks", ()] == 0
    assert found["tosca_ready", ()] == 1
    assert found["tosca_engine_alive", ()] == 1
    assert found["tosca_store_fault", ()] == 0
    assert 0.0 <= found["tosca_store_staleness_seconds", ()] < 60.0


def test_tasks_are_labels_while_they_are_active(client: TestClient) -> None:
    ask(client, task="birds")
    found = samples(client)
    assert found["tosca_task_images_total", ("birds",)] == 1
    assert found["tosca_task_images_total", ("_other",)] == 0
    assert found["tosca_task_confidence_bucket", ("+Inf", "birds")] == 1
    assert found["tosca_task_confidence_count", ("birds",)] == 1
    assert 0.0 < found["tosca_task_confidence_sum", ("birds",)] <= 1.0
    assert 0.0 < found["tosca_task_drift_p_value", ("birds",)] <= 1.0
    assert found["tosca_task_drifting", ("birds",)] in (0.0, 1.0)
    client.delete("/tasks/birds")
    assert not [key for key in samples(client) if "birds" in key[1]]


# -- where, and for whom ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "on_main", "on_admin"),
    [("both", 200, 200), ("main", 200, 404), ("admin", 404, 200), ("nothing", 404, 404)],
)
def test_ports_that_serve_them(
    where: str, on_main: int, on_admin: int, settings: Settings, tiny_backbone: Backbone
) -> None:
    chosen = settings.model_copy(update={"admin_port": 9000, "metrics_on": where})
    app = create_app(chosen, tiny_backbone)
    with TestClient(app) as main:
        admin = TestClient(create_admin_app(chosen, app))
        assert main.get("/metrics").status_code == on_main
        assert admin.get("/metrics").status_code == on_admin


@pytest.mark.parametrize(("where", "status"), [("admin", 200), ("nothing", 404)])
def test_one_port_alone_has_what_the_admin_port_would(
    where: str, status: int, settings: Settings, tiny_backbone: Backbone
) -> None:
    with TestClient(create_app(settings.model_copy(update={"metrics_on": where}), tiny_backbone)) as client:
        assert client.get("/metrics").status_code == status


def test_they_may_be_opened_to_everybody(settings: Settings, tiny_backbone: Backbone, tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.json"
    keys_file.write_text('{"keys": []}')
    locked = settings.model_copy(update={"keys_file": keys_file})
    with TestClient(create_app(locked, tiny_backbone)) as client:
        assert client.get("/metrics").status_code == 401
    opened = locked.model_copy(update={"metrics_need_key": False})
    with TestClient(create_app(opened, tiny_backbone)) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/traffic").status_code == 401
