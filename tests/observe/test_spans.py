"""Spans on their way out of a worker: in batches, one at a time, bounded, and all of them at the end."""

from typing import Any

import pytest

from expressgateway.observe import spans as module
from expressgateway.observe.spans import FULL, MAX_TEXT, AttemptSpan, ExchangeSpan, Spans, cut, decode


def span(path: str = "/", attempts: int = 1) -> ExchangeSpan:
    tried = AttemptSpan("0d" * 8, 1, 2, "b", "192.0.2.9", 80, "1.1", 200, "")
    return ExchangeSpan(
        *(
            "0a" * 16,
            "0b" * 8,
            "",
            1,
            1,
            2,
            "web",
            "r",
            "p",
            "GET",
            "http",
            "a",
            path,
            "1.1",
            "192.0.2.1",
            "",
        ),
        *(200, -1, 0, 0, "", ["queued"], "r-1", (tried,) * attempts),
    )


class Told(list[dict[str, Any]]):
    def paths(self) -> list[str]:
        return [decode(line.encode()).path for each in self for line in each["lines"].splitlines()]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def spans(told: Told) -> Spans:
    made = Spans()
    made.tell = told.append
    return made


def dropped(spans: Spans) -> list[float | list[float]]:
    return [
        value for name, labels, value in spans.collect() if (name, labels) == ("trace_spans_dropped", (FULL,))
    ]


def test_a_sweep_tells_what_there_is(spans: Spans, told: Told) -> None:
    spans.sweep()
    assert told == []
    assert list(spans.collect()) == []
    spans.put(span("/a", attempts=0))
    spans.put(span("/b", attempts=2))
    assert told == []
    spans.sweep()
    assert (told[0]["type"], told[0]["number"], told.paths()) == ("spans", 4, ["/a", "/b"])
    assert decode(told[0]["lines"].splitlines()[1].encode()) == span("/b", attempts=2)
    assert dropped(spans) == [0]


def test_one_batch_at_a_time(spans: Spans, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    for number in range(5):
        spans.put(span(f"/{number}"))
    assert told.paths() == ["/0", "/1"], "a full batch does not wait for the sweep"
    spans.sweep()
    assert len(told) == 1, "the last one was not taken yet"
    spans.taken()
    assert told.paths() == ["/0", "/1", "/2", "/3"]
    spans.taken()
    assert len(told) == 2, "one span is no batch"
    spans.sweep()
    assert told.paths() == ["/0", "/1", "/2", "/3", "/4"]


def test_too_many_are_dropped_and_counted(spans: Spans, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 3)
    for number in range(5):
        spans.put(span(f"/{number}", attempts=2))
    assert dropped(spans) == [6]
    spans.sweep()
    assert told.paths() == ["/0", "/1", "/2"]


def test_all_at_the_end(spans: Spans, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    for number in range(5):
        spans.put(span(f"/{number}"))
    spans.flush()
    assert [each["number"] for each in told] == [4, 4, 2]
    spans.flush()
    assert len(told) == 3


def test_before_there_is_a_channel() -> None:
    spans = Spans()
    spans.put(span())
    spans.sweep()
    spans.flush()
    assert repr(spans) == "<Spans 1 held>"


def test_texts_are_cut_and_valid() -> None:
    assert cut(b"\xff\xc3\xa9") == "\ufffdé"
    assert len(cut(b"x" * 10_000)) == MAX_TEXT


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"7", b"[1,[]]", b"[1,2,3,[[1]]]", b"\xff"])
def test_nonsense(line: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(line)
