"""A protocol without bytes, shaped like HTTP/2: many exchanges at once on one connection.

It proves that exchange, pool and selection need nothing of HTTP/1: ``MemoryClientEnd`` is a
``ServerStream``, ``MemoryWork`` a ``ClientStream`` and ``MemoryBack`` a backend's ``Connections``, with a
stream for everyone on a single connection. A stream that is reset leaves its siblings alone.
"""

from expressgateway.proxy.forwarding import Peer
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.wire.errors import PeerClosedError, TruncatedError, WireError
from expressgateway.wire.head import WEBSOCKET, Fields, RequestHead, ResponseHead
from tests.proxy.ends import BackSide, ClientEnd, FieldList, Settling, Work


class MemoryClientEnd(ClientEnd):
    """One stream of a client's connection: ``ServerStream`` towards the exchange."""

    def __init__(self, world: Settling, peer: Peer) -> None:
        super().__init__()
        self.world = world
        self.peer = peer
        self.is_ended = False

    # -- what the client does --------------------------------------------------------------------------

    def request(
        self,
        method: bytes = b"GET",
        path: bytes = b"/",
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        length: int | None = None,
        end: bool = True,
        upgrade: bool = False,
        host: bytes = b"a.example",
    ) -> None:
        names = dict(headers)
        head = RequestHead(
            method,
            self.peer.scheme,
            host,
            path,
            tuple((name.lower(), value) for name, value in headers if name.lower() != b"te"),
            WEBSOCKET if upgrade else None,
            length,
            b"2",
            names.get(b"TE") == b"trailers",
            names.get(b"Expect") == b"100-continue",
        )
        self.exchange = self.world.new_exchange(self, self.peer)
        self.exchange.on_request(head, end and not upgrade)
        self.world.settle()

    def data(self, chunk: bytes, end: bool = False) -> None:
        if self.exchange is not None:
            self.exchange.on_request_data(chunk, end)
        self.world.settle()

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        if self.exchange is not None:
            if trailers:
                self.exchange.on_request_trailers(trailers)
            else:
                self.exchange.on_request_data(b"", True)
        self.world.settle()

    def vanish(self) -> None:
        if self.exchange is not None and not self.is_ended:
            self.is_ended = True
            self.exchange.on_request_abort(PeerClosedError("the stream was reset"))
        self.world.settle()

    def half_close(self) -> None:
        self.data(b"", True)

    # -- ServerStream ----------------------------------------------------------------------------------

    def send_informational(self, head: ResponseHead) -> None:
        self.interim.append(head.status)
        if head.status == 101:
            self.headers = [*head.shared.fields, *head.headers]

    def send_head(self, head: ResponseHead, end: bool) -> None:
        if self.is_ended:
            return
        if self.status:
            raise AssertionError("two heads")
        self.status = head.status
        self.headers = [*head.shared.fields, *head.headers]
        if head.content_length is not None:
            self.headers.append((b"content-length", b"%d" % head.content_length))
        if end:
            self._end()

    def send_data(self, chunk: bytes, end: bool) -> None:
        if self.is_ended:
            return
        if 101 in self.interim:
            self.raw += chunk
        else:
            self.body += chunk
        if end:
            self._end()

    def send_trailers(self, fields: Fields) -> None:
        if not self.is_ended:
            self.trailers = list(fields)
            self._end()

    def _end(self) -> None:
        self.is_complete = True
        self.is_ended = True

    def abort(self, error: WireError | None) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.is_cut = True
            self.cut_by = error

    def close(self) -> None:
        self.is_ended = True
        self.is_closed = True

    def unsent(self) -> int:
        return self.waiting_bytes

    def pause(self) -> None:
        self.pauses.append("pause")

    def resume(self) -> None:
        self.pauses.append("resume")


