"""What a service tells about itself while it answers: its instruments and its spans."""

from dataclasses import dataclass, field

from opentelemetry.trace import Tracer

from service.metrics import Metrics
from service.timings import Timings
from service.tracing import NO_TRACER, trace_stages


@dataclass(frozen=True, slots=True)
class Telemetry:
    metrics: Metrics = field(default_factory=Metrics)
    tracer: Tracer = NO_TRACER

    def tell_picture(self, timings: Timings, num_modules: int) -> None:
        """One answered picture, for which `num_modules` were evaluated. Called in its request's context."""
        self.metrics.time_picture(timings, num_modules)
        trace_stages(self.tracer, timings)
