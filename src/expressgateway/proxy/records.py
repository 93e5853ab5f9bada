"""What the access log is told of an exchange that has ended."""

from collections.abc import Callable

from expressgateway.observe.access_format import Common, Said, Sizes, Times
from expressgateway.observe.access_log import AccessLog
from expressgateway.proxy.trace_context import PARENT_ID, TRACE_ID, read_parent
from expressgateway.wire.head import NO_SHARED, Fields, RequestHead

_NOTHING: Said = (b"", b"")


class Records:
    """One worker's access log, as its exchanges see it."""

    __slots__ = ("_ended_ms", "_log", "_now", "_wall", "wants")

    def __init__(self, log: AccessLog, wall: Callable[[], float]) -> None:
        """``wall``: seconds since 1970."""
        self._log = log
        self._wall = wall
        self._now = -1.0
        self._ended_ms = 0  # the time on the wall at _now
        self.wants = log.wants
        """Whether the exchange that ends now is to be recorded: some may only be sampled."""

    def take(
        self,
        now: float,
        head: RequestHead | None,
        asked: tuple[bytes, bytes] | None,
        client: bytes,
        request_id: bytes,
        common: Common,
        sizes: Sizes,
        times: Times,
    ) -> None:
        """``now``: of the clock that stands still while a turn of the loop lasts; so does ours. ``asked``:
        authority and target as the client sent them, if they were rewritten since."""
        if now != self._now:
            self._now = now
            self._ended_ms = int(self._wall() * 1000)
        if head is None:
            kind, raw, said = (common, b"", b"", b""), (b"", request_id, b"", b""), _NOTHING
        else:
            authority, target = asked or (head.authority, head.path)
            kind = (common, head.method, authority, head.version)
            shared = head.shared
            trace = span = b""
            for name, value in head.headers:
                if name == b"traceparent":
                    if shared is NO_SHARED:  # nothing was made of it: it says what a peer likes
                        value = read_parent((value,)) or b""
                    trace, span = value[TRACE_ID], value[PARENT_ID]
            raw = (target, request_id, trace, span)
            if shared is NO_SHARED:
                said = said_in(head.headers)
            else:
                said = shared.said or said_in(shared.fields)
                shared.said = said
        self._log.record((kind, client, raw, said, self._ended_ms, sizes, times))


def said_in(fields: Fields) -> Said:
    """What a client says of itself."""
    values = dict(fields)
    return values.get(b"user-agent", b""), values.get(b"referer", b"")
