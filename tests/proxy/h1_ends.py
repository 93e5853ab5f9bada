"""HTTP/1 ends for exchange tests: h11, which we did not write, on the far side of either codec."""

from typing import Any

import h11
from websockets.utils import accept_key, generate_key

from expressgateway.proxy.forwarding import Peer
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.wire.errors import WireError
from expressgateway.wire.h1.client import IDLE, H1Client
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.h1.server import H1Server, Limits
from expressgateway.wire.head import RequestHead
from expressgateway.wire.sinks import RequestSink, ServerStream
from tests.proxy.ends import BackSide, ClientEnd, FieldList, Seen, Settling, Work


class H1ClientEnd(ClientEnd):
    """h11 on the client's side of an ``H1Server``; its shell, too."""

    def __init__(self, world: Settling, limits: Limits, peer: Peer) -> None:
        super().__init__()
        self.world = world
        self.peer = peer
        self.shell = H1FrontShell(self)
        self.codec = H1Server(self.shell, limits, peer.scheme)
        self.h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        self.has_tunnel = False
        self.is_upgrading = False
        self.sent = b""

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
        lines: FieldList = [(b"Host", host), *headers]
        if upgrade:
            lines += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
            if not any(name.lower() == b"sec-websocket-key" for name, _ in headers):
                lines.append((b"Sec-WebSocket-Key", generate_key().encode()))
            self.is_upgrading = True
        elif length is not None:
            lines.append((b"Content-Length", b"%d" % length))
        elif not end:
            lines.append((b"Transfer-Encoding", b"chunked"))
        out = self.h11.send(h11.Request(method=method, target=path, headers=lines)) or b""
        if end or upgrade:
            out += self.h11.send(h11.EndOfMessage()) or b""
        self.send(out)

    def send(self, data: bytes) -> None:
        """Raw bytes to the gateway."""
        self.codec.receive_data(data)
        self.world.settle()

    def data(self, chunk: bytes, end: bool = False) -> None:
        if self.has_tunnel or self.is_upgrading:
            self.send(chunk)
            return
        out = self.h11.send(h11.Data(data=chunk)) or b""
        if end:
            out += self.h11.send(h11.EndOfMessage()) or b""
        self.send(out)

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        self.send(self.h11.send(h11.EndOfMessage(headers=list(trailers))) or b"")

    def vanish(self) -> None:
        self.codec.receive_reset()
        self.world.settle()

    def half_close(self) -> None:
        self.codec.receive_eof()
        self.world.settle()

    def again(self) -> None:
        """The connection's next request."""
        Seen.__init__(self)
        self.status = 0
        self.interim = []
        self.h11.start_next_cycle()

    # -- its shell -------------------------------------------------------------------------------------

    def wake(self) -> None:
        self.world.later(self.flush)

    def flush(self) -> None:
        out, self.codec.out = self.codec.out, []
        data = b"".join(out)
        self.sent += data
        if self.has_tunnel:
            self.raw += data
        elif data:
            self.h11.receive_data(data)
            self.read()

    def read(self) -> None:
        while True:
            event = self.h11.next_event()
            if isinstance(event, h11.InformationalResponse):
                self.interim.append(event.status_code)
                if event.status_code == 101:
                    self.headers = list(event.headers)
                    self.has_tunnel = True
                    self.raw += self.h11.trailing_data[0]
                    return
            elif isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = list(event.headers)
            elif isinstance(event, h11.Data):
                self.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.trailers = list(event.headers)
                self.is_complete = True
            else:
                return

    def pause_reading(self) -> None:
        self.pauses.append("pause")

    def resume_reading(self) -> None:
        self.pauses.append("resume")

    def unsent(self) -> int:
        return self.waiting_bytes

    def open_exchange(self, stream: ServerStream) -> RequestSink:
        self.exchange = self.world.new_exchange(stream, self.peer)
        return self.exchange

    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        self.world.new_exchange(stream, self.peer).refuse(error)

    def exchange_done(self, is_reusable: bool) -> None:
        self.exchange = None
        if not is_reusable:
            self.world.later(self._close)

    def _close(self) -> None:
        self.flush()
        self.is_closed = True
        if not self.has_tunnel and not self.is_complete and self.h11.their_state is h11.SEND_BODY:
            try:
                self.h11.receive_data(b"")
                self.read()
            except h11.RemoteProtocolError:
                self.is_cut = True

    def reset(self) -> None:
        self.flush()
        self.is_cut = True
        self.exchange = None


