"""The supervisor's side of the exporter: what is passed on, what is dropped and why, and how it all ends."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from expressgateway.config.schema import Config
from expressgateway.control import traces as module
from expressgateway.control.traces import MAX_BACKLOG_BYTES, Traces

PATIENCE_S = 60.0

# Exporters: what they do with their input and say of it.
TAKES = "import sys\nfor line in sys.stdin: print('exported', line.strip(), flush=True)"
REFUSES = TAKES.replace("exported", "failed")
SLEEPS = "import time\ntime.sleep(3600)"
DIES = "import sys\nsys.stdin.readline()"
BABBLES = "print('who\\nexported\\nexported x\\nexported -5\\n\\udcff', flush=True)\n" + TAKES


def config(endpoint: str | None = "http://127.0.0.1:9") -> Config:
    tracing = {"endpoint": endpoint} if endpoint else None
    return Config.model_validate({"observability": {"tracing": tracing}}, context={"rules_later": True})


def made(script: str) -> Traces:
    return Traces((sys.executable, "-c", script))


def tell(traces: Traces, number: int = 2, lines: str | None = None) -> None:
    traces.take({"type": "spans", "number": number, "lines": lines or f"{number}\n"})


def counts(traces: Traces) -> dict[str, float | list[float]]:
    return {" ".join((name, *labels)): value for name, labels, value in traces.samples()}


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not check():  # noqa: ASYNC110 - it is a process that has to get there
            await asyncio.sleep(0.005)


async def started(traces: Traces) -> None:
    traces.use(config())
    await until(lambda: traces._exporter is not None and traces._exporter._process is not None)


def test_what_is_taken() -> None:
    async def play() -> None:
        traces = made(TAKES)
        assert counts(traces) == {}
        await started(traces)
        tell(traces, 2)
        tell(traces, 3)
        await until(lambda: traces.exported == 5)
        await traces.close()
        assert counts(traces) == {
            "trace_spans_exported": 5,
            "trace_spans_dropped backlog": 0,
            "trace_spans_dropped refused": 0,
            "trace_spans_dropped lost": 0,
        }
        tell(traces, 1)
        assert counts(traces)["trace_spans_dropped lost"] == 1

    asyncio.run(play())


def test_what_is_told_last_is_waited_for() -> None:
    async def play() -> None:
        traces = made(TAKES)
        await started(traces)
        tell(traces, 2)
        await traces.close()
        assert traces.exported == 2

    asyncio.run(play())


def test_what_is_refused() -> None:
    async def play() -> None:
        traces = made(REFUSES)
        await started(traces)
        tell(traces, 2)
        await until(lambda: counts(traces)["trace_spans_dropped refused"] == 2)
        await traces.close()

    asyncio.run(play())


def test_one_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, and the end does not wait for long."""
    monkeypatch.setattr(module, "END_S", 0.1)

    async def play() -> None:
        traces = made(SLEEPS)
        await started(traces)
        lines = "x" * (MAX_BACKLOG_BYTES // 4)
        for _ in range(10):
            tell(traces, 1, lines)
        dropped = counts(traces)["trace_spans_dropped backlog"]
        assert isinstance(dropped, int)
        assert 5 <= dropped <= 6
        begun = time.monotonic()
        await traces.close(0.1)
        assert time.monotonic() - begun < PATIENCE_S
        assert counts(traces)["trace_spans_dropped lost"] == 10 - dropped

    asyncio.run(play())


def test_one_that_dies_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        traces = made(DIES)
        await started(traces)
        exporter = traces._exporter
        assert exporter is not None
        first = exporter._process
        tell(traces, 2)
        await until(lambda: exporter._process not in (None, first))
        assert counts(traces)["trace_spans_dropped lost"] == 2
        await traces.close()

    asyncio.run(play())
    assert [record.getMessage() for record in caplog.records] == [
        "the exporter of spans exited with status 0; the next one comes in 0.0 seconds"
    ]


def test_one_that_cannot_be_started(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async def play() -> None:
        traces = Traces((str(tmp_path / "absent"),))
        traces.use(config())
        await until(lambda: len(caplog.records) >= 3)
        tell(traces, 2)
        assert counts(traces)["trace_spans_dropped lost"] == 2
        begun = time.monotonic()
        await traces.close()
        assert time.monotonic() - begun < 2.0, "the pause before the next attempt is not waited for"

    asyncio.run(play())
    assert "cannot be started" in caplog.records[0].getMessage()


def test_one_that_babbles() -> None:
    async def play() -> None:
        traces = made(BABBLES)
        await started(traces)
        tell(traces, 2)
        await until(lambda: traces.exported == 2)
        await traces.close()

    asyncio.run(play())


def test_another_configuration() -> None:
    async def play() -> None:
        traces = made(TAKES)
        await started(traces)
        first = traces._exporter
        traces.use(config())
        assert traces._exporter is first, "the same: nothing is done"
        tell(traces, 2)
        traces.use(config("http://127.0.0.1:10"))
        assert traces._exporter is not first
        await until(lambda: traces.exported == 2)
        traces.use(config(None))
        assert traces._exporter is None
        tell(traces, 3)
        assert counts(traces)["trace_spans_dropped lost"] == 3
        await traces.close()
        assert traces._leaving == set()

    asyncio.run(play())