class MemoryWork(Work):
    """One stream to a backend: ``ClientStream`` towards the exchange."""

    version = b"2"

    def __init__(self, side: "MemoryBack", waiter: Waiter, is_reused: bool, is_dead: bool) -> None:
        super().__init__()
        self.side = side
        self.waiter: Waiter | None = waiter
        self.is_reused = is_reused
        self.is_dead = is_dead
        self.head: RequestHead | None = None
        self._has_answer = False
        self._was_head = False

    # -- ClientStream ----------------------------------------------------------------------------------

    def send_head(self, head: RequestHead, end: bool) -> None:
        if self.is_dead:
            self.side.world.later(self._die)
            return
        self.side.works.append(self)
        self.head = head
        self.method, self.path, self.host = head.method, head.path, head.authority
        self.headers = [*head.shared.fields, *head.headers]
        if end:
            self.is_complete = True

    def _die(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.on_response_abort(PeerClosedError("the connection is gone"))

    def send_data(self, chunk: bytes, end: bool) -> None:
        if self.head is not None and self.head.protocol is not None:
            self.raw += chunk
            self.is_tunnel_ended = self.is_tunnel_ended or end
        elif not self.is_dead:
            self.body += chunk
            self.is_complete = self.is_complete or end
            if self.side.is_full and self.waiter is not None:
                self.waiter.on_back_blocked()

    def send_trailers(self, fields: Fields) -> None:
        if not self.is_dead:
            self.trailers = list(fields)
            self.is_complete = True

    def abort(self, error: WireError | None) -> None:
        self.waiter = None
        if not self.is_complete:
            self.is_cut = True

    def close(self) -> None:
        self.waiter = None
        self.is_tunnel_ended = True

    def was_delivered(self) -> bool:
        return self.side.was_delivered

    def unsent(self) -> int:
        return self.side.waiting_bytes

    def pause(self) -> None:
        self.pauses.append("pause")

    def resume(self) -> None:
        self.pauses.append("resume")

    # -- what the backend does -------------------------------------------------------------------------

    def interim(self, status: int, headers: FieldList | None = None) -> None:
        if self.waiter is not None:
            self.waiter.on_informational(ResponseHead(status, tuple(headers or ())))
        self.side.world.settle()

    def reply(
        self,
        status: int = 200,
        *,
        headers: FieldList | None = None,
        length: int | None = None,
        end: bool = False,
    ) -> None:
        fields = tuple((name.lower(), value) for name, value in headers or ())
        self._has_answer = True
        end = end or status in (204, 304) or self.method == b"HEAD"
        if self.waiter is not None:
            waiter = self.waiter
            if end:
                self.waiter = None
            waiter.on_response(ResponseHead(status, fields, length, b"2"), end)
        self.side.world.settle()

    def data(self, chunk: bytes, end: bool = False) -> None:
        waiter = self.waiter
        if waiter is not None:
            if end:
                self.waiter = None
            waiter.on_response_data(chunk, end)
        self.side.world.settle()

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            if trailers:
                waiter.on_response_trailers(trailers)
            else:
                waiter.on_response_data(b"", True)
        self.side.world.settle()

    def accept(self, *fields: tuple[bytes, bytes]) -> None:
        self.interim(101, list(fields))

    def vanish(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.on_response_abort(
                TruncatedError("reset") if self._has_answer else PeerClosedError("reset")
            )
        self.side.world.settle()

    def half_close(self) -> None:
        if self.waiter is not None:
            self.waiter.on_response_data(b"", True)
        self.side.world.settle()

    def block(self) -> None:
        if self.waiter is not None:
            self.waiter.on_back_blocked()

    def drain(self) -> None:
        if self.waiter is not None:
            self.waiter.on_back_drained()


class MemoryBack(BackSide):
    """One connection with as many streams as there are exchanges."""

    def __init__(self, world: Settling, backend: Backend) -> None:
        super().__init__(world, backend)
        self.is_connected = False
        self.is_stale = False
        self.is_full = False
        """It takes nothing more, and says so within the very call that gives it something."""
        self.streams = 0

    def lease(self, waiter: Waiter, fresh: bool = False) -> MemoryWork | None:
        if fresh:
            self.is_connected = False
            self.is_stale = False
        if self.is_connected:
            return self._stream(waiter)
        self.dial(waiter)
        return None

    def _stream(self, waiter: Waiter) -> MemoryWork:
        self.streams += 1
        return MemoryWork(self, waiter, self.streams > 1, self.is_stale)

    def admit(self, waiter: Waiter) -> None:
        if not self.is_connected:
            self.is_connected = True
            self.streams = 0
            self.keep()
        waiter.on_leased(self._stream(waiter))

    def go_stale(self) -> None:
        self.is_stale = True

    @property
    def idle(self) -> int:
        return int(self.is_connected)

    @property
    def open(self) -> int:
        return int(self.is_connected or bool(self.pending))
