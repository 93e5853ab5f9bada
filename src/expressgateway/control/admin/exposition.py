"""From merged counts to the text that Prometheus reads.

Names, help and types come from `FAMILIES`; the text itself is the prometheus client's work.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from expressgateway.control.ledger import Merged
from expressgateway.observe.counters import BUCKETS_S, FAMILIES, Family

SUPERVISOR_FAMILIES: Final[dict[str, Family]] = {
    "admin_rejects": Family("counter", "Clients the admin listener turned away, by reason.", ("reason",)),
    "shutdown_drain_seconds": Family(
        "gauge", "How long a phase of the drain has taken, or takes so far.", ("phase",)
    ),
    "shutdown_aborted_connections": Family(
        "counter", "Connections still open at the end of the drain.", ("listener",)
    ),
}
"""Families that only the supervisor has, besides those of `FAMILIES` that it fills."""

OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_BOUNDS: Final = (*map(floatToGoString, BUCKETS_S), "+Inf")


class _Counts(Collector):
    def __init__(self, merged: Merged) -> None:
        self._merged = merged

    def collect(self) -> Iterator[Metric]:
        for name, family in (FAMILIES | SUPERVISOR_FAMILIES).items():
            if (series := self._merged.get(name)) is not None:
                metric = _new(name, family)
                for labels, value in sorted(series.items()):
                    if isinstance(metric, HistogramMetricFamily):
                        if isinstance(value, list):
                            metric.add_metric(labels, _cumulative(value), value[-1])
                    elif not isinstance(value, list):
                        metric.add_metric(labels, value)
                yield metric


def _new(name: str, family: Family) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    match family.kind:
        case "counter":
            return CounterMetricFamily(name, family.help, labels=family.labels)
        case "histogram":
            return HistogramMetricFamily(name, family.help, labels=family.labels)
        case _:
            return GaugeMetricFamily(name, family.help, labels=family.labels)


def _cumulative(counts: list[float]) -> list[tuple[str, float]]:
    """Buckets as the format has them: each holds all smaller ones too."""
    total = 0.0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip(_BOUNDS, counts, strict=False):  # the last number is the sum
        total += count
        buckets.append((bound, total))
    return buckets


def expose(merged: Merged, accept: str = "") -> tuple[bytes, str]:
    """The text and its content type: OpenMetrics if the client takes it, else the format every one reads."""
    registry = CollectorRegistry()
    registry.register(_Counts(merged))
    if "application/openmetrics-text" in accept:
        # the client library leaves this one function without types
        return generate_openmetrics(registry), OPENMETRICS  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
