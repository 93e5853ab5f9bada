"""What one worker tells of the exchanges whose traces are recorded, on its way to the exporter.

An exchange that ends hands over an ``ExchangeSpan``. Spans wait in a bounded queue; a few times a second, or
when many wait, a *batch* goes to the supervisor, the next one when it was taken. Whoever does not keep up
costs spans, which are counted, and nothing else. What becomes of them then is the exporter's business.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from expressgateway.observe.counters import Sample

MAX_HELD: Final = 4096  # exchanges waiting; more are dropped. Texts in them are cut to MAX_TEXT
MAX_BATCH: Final = 512  # exchanges told at once
MAX_TEXT: Final = 1024  # characters of what a peer chose

FULL: Final = "full"
"""Reason of ``trace_spans_dropped``: the supervisor does not take them as fast."""


class AttemptSpan(NamedTuple):
    """One try with one backend."""

    span_id: str
    began_ns: int
    """Since 1970, as all times here."""
    ended_ns: int
    backend: str
    """Its id."""
    host: str
    port: int
    version: str
    """Of HTTP; empty: nothing could be sent."""
    status: int
    """0: no answer."""
    error: str
    """Why it failed, from a closed set; empty: it did not, or its status says why."""


class ExchangeSpan(NamedTuple):
    """One exchange. Empty texts: there was none."""

    trace_id: str
    span_id: str
    parent_id: str
    """The client's span; empty: the trace begins here."""
    flags: int
    """Of the trace (W3C Trace Context 3.2.2.5)."""
    began_ns: int
    ended_ns: int
    listener: str
    route: str
    pool: str
    method: str
    scheme: str
    authority: str
    path: str
    """As the client sent it, without the query, which may hold secrets."""
    version: str
    client: str
    agent: str
    status: int
    """0: none was sent."""
    grpc_status: int
    """-1: it was no call."""
    request_bytes: int
    response_bytes: int
    error: str
    """Why the gateway ended it, from a closed set; empty: it did not."""
    decided: Sequence[str]
    """What was decided on the way: the access log's flags."""
    request_id: str
    attempts: tuple[AttemptSpan, ...]

    @property
    def spans(self) -> int:
        """How many spans this makes."""
        return 1 + len(self.attempts)


def encode(spans: list[ExchangeSpan]) -> str:
    """One line of JSON for each."""
    return "".join([json.dumps(span, separators=(",", ":")) + "\n" for span in spans])


def decode(line: bytes) -> ExchangeSpan:
    """The reverse, for one line. Raises ``ValueError`` or ``TypeError`` for anything else."""
    *row, attempts = json.loads(line)
    return ExchangeSpan(*row, tuple(AttemptSpan(*attempt) for attempt in attempts))  # type: ignore[call-arg]  # JSON's


def cut(raw: bytes) -> str:
    """What a peer sent, as text of bounded length."""
    return raw[:MAX_TEXT].decode("utf-8", "replace")


class Spans:
    """See the module's text."""

    __slots__ = ("_dropped", "_held", "_is_told", "_is_used", "tell")

    def __init__(self) -> None:
        self._held: list[ExchangeSpan] = []
        self._is_told = False  # a batch is on its way
        self._is_used = False
        self._dropped = 0
        self.tell: Callable[[dict[str, Any]], None] | None = None
        """Takes messages for the supervisor."""

    def put(self, span: ExchangeSpan) -> None:
        """Never blocks, never raises."""
        self._is_used = True
        if len(self._held) >= MAX_HELD:
            self._dropped += span.spans
            return
        self._held.append(span)
        if len(self._held) >= MAX_BATCH and not self._is_told:
            self._tell()

    def sweep(self, _: float = 0.0) -> None:
        if self._held and not self._is_told:
            self._tell()

    def taken(self) -> None:
        """The supervisor has the last batch."""
        self._is_told = False
        if len(self._held) >= MAX_BATCH:
            self._tell()

    def flush(self) -> None:
        """Tell all that waits: at the end, and before another collector is told."""
        while self._held and self.tell is not None:
            self._tell()

    def _tell(self) -> None:
        tell = self.tell
        if tell is None:
            return
        batch, self._held = self._held[:MAX_BATCH], self._held[MAX_BATCH:]
        self._is_told = True
        number = sum(span.spans for span in batch)
        tell({"type": "spans", "number": number, "lines": encode(batch)})

    def collect(self) -> Iterator[Sample]:
        """This worker's samples; none before there was a span."""
        if self._is_used:
            yield "trace_spans_dropped", (FULL,), self._dropped

    def __repr__(self) -> str:
        return f"<Spans {len(self._held)} held>"