class H1FrontShell:
    """The codec's ``half_close`` is the gateway's end, the client's is another: two names, one object."""

    def __init__(self, end: H1ClientEnd) -> None:
        self._end = end
        self.has_ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._end, name)

    def half_close(self) -> None:
        self._end.flush()
        self.has_ended = True


class H1Work(Work):
    """One request on an ``H1BackConnection``."""

    def __init__(self, connection: "H1BackConnection") -> None:
        super().__init__()
        self.connection = connection

    def interim(self, status: int, headers: FieldList | None = None) -> None:
        self._send(h11.InformationalResponse(status_code=status, headers=headers or []))

    def reply(
        self,
        status: int = 200,
        *,
        headers: FieldList | None = None,
        length: int | None = None,
        end: bool = False,
    ) -> None:
        lines = list(headers or [])
        if length is not None:
            lines.append((b"Content-Length", b"%d" % length))
        elif end:
            lines.append((b"Content-Length", b"0"))
        else:
            lines.append((b"Transfer-Encoding", b"chunked"))
        response = h11.Response(status_code=status, headers=lines)
        if end or status in (204, 304) or self.method == b"HEAD":
            self._send(response, h11.EndOfMessage())
        else:
            self._send(response)

    def data(self, chunk: bytes, end: bool = False) -> None:
        if self.connection.has_tunnel:
            self.connection.tell(chunk)
        elif end:
            self._send(h11.Data(data=chunk), h11.EndOfMessage())
        else:
            self._send(h11.Data(data=chunk))

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        self._send(h11.EndOfMessage(headers=list(trailers)))

    def accept(self, *fields: tuple[bytes, bytes]) -> None:
        if not fields:
            key = (self.header(b"sec-websocket-key") or b"").decode()
            fields = ((b"Sec-WebSocket-Accept", accept_key(key).encode()),)
        lines = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), *fields]
        self.connection.has_tunnel = True
        self._send(h11.InformationalResponse(status_code=101, headers=lines))

    def _send(self, *events: Any) -> None:
        self.connection.tell(b"".join(self.connection.h11.send(event) or b"" for event in events))

    def raw_reply(self, data: bytes) -> None:
        """Bytes that no good backend sends."""
        self.connection.tell(data)

    def vanish(self) -> None:
        self.connection.is_dead = True
        self.connection.codec.receive_eof()
        self.connection.world.settle()

    def half_close(self) -> None:
        self.connection.codec.receive_eof()
        self.connection.world.settle()

    def block(self) -> None:
        if self.connection.waiter is not None:
            self.connection.waiter.on_back_blocked()

    def drain(self) -> None:
        if self.connection.waiter is not None:
            self.connection.waiter.on_back_drained()


