"""``python -m expressgateway.exporter``: started by the supervisor, never by hand."""

import argparse
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Final

from expressgateway.observe import logs
from expressgateway.observe.spans import ExchangeSpan, decode

log = logging.getLogger(__name__)

EXPORTED: Final = "exported"
FAILED: Final = "failed"

_GATHER_S: Final = 0.5  # how long the first span of a batch may wait for others
_MOST: Final = 512  # exchanges sent at once
_READ_BYTES: Final = 1 << 16
_PATIENCE_S: Final = 5.0  # with a collector, for one batch
_WINDOW_S: Final = 60.0


def gathered(fd: int, gather_s: float = _GATHER_S) -> Iterator[list[ExchangeSpan]]:
    """What comes, in batches, to the end of the input. Nothing is read while a batch is being sent."""
    rest = b""
    held: list[ExchangeSpan] = []
    due = 0.0
    while True:
        wait_s = max(0.0, due - time.monotonic()) if held else None
        if select.select([fd], [], [], wait_s)[0]:
            data = os.read(fd, _READ_BYTES)
            if not data:
                break
            if not held:
                due = time.monotonic() + gather_s
            *lines, rest = (rest + data).split(b"\n")
            held += [span for line in lines if (span := _read(line)) is not None]
        while len(held) >= _MOST or (held and time.monotonic() >= due):
            yield held[:_MOST]
            held = held[_MOST:]
    while held:
        yield held[:_MOST]
        held = held[_MOST:]


def _read(line: bytes) -> ExchangeSpan | None:
    try:
        return decode(line)
    except (ValueError, TypeError):
        log.exception("a span could not be read: this is a defect")
        return None


class Seldom(logging.Filter):
    """Lets each kind of line of a library pass once a minute: a collector that is down fails every batch."""

    def __init__(self) -> None:
        super().__init__()
        self._since: dict[object, float] = {}  # as many as there are calls of a logger

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(("opentelemetry", "urllib3", "requests", "py.warnings")):
            return True
        if record.levelno < logging.WARNING:
            return False
        key = (record.pathname, record.lineno)
        now = time.monotonic()
        if now - self._since.get(key, -_WINDOW_S) < _WINDOW_S:
            return False
        self._since[key] = now
        return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="expressgateway.exporter")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--service-name", required=True)
    arguments = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # the end of its input is its order to end
    logs.configure("exporter")
    logging.captureWarnings(True)  # what the libraries have to say is a line like any other
    for handler in logging.getLogger().handlers:
        handler.addFilter(Seldom())
    from expressgateway.exporter.otlp import Collector  # takes a while, and may not be installed

    collector = Collector(arguments.endpoint, arguments.service_name, _PATIENCE_S)
    limited = logs.Limited(log)
    for batch in gathered(0):
        number = sum(exchange.spans for exchange in batch)
        is_taken = collector.send(batch)
        if not is_taken:
            limited.warning(
                "traces", arguments.endpoint, "the collector took no spans: they are dropped", spans=number
            )
        try:
            os.write(1, f"{EXPORTED if is_taken else FAILED} {number}\n".encode())
        except OSError:  # the supervisor is gone; what is left is sent all the same
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
