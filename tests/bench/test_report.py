"""Tables, verdicts and the generated part of the page."""

import json
from pathlib import Path

import pytest
from bench.__main__ import arguments
from bench.cells import OVER_H1, Outcome
from bench.idle import IdleFigures
from bench.soak import flatness
from bench.stats import Sample
from bench.streams import StreamFigures

from bench import report

BULK = frozenset({"tcp-bulk"})


def outcome(*costs_us: float) -> Outcome:
    return Outcome([Sample(requests=1, seconds=1, cpu_s=cost / 1e6, bytes=1000) for cost in costs_us])


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_gives_both_ratios() -> None:
    text = report.load_table({"nginx": outcome(10, 20, 30), "gateway": outcome(15, 30, 45)}, bulk=False)
    header = row(text, "proxy")
    gateway, nginx = (dict(zip(header, row(text, name), strict=True)) for name in ("gateway", "nginx"))
    assert gateway["CPU us/request"] == "30.0"
    assert gateway["x nginx"] == "1.50"
    assert nginx["gateway / it"] == "1.50"


def test_a_failure_stands_where_its_numbers_would() -> None:
    half_way = outcome(10)
    half_way.failure = "wrk saw 3 read errors"
    text = report.load_table({"nginx": outcome(10, 11), "gateway": half_way}, bulk=False)
    assert row(text, "gateway")[1:] == ["failed", *["-"] * 7]
    assert "**gateway failed**: wrk saw 3 read errors" in text
    assert row(text, "nginx")[4] == "-"


def test_verdicts_tell_kept_from_missed_from_unknown() -> None:
    cells = {
        "h1": {"nginx": outcome(10), "envoy": outcome(30), "gateway": outcome(19)},
        "tcp-bulk": {"haproxy": outcome(10), "gateway": outcome(8)},
        "tls": {"nginx": outcome(10), "gateway": Outcome(failure="no answer")},
    }
    text = report.verdicts(cells, BULK, {"gateway": IdleFigures(1000, 0, 17 * 1024 * 1000)}, None)
    found = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in text.splitlines()[2:]}
    assert found["h1: CPU against nginx"] == "kept"
    assert found["h1: CPU against envoy"] == "MISSED"
    assert found["tls: CPU against nginx"] == "not measured"
    assert found["tcp-bulk: CPU against haproxy"] == "kept"
    assert found["idle: memory a connection"] == "MISSED"
    assert found["scaling: two workers"] == "not measured"


@pytest.mark.parametrize(("seconds", "verdict"), [(1.4, "kept"), (1.5, "MISSED")])
def test_http2_is_held_against_http1_by_its_throughput(seconds: float, verdict: str) -> None:
    one, other = (Outcome([Sample(requests=1, seconds=each, cpu_s=1, bytes=1000)]) for each in (seconds, 1.0))
    text = report.verdicts({"h2-upload": {"gateway": one, OVER_H1: other}}, BULK, None, None)
    assert row(text, "h2-upload: throughput against HTTP/1.1 over TLS")[3] == verdict


def test_bytes_of_a_stream() -> None:
    text = report.streams_table({"gateway": StreamFigures(10, 1000, 0, 3_000_000), "nginx": "no listener"})
    assert row(text, "gateway")[-1] == "3000"
    assert "**nginx failed**: no listener" in text


def test_only_the_generated_part_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    report.write_section(page, "bench", "first")
    report.write_section(page, "soak", "endurance")
    by_hand = page.read_text("utf-8").replace("# Performance", "# Performance\n\nWritten by hand.")
    page.write_text(by_hand + "\nAnd after.\n", "utf-8")
    report.write_section(page, "bench", "second")
    after = page.read_text("utf-8")
    assert after == (by_hand + "\nAnd after.\n").replace("first", "second")
    assert "endurance" in after


def test_the_record_keeps_every_sample(tmp_path: Path) -> None:
    path = report.write_record(tmp_path, "one", {"cells": {"h1": {"nginx": outcome(1, 2)}}, "scaling": None})
    read = json.loads(path.read_text("utf-8"))
    assert len(read["cells"]["h1"]["nginx"]["samples"]) == 2
    assert read["scaling"] is None


def test_arguments() -> None:
    options = arguments(["--cells", "tls,h1", "--peers", "gateway,nginx", "--quick"])
    assert (options.command, options.cells, options.peers, options.rounds) == (
        "run",
        ["h1", "tls"],
        ["nginx", "gateway"],
        1,
    )
    assert arguments(["soak"]).peers == ["gateway"]


@pytest.mark.parametrize("given", [["--cells", "h9"], ["--peers", "ngnix"], ["--rounds", "0"], ["walk"]])
def test_wrong_usage_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(given)
    assert ended.value.code == 2
    assert given[-1] in capsys.readouterr().err or given == ["--rounds", "0"]


class TestFlatness:
    def test_a_plateau_after_warm_up_is_flat(self) -> None:
        assert flatness([10_000_000] * 4 + [60_000_000] * 12).is_flat

    def test_slow_growth_is_not(self) -> None:
        assert not flatness([60_000_000 + step * 1_000_000 for step in range(16)]).is_flat

    def test_too_few_samples_show_nothing(self) -> None:
        with pytest.raises(ValueError, match="too few"):
            flatness([1] * 7)
