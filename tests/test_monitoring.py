"""Dashboard and alert rules ask only for what is exported, and fit together with what provisions them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from exposed import labels_of_series, make_traffic
from starlette.testclient import TestClient

from model_store.backbone import Backbone, BackboneArtefact
from model_store.store import ModelStore
from service.app import create_app
from service.settings import Settings

MakeModule = Callable[..., bytes]
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker/monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/tosca.json").read_text())
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
BY_THE_SCRAPER = {"instance", "job"}
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


def panels() -> Iterator[dict[str, Any]]:
    yield from DASHBOARD["panels"]


def expressions() -> dict[str, str]:
    """Every query by where it stands, with Grafana's variables filled in."""
    found = {}
    for panel in panels():
        for target in panel.get("targets", []):
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            found[f"panel {panel['title']} {target['refId']}"] = text
    for group in RULES["groups"]:
        for rule in group["rules"]:
            found[f"alert {rule['alert']}"] = rule["expr"]
    return found


def faults(query: str, series: Mapping[str, set[str]]) -> list[str]:
    """What a query asks for that is not there: metrics, labels to match, labels to group by."""
    found: list[str] = []

    def labels_below(expression: promql_parser.Expr) -> set[str]:
        labels = set(BY_THE_SCRAPER)

        def gather(one: promql_parser.Expr) -> None:
            if isinstance(one, promql_parser.VectorSelector):
                labels.update(series.get(one.name, ()))

        promql_parser.walk(expression, gather)
        return labels

    def check(one: promql_parser.Expr) -> None:
        if isinstance(one, promql_parser.VectorSelector):
            if one.name not in series:
                found.append(f"metric {one.name}")
            known = series.get(one.name, set()) | BY_THE_SCRAPER
            found.extend(
                f"label {m.name} of {one.name}" for m in one.matchers.matchers if m.name not in known
            )
        elif isinstance(one, promql_parser.AggregateExpr) and one.modifier is not None:
            known = labels_below(one.expr)
            found.extend(f"label {name} to group by" for name in one.modifier.labels if name not in known)

    promql_parser.walk(promql_parser.parse(query), check)
    return found


@pytest.fixture(scope="module")
def series(
    tmp_path_factory: pytest.TempPathFactory, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> Mapping[str, set[str]]:
    """What a real service exports after a little traffic, and what Prometheus adds to it."""
    store = ModelStore(tmp_path_factory.mktemp("monitored") / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    settings = Settings(store=store.url, store_poll_s=0.0)
    with TestClient(create_app(settings, Backbone.load(tiny_artefact, device="cpu"))) as client:
        assert client.post("/tasks", content=make_module("birds")).status_code == 201
        make_traffic(client, "birds")
        return {"up": set(), **labels_of_series(client)}


@pytest.mark.parametrize(("where", "query"), expressions().items(), ids=list(expressions()))
def test_every_query_asks_for_what_is_exported(
    where: str, query: str, series: Mapping[str, set[str]]
) -> None:
    assert faults(query, series) == [], where


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("rate(tosca_requests_total[1m])", "metric tosca_requests_total"),
        ("tosca_request_duration_seconds", "metric tosca_request_duration_seconds"),
        ("1 - sum(toska_ready)", "metric toska_ready"),
        ('tosca_revision{task="birds"}', "label task of tosca_revision"),
        ("sum by (tasks) (tosca_task_drifting)", "label tasks to group by"),
        ("sum by (le) (rate(tosca_batch_images_sum[1m]))", "label le to group by"),
    ],
)
def test_an_unknown_metric_or_label_is_found(query: str, fault: str, series: Mapping[str, set[str]]) -> None:
    assert faults(query, series) == [fault]


def test_every_metric_of_the_service_is_looked_at_or_left_out_on_purpose(
    series: Mapping[str, set[str]],
) -> None:
    queries = "\n".join(expressions().values())
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series if name.startswith("tosca_")}
    assert {name for name in ours if name not in queries} == {"tosca_build_info", "tosca_cls_cache_entries"}


# -- the files by themselves -----------------------------------------------------------------------------


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_and_variable_uses_the_provisioned_data_source() -> None:
    [source] = yaml.safe_load((FOLDER / "grafana/datasource.yaml").read_text())["datasources"]
    used = [one["datasource"] for one in DASHBOARD["templating"]["list"]]
    for panel in panels():
        if panel["type"] != "row":
            used += [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert {(one["type"], one["uid"]) for one in used} == {(source["type"], source["uid"])}


def test_alerts_say_how_bad_and_what_to_do_and_are_documented() -> None:
    document = (ROOT / "docs/monitoring.md").read_text()
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"| `{rule['alert']}` | {rule['labels']['severity']} |" in document, rule["alert"]


def test_every_alert_is_tried_both_ways() -> None:
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())["tests"]
    tried = {
        (re.findall(r'alertname="(\w+)"', one["expr"])[0], one["exp_samples"][0]["value"])
        for test in tests
        for one in test["promql_expr_test"]
    }
    names = {rule["alert"] for group in RULES["groups"] for rule in group["rules"]}
    assert tried == {(name, fires) for name in names for fires in (0, 1)}


def test_compose_mounts_what_is_there() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = {
        name: one for name, one in compose["services"].items() if one.get("profiles") == ["monitoring"]
    }
    assert set(services) == {"prometheus", "grafana"}
    mounts = [mount for one in services.values() for mount in one["volumes"] if mount.startswith("./")]
    assert len(mounts) == 5
    for mount in mounts:
        path, _, how = mount.split(":")
        assert (ROOT / "docker" / path).is_file(), path
        assert how == "ro"
