"""One client's HTTP/2 connection: the stream's owner, the codec's shell, the home of its exchanges.

A connection ends in two steps (RFC 9113 6.8): the client is told that it is to leave, and a moment later
which streams are still served; so nothing that was on its way is lost.

What a client does not read is held back in three places. Bodies wait in their streams, each up to a bound;
a stream whose client takes nothing of it is reset, also when its exchange is long complete. What a stream
cannot hold back - heads, and answers to frames - stands in the socket's backlog: past ``DEAF_BYTES`` of it
nothing more is read, so that a client which only asks is bounded by what it has asked.
"""

from typing import TYPE_CHECKING, Final

from expressgateway.net.facts import Facts, State, of_peer
from expressgateway.net.h1_front import PARTING_S
from expressgateway.net.shared_front import SharedFront
from expressgateway.net.stream import Stream
from expressgateway.proxy.errors import Reason
from expressgateway.proxy.forwarding import Peer
from expressgateway.wire.h2.frames import CANCEL, ENHANCE_YOUR_CALM, PREFACE, H2ConnectionError
from expressgateway.wire.h2.server import H2Server
from expressgateway.wire.h2.streams import H2Stream

if TYPE_CHECKING:
    from expressgateway.net.http_listener import HttpListener

DEAF_BYTES: Final = 524_288  # of backlog: more than one quantum of bodies, and a batch of heads


class H2FrontConnection(SharedFront[H2Stream]):
    """See the module's text."""

    __slots__ = (
        "_ends_linger",
        "_is_closing",
        "_mid_id",
        "_mid_since",
        "_moved_at",
        "_unsent",
        "codec",
        "stream",
    )

    label = "HTTP/2"
    _listener: "HttpListener"

    def __init__(self, listener: "HttpListener", peer: Peer, stream: Stream) -> None:
        super().__init__(listener, peer)
        # Wiring
        self.stream = stream
        self.codec = H2Server(self, listener.h2_limits, peer.scheme)
        # Connection
        now = listener.reactor.now
        self._mid_since = 0.0  # 0: no head is incomplete
        self._mid_id = 0  # the last head that was complete then
        self._unsent = 0  # bytes waiting at the last sweep, and since when they have not moved
        self._moved_at = now
        self._is_closing = False
        self._ends_linger = False

    def begin(self) -> None:
        """Take the stream over: it is open, and nothing was read from it that is not given here."""
        self.stream.owner = self
        self.codec.begin()

    # -- StreamOwner -----------------------------------------------------------------------------------

    def on_open(self) -> None:
        """It is open already."""

    def on_bytes(self, data: bytes) -> None:
        self.codec.receive_data(data, self._listener.reactor.now)

    def on_eof(self) -> None:
        self.codec.receive_eof()

    def on_closed(self, error: str) -> None:
        self.codec.receive_reset(error)

    def on_released(self) -> None:
        self.codec.receive_reset()
        self._listener.forget(self)

    def on_congested(self) -> None:
        self._moved_at = self._listener.reactor.now
        self.codec.congested()

    def on_drained(self) -> None:
        self.stream.resume()
        self.codec.drained()

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self._listener.reactor.wake(self)

    def close(self, linger: bool) -> None:
        self._is_closing = True
        self._ends_linger = linger
        self.wake()

    def flush(self) -> None:
        """The reactor's call at the end of a batch."""
        stream = self.stream
        out = self.codec.take_out()
        if out:
            stream.write(out)
            if stream.backlog_bytes > DEAF_BYTES:
                stream.pause()
        if self._is_closing:
            stream.close(linger=self._ends_linger)

    # -- ending ----------------------------------------------------------------------------------------

    def say_goaway_soon(self) -> None:
        self.codec.go_away_soon()

    def say_goaway(self) -> None:
        self.codec.go_away()

    def cancel(self, stream: H2Stream) -> None:
        self.codec.reset_stream(stream, CANCEL)

    def go_away(self) -> None:
        """The drain's time is up."""
        for exchange in list(self._exchanges.values()):
            exchange.go_away()
        self.codec.go_away()
        self.flush()
        # What is open still was not ended, so it cannot be taken for complete; and what sessions were told
        # arrives.
        self.codec.receive_reset()
        self._ends_linger = True
        self.flush()

    def reset(self) -> None:
        """Close so that nothing sent before can be taken for complete."""
        self.codec.receive_reset()
        self.stream.reset()

    def sweep(self, now: float) -> None:
        """Find what is due."""
        stream = self.stream
        if stream.is_closed:
            return
        if self._is_closing:
            stream.sweep(now)
            return
        timeouts = self._listener.service.timeouts
        codec = self.codec
        unsent = stream.backlog_bytes
        if not unsent or unsent != self._unsent:
            self._unsent = unsent
            self._moved_at = now
        if unsent and now - self._moved_at > timeouts.body:
            self._listener.service.counters.errors.add(Reason.SLOW_READER.value)
            self._listener.service.security_event("slow_reader", self.peer, "the client does not read")
            self.reset()
            return
        if not codec.is_mid_head:
            self._mid_since = 0.0
        elif not self._mid_since or codec.last_id != self._mid_id:
            self._mid_since = now
            self._mid_id = codec.last_id
        elif now - self._mid_since > timeouts.header:
            self._listener.service.counters.errors.add("slow_head")
            codec.fail(
                H2ConnectionError(ENHANCE_YOUR_CALM, "a header block was not completed in time", "slow_head")
            )
            return
        codec.sweep(now)
        self.sweep_exchanges(now)
        self.sweep_stalled(codec.streams.values(), now)
        self.sweep_leaving(now)


