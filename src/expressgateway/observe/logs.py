"""Logs: one line an event, a sentence with fields, JSON or text, on standard error.

``LB_LOG_FORMAT`` is ``json`` (default) or ``text``; ``LB_LOG_LEVEL`` a level's name (default ``info``).
Fields are passed as ``extra={"fields": {...}}``. Events that a peer can cause go through ``Limited``: one
line per kind and source a minute, and a summary of what was held back.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Final

from expressgateway.observe.log_stream import LineStream

_WINDOW_S: Final = 60.0
_MAX_SOURCES: Final = 4096  # sources remembered per window; more share one place


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03d}Z"


class TextFormatter(JsonFormatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        begin = f"{self.formatTime(record)} {record.levelname.lower():7} {self._process}:"
        # A peer's line break must not begin a line of ours.
        line = f"{begin} {record.getMessage()}{fields}".replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure(process: str) -> None:
    """Set the root logger up from the environment. ``process`` names the writer in every line."""
    handler = _handler()
    form = os.environ.get("LB_LOG_FORMAT", "json")
    handler.setFormatter(TextFormatter(process) if form == "text" else JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = os.environ.get("LB_LOG_LEVEL", "info").upper()
    known = logging.getLevelNamesMapping()
    root.setLevel(known.get(level, logging.INFO))
    logging.raiseExceptions = False  # a closed standard error must not disturb traffic
    if level not in known:
        root.warning("LB_LOG_LEVEL is not a level: use debug, info, warning or error; info is used")
    if form not in ("json", "text"):
        root.warning("LB_LOG_FORMAT is neither json nor text; json is used")


LEVELS: Final = ("debug", "info", "warning", "error")


def set_level(name: str) -> None:
    """What is logged from now on, by this process: one of ``LEVELS``. Raises ``ValueError`` for another."""
    if name not in LEVELS:
        raise ValueError(f"{name!r} is not a level")
    logging.getLogger().setLevel(name.upper())


def level() -> str:
    """The level of this process: one of ``LEVELS``, the closest one below if it is another."""
    set_to = logging.getLogger().getEffectiveLevel()
    return next((name for name in reversed(LEVELS) if getattr(logging, name.upper()) <= set_to), LEVELS[0])


def _handler() -> logging.Handler:
    try:
        return LineStream(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # no file is behind it, or there is none
        return logging.StreamHandler(sys.stderr)


class Limited:
    """Rate-limited lines for what peers can cause: one per kind and source in a minute, then a summary."""

    __slots__ = ("_begun", "_clock", "_held", "_log", "_shared", "_since", "window_s")

    def __init__(
        self, log: logging.Logger, clock: Callable[[], float] = time.monotonic, window_s: float = _WINDOW_S
    ) -> None:
        self.window_s = window_s
        self._log = log
        self._clock = clock
        self._since: dict[tuple[str, str], float] = {}
        self._begun = 0.0  # when the first of those sources was remembered
        self._shared: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def warning(self, kind: str, source: str, message: str, **fields: object) -> None:
        now = self._clock()
        key = (kind, source)
        since = self._since.get(key)
        if since is not None and now - since < self.window_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        if since is None and len(self._since) >= _MAX_SOURCES:
            if now - self._begun < self.window_s:
                self._others(kind, message, fields, now)
                return
            self._since.clear()
        if not self._since:
            self._begun = now
        self._since[key] = now
        self._write(kind, source, message, fields)

    def _others(self, kind: str, message: str, fields: dict[str, object], now: float) -> None:
        """A source too many: all of these share one line a minute and kind."""
        since = self._shared.get(kind)
        if since is not None and now - since < self.window_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        self._shared[kind] = now  # kinds are a closed set
        self._write(kind, "many", message, fields)

    def _write(self, kind: str, source: str, message: str, fields: dict[str, object]) -> None:
        held = self._held.pop(kind, 0)
        if held:
            fields["not_logged"] = held
        self._log.warning(message, extra={"fields": {"kind": kind, "source": source, **fields}})
