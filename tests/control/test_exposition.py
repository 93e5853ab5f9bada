"""The text that Prometheus reads: read back by its own parsers, and compared with what its library writes."""

import random

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from prometheus_client.registry import Collector

from expressgateway.control.admin.exposition import OPENMETRICS, expose
from expressgateway.control.ledger import Ledger, Merged
from expressgateway.observe.counters import BUCKETS_S, FAMILIES, SUPERVISOR_FAMILIES

ASKS_OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;q=0.5"

MERGED: Merged = {
    "connections": {("web",): 7, ('quo"te\\\n',): 1},
    "connections_inflight": {("web",): 2},
    "http_request_duration_seconds": {("web", "api", "1.1"): [1, 0, 2, *[0] * 11, 4, 12.5]},
    "worker_cpu_seconds": {("0",): 1.5},
    "admin_rejects": {("too_many",): 2},
    "shutdown_drain_seconds": {("settle",): 3.0},
    "dns_queries": {(): 5},
}


def ledger_of(merged: Merged) -> Ledger:
    ledger = Ledger()
    for family, series in merged.items():
        for labels, value in series.items():
            held = ledger.hold(family, labels)
            assert held is not None
            held.value = value
    return ledger


def text_of(merged: Merged, accept: str = "") -> tuple[bytes, str]:
    return expose(ledger_of(merged).tables, accept)


def read(text: bytes, parse: object) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse(text.decode())  # type: ignore[operator]  # one of two parsers of the same shape
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_both_formats_say_the_same() -> None:
    text, content_type = text_of(MERGED)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = read(text, plain)
    other, content_type = text_of(MERGED, ASKS_OPENMETRICS)
    assert content_type == OPENMETRICS
    assert read(other, openmetrics) == found
    assert found["connections_total", (("listener", "web"),)] == 7
    assert found["connections_total", (("listener", 'quo"te\\\n'),)] == 1
    assert found["connections_inflight", (("listener", "web"),)] == 2
    assert found["worker_cpu_seconds_total", (("worker", "0"),)] == 1.5
    assert found["admin_rejects_total", (("reason", "too_many"),)] == 2
    assert found["shutdown_drain_seconds", (("phase", "settle"),)] == 3
    assert found["dns_queries_total", ()] == 5


def test_histogram_buckets_are_cumulative() -> None:
    found = read(text_of(MERGED)[0], plain)

    def bucket(bound: str) -> float:
        name = "http_request_duration_seconds_bucket"
        return found[name, (("le", bound), ("listener", "web"), ("route", "api"), ("version", "1.1"))]

    assert (bucket("0.0005"), bucket("0.001"), bucket("0.0025")) == (1, 1, 3)
    assert (bucket("10.0"), bucket("+Inf")) == (3, 7)
    labels = (("listener", "web"), ("route", "api"), ("version", "1.1"))
    assert found["http_request_duration_seconds_count", labels] == 7
    assert found["http_request_duration_seconds_sum", labels] == 12.5


def test_nothing_to_tell() -> None:
    assert text_of({})[0] == b""
    assert text_of({}, ASKS_OPENMETRICS)[0] == b"# EOF\n"


def test_a_series_that_changes_is_written_anew() -> None:
    ledger = ledger_of(MERGED)
    counts = ledger.join()
    for number in (8, 9):
        counts.set(("connections", ("web",), number - 7))
        assert f'connections_total{{listener="web"}} {number}.0\n'.encode() in expose(ledger.tables)[0]


class Theirs(Collector):
    """The same counts, for the library to write."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged

    def collect(self) -> list[Metric]:
        return [self._metric(name) for name in {**FAMILIES, **SUPERVISOR_FAMILIES} if name in self.merged]

    def _metric(self, name: str) -> Metric:
        family = (FAMILIES | SUPERVISOR_FAMILIES)[name]
        metric: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
        match family.kind:
            case "counter":
                metric = CounterMetricFamily(name, family.help, labels=family.labels)
            case "gauge":
                metric = GaugeMetricFamily(name, family.help, labels=family.labels)
            case _:
                metric = HistogramMetricFamily(name, family.help, labels=family.labels)
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        for labels, value in sorted(self.merged[name].items()):
            if isinstance(value, list):
                assert isinstance(metric, HistogramMetricFamily)
                sums = [sum(value[: place + 1]) for place in range(len(bounds))]
                metric.add_metric(labels, list(zip(bounds, sums, strict=True)), value[-1])
            else:
                assert not isinstance(metric, HistogramMetricFamily)
                metric.add_metric(labels, value)
        return metric


def test_the_text_is_what_the_library_would_write() -> None:
    """Line by line, but for how a number is spelled."""
    dice = random.Random(1)
    everything: Merged = {}
    for name, family in {**FAMILIES, **SUPERVISOR_FAMILIES}.items():
        for number in range(3):
            labels = tuple(f"{label}-{number}" for label in family.labels)
            whole = [dice.randrange(10) for _ in range(len(BUCKETS_S) + 1)]
            one = dice.choice((dice.randrange(10**9), dice.random()))
            everything.setdefault(name, {})[labels] = (
                [*whole, dice.random()] if family.kind == "histogram" else one
            )
    registry = CollectorRegistry()
    registry.register(Theirs(everything))
    for accept, theirs in (
        ("", generate_latest(registry)),
        (ASKS_OPENMETRICS, generate_openmetrics(registry)),  # type: ignore[no-untyped-call]  # it has none
    ):
        ours = text_of(everything, accept)[0].decode().splitlines()
        expected = theirs.decode().splitlines()
        assert [_spelled(line) for line in ours] == [_spelled(line) for line in expected]


def _spelled(line: str) -> object:
    if line.startswith("#"):
        return line
    head, _, value = line.rpartition(" ")
    name, _, labels = head.rstrip("}").partition("{")
    return name, sorted(labels.split(",")), float(value)
