"""The instruments of a replica as metrics of Ray, which every node exports for Prometheus with Ray's own.

`/metrics` behind Ray's proxy would answer for a replica by chance. Ray's names begin with `ray_`, so
`tosca_revision` is `ray_tosca_revision` there; every sample carries the replica it is of. Cumulative counts
and buckets are handed on as they are: `rate` and `histogram_quantile` read them as ever.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client.core import Metric
from ray.util.metrics import Gauge

REPLICA_TAG = "replica"


class SetsValues(Protocol):
    def set(self, value: float, tags: dict[str, str]) -> None:
        """Replace the value of these tags."""


MakeGauge = Callable[[str, str, tuple[str, ...]], SetsValues]


def make_gauge(name: str, meaning: str, tags: tuple[str, ...]) -> SetsValues:
    return Gauge(name, meaning, tags)


class RayMetrics:
    """Hands samples to Ray, as one replica's."""

    def __init__(self, replica: str, make: MakeGauge = make_gauge) -> None:
        self._replica = replica
        self._make = make
        self._gauges: dict[str, SetsValues] = {}

    def publish(self, families: Iterable[Metric]) -> None:
        """Replace what Ray has of these metrics."""
        for family in families:
            for sample in family.samples:
                tags = {**sample.labels, REPLICA_TAG: self._replica}
                if sample.name not in self._gauges:
                    self._gauges[sample.name] = self._make(sample.name, family.documentation, tuple(tags))
                self._gauges[sample.name].set(sample.value, tags)
