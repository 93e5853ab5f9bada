"""What `bench.rolling` can be wrong about without noticing: its configurations, and what it tells."""

import argparse
from collections import Counter
from pathlib import Path

import pytest
from bench.rolling import Report, tell
from bench.rolling_clients import Tally
from bench.rolling_world import FIXED, Places, State, toml
from bench.world import make_site

from expressgateway.config.load import load
from tests.ports import free_port


@pytest.mark.parametrize(
    "state",
    [
        State(),
        State(weights=(1, 3), policy="weighted_round_robin", has_route=True, total_timeout_ms=51_000),
        State(min_version="1.3", has_pool=True, workers=3, user="root", has_passthrough=True),
        State(spare_port=1, spare_protocol="tcp", turning_name="turned", turning_protocol="tcp"),
    ],
    ids=["first", "swapped", "rolled", "listeners"],
)
def test_every_state_is_a_configuration(tmp_path: Path, state: State) -> None:
    site = make_site(tmp_path)
    kinds = ("tcp", "udp", "websocket", "grpc", "slow")
    ports = [free_port() for _ in range(len(FIXED) + 3 + len(kinds))]
    listeners = dict(zip((*FIXED, "turning"), ports, strict=False))
    places = Places(listeners, dict(zip(kinds, ports[-len(kinds) :], strict=True)), ports[len(FIXED) + 1])
    state.admin = ports[len(FIXED) + 2]
    path = tmp_path / "gateway.toml"
    path.write_text(toml(state, site, places, tmp_path))
    config = load(path).config
    assert [listener.name for listener in config.listeners][: len(FIXED)] == list(FIXED)
    assert config.runtime.workers == state.workers


def test_a_tally_knows_its_longest_gap_and_its_first_failures() -> None:
    tally = Tally("HTTP/2")
    for number in range(20):
        tally.fail(f"failure {number}")
    tally.done()
    tally.done()
    told = tally.report()
    assert (told["requests"], told["failures"], len(told["told"])) == (2, 20, 8)
    assert told["gap_s"] >= 0


def test_a_report_is_good_without_problems_and_failures() -> None:
    load_ = {"name": "UDP", "requests": 1000, "failures": 0, "connections": 1, "gap_s": 0.25, "told": []}
    report = Report(Counter({"upgrade": 2}), {"upgrade": 1.5}, loads=[load_])
    assert report.is_good
    arguments = argparse.Namespace(reloads=1, rotations=1, upgrades=2, pause=0.5)
    text = tell(report, arguments)
    assert "| upgrade | 2 | 1.50 |" in text
    assert "| UDP | 1,000 | 0 | 1 | 0.25 |" in text
    load_["failures"] = 1
    assert not report.is_good
