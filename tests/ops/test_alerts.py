"""Every alert fires on the series that it is about, and not on those of a gateway that is well.

Series are made here, by the names and labels of the catalogue; `test_metrics` records them from a gateway.
"""

import re
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.ops.rules import (
    ROOT,
    RULES,
    alerts,
    grouped_by,
    needs_promtool,
    run_promtool,
    selectors,
    series_names,
)

MINUTES: Final = 90
ADDED: Final = {"job", "instance"}
"""Labels that Prometheus adds."""

Case = tuple[list[tuple[str, str]], list[tuple[str, str]]]
"""Series that make it fire, and series that do not: name with labels, and values by the minute."""


def flat(value: float) -> str:
    return f"{value}x{MINUTES}"


def rising(by: float) -> str:
    return f"0+{by}x{MINUTES}"


REQUESTS: Final = [
    ('http_requests_total{listener="web",route="default",version="1.1",status_class="2xx"}', rising(600)),
]
BUCKET: Final = 'http_request_duration_seconds_bucket{listener="web",route="default",version="1.1",le="%s"}'
UP: Final = 'backend_up{pool="app",backend="b0"}'
STATE: Final = 'backend_state{pool="app",backend="b0",state="%s"}'


def pair(series: str, bad: str, good: str, beside: list[tuple[str, str]] | None = None) -> Case:
    """The same series, with values that are bad and values that are good."""
    return [(series, bad), *(beside or [])], [(series, good), *(beside or [])]


SOME: Final = f"0x60 1x{MINUTES - 60}"
"""Once, an hour from the start."""

CASES: Final[dict[str, Case]] = {
    "HighGatewayErrors": (
        [('http_gateway_errors_total{listener="web",reason="connect_refused"}', rising(60)), *REQUESTS],
        [('http_gateway_errors_total{listener="web",reason="client_closed"}', rising(60)), *REQUESTS],
    ),
    "HighServerErrors": pair(
        'http_requests_total{listener="web",route="default",version="1.1",status_class="5xx"}',
        rising(60),
        rising(6),
        REQUESTS,
    ),
    "HighLatency": (
        [(BUCKET % "1.0", rising(90)), (BUCKET % "2.5", rising(100)), (BUCKET % "+Inf", rising(100))],
        [(BUCKET % "1.0", rising(100)), (BUCKET % "2.5", rising(100)), (BUCKET % "+Inf", rising(100))],
    ),
    "ConnectionsNearLimit": pair(
        'connections_inflight{listener="web"}', flat(900), flat(700), [("connections_limit", flat(1000))]
    ),
    "ConnectionsRefused": (
        [('accept_reject_total{listener="web",reason="ip_cap"}', rising(120))],
        [('accept_reject_total{listener="web",reason="draining"}', rising(120))],
    ),
    "AcceptErrors": pair('accept_errors_total{listener="web",kind="EMFILE"}', rising(1), flat(3)),
    "TlsHandshakesFailing": pair(
        'tls_handshakes_total{listener="web",version="",resumed="no",result="failed"}',
        rising(60),
        rising(6),
        [('tls_handshakes_total{listener="web",version="TLSv1.3",resumed="no",result="ok"}', rising(120))],
    ),
    "SecurityEventsBurst": pair(
        'security_events_total{listener="web",kind="request_smuggling"}', rising(600), rising(60)
    ),
    "DatagramsDropped": pair(
        'udp_dropped_total{listener="dns",reason="no_backend"}', rising(6000), rising(60)
    ),
    "BackendDown": (
        [(UP, flat(0)), (STATE % "unhealthy", flat(1)), (STATE % "draining", flat(0))],
        [(UP, flat(0)), (STATE % "unhealthy", flat(0)), (STATE % "draining", flat(1))],
    ),
    "PoolWithoutBackend": pair('pool_unavailable_total{pool="app"}', rising(1), flat(4)),
    "PoolInPanic": pair('pool_panic{pool="app"}', flat(1), flat(0)),
    "BackendFlapping": pair(
        'backend_ejections_total{pool="app",backend="b0",cause="5xx"}', rising(1), f"0x70 1x{MINUTES - 70}"
    ),
    "BackendConnectFailures": pair(
        'backend_connect_failures_total{pool="app",backend="b0"}', rising(60), rising(1)
    ),
    "PoolSaturated": (
        [('pool_queued_total{pool="app",result="refused"}', rising(1))],
        [('pool_queued_total{pool="app",result="waited"}', rising(60))],
    ),
    "RetryBudgetSpent": pair('pool_retries_refused_total{pool="app"}', rising(1), flat(9)),
    "DnsFailing": pair("dns_failures_total", rising(2), f"0x60 2x{MINUTES - 60}"),
    "NameWithoutAddress": pair('dns_addresses{name="app.example"}', flat(0), flat(2)),
    "NoWorkerServes": pair('worker_up{worker="0"}', flat(0), flat(1), [('worker_up{worker="1"}', flat(0))]),
    "WorkerDown": pair('worker_up{worker="0"}', flat(0), flat(1)),
    "WorkerRestarted": pair('worker_restarts_total{worker="0"}', f"0x85 1x{MINUTES - 85}", flat(1)),
    "WorkerCrashLoop": pair(
        'worker_crash_looping{worker="0"}',
        flat(1),
        flat(0),
        [('worker_restarts_total{worker="0"}', f"0x85 1x{MINUTES - 85}")],
    ),
    "WorkerHung": pair('worker_hangs_total{worker="0"}', f"0x85 1x{MINUTES - 85}", flat(1)),
    "WorkerOutgrown": pair(
        'worker_replacements_total{worker="0",cause="memory"}',
        rising(1),
        f"0x85 1x{MINUTES - 85}",
        [('worker_replacements_total{worker="0",cause="reload"}', rising(1))],
    ),
    "WorkerFaults": pair('worker_faults_total{worker="0"}', f"0x85 1x{MINUTES - 85}", flat(1)),
    "WorkerLoopLag": pair('worker_loop_lag_seconds{worker="0"}', flat(0.4), flat(0.02)),
    "WorkerSaturated": pair('worker_cpu_seconds_total{worker="0"}', rising(58), rising(30)),
    "ReloadFailed": pair("config_last_reload_successful", flat(0), flat(1)),
    "CertificateExpiresSoon": pair(
        'certificate_expiry_timestamp_seconds{listener="web",subject="a.example"}',
        flat(20 * 86400),
        flat(80 * 86400),
    ),
    "CertificateExpires": pair(
        'certificate_expiry_timestamp_seconds{listener="web",subject="a.example"}',
        flat(6 * 86400),
        flat(20 * 86400),
    ),
    "CertificateUnusable": pair("certificate_reload_failing", flat(1), flat(0)),
    "AccessLogDropped": pair('access_log_dropped_total{reason="queue_full"}', rising(5), flat(5)),
    "DrainSlow": (
        [('shutdown_drain_seconds{phase="finish"}', rising(60))],
        [('shutdown_drain_seconds{phase="settle"}', rising(60))],
    ),
    "DrainAborted": pair('shutdown_aborted_connections_total{listener="web"}', flat(2), flat(0)),
    "AdminUnauthorized": (
        [('admin_rejects_total{reason="unauthorized"}', rising(5))],
        [('admin_rejects_total{reason="timeout"}', rising(5))],
    ),
    "QuicHandoversDropped": pair('quic_handovers_dropped_total{reason="full"}', rising(120), rising(6)),
    "XdpNotAttached": (
        [
            ('xdp_attached{interface="e0",mode="none"}', flat(0)),
            ('xdp_attached{interface="e1",mode="skb"}', flat(1)),
        ],
        [('xdp_attached{interface="e0",mode="native"}', flat(1))],
    ),
    "XdpFault": pair("xdp_fault", flat(1), flat(0)),
    "XdpFlowsNearLimit": pair(
        'xdp_flow_entries{family="ipv4"}', flat(950), flat(800), [("xdp_flow_entries_limit", flat(1000))]
    ),
}


