"""Log lines: each one valid, on one line, and few of them whatever a peer does."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import TYPE_CHECKING

import pytest

from expressgateway.observe import logs
from expressgateway.observe.logs import JsonFormatter, Limited, TextFormatter, configure

if TYPE_CHECKING:
    from collections.abc import Iterator


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.WARNING, "x.py", 1, message, args, None)
    if fields:
        made.fields = fields
    made.created = 1_700_000_000.0
    made.msecs = 7.0
    return made


class TestFormats:
    @pytest.mark.parametrize(
        "message", ["plain", 'a "quote"', "two\nlines", "nul \0 and \x1b[31m", "ümlaut \udcff", ""]
    )
    def test_json_is_one_valid_line(self, message: str) -> None:
        line = JsonFormatter("worker 1").format(record(message, kind="k", odd=b"\xff"))
        assert "\n" not in line
        read = json.loads(line)
        assert read["message"] == message
        assert (read["level"], read["process"], read["kind"]) == ("warning", "worker 1", "k")
        assert read["time"] == "2023-11-14T22:13:20.007Z"

    def test_text_has_the_same_parts(self) -> None:
        line = TextFormatter("supervisor").format(record("%d of %d", 1, 2, listener="web", n=3))
        assert line == "2023-11-14T22:13:20.007Z warning supervisor: 1 of 2 listener=web n=3"

    def test_a_peers_line_break_begins_no_line(self) -> None:
        line = TextFormatter("w").format(record("a\r\nb", source="c\nd"))
        assert line.endswith("a\\r\\nb source=c\\nd")
        assert len(line.splitlines()) == 1

    @pytest.mark.parametrize("formatter", [JsonFormatter("w"), TextFormatter("w")])
    def test_an_exception_comes_with_its_traceback(self, formatter: logging.Formatter) -> None:
        made = record("oops")
        try:
            raise ValueError("a defect")
        except ValueError:
            made.exc_info = sys.exc_info()
        assert "ValueError: a defect" in formatter.format(made)


class TestConfigure:
    @pytest.fixture(autouse=True)
    def root(self) -> Iterator[None]:
        root = logging.getLogger()
        handlers, level, raising = list(root.handlers), root.level, logging.raiseExceptions
        yield
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.raiseExceptions = raising

    def lines(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
        error = io.StringIO()
        monkeypatch.setattr(sys, "stderr", error)
        for name in ("LB_LOG_FORMAT", "LB_LOG_LEVEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        configure("w")
        logging.getLogger("x").debug("small")
        logging.getLogger("x").info("large")
        return error.getvalue().splitlines()

    def test_json_from_info_on_is_what_there_is_without_a_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.lines(monkeypatch)
        assert [json.loads(line)["message"] for line in lines] == ["large"]

    def test_the_environment_decides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.lines(monkeypatch, LB_LOG_FORMAT="text", LB_LOG_LEVEL="debug")
        assert [line.split(" w: ")[1] for line in lines] == ["small", "large"]

    def test_an_unknown_word_is_said_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.lines(monkeypatch, LB_LOG_FORMAT="xml", LB_LOG_LEVEL="loud")
        messages = [json.loads(line)["message"] for line in lines]
        assert messages[0].startswith("LB_LOG_LEVEL is not a level")
        assert messages[1].startswith("LB_LOG_FORMAT is neither")
        assert messages[2] == "large"


class Lines(logging.Logger):
    def __init__(self) -> None:
        super().__init__("lines")
        self.seen: list[dict[str, object]] = []

    def handle(self, made: logging.LogRecord) -> None:
        self.seen.append({"message": made.getMessage(), **getattr(made, "fields", {})})


class TestLimited:
    def make(self) -> tuple[Limited, Lines, list[float]]:
        log, now = Lines(), [1000.0]
        return Limited(log, lambda: now[0]), log, now

    def test_one_line_per_kind_and_source_a_minute(self) -> None:
        limited, log, now = self.make()
        for _ in range(5):
            limited.warning("flood", "a", "no")
            limited.warning("flood", "b", "no")
            limited.warning("other", "a", "no")
        assert [(line["kind"], line["source"]) for line in log.seen] == [
            ("flood", "a"),
            ("flood", "b"),
            ("other", "a"),
        ]
        now[0] += 59.9
        limited.warning("flood", "a", "no")
        assert len(log.seen) == 3
        now[0] += 0.2
        limited.warning("flood", "a", "no", listener="web")
        assert log.seen[3] == {
            "message": "no",
            "kind": "flood",
            "source": "a",
            "listener": "web",
            "not_logged": 9,
        }
        assert "not_logged" not in log.seen[0]

    def test_another_window(self) -> None:
        log, now = Lines(), [1000.0]
        limited = Limited(log, lambda: now[0], window_s=5.0)
        for _ in range(3):
            limited.warning("flood", "a", "no")
            now[0] += 4.0
        assert len(log.seen) == 2

    def test_sources_without_number_share_a_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logs, "_MAX_SOURCES", 10)
        limited, log, now = self.make()
        for source in range(1000):
            limited.warning("flood", str(source), "no")
            limited.warning("other", str(source), "no")
        assert len(log.seen) <= 12
        assert log.seen[-1]["source"] == "many"
        assert len(limited._since) <= 10
        now[0] += 61
        limited.warning("flood", "new", "no")
        assert (log.seen[-1]["source"], len(limited._since)) == ("new", 1)
        assert int(str(log.seen[-1]["not_logged"])) > 900

    def test_a_known_source_keeps_its_minute_when_the_table_is_full(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logs, "_MAX_SOURCES", 2)
        limited, log, now = self.make()
        for source in "abc":
            limited.warning("k", source, "no")
        now[0] += 30
        for source in "abc":
            limited.warning("k", source, "no")
        assert [line["source"] for line in log.seen] == ["a", "b", "many"]
