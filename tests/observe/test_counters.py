"""Counters become samples, samples of workers become one, and every sample has a family that fits it."""

from __future__ import annotations

import pytest

from expressgateway.observe.counters import (
    BUCKETS_S,
    CLASSES,
    FAMILIES,
    VERSIONS,
    Histogram,
    ListenerCounters,
    Sample,
    Tally,
    merge,
)


def busy() -> ListenerCounters:
    """One of everything."""
    counters = ListenerCounters("web")
    counters.connections = 3
    counters.inflight = 1
    counters.handshake("TLSv1.3", True, "ok")
    counters.handshake("TLSv1.3", True, "ok")
    counters.handshake("", False, "failed")
    for tally in (
        counters.rejects,
        counters.accept_errors,
        counters.security,
        counters.errors,
        counters.websocket_closed,
        counters.relay_errors,
        counters.dropped,
    ):
        tally.add("x")
    for name in ("api", "default"):
        route = counters.route(name)
        for version in range(len(VERSIONS)):
            for status_class in range(len(CLASSES)):
                route.requests[version][status_class] += 1
            route.durations[version].observe(0.003)
    counters.relayed = [5, 7]
    counters.datagrams = [1, 0]
    return counters


@pytest.mark.parametrize("counters", [ListenerCounters("web"), busy()])
def test_every_sample_has_a_family_with_as_many_labels(counters: ListenerCounters) -> None:
    for family, labels, value in counters.collect():
        assert len(FAMILIES[family].labels) == len(labels), family
        assert (FAMILIES[family].kind == "histogram") == isinstance(value, list), family
        assert all(isinstance(label, str) for label in labels), family


def test_everything_counted_is_collected() -> None:
    samples = {(family, labels): value for family, labels, value in busy().collect()}
    assert samples["tls_handshakes", ("web", "TLSv1.3", "yes", "ok")] == 2
    assert samples["tls_handshakes", ("web", "", "no", "failed")] == 1
    for route in ("api", "default"):
        for version in VERSIONS:
            durations = samples["http_request_duration_seconds", ("web", route, version)]
            assert isinstance(durations, list)
            assert (sum(durations[:-1]), durations[-1]) == (1, 0.003)
            for status_class in CLASSES:
                assert samples["http_requests", ("web", route, version, status_class)] == 1
    assert samples["relay_bytes", ("web", "from_client")] == 5
    assert samples["relay_bytes", ("web", "from_backend")] == 7
    assert samples["udp_datagrams", ("web", "from_backend")] == 0
    for family in (
        "accept_reject",
        "accept_errors",
        "security_events",
        "http_gateway_errors",
        "websocket_closed",
        "relay_errors",
        "udp_dropped",
    ):
        assert samples[family, ("web", "x")] == 1
    assert len(samples) == len(list(busy().collect()))  # no label set twice


def test_a_quiet_listener_is_brief() -> None:
    assert len(list(ListenerCounters("web").collect())) < 10


def test_families_are_well_formed() -> None:
    for name, family in FAMILIES.items():
        assert family.kind in ("counter", "gauge", "histogram")
        assert family.help.endswith(".")
        assert name == name.lower()
        assert len(set(family.labels)) == len(family.labels)


class TestHistogram:
    @pytest.mark.parametrize("index", range(len(BUCKETS_S)))
    def test_an_edge_belongs_to_its_own_bucket(self, index: int) -> None:
        histogram = Histogram()
        histogram.observe(BUCKETS_S[index])
        histogram.observe(BUCKETS_S[index] + 1e-9)
        assert histogram.counts[index : index + 2] == [1, 1]
        assert sum(histogram.counts) == 2

    @pytest.mark.parametrize(("value", "index"), [(0.0, 0), (-1.0, 0), (1e9, len(BUCKETS_S))])
    def test_nothing_falls_out(self, value: float, index: int) -> None:
        histogram = Histogram()
        histogram.observe(value)
        assert histogram.counts[index] == 1

    def test_the_sum_comes_last(self) -> None:
        histogram = Histogram()
        histogram.observe(0.25)
        histogram.observe(0.5)
        assert histogram.as_list()[-1] == 0.75
        assert len(histogram.as_list()) == len(BUCKETS_S) + 2

    def test_buckets_rise(self) -> None:
        assert list(BUCKETS_S) == sorted(set(BUCKETS_S))


class TestMerge:
    def test_workers_add_up(self) -> None:
        one: list[Sample] = [("a", ("x",), 1), ("a", ("y",), 2), ("h", (), [1, 2, 0.5])]
        two: list[Sample] = [("a", ("x",), 10), ("b", (), 5), ("h", (), [0, 3, 0.25])]
        assert merge([one, two]) == {
            "a": {("x",): 11, ("y",): 2},
            "b": {(): 5},
            "h": {(): [1, 5, 0.75]},
        }

    def test_nothing_that_came_in_is_changed(self) -> None:
        values: list[float] = [1, 2]
        merge([[("h", (), values)], [("h", (), values)]])
        assert values == [1, 2]

    def test_labels_that_came_as_lists_meet_those_that_did_not(self) -> None:
        """Samples cross the control channel as JSON."""
        merged = merge([[("a", ["x"], 1)], [("a", ("x",), 1)]])  # type: ignore[list-item]  # as after JSON
        assert merged == {"a": {("x",): 2}}

    def test_nothing_is_nothing(self) -> None:
        assert merge([]) == {}
        assert merge([[], []]) == {}


def test_a_tally_counts_from_zero() -> None:
    tally = Tally()
    for label in "aba":
        tally.add(label)
    assert tally == {"a": 2, "b": 1}
