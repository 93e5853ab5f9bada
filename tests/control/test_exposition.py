"""The text that Prometheus reads, read back by its own parsers."""

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from expressgateway.control.admin.exposition import OPENMETRICS, expose
from expressgateway.control.ledger import Merged

MERGED: Merged = {
    "connections": {("web",): 7, ('quo"te\\',): 1},
    "connections_inflight": {("web",): 2},
    "http_request_duration_seconds": {("web", "1.1"): [1, 0, 2, *[0] * 11, 4, 12.5]},
    "worker_cpu_seconds": {("0",): 1.5},
    "admin_rejects": {("too_many",): 2},
    "shutdown_drain_seconds": {("settle",): 3.0},
}


def read(text: bytes, parse: object) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = parse(text.decode())  # type: ignore[operator]  # one of two parsers of the same shape
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_both_formats_say_the_same() -> None:
    text, content_type = expose(MERGED)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = read(text, plain)
    other, content_type = expose(MERGED, "application/openmetrics-text;version=1.0.0;q=0.9,text/plain;q=0.5")
    assert content_type == OPENMETRICS
    assert read(other, openmetrics) == found
    assert found["connections_total", (("listener", "web"),)] == 7
    assert found["connections_total", (("listener", 'quo"te\\'),)] == 1
    assert found["connections_inflight", (("listener", "web"),)] == 2
    assert found["worker_cpu_seconds_total", (("worker", "0"),)] == 1.5
    assert found["admin_rejects_total", (("reason", "too_many"),)] == 2
    assert found["shutdown_drain_seconds", (("phase", "settle"),)] == 3


def test_histogram_buckets_are_cumulative() -> None:
    found = read(expose(MERGED)[0], plain)

    def bucket(bound: str) -> float:
        name = "http_request_duration_seconds_bucket"
        return found[name, (("le", bound), ("listener", "web"), ("version", "1.1"))]

    assert (bucket("0.0005"), bucket("0.001"), bucket("0.0025")) == (1, 1, 3)
    assert (bucket("10.0"), bucket("+Inf")) == (3, 7)
    labels = (("listener", "web"), ("version", "1.1"))
    assert found["http_request_duration_seconds_count", labels] == 7
    assert found["http_request_duration_seconds_sum", labels] == 12.5


def test_nothing_to_tell() -> None:
    assert expose({})[0] == b""
