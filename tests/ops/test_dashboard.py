"""The Grafana dashboard: everything it asks for exists, and everything is somewhere on it."""

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.ops.rules import ROOT, grouped_by, needs_promtool, run_promtool, selectors, series_names

DASHBOARD: Final[dict[str, Any]] = json.loads((ROOT / "ops/grafana/expressgateway.json").read_text())
PANELS: Final[list[dict[str, Any]]] = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
VARIABLES: Final = {each["name"] for each in DASHBOARD["templating"]["list"]}
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
ADDED: Final = {"job", "instance"}
SUBJECTS: Final = (
    "http_requests",
    "http_request_duration_seconds",
    "http_gateway_errors",
    "backend_up",
    "backend_state",
    "connections_inflight",
    "tls_handshakes",
    "quic_wire_datagrams",
    "worker_cpu_seconds",
    "worker_rss_bytes",
    "config_reload",
    "shutdown_drain_seconds",
    "certificate_expiry_timestamp_seconds",
    "security_events",
)
"""What an operator looks for."""


def plain(expr: str) -> str:
    """Without Grafana's variables."""
    return expr.replace("$__rate_interval", "5m")


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "expr"), expressions())
def test_what_is_asked_for_exists(title: str, expr: str) -> None:
    names = series_names()
    read = selectors(plain(expr))
    assert read
    for series, labels in read:
        assert set(labels) <= {*names[series][1], *ADDED}, (series, labels)
    assert grouped_by(plain(expr)) <= {label for series, _ in read for label in names[series][1]} | ADDED
    assert set(re.findall(r"\$(\w+)", expr)) <= VARIABLES | {"__rate_interval"}


def test_what_is_looked_for_is_shown() -> None:
    names = series_names()
    shown = {names[series][0] for _, expr in expressions() for series, _ in selectors(plain(expr))}
    assert set(SUBJECTS) <= shown


def test_its_parts_are_in_order() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["datasource"] == SOURCE
        assert all(target["datasource"] == SOURCE for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] in ("timeseries", "stat", "table")
    taken = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in DASHBOARD["panels"]]
    assert len(set(taken)) == len(taken)


def test_its_variables_ask_for_what_exists() -> None:
    names = series_names()
    kinds = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert kinds["datasource"]["type"] == "datasource"
    for name, variable in kinds.items():
        if name != "datasource":
            asked = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"])
            assert asked is not None
            assert asked[2] in {*names[asked[1]][1], *ADDED}


@pytest.mark.peer
@needs_promtool
def test_prometheus_can_read_its_expressions(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel_{number}", "expr": re.sub(r"\$(\w+)", ".*", plain(expr))}
        for number, (_, expr) in enumerate(expressions())
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run_promtool("check", "rules", str(path))
