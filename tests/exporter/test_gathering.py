"""Batches from a pipe: what comes together goes together, nothing waits for long, and the rest at the end."""

import contextlib
import logging
import os
from collections.abc import Iterator

import pytest

from expressgateway.exporter.__main__ import Seldom, gathered
from expressgateway.observe.spans import encode
from tests.exporter.test_otlp import attempt, exchange


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(fd)


def test_together(ends: tuple[int, int]) -> None:
    reader, writer = ends
    lines = encode([exchange(attempt(), path=f"/{number}") for number in range(3)]).encode()
    os.write(writer, lines[:100])
    batches = gathered(reader, gather_s=0.2)
    os.write(writer, lines[100:])
    assert [each.path for each in next(batches)] == ["/0", "/1", "/2"]
    os.write(writer, lines)
    os.close(writer)
    assert [len(batch) for batch in batches] == [3], "the end is not waited for"


def test_a_full_batch_does_not_wait(ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expressgateway.exporter.__main__._MOST", 10)
    reader, writer = ends
    os.write(writer, encode([exchange()] * 25).encode())
    batches = gathered(reader, gather_s=3600.0)
    assert [len(next(batches)), len(next(batches))] == [10, 10]
    os.close(writer)
    assert [len(batch) for batch in batches] == [5]


def test_nonsense_is_passed_over(ends: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = ends
    os.write(writer, b"{}\n[]\n7\nx\n[1,2,[]]\n" + encode([exchange()]).encode())
    os.close(writer)
    assert [len(batch) for batch in gathered(reader)] == [1]
    assert len(caplog.records) == 5


def test_libraries_say_it_once_a_minute() -> None:
    seldom = Seldom()

    def passes(name: str, level: int, line: int) -> bool:
        return bool(seldom.filter(logging.LogRecord(name, level, "x.py", line, "no", (), None)))

    assert [passes("opentelemetry.exporter", logging.ERROR, 1) for _ in range(3)] == [True, False, False]
    assert passes("opentelemetry.exporter", logging.ERROR, 2)
    assert not passes("urllib3.connectionpool", logging.DEBUG, 3)
    assert all(passes("expressgateway.exporter", logging.INFO, 4) for _ in range(3))
