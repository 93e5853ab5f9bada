"""One client's HTTP/1 connection: the stream's owner, the codec's shell, the home of its exchanges."""

from typing import TYPE_CHECKING, Final

from expressgateway.net.facts import Facts, State, of_peer
from expressgateway.net.h1_shell import StreamShell
from expressgateway.proxy.errors import DeadlineError, Reason
from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.traced import open_exchange
from expressgateway.wire.errors import WireError
from expressgateway.wire.h1.server import DISCARD, HEAD, IDLE, H1Server
from expressgateway.wire.head import RequestHead
from expressgateway.wire.sinks import ServerStream

if TYPE_CHECKING:
    from expressgateway.net.http_listener import HttpListener

PARTING_S: Final = 1.0  # a drain leaves a connection so long without a request before it closes it


class H1FrontConnection(StreamShell):
    """See the module's text."""

    __slots__ = (
        "_ends_linger",
        "_exchanges",
        "_head_since",
        "_idle_since",
        "_is_closing",
        "_is_congested",
        "_is_draining",
        "_is_receiving",
        "_listener",
        "_moved_at",
        "_unsent",
        "codec",
        "exchange",
        "peer",
    )

    def __init__(self, listener: "HttpListener", peer: Peer) -> None:
        super().__init__()
        # Wiring
        self._listener = listener
        self.peer = peer
        self.codec = H1Server(self, listener.h1_limits, peer.scheme)
        # Connection
        now = listener.reactor.now
        self._exchanges = 0
        self._idle_since = now  # seconds, as all times here
        self._head_since = 0.0  # 0: no head has begun
        self._unsent = 0  # bytes waiting at the last sweep, and since when they have not moved
        self._moved_at = now
        self._is_draining = False
        self._is_closing = False
        self._ends_linger = False  # the client may still be sending when we close
        self._is_congested = False
        # Exchange
        self.exchange: Exchange | None = None
        self._is_receiving = False

    def begin(self) -> None:
        if self.stream is not None:
            self.stream.start()

    # -- StreamOwner -----------------------------------------------------------------------------------

    def on_open(self) -> None:
        self._idle_since = self._listener.reactor.now
        self._listener.on_open(self)

    def on_bytes(self, data: bytes) -> None:
        codec = self.codec
        self._is_receiving = True
        codec.receive_data(data)
        self._is_receiving = False
        if codec.reading is HEAD:
            if not codec.is_mid_head:
                self._head_since = 0.0
            elif not self._head_since:
                self._head_since = self._listener.reactor.now
            if self._is_congested:
                self.pause_reading()

    def on_eof(self) -> None:
        codec = self.codec
        codec.receive_eof()
        if codec.reading is DISCARD and not self._is_closing:
            self._begin_close(linger=False)

    def on_closed(self, error: str) -> None:
        stream = self.stream
        if stream is not None and stream.is_tls and not self._listener.is_counted(self):
            self._listener.handshake_failed(self, error)
        self.codec.receive_reset()

    def on_released(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:  # if the safety net closed it, the exchange must hear of that
            self.codec.receive_reset()
        self._listener.forget(self)

    def on_congested(self) -> None:
        self._is_congested = True
        self._moved_at = self._listener.reactor.now
        if self.exchange is not None:
            self.exchange.on_front_blocked()

    def on_drained(self) -> None:
        self._is_congested = False
        if self.exchange is not None:
            self.exchange.on_front_drained()
        elif not self._is_closing:
            self._next()

    # -- the codec's shell -----------------------------------------------------------------------------

    def open_exchange(self, stream: ServerStream) -> Exchange:
        service = self._listener.service
        self._exchanges += 1
        self._head_since = 0.0
        if self._is_draining or (service.max_requests and self._exchanges >= service.max_requests):
            # The end is our wish, not the client's: it may be sending its next request already, and closing
            # over that would reset the connection and with it this answer (RFC 9112 9.6).
            self._ends_linger = not self.codec.close_after
            self.codec.close_after = True
        exchange = open_exchange(service, stream, self.peer)
        self.exchange = exchange
        return exchange

    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        self._ends_linger = True
        exchange = Exchange(self._listener.service, stream, self.peer)
        exchange.refuse(error)

    def wake(self) -> None:
        self._listener.reactor.wake(self)

    def flush(self) -> None:
        """The reactor's call at the end of a batch."""
        codec = self.codec
        out = codec.out
        stream = self.stream
        if out:
            codec.out = []
            if stream is not None:
                stream.write(out)
        if self._is_closing and stream is not None:
            stream.close(linger=self._ends_linger)

    def exchange_done(self, is_reusable: bool) -> None:
        exchange = self.exchange
        self.exchange = None
        self._idle_since = self._listener.reactor.now
        if not is_reusable:
            # Without an end to its request the client is still sending: closing at once would destroy our
            # answer on its way.
            self._begin_close(linger=self._ends_linger or (exchange is not None and exchange.is_cut_short))
        elif not self._is_receiving:
            self._next()

    def reset(self) -> None:
        """Close so that nothing sent before can be taken for complete."""
        self._is_closing = True
        exchange, self.exchange = self.exchange, None
        if self.stream is not None:
            out, self.codec.out = self.codec.out, []
            if out and not self._is_congested:
                self.stream.write(out)
            self.stream.reset()
        if exchange is not None and not exchange.is_done:
            self.codec.receive_reset()

    # -- between exchanges -----------------------------------------------------------------------------

    def _next(self) -> None:
        """The connection is idle: take the request that came early, or wait for one."""
        if self._is_congested or self.stream is None:
            return
        self.stream.resume()
        if self.codec.has_pipelined:
            held = self.codec.take_pipelined()
            self._listener.reactor.call_soon(self._take_early, held)

    def _take_early(self, held: bytes) -> None:
        if self.stream is not None and not self.stream.is_closed:
            self.on_bytes(held)

    def _begin_close(self, linger: bool) -> None:
        self._is_closing = True
        self._ends_linger = linger
        self.wake()

    def drain(self) -> None:
        """Take one more request at most: its answer says so. A connection that is idle closes.

        Not at once if it was busy a moment ago: its next request may be on its way, and would be lost.
        """
        self._is_draining = True
        if self.codec.writing is IDLE:
            self.codec.close_after = True
        if self.stream is None or self.stream.is_shaking_hands:
            return
        if self.codec.is_idle:
            self._close_if_idle(self._listener.reactor.now)
        elif self.exchange is not None:
            self.exchange.leave()

    def _close_if_idle(self, now: float) -> None:
        limit_s = self._listener.service.timeouts.idle
        if self._is_draining and self.codec.is_idle:
            limit_s = min(limit_s, PARTING_S)
        if not self._is_closing and now - self._idle_since > limit_s:
            self._begin_close(linger=False)

    def go_away(self) -> None:
        """The drain's time is up."""
        if self.exchange is not None:
            self.exchange.go_away()
        if not self._is_closing:
            self.reset()

    def sweep(self, now: float) -> None:
        """Find what is due."""
        stream = self.stream
        if stream is None or stream.is_closed:
            return
        timeouts = self._listener.service.timeouts
        unsent = stream.backlog_bytes
        if not unsent or unsent != self._unsent:
            self._unsent = unsent
            self._moved_at = now
        if stream.is_shaking_hands:
            if now - self._idle_since > self._listener.handshake_timeout_s:
                self._listener.handshake_failed(self, "timeout")
                stream.reset()
        elif unsent and now - self._moved_at > self._body_timeout_s():
            self._slow_reader()
        elif self.exchange is not None:
            self.exchange.sweep(now)
        elif self._is_closing:
            stream.sweep(now)
        elif self._head_since:
            if now - self._head_since > timeouts.header:
                self._head_since = 0.0
                self.codec.fail(DeadlineError(Reason.SLOW_HEAD))
        else:
            self._close_if_idle(now)

    def _body_timeout_s(self) -> float:
        exchange = self.exchange
        return self._listener.service.timeouts.body if exchange is None else exchange.body_timeout_s

    def _slow_reader(self) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.on_request_abort(DeadlineError(Reason.SLOW_READER))
        else:
            self._listener.service.counters.errors.add(Reason.SLOW_READER.value)
            self._listener.service.security_event("slow_reader", self.peer, "the client does not read")
        self.reset()

    def facts(self) -> Facts:
        state = State.IDLE if self.exchange is None else State.ACTIVE
        if self._is_closing:
            state = State.CLOSING
        elif self.stream is None or self.stream.is_shaking_hands:
            state = State.OPENING
        return of_peer(self.peer, "HTTP/1.1", self._exchanges, state)

    def __repr__(self) -> str:
        return f"<H1FrontConnection {self.peer.ip.decode('ascii')} {self.codec!r} {self.exchange!r}>"
