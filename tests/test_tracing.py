"""Traces, received by a real OTLP/HTTP receiver in this process."""

import gzip
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pictures import encoded, noise
from starlette.testclient import TestClient

from model_store.backbone import Backbone
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.errors import InvalidSettings
from service.logs import JsonFormatter
from service.settings import Settings

MakeModule = Callable[..., bytes]
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}


@dataclass
class Collector:
    """Where spans arrive; they are complete once the service has stopped."""

    url: str = ""
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collected = Collector()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            collected.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collected.url = f"http://127.0.0.1:{server.server_port}"
        yield collected
        server.shutdown()
        thread.join()


@pytest.fixture
def settings(tiny_store: ModelStore, make_module: MakeModule, collector: Collector) -> Settings:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    return Settings(store=tiny_store.url, store_poll_s=0.0, otlp_endpoint=collector.url)


def attributes(span: Span) -> dict[str, object]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_request_is_a_trace_of_its_stages(
    settings: Settings, tiny_backbone: Backbone, collector: Collector
) -> None:
    began_ns = time.time_ns()
    with TestClient(create_app(settings, tiny_backbone)) as client:
        response = client.post("/predict", content=encoded(noise()), headers=SAMPLED)
        assert response.status_code == 200
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == {"POST /predict", "decode", "queue", "backbone", "selection", "modules"}
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    request = by_name["POST /predict"]
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.parent_span_id.hex() == PARENT_ID
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "url.path": "/predict",
        "tosca.request_id": response.headers["x-request-id"],
    }
    for name in ("decode", "queue", "backbone", "selection"):
        assert by_name[name].parent_span_id == request.span_id
    assert by_name["modules"].parent_span_id == by_name["selection"].span_id
    assert attributes(by_name["backbone"]) == {"tosca.batch_images": 1}
    moments = [began_ns, request.start_time_unix_nano]
    for name in ("decode", "queue", "backbone", "selection"):
        moments += [by_name[name].start_time_unix_nano, by_name[name].end_time_unix_nano]
    moments += [request.end_time_unix_nano, time.time_ns()]
    slack_ns = 1_000_000  # two clocks are read one after the other
    assert all(earlier <= later + slack_ns for earlier, later in pairwise(moments))
    service = {
        one.key: one.value.string_value for one in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert service["service.name"] == "tosca-serving"


def test_every_picture_has_its_stages_and_a_known_one_no_pass(
    settings: Settings, tiny_backbone: Backbone, collector: Collector
) -> None:
    pictures = [("image", encoded(noise(seed=seed))) for seed in range(2)]
    with TestClient(create_app(settings, tiny_backbone)) as client:
        assert client.post("/predict", files=pictures[:1]).status_code == 200
        assert client.post("/predict", files=pictures).status_code == 200
    names = [span.name for span in collector.spans]
    assert (names.count("decode"), names.count("selection"), names.count("backbone")) == (3, 3, 2)
    assert len({span.trace_id for span in collector.spans}) == 2


def test_a_caller_that_does_not_sample_is_not_sampled(
    settings: Settings, tiny_backbone: Backbone, collector: Collector
) -> None:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        assert client.post("/predict", content=encoded(noise()), headers=NOT_SAMPLED).status_code == 200
        assert client.get("/health/live").status_code == 200
    assert collector.spans == []


def test_of_other_requests_the_chosen_share_is_sampled(
    settings: Settings, tiny_backbone: Backbone, collector: Collector
) -> None:
    nothing = settings.model_copy(update={"trace_ratio": 0.0})
    with TestClient(create_app(nothing, tiny_backbone)) as client:
        assert client.get("/tasks").status_code == 200
        assert client.get("/tasks", headers=SAMPLED).status_code == 200
    assert [span.trace_id.hex() for span in collector.spans] == [TRACE_ID]


def test_refusals_and_bugs_are_in_their_spans(
    settings: Settings, tiny_backbone: Backbone, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("service.routes.traffic.TrafficOut.of", fail)
    with TestClient(create_app(settings, tiny_backbone), raise_server_exceptions=False) as client:
        assert client.get("/tasks/nothing").status_code == 404
        assert client.get("/traffic").status_code == 500
    refused, broken = collector.spans
    assert attributes(refused)["http.response.status_code"] == 404
    assert refused.status.code == Status.STATUS_CODE_UNSET
    assert broken.status.code == Status.STATUS_CODE_ERROR
    assert [event.name for event in broken.events] == ["exception"]


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "é" * 400])
def test_a_damaged_traceparent_begins_a_new_trace(
    header: str, settings: Settings, tiny_backbone: Backbone, collector: Collector
) -> None:
    with TestClient(create_app(settings, tiny_backbone)) as client:
        assert client.get("/tasks", headers={"traceparent": header.encode()}).status_code == 200
    [span] = collector.spans
    assert span.parent_span_id == b""
    assert span.name == "GET /tasks"


def test_log_lines_have_the_trace_of_their_request(
    settings: Settings, tiny_backbone: Backbone, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []

    class Capture(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonFormatter().format(record))

    handler = Capture()
    logger = logging.getLogger("tosca.request")
    logger.addHandler(handler)
    caplog.set_level(logging.INFO, "tosca.request")
    try:
        with TestClient(create_app(settings, tiny_backbone)) as client:
            client.get("/tasks")
    finally:
        logger.removeHandler(handler)
    [span] = collector.spans
    assert json.loads(lines[-1])["trace_id"] == span.trace_id.hex()


def test_a_collector_that_is_gone_costs_no_request(settings: Settings, tiny_backbone: Backbone) -> None:
    gone = settings.model_copy(update={"otlp_endpoint": "http://127.0.0.1:9"})
    with TestClient(create_app(gone, tiny_backbone)) as client:
        assert client.post("/predict", content=encoded(noise())).status_code == 200


def test_an_endpoint_without_the_extra_is_refused(
    settings: Settings, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidSettings, match="tracing"):
        create_app(settings, tiny_backbone)
