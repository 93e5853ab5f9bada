"""One client's HTTP/3 connection: the QUIC session, the codec's shell, the home of its exchanges.

A connection ends in two steps, as HTTP/2's does (RFC 9114 5.2): the client is told that it is to leave, and a
moment later which requests are still served. Then it is closed with H3_NO_ERROR, when what it was sent has
arrived.

What a client does not read is held back in its streams, each up to a bound; a stream whose client takes
nothing of it is reset, also when its exchange is long complete.
"""

from typing import TYPE_CHECKING, Final

from expressgateway.net.facts import Facts, State
from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.events import Ended
from expressgateway.net.shared_front import SharedFront
from expressgateway.proxy.forwarding import Peer
from expressgateway.wire.h3.frames import NO_ERROR, REQUEST_CANCELLED
from expressgateway.wire.h3.server import H3Server
from expressgateway.wire.h3.streams import H3Stream

if TYPE_CHECKING:
    from expressgateway.net.h3_listener import H3Listener

LINGER_S: Final = 5.0  # for the last answers to arrive, at the end


class H3FrontConnection(SharedFront[H3Stream]):
    """See the module's text. Implements ``Session``."""

    __slots__ = (
        "_close_at",
        "_leaves_when_open",
        "codec",
        "quic",
    )

    label = "HTTP/3"
    _listener: "H3Listener"

    def __init__(self, listener: "H3Listener", peer: Peer, quic: QuicConnection) -> None:
        super().__init__(listener, peer)
        # Wiring
        self.quic = quic
        self.codec = H3Server(self, quic.engine, listener.h3_limits)
        # Connection
        self._close_at = (
            0.0  # it is closed by then, or as soon as everything has arrived; 0: it is not ending
        )
        self._leaves_when_open = False

    def facts(self) -> Facts:
        told = super().facts()
        return told if self.quic.engine.is_open else told._replace(state=State.OPENING)

    # -- Session ---------------------------------------------------------------------------------------

    def on_open(self) -> None:
        self.peer.sni = self.quic.engine.sni
        self._idle_since = self._listener.reactor.now
        self.quic.way.opened(self.quic)
        self.codec.begin(self._listener.reactor.now)
        if self._leaves_when_open:
            super().drain()

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.codec.receive(stream_id, data, end, self._listener.reactor.now)

    def on_stream_reset(self, stream_id: int, code: int) -> None:
        self.codec.receive_reset(stream_id, code, self._listener.reactor.now)

    def on_stream_stop(self, stream_id: int, code: int) -> None:
        self.codec.receive_stop(stream_id, code, self._listener.reactor.now)

    def on_streams_allowed(self) -> None:
        """We open none but the three that every client allows."""

    def on_datagram(self, data: bytes) -> None:
        """None were agreed on."""

    def on_ended(self, ended: Ended) -> None:
        self.quic.way.ended(self.quic, ended)
        self.codec.receive_closed(str(ended))

    def on_flushed(self) -> None:
        self.codec.sent()
        engine = self.quic.engine
        if self._close_at and engine.ended is None and engine.is_settled:
            engine.close(NO_ERROR, "")
            self.quic.wake()

    def on_over(self) -> None:
        self.codec.receive_closed("the connection is gone")
        self._listener.forget(self.quic)
        del self.codec  # which knows its shell

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self.quic.wake()

    def close(self, linger: bool) -> None:
        if linger and not self._close_at:
            self._close_at = self._listener.reactor.now + LINGER_S
        self.quic.wake()

    # -- ending ----------------------------------------------------------------------------------------

    def say_goaway_soon(self) -> None:
        self.codec.go_away_soon()

    def say_goaway(self) -> None:
        self.codec.go_away()

    def cancel(self, stream: H3Stream) -> None:
        self.codec.reset_stream(stream, REQUEST_CANCELLED)

    def drain(self) -> None:
        """Tell the client to leave; what it has begun is served. A handshake, too: a client that is refused
        in the middle of one does not come back, and its first request would be lost."""
        if self.quic.engine.is_open:
            super().drain()
        else:
            self._leaves_when_open = True

    def go_away(self) -> None:
        """The drain's time is up. What is open still is reset, so it cannot be taken for complete; what
        sessions were told is sent."""
        for exchange in list(self._exchanges.values()):
            exchange.go_away()
        self.codec.go_away()
        for stream in list(self.codec.streams.values()):
            if not stream.parting_at:
                self.codec.reset_stream(stream, REQUEST_CANCELLED)
        self.quic.flush()
        self.quic.engine.close(NO_ERROR, "")
        self.quic.flush()

    def sweep(self, now: float) -> None:
        """Find what is due."""
        engine = self.quic.engine
        if engine.ended is not None or not engine.is_open:
            return
        if self._close_at and now >= self._close_at:
            engine.close(NO_ERROR, "")
            self.quic.wake()
            return
        codec = self.codec
        timeouts = self._listener.service.timeouts
        codec.fail_slow_heads(now - timeouts.header)
        codec.sweep(now)
        self.sweep_exchanges(now)
        if codec.streams:
            self.sweep_stalled(codec.streams.values(), now)
        self.sweep_leaving(now)
