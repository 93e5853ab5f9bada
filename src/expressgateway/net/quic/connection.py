"""One QUIC connection between its engine and the network: datagrams in, datagrams out, time.

Whatever happens to a connection - datagrams, a session that sends, a moment that comes - ends in one
``flush`` at the end of the reactor's batch. What the socket does not take waits here, at most one burst, and
nothing more is asked of the engine until it is gone: its streams fill, and backpressure does the rest.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from expressgateway.net.datagram import Control
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import NO_VIABLE_PATH, Address, Ended, EngineSink
from expressgateway.net.quic.timers import NEVER, Timers
from expressgateway.net.reactor import Reactor

BURST: Final = 64  # datagrams of one connection in one turn
_NO_CONTROL: Final[Sequence[Control]] = ()


class Session(EngineSink, Protocol):
    """What is spoken on a connection's streams."""

    def on_flushed(self) -> None:
        """The engine was asked for datagrams, and there may have been some: streams may have room again, and
        whoever has something to send from now on is to ``wake``."""

    def on_over(self) -> None:
        """The connection is gone and forgotten."""


class Way(Protocol):
    """Where a connection's datagrams go."""

    reactor: Reactor
    timers: Timers

    def send(self, datagrams: list[bytes], address: Address, control: Sequence[Control]) -> int:
        """Gives how many were taken; the others are offered again after ``QuicConnection.writable``."""

    def blocked(self, connection: "QuicConnection") -> None:
        """It has datagrams that were not taken."""

    def opened(self, connection: "QuicConnection") -> None:
        """Its handshake is complete."""

    def ended(self, connection: "QuicConnection", ended: Ended) -> None:
        """It is over; its last packets are on their way."""

    def forget(self, connection: "QuicConnection") -> None: ...
    def on_cid_issued(self, connection: "QuicConnection", cid: bytes) -> None: ...
    def on_cid_retired(self, connection: "QuicConnection", cid: bytes) -> None: ...


class QuicConnection:
    """See the module's text. Implements ``Timed`` and ``EngineOwner``."""

    __slots__ = (
        "_is_forgotten",
        "_is_woken",
        "_session",
        "_unsent",
        "control",
        "due",
        "engine",
        "way",
    )

    engine: Engine

    def __init__(self, way: Way) -> None:
        """``engine`` is to be set at once, then ``session``."""
        self.way = way
        self._session: Session = NOBODY
        self.control: Sequence[Control] = _NO_CONTROL
        """What makes answers come from the address that the peer last used."""
        self.due = NEVER
        self._unsent: list[tuple[bytes, Address]] = []  # at most BURST, and one packet of credit
        self._is_woken = False
        self._is_forgotten = False

    @property
    def session(self) -> Session:
        return self._session

    @session.setter
    def session(self, session: Session) -> None:
        self._session = session
        self.engine.sink = session

    def receive(
        self, data: bytes, segment_bytes: int, address: Address, control: Sequence[Control], now: float
    ) -> None:
        self.control = control
        self.engine.receive(data, segment_bytes, address, now)
        if not self._is_woken:
            self.wake()

    def wake(self) -> None:
        """Something may have to be sent."""
        if not self._is_woken:
            self._is_woken = True
            self.way.reactor.wake(self)

    def on_cid_issued(self, cid: bytes) -> None:
        self.way.on_cid_issued(self, cid)

    def on_cid_retired(self, cid: bytes) -> None:
        self.way.on_cid_retired(self, cid)

    def on_timer(self, now: float) -> None:
        if self._is_forgotten:
            return
        engine = self.engine
        timer = engine.timer()
        if timer is not None and timer <= now:
            engine.handle_timer(now)
            self.wake()
        elif timer is not None:
            self.way.timers.schedule(self, timer)

    def writable(self) -> None:
        """The socket takes more."""
        self.wake()

    def flush(self) -> None:
        """The reactor's call at the end of a batch."""
        self._is_woken = False
        if self._is_forgotten:
            return
        way = self.way
        engine = self.engine
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            if not self._send(unsent):
                return
        out = engine.transmit(way.reactor.now, BURST)
        if out and self._send(out) and len(out) >= BURST:
            way.reactor.call_soon(self.wake)  # others first
        self.session.on_flushed()
        if engine.is_over:
            self.forget()
            return
        timer = engine.timer()
        if timer is not None and timer < self.due:
            way.timers.schedule(self, timer)

    def _send(self, out: list[tuple[bytes, Address]]) -> bool:
        """False: the socket is full, and what it did not take waits."""
        address = out[0][1]
        if out[-1][1] == address:
            # fast path: one path
            taken = self.way.send([each[0] for each in out], address, self.control)
        else:
            taken = 0
            for datagram, to in out:
                if not self.way.send([datagram], to, self.control):
                    break
                taken += 1
        if taken < len(out):
            self._unsent = out[taken:]
            self.way.blocked(self)
            return False
        return True

    def lose(self, error: OSError) -> None:
        """The network says that there is no way to the peer."""
        self.engine.abandon(NO_VIABLE_PATH, error.strerror or str(error), error.errno or 0)
        self.wake()

    def forget(self) -> None:
        """It is over, or given up without a word. Idempotent."""
        if not self._is_forgotten:
            self._is_forgotten = True
            self._unsent.clear()
            self.way.timers.cancel(self)
            self.way.forget(self)
            self.session.on_over()
            # Each knows the other; a connection's memory is too large to wait for the cyclic collector.
            self._session = NOBODY
            self.engine.release(NOBODY)

    def reset(self) -> None:
        """The safety net's call: end it now, telling the peer if that works."""
        self.engine.close(0x102, "")  # H3_INTERNAL_ERROR: whatever is spoken, something of ours broke
        self.wake()

    def __repr__(self) -> str:
        return f"<QuicConnection {self.engine.cid.hex()} with {self.engine.address}>"


def without_zone(address: Address) -> Address:
    """A socket's address as the core can read it. An IPv6 address of one link has its zone in the host, too
    (``fe80::1%eth0``); the scope says the same."""
    host = address[0]
    return (host.partition("%")[0], *address[1:]) if "%" in host else address


class _Nobody:
    """A session's place until there is one, and when it is gone."""

    def on_open(self) -> None: ...
    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None: ...
    def on_stream_reset(self, stream_id: int, code: int) -> None: ...
    def on_stream_stop(self, stream_id: int, code: int) -> None: ...
    def on_streams_allowed(self) -> None: ...
    def on_datagram(self, data: bytes) -> None: ...
    def on_ended(self, ended: Ended) -> None: ...
    def on_flushed(self) -> None: ...
    def on_over(self) -> None: ...
    def wake(self) -> None: ...
    def on_cid_issued(self, cid: bytes) -> None: ...
    def on_cid_retired(self, cid: bytes) -> None: ...


NOBODY: Final = _Nobody()
