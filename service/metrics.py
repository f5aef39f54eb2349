"""What is measured while requests are answered, as Prometheus instruments in a registry of our own.

Label values are bounded: routes are templates, methods and reasons are ours, statuses are few. What is known
by task is not here but in `service.traffic`, and becomes metrics when it is asked for (`service.exposition`).
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from service.timings import Interval, Timings

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UP_TO_A_SECOND = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_UP_TO_A_MINUTE = (*_UP_TO_A_SECOND[2:], 2.5, 5.0, 10.0, 30.0, 60.0)
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The instruments of one service. Safe to use from several threads."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series of its own beside every counter that nobody reads
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.request = Histogram(
            "tosca_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ("method", "route", "status"),
            buckets=_UP_TO_A_MINUTE,
            registry=self.registry,
        )
        self.refusals = Counter(
            "tosca_refusals",
            "Problem documents by the last part of their type.",
            ("reason",),
            registry=self.registry,
        )
        self.change = Histogram(
            "tosca_change_duration_seconds",
            "Changes of the active set asked of this process, done or refused.",
            ("action", "outcome"),
            buckets=(*_UP_TO_A_MINUTE, 300.0),
            registry=self.registry,
        )
        self.decode = self._stage("decode_duration", "Decoding and preprocessing a picture.")
        self.queue = self._stage("queue_wait", "From a picture's decoding to the start of its pass.")
        self.backbone = self._stage("backbone_duration", "A pass of the backbone.")
        self.selection = self._stage(
            "selection_duration", "Choosing tasks for pictures answered together, p-values included."
        )
        self.modules = self._stage("modules_duration", "Evaluating modules for pictures answered together.")
        self.batch = Histogram(
            "tosca_batch_images",
            "Pictures in a pass of the backbone.",
            buckets=_POWERS_OF_TWO,
            registry=self.registry,
        )
        self.evaluated = Histogram(
            "tosca_evaluated_modules",
            "Modules evaluated for a picture.",
            buckets=_POWERS_OF_TWO,
            registry=self.registry,
        )

    def _stage(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"tosca_{name}_seconds", meaning, buckets=_UP_TO_A_MINUTE, registry=self.registry)

    def count_request(
        self, method: str, route: str | None, status: int, duration_s: float, refusal: str | None
    ) -> None:
        """One answered request; `route` is the template of its path, None when no route has it."""
        known = method if method in METHODS else "other"
        self.request.labels(known, route or "none", str(status)).observe(duration_s)
        if refusal is not None:
            self.count_refusal(refusal)

    def count_refusal(self, reason: str) -> None:
        self.refusals.labels(reason).inc()

    def time_picture(self, timings: Timings, num_modules: int) -> None:
        """One answered picture; known ones were neither decoded nor queued."""
        self.evaluated.observe(num_modules)
        if timings.queue is not None:
            self.decode.observe(timings.decode.duration_s)
            self.queue.observe(timings.queue.duration_s)

    def time_pass(self, backbone: Interval, num_pictures: int) -> None:
        self.backbone.observe(backbone.duration_s)
        self.batch.observe(num_pictures)

    def time_answers(self, answering: Interval, modules: Interval) -> None:
        """Pictures answered together; `modules` lies within `answering`."""
        self.selection.observe(answering.duration_s - modules.duration_s)
        self.modules.observe(modules.duration_s)

    def count_change(self, action: str, outcome: str, duration_s: float) -> None:
        self.change.labels(action, outcome).observe(duration_s)
