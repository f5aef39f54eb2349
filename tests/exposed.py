"""Traffic of every kind, and what a service exports after it."""

from collections.abc import Mapping

from pictures import encoded, noise
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}


def make_traffic(client: TestClient, task: str) -> None:
    """An answer by `task`, its label, and a refusal, so that every metric has a sample."""
    request = {"x-request-id": "labelled"}
    answered = client.post("/predict", params={"task": task}, content=encoded(noise()), headers=request)
    assert answered.status_code == 200, answered.text
    told = client.post("/feedback", json={"request_id": "labelled", "label": "something else"})
    assert told.json()["counted"], told.text
    assert client.get("/tasks/nothing").status_code == 404


def families(client: TestClient) -> list[Metric]:
    return list(text_string_to_metric_families(client.get("/metrics").text))


def label_names(family: Metric) -> set[str]:
    """The labels of a family's samples, but for the edges of a histogram."""
    return {name for sample in family.samples for name in sample.labels if name != "le"}


def labels_of_series(client: TestClient) -> Mapping[str, set[str]]:
    """The names that a query may ask for, and the labels each has."""
    series = {}
    for family in families(client):
        for suffix in _SUFFIXES.get(family.type, ("",)):
            name = family.name if family.name.endswith(suffix) else family.name + suffix
            series[name] = label_names(family) | ({"le"} if suffix == "_bucket" else set())
    return series
