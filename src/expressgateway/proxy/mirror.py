"""A copy of a request to another pool, whose answer nobody waits for.

A mirror can neither slow nor fail the exchange it copies: it never pauses the client, holds at most
``HELD_BYTES`` for a backend that is not there yet, and gives itself up as soon as its backend does not keep
up, whatever the reason. It is not tried twice. What became of it is counted in its pool.
"""

from typing import Final

from expressgateway.proxy.route import Target
from expressgateway.upstream.backend import Addresses, Backend
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.errors import PeerClosedError, WireError
from expressgateway.wire.head import Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ClientStream

HELD_BYTES: Final = 65536
MAX_MIRRORS: Final = 1024  # under way at once, per worker; more requests are not copied
MAX_LIFE_S: Final = 60.0


class Mirrors:
    """Every mirror of one worker: their number is bounded, their time too."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[Mirror, float] = {}

    def begin(
        self, target: Target, head: RequestHead, end: bool, addresses: Addresses | None, now: float
    ) -> "Mirror | None":
        """Copy a request from its head on; the head must have its fields for the backend already."""
        if head.protocol is not None:
            return None  # two answers to one handshake make no sense
        tally = target.pool.mirrored
        if len(self._open) >= MAX_MIRRORS:
            tally.add("too_many")
            return None
        backend = target.pool.pick()
        if backend is None or backend.connections is None:
            tally.add("no_backend")
            return None
        mirror = Mirror(self, target, backend, head, end, addresses)
        self._open[mirror] = now + MAX_LIFE_S
        mirror.lease()
        return mirror

    def forget(self, mirror: "Mirror") -> None:
        self._open.pop(mirror, None)

    def sweep(self, now: float) -> None:
        for mirror in [mirror for mirror, due in self._open.items() if now >= due]:
            mirror.drop("timeout")

    def __len__(self) -> int:
        return len(self._open)


class Mirror:
    """One copy. Implements ``Waiter``; what it is told of the answer it only counts."""

    __slots__ = (
        "_back",
        "_backend",
        "_end",
        "_head",
        "_held",
        "_held_bytes",
        "_is_over",
        "_mirrors",
        "_status",
        "_target",
        "_trailers",
        "addresses",
    )

    def __init__(
        self,
        mirrors: Mirrors,
        target: Target,
        backend: Backend,
        head: RequestHead,
        end: bool,
        addresses: Addresses | None,
    ) -> None:
        # Wiring
        self._mirrors = mirrors
        self._target = target
        self._backend = backend
        self._back: ClientStream | None = None
        self.addresses = addresses
        # Exchange
        self._head = _copy(head)
        self._end = end
        self._held: list[bytes] = []  # until there is a connection; at most HELD_BYTES
        self._held_bytes = 0
        self._trailers: Fields | None = None
        self._status = 0
        self._is_over = False
        backend.begin()

    def lease(self) -> None:
        connections = self._backend.connections
        stream = connections.lease(self) if connections is not None else None
        if stream is not None:
            self.on_leased(stream)

    # -- from the exchange -----------------------------------------------------------------------------

    def send_data(self, chunk: bytes, end: bool) -> None:
        if self._is_over:
            return
        self._end = self._end or end
        if self._back is not None:
            self._back.send_data(chunk, end)
            return
        self._held_bytes += len(chunk)
        if self._held_bytes > HELD_BYTES:
            self.drop("too_slow")
        elif chunk:
            self._held.append(chunk)

    def send_trailers(self, fields: Fields) -> None:
        if self._is_over:
            return
        self._end = True
        if self._back is not None:
            self._back.send_trailers(fields)
        else:
            self._trailers = fields

    def abort(self) -> None:
        """The request it copies was cut short; a copy that is complete goes on."""
        if not self._end:
            self.drop("cut_short")

    # -- Waiter ----------------------------------------------------------------------------------------

    def on_leased(self, stream: ClientStream) -> None:
        self._back = stream
        if not self._held and self._trailers is None:
            stream.send_head(self._head, self._end)
            return
        stream.send_head(self._head, False)
        for chunk in self._held:
            stream.send_data(chunk, False)
        self._held.clear()
        if self._is_over:
            return  # it was full at once
        if self._trailers is not None:
            stream.send_trailers(self._trailers)
        elif self._end:
            stream.send_data(b"", True)

    def on_lease_failed(self, error: UpstreamError) -> None:
        self._backend.connect_failures += 1
        if error.fault is not Fault.OVER_CAPACITY:  # that is the gateway's own lack of sockets
            self._target.pool.failed(self._backend, error.detail)
        self._finish("connect_failed")

    def on_informational(self, head: ResponseHead) -> None:
        """Of no interest."""

    def on_response(self, head: ResponseHead, end: bool) -> None:
        self._status = head.status
        self._backend.succeeded()
        if end:
            self._finish("answered")

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        if end:
            self._finish("answered")

    def on_response_trailers(self, fields: Fields) -> None:
        self._finish("answered")

    def on_response_abort(self, error: WireError) -> None:
        back, self._back = self._back, None
        # As for any exchange: a keep-alive connection that ended under us is no failure of the backend.
        if back is None or not back.is_reused or not isinstance(error, PeerClosedError):
            self._target.pool.failed(self._backend, error.detail)
        self._finish("failed")

    def on_back_blocked(self) -> None:
        self.drop("too_slow")

    def on_back_drained(self) -> None:
        """Never waited for."""

    # -- endings ---------------------------------------------------------------------------------------

    def drop(self, result: str) -> None:
        """Give it up."""
        if self._is_over:
            return
        back, self._back = self._back, None
        if back is not None:
            back.abort(None)
        elif self._backend.connections is not None:
            self._backend.connections.cancel(self)
        self._finish(result)

    def _finish(self, result: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        back, self._back = self._back, None
        if back is not None and not self._end:
            back.abort(None)  # it was answered before its request was complete
        self._held.clear()
        self._mirrors.forget(self)
        self._backend.responses[self._status // 100] += 1
        self._backend.end()
        self._target.pool.mirrored.add(result)


def _copy(head: RequestHead) -> RequestHead:
    copy = RequestHead(
        head.method,
        head.scheme,
        head.authority,
        head.path,
        head.headers,
        None,
        head.content_length,
        head.version,
        head.accepts_trailers,
        False,  # nobody waits for its 100
    )
    copy.shared = head.shared
    return copy
