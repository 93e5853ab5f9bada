"""Who is recorded as spans, and where it is told."""

import time
from collections.abc import Callable
from typing import Final

from expressgateway.observe.spans import Spans

_RANDOM: Final = slice(21, 35)  # of a trace parent: the 56 bits that samplers go by (level 2, 5.1)
_RANDOM_BITS: Final = 56


class Recorded(bytes):
    """A trace parent that names a span of ours. Mirrors are told it; a backend is told its attempt's."""

    parent_id: bytes = b""
    """Whose child that span is; empty: it begins the trace."""


class Tracer:
    """Who is recorded by one listener, and where it is told."""

    __slots__ = ("_below", "_wall_ns", "spans")

    def __init__(self, spans: Spans, sample: float, wall_ns: Callable[[], int] = time.time_ns) -> None:
        """``sample``: the share of new traces that are recorded, 0 to 1."""
        self.spans = spans
        self._below: int = round(sample * 2**_RANDOM_BITS)
        self._wall_ns = wall_ns

    def wants_new(self, trace_parent: bytes) -> bool:
        """By its trace id, so that others with the same share come to the same end."""
        return int(trace_parent[_RANDOM], 16) < self._below

    def wall_ns(self) -> int:
        """Now, in nanoseconds since 1970."""
        return self._wall_ns()
