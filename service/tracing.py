"""OpenTelemetry spans of requests and of the stages of their pictures, sent over OTLP/HTTP when configured.

    POST /predict ── decode, queue, backbone, selection ── modules        for each picture

A trace continues that of a `traceparent` header, whose sampling it keeps; without one the share
`trace_ratio` of requests is sampled.
"""

import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InvalidSettings
from service.request_context import ASKED_BY_MACHINES, current_request
from service.settings import Settings
from service.timings import Interval, Timings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

NO_TRACER = trace.NoOpTracer()
_EXPORT_TIMEOUT_S = 5.0
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """The tracer of a service, and the thread that sends its spans away. Close it to send the last."""

    def __init__(self, settings: Settings) -> None:
        """Raises InvalidSettings when an endpoint is set but the packages of the extra are not there."""
        self.tracer: trace.Tracer = NO_TRACER
        self._provider: TracerProvider | None = None
        if settings.otlp_endpoint is not None:
            self._provider = _provider(settings.otlp_endpoint, settings.trace_ratio)
            self.tracer = self._provider.get_tracer("tosca", version("tosca-serving"))

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


class TraceRequests:
    """ASGI middleware: a span for every request but those that machines make every few seconds."""

    def __init__(self, app: ASGIApp, tracer: trace.Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(ASKED_BY_MACHINES):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        with self._tracer.start_as_current_span(
            scope["method"], _PROPAGATOR.extract(given), trace.SpanKind.SERVER
        ) as span:
            span.set_attributes({"http.request.method": scope["method"], "url.path": scope["path"][:200]})
            if (context := current_request.get()) is not None:
                context.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
                span.set_attribute("tosca.request_id", context.request_id)

            async def traced(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _tell_answer(span, scope, message["status"])
                await send(message)

            await self._app(scope, receive, traced)


def trace_stages(tracer: trace.Tracer, timings: Timings) -> None:
    """Spans for the stages of one picture, beneath the span of the request, if that is sampled."""
    if not trace.get_current_span().is_recording():
        return
    offset_ns = time.time_ns() - time.monotonic_ns()

    def span(name: str, interval: Interval | None, parent: trace.Span | None = None) -> trace.Span | None:
        if interval is None:
            return None
        context = trace.set_span_in_context(parent) if parent is not None else None
        made = tracer.start_span(name, context, start_time=int(1e9 * interval.began_at) + offset_ns)
        if name == "backbone":
            made.set_attribute("tosca.batch_images", timings.batch_size)
        made.end(int(1e9 * interval.ended_at) + offset_ns)
        return made

    span("decode", timings.decode)
    span("queue", timings.queue)
    span("backbone", timings.backbone)
    selection = span("selection", timings.selection)
    span("modules", timings.modules, selection)


def _tell_answer(span: trace.Span, scope: Scope, status: int) -> None:
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(trace.StatusCode.ERROR)


def _provider(endpoint: str, ratio: float) -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise InvalidSettings(
            "TOSCA_OTLP_ENDPOINT needs the extra `tracing`: pip install 'tosca-serving[tracing]'"
        ) from error
    resource = Resource.create({"service.name": "tosca-serving", "service.version": version("tosca-serving")})
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)), resource=resource, shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