def on(instance: str, series: str) -> str:
    """The series as Prometheus keeps it: with its target."""
    target = f'job="expressgateway",instance="{instance}"'
    name, brace, labels = series.partition("{")
    return f"{name}{{{labels.removesuffix('}')},{target}}}" if brace else f"{name}{{{target}}}"


def trial() -> dict[str, object]:
    """One of promtool's tests: two gateways for each alert, of which one is well."""
    series = []
    expected = []
    for alert, case in CASES.items():
        for kind, made in zip(("bad", "good"), case, strict=True):
            instance = f"{alert}-{kind}"
            series += [{"series": on(instance, name), "values": values} for name, values in made]
            expected.append(
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing",instance="{instance}"}})',
                    "eval_time": f"{MINUTES - 1}m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if kind == "bad" else [],
                }
            )
    return {"interval": "1m", "input_series": series, "promql_expr_test": expected}


def test_every_alert_has_a_case() -> None:
    assert [alert.name for alert in alerts()] == list(CASES)


@pytest.mark.peer
@needs_promtool
def test_each_fires_and_each_is_quiet(tmp_path: Path) -> None:
    run_promtool("check", "rules", str(RULES))
    page = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [trial()]}
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(page))
    assert "SUCCESS" in run_promtool("test", "rules", str(path))


def test_series_of_the_cases_are_ours() -> None:
    names = series_names()
    for alert, case in CASES.items():
        for series, _ in (*case[0], *case[1]):
            name, _, labels = series.partition("{")
            assert set(re.findall(r"(\w+)=", labels)) == set(names[name][1]), (alert, series)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_a_rule_reads_what_there_is(alert: object) -> None:
    assert isinstance(alert, tuple)
    name, expr, severity, annotations = alert
    names = series_names()
    read = selectors(expr)
    assert read, name
    for series, labels in read:
        assert set(labels) <= set(names[series][1]), (series, labels)
    possible = {label for series, _ in read for label in names[series][1]} | ADDED
    assert grouped_by(expr) <= possible
    assert severity in ("warning", "critical")
    assert set(annotations) == {"summary", "description", "runbook_url"}
    for text in annotations.values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= possible
    assert annotations["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == [alert.name for alert in alerts()]
