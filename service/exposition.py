"""What Prometheus reads: the instruments, and the state of the service at the moment it is asked."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from service.metrics import Metrics
from service.routes.state import ServiceState
from service.traffic import CONFIDENCE_EDGES, Tally, TaskTraffic

OTHER_TASKS = "_other"  # no task can be called so


class _Families(Collector):
    """Metrics gathered already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(metrics: Metrics, state: Sequence[Metric]) -> bytes:
    """The text format, version 0.0.4. Takes milliseconds with many tasks: not for the event loop."""
    return generate_latest(_Families([*metrics.registry.collect(), *state]))


def gather(state: ServiceState) -> list[Metric]:
    """The state as metrics. Called on the event loop, where the traffic lives."""
    return [*_of_service(state), *_of_engine(state), *_of_tasks(state)]


def _of_service(state: ServiceState) -> Iterator[Metric]:
    backbone = state.engine.backbone
    yield InfoMetricFamily(
        "tosca_build",
        "What is running.",
        {
            "version": version("tosca-serving"),
            "backbone": backbone.manifest.architecture,
            "fingerprint": backbone.fingerprint,
            "runtime": backbone.runtime_name,
            "device": str(backbone.device),
        },
    )
    registry = state.registry
    yield _gauge("tosca_ready", "1 while load balancers should send requests.", state.is_ready)
    yield _gauge("tosca_revision", "The revision that answers.", registry.active.revision.number)
    yield _gauge("tosca_tasks", "Active tasks.", len(registry.active.files))
    memory = registry.module_memory
    yield _gauge("tosca_deferred_modules", "Modules in memory that may be read again.", memory.num_modules)
    yield _gauge("tosca_deferred_modules_bytes", "Memory of those modules.", memory.size_bytes)
    yield CounterMetricFamily(
        "tosca_deferred_modules_reads", "Modules read because a task might answer.", value=memory.num_reads
    )
    yield _gauge(
        "tosca_store_staleness_seconds", "Since the newest revision was last asked for.", registry.staleness_s
    )
    yield _gauge(
        "tosca_revision_lag",
        "Revisions known to be in the store and not served yet.",
        registry.revision_lag,
    )
    yield _gauge(
        "tosca_replica_record_fault",
        "1 when this replica could not write its record the last time.",
        state.replicas.fault is not None,
    )
    yield _gauge(
        "tosca_store_fault",
        "1 when the store could not be read the last time.",
        registry.fault is not None,
    )


def _of_engine(state: ServiceState) -> Iterator[Metric]:
    engine = state.engine
    yield _gauge("tosca_engine_alive", "1 while every inference thread makes progress.", engine.is_alive)
    yield _gauge("tosca_admitted_images", "Pictures admitted and not yet answered.", engine.num_admitted)
    yield _gauge(
        "tosca_admitted_images_limit",
        "Most pictures that may be admitted at once.",
        state.settings.max_queued_images,
    )
    yield _gauge("tosca_queued_images", "Pictures decoded and waiting for a pass.", engine.num_queued)
    cache = engine.cache.statistics
    yield CounterMetricFamily(
        "tosca_cls_cache_hits", "Pictures whose CLS vector was known.", value=cache.num_hits
    )
    yield CounterMetricFamily(
        "tosca_cls_cache_misses", "Pictures whose CLS vector was not.", value=cache.num_misses
    )
    yield _gauge("tosca_cls_cache_entries", "CLS vectors kept.", cache.num_entries)
    yield _gauge("tosca_cls_cache_bytes", "Memory of the CLS vectors kept.", cache.size_bytes)


def _of_tasks(state: ServiceState) -> Iterator[Metric]:
    traffic = state.engine.traffic
    traffic.follow(state.registry.active.bank)
    tasks = traffic.tasks()
    tallies = [*((task, one.tally) for task, one in tasks), (OTHER_TASKS, traffic.others)]
    yield from _of_tallies(tallies)
    yield from _of_drift(tasks)
    yield from _of_feedback(tasks)


def _of_tallies(tallies: Sequence[tuple[str, Tally]]) -> Iterator[Metric]:
    images = CounterMetricFamily("tosca_task_images", "Pictures a task answered.", labels=["task"])
    abstained = CounterMetricFamily(
        "tosca_task_abstained", "Pictures a task answered and abstained on.", labels=["task"]
    )
    confidence = HistogramMetricFamily(
        "tosca_task_confidence", "Confidences of a task's answers.", labels=["task"]
    )
    edges = [*map(str, CONFIDENCE_EDGES[:-1]), "+Inf"]
    for task, tally in tallies:
        images.add_metric([task], tally.num_images)
        abstained.add_metric([task], tally.num_abstained)
        buckets = list(zip(edges, accumulate(tally.confidence_histogram), strict=True))
        confidence.add_metric([task], buckets, tally.sum_of_confidences)
    yield from (images, abstained, confidence)


def _of_drift(tasks: Sequence[tuple[str, TaskTraffic]]) -> Iterator[Metric]:
    p_value = GaugeMetricFamily(
        "tosca_task_drift_p_value", "P-value of the test for drift, valid at any time.", labels=["task"]
    )
    mean = GaugeMetricFamily(
        "tosca_task_mean_p_value",
        "Mean p-value of the last pictures, about 0.5 or above without drift.",
        labels=["task"],
    )
    drifting = GaugeMetricFamily(
        "tosca_task_drifting", "1 when the p-value of drift is at or below the alarm rate.", labels=["task"]
    )
    for task, one in tasks:
        if (drift := one.drift.judge()) is not None:
            p_value.add_metric([task], drift.p_value)
            mean.add_metric([task], drift.mean_p_value)
            drifting.add_metric([task], float(drift.is_drifting))
    yield from (p_value, mean, drifting)


def _of_feedback(tasks: Sequence[tuple[str, TaskTraffic]]) -> Iterator[Metric]:
    labels = CounterMetricFamily(
        "tosca_task_feedback_labels", "True labels that came back for the present module.", labels=["task"]
    )
    accuracy = GaugeMetricFamily(
        "tosca_task_feedback_accuracy_ratio", "Share of right answers among the labelled.", labels=["task"]
    )
    ece = GaugeMetricFamily(
        "tosca_task_feedback_ece_ratio", "Expected calibration error of the labelled.", labels=["task"]
    )
    for task, one in tasks:
        reliability = one.reliability
        if reliability.accuracy is not None and reliability.ece is not None:
            labels.add_metric([task], reliability.num_labels)
            accuracy.add_metric([task], reliability.accuracy)
            ece.add_metric([task], reliability.ece)
    yield from (labels, accuracy, ece)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=float(value))