class H1BackConnection:
    """An ``H1Client``, its shell, and h11 as the backend."""

    def __init__(self, side: "H1Back") -> None:
        self.side = side
        self.world = side.world
        self.codec = H1Client(self, FieldReader(256, underscore="allow"), 65536)
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        self.waiter: Waiter | None = None
        self.work: H1Work | None = None
        self._pauses: list[str] = []  # before the request is on the wire
        self.is_dead = False
        self.has_tunnel = False
        self._is_receiving = False
        self._is_done = False

    def begin(self, waiter: Waiter) -> H1Client:
        if self.h11.our_state is h11.DONE:
            self.h11.start_next_cycle()
        self.waiter = waiter
        self.work = None
        self.codec.open(waiter)
        return self.codec

    def tell(self, data: bytes) -> None:
        """The backend sends."""
        self._is_receiving = True
        self.codec.receive_data(data)
        self._is_receiving = False
        if self._is_done:
            self._is_done = False
            self._settle(self.codec.reading is IDLE)
        self.world.settle()

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self.world.later(self.flush)

    def flush(self) -> None:
        out, self.codec.out = self.codec.out, []
        data = b"".join(out)
        if not data:
            return
        if self.is_dead:
            self.codec.receive_reset()
        elif self.has_tunnel and self.work is not None:
            self.work.raw += data
        else:
            self.h11.receive_data(data)
            self.read()

    def read(self) -> None:
        while True:
            event = self.h11.next_event()
            work = self.work
            if isinstance(event, h11.Request):
                work = self.work = H1Work(self)
                self.side.works.append(work)
                work.pauses, self._pauses = self._pauses, []
                work.method, work.path = event.method, event.target
                work.headers = [field for field in event.headers if field[0] != b"host"]
                work.host = next((value for name, value in event.headers if name == b"host"), b"")
            elif work is None:
                return
            elif isinstance(event, h11.Data):
                work.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                work.trailers = list(event.headers)
                work.is_complete = True
            else:
                if event is h11.PAUSED and self.h11.trailing_data[0]:
                    work.raw += self.h11.trailing_data[0]
                return

    def pause_reading(self) -> None:
        (self._pauses if self.work is None else self.work.pauses).append("pause")

    def resume_reading(self) -> None:
        (self._pauses if self.work is None else self.work.pauses).append("resume")

    def unsent(self) -> int:
        return self.side.waiting_bytes

    def half_close(self) -> None:
        self.flush()
        if self.work is not None:
            self.work.is_tunnel_ended = True

    def was_delivered(self) -> bool:
        return self.side.was_delivered

    def exchange_done(self, is_reusable: bool) -> None:
        if self._is_receiving:
            self._is_done = True
            if not is_reusable:
                self._is_done = False
                self._settle(False)
        else:
            self._settle(is_reusable)

    def _settle(self, is_reusable: bool) -> None:
        self.waiter = None
        if is_reusable and not self.side.is_leaving:
            self.side.stack.append(self)
            self.side.keep()
        else:
            self.flush()
            if self.work is not None:
                self.work.is_tunnel_ended = True
            self.side.forget(self)

    def reset(self) -> None:
        # What is not on its way yet never will be.
        self.codec.out = []
        self.waiter = None
        if self.work is not None:
            self.work.is_cut = True
        self.side.forget(self)


class H1Back(BackSide):
    """A stack of HTTP/1 connections."""

    def __init__(self, world: Settling, backend: Backend) -> None:
        super().__init__(world, backend)
        self.stack: list[H1BackConnection] = []
        self.everyone: set[H1BackConnection] = set()
        self.is_leaving = False

    def lease(self, waiter: Waiter, fresh: bool = False) -> H1Client | None:
        if self.stack and not fresh:
            return self.stack.pop().begin(waiter)
        self.dial(waiter)
        return None

    def admit(self, waiter: Waiter) -> None:
        connection = H1BackConnection(self)
        self.everyone.add(connection)
        waiter.on_leased(connection.begin(waiter))

    def forget(self, connection: H1BackConnection) -> None:
        self.everyone.discard(connection)
        self.world.later(self.recount)  # as a socket: gone after the events at hand

    def go_stale(self) -> None:
        for connection in self.stack:
            connection.is_dead = True

    def close_idle(self) -> None:
        self.is_leaving = True
        while self.stack:
            self.forget(self.stack.pop())

    @property
    def idle(self) -> int:
        return len(self.stack)

    @property
    def open(self) -> int:
        return len(self.everyone) + len(self.pending)