class H2cGreeting:
    """Waits until it is clear whether a client begins with HTTP/2's preface (RFC 9113 3.3)."""

    __slots__ = ("_held", "_is_draining", "_listener", "_since", "peer", "stream")

    def __init__(self, listener: "HttpListener", peer: Peer) -> None:
        self._listener = listener
        self.peer = peer
        self.stream: Stream | None = None
        self._held = b""  # shorter than the preface
        self._since = 0.0  # of the first byte, or of the connection
        self._is_draining = False

    def begin(self) -> None:
        self._since = self._listener.reactor.now
        if self.stream is not None:
            self.stream.start()

    def on_open(self) -> None:
        """Nothing is known yet."""

    def on_bytes(self, data: bytes) -> None:
        held = self._held + data
        if PREFACE.startswith(held[: len(PREFACE)]):
            if len(held) < len(PREFACE):
                if not self._held:
                    self._since = self._listener.reactor.now
                self._held = held
                return
            self._listener.speak_h2(self, held)
        else:
            self._listener.speak_h1(self, held)

    def on_eof(self) -> None:
        self.reset()

    def on_closed(self, error: str) -> None:
        """It leaves without having asked for anything."""

    def on_released(self) -> None:
        self._listener.forget(self)

    def on_congested(self) -> None:
        """Nothing was sent."""

    def on_drained(self) -> None:
        """As above."""

    def facts(self) -> Facts:
        return of_peer(self.peer, "HTTP/1.1", 0, State.OPENING)

    def drain(self) -> None:
        """Its first request may be on its way: what it becomes is drained; without one it ends soon."""
        self._is_draining = True

    def go_away(self) -> None:
        self.reset()

    def reset(self) -> None:
        if self.stream is not None:
            self.stream.reset()

    def sweep(self, now: float) -> None:
        service = self._listener.service
        timeouts = service.timeouts
        idle_s = PARTING_S if self._is_draining else timeouts.idle
        if now - self._since > (timeouts.header if self._held else idle_s):
            if self._held:
                service.counters.errors.add(Reason.SLOW_HEAD.value)
                service.security_event("slow_head", self.peer, "a preface was not completed in time")
            self.reset()
