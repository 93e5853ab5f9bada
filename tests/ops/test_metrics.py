"""What a gateway exposes: against the catalogue, its page, the naming rules, and the alerts about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from tests.ops.busy import Scrapes, scrapes
from tests.ops.metrics_page import page
from tests.ops.rules import CATALOGUE, ROOT, RULES, needs_promtool, run_promtool, series_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.metrics_core import Metric

ELSEWHERE = {
    "accept_errors": "tests/net/test_listener.py",
    "accept_reject": "tests/e2e/test_attacks_limits.py",
    "access_log_dropped": "tests/observe/test_access_log.py",
    "certificate_ocsp_stapled": "tests/control/test_certificates.py",
    "config_changes": "tests/e2e/test_runtime_changes.py",
    "grpc_requests": "tests/e2e/test_grpc_calls.py",
    "pool_limit_hits": "tests/e2e/test_breakers_live.py",
    "pool_retries_refused": "tests/proxy/test_attempts.py",
    "quic_datagrams": "tests/l4/test_relay_datagrams.py",
    "quic_datagrams_dropped": "tests/l4/test_relay_datagrams.py",
    "quic_evictions": "tests/l4/test_passthrough.py",
    "quic_handovers_dropped": "tests/net/quic/test_handover.py",
    "quic_rebinds": "tests/l4/test_passthrough.py",
    "quic_relayed_streams": "tests/l4/test_quic_relay.py",
    "quic_relayed_streams_open": "tests/l4/test_quic_relay.py",
    "relay_errors": "tests/e2e/test_l4.py",
    "shutdown_aborted_connections": "tests/control/test_drain.py",
    "shutdown_drain_seconds": "tests/control/test_drain.py",
    "trace_spans_dropped": "tests/e2e/test_tracing.py",
    "trace_spans_exported": "tests/e2e/test_tracing.py",
} | {family: "tests/control/test_xdp.py" for family in CATALOGUE if family.startswith("xdp_")}
"""Families that need more than one gateway's usual work, and where they are seen."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Scrapes:
    return scrapes(tmp_path_factory.mktemp("busy"))


def test_the_page_is_in_step() -> None:
    """`python -m tests.ops.metrics_page > docs/metrics.md`"""
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == page()


def families(text: str, parse: object) -> list[Metric]:
    found: Iterable[Metric] = parse(text)  # type: ignore[operator]  # one of two parsers of the same shape
    return list(found)


def test_every_family_is_exposed_or_named_elsewhere(seen: Scrapes) -> None:
    names = series_names()
    found = {names[sample.name][0] for family in families(seen.after, plain) for sample in family.samples}
    assert set(CATALOGUE) - found <= set(ELSEWHERE)
    assert set(ELSEWHERE) <= set(CATALOGUE)


def test_every_series_is_in_the_catalogue(seen: Scrapes) -> None:
    names = series_names()
    for family in families(seen.after, plain):
        for sample in family.samples:
            described, labels = names[sample.name]
            assert set(sample.labels) == set(labels), sample
            assert family.type == CATALOGUE[described].kind
            assert family.documentation == CATALOGUE[described].help


def test_every_kind_of_pool_has_its_times(seen: Scrapes) -> None:
    found: dict[str, set[str]] = {}
    for family in families(seen.after, plain):
        for sample in family.samples:
            if sample.name.endswith("_count") and "pool" in sample.labels and sample.value:
                found.setdefault(family.name, set()).add(sample.labels["pool"])
    assert found == {
        "backend_connect_duration_seconds": {"app", "probed", "tcp", "shared"},
        "backend_head_duration_seconds": {"app", "probed", "shared"},
        "backend_request_duration_seconds": {"app", "probed", "shared"},
    }


def test_sessions_are_no_answers(seen: Scrapes) -> None:
    """A WebSocket session may last for days: it says nothing of how fast a backend is."""
    values = recorded(seen.after)
    answered = sum(
        value
        for series, value in values.items()
        if series.startswith("backend_requests_total{") and 'backend="good",status_class="2xx"' in series
    )
    assert values['backend_request_duration_seconds_count{pool="app",backend="good"}'] == answered


def test_both_formats_have_the_same_series(seen: Scrapes) -> None:
    def series(text: str, parse: object) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in families(text, parse)
            for sample in family.samples
        }

    assert series(seen.after, plain) == series(seen.openmetrics, openmetrics)


def test_labels_are_of_the_configuration_or_of_closed_sets(seen: Scrapes) -> None:
    """No value of a label is anything a client has sent."""
    for family in families(seen.after, plain):
        for sample in family.samples:
            for label, value in sample.labels.items():
                assert re.fullmatch(r"[\w.+:#=-]*", value), (sample.name, label, value)
                assert "copied/" not in value


def test_names_keep_the_rules(seen: Scrapes) -> None:
    """As ``promtool check metrics`` has them: base units, no type in the name, text in English."""
    for name, family in CATALOGUE.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name)
        assert not re.search(
            r"_(ms|us|minutes|kb|mb|percent|counter|gauge|histogram|total|count|sum|bucket)$", name
        )
        assert not {"le", "quantile", "job", "instance"} & set(family.labels)
        if family.kind == "histogram":
            assert name.endswith("_seconds")


@pytest.mark.peer
@needs_promtool
def test_promtool_finds_nothing_to_say(seen: Scrapes) -> None:
    assert run_promtool("check", "metrics", stdin=seen.after) == ""


EXPECTED = (
    "HighGatewayErrors",
    "HighServerErrors",
    "BackendDown",
    "PoolWithoutBackend",
    "NameWithoutAddress",
    "WorkerRestarted",
    "WorkerCrashLoop",
    "ReloadFailed",
)


def recorded(text: str) -> dict[str, float]:
    """Values by series, as promtool takes them."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            found[series] = float(value)
    return found


@pytest.mark.peer
@needs_promtool
def test_alerts_fire_on_what_a_gateway_says(seen: Scrapes, tmp_path: Path) -> None:
    """Recorded: as if every minute were like the one in which all went wrong."""
    before, after = recorded(seen.before), recorded(seen.after)
    series = []
    kinds = series_names()
    for name, value in after.items():
        family = CATALOGUE[kinds[name.partition("{")[0]][0]]
        risen = value - before.get(name, 0)
        values = f"{value}x30" if family.kind == "gauge" else f"{before.get(name, 0)}+{max(0, risen)}x30"
        series.append({"series": name, "values": values})
    quiet = [{"series": name, "values": f"{value}x30"} for name, value in before.items()]

    def fires(alert: str, times: int) -> dict[str, object]:
        expr = f'count(count by (alertname) (ALERTS{{alertname=~"{alert}",alertstate="firing"}}))'
        expected = [{"labels": "{}", "value": times}] if times else []
        return {"expr": expr, "eval_time": "29m", "exp_samples": expected}

    tests = [
        {"interval": "1m", "input_series": series, "promql_expr_test": [fires(each, 1) for each in EXPECTED]},
        # Backends that nobody has asked yet may be down, and names unknown, from the first moment on.
        {
            "interval": "1m",
            "input_series": quiet,
            "promql_expr_test": [
                fires(each, 0) for each in EXPECTED if each not in ("BackendDown", "NameWithoutAddress")
            ],
        },
    ]
    path = tmp_path / "tests.yaml"
    rules = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(rules))
    assert "SUCCESS" in run_promtool("test", "rules", str(path))
