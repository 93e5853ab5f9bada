"""What a test sees of the two far ends of an exchange, whatever protocol joins them to the gateway.

A ``ClientEnd`` is one request's client, a ``Work`` is one request as a backend sees it, a ``BackSide`` is a
backend's connections. ``h1_ends`` and ``memory`` have them for their protocols.
"""

from typing import Any, Protocol

from expressgateway.proxy.exchange import Exchange
from expressgateway.proxy.forwarding import Peer
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.errors import WireError
from expressgateway.wire.sinks import ServerStream

FieldList = list[tuple[bytes, bytes]]


class Settling(Protocol):
    """The world around the ends: runs what was put off until a batch of events is over."""

    exchanges: list[Exchange]

    def later(self, call: Any) -> None: ...
    def settle(self) -> None: ...
    def new_exchange(self, stream: ServerStream, peer: Peer) -> Exchange: ...


class Seen:
    """One message as a far end saw it."""

    def __init__(self) -> None:
        self.headers: FieldList = []
        self.body = b""
        self.trailers: FieldList = []
        self.is_complete = False
        self.is_cut = False
        """Ended in a way that cannot be taken for complete."""
        self.cut_by: WireError | None = None
        """The error that this end is to tell its peer, where its protocol can."""
        self.pauses: list[str] = []
        """What the gateway asked of this end's sender: ``pause`` and ``resume``."""

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def is_paused(self) -> bool:
        return self.pauses[-1:] == ["pause"]


class ClientEnd(Seen):
    """A client with one request under way."""

    def __init__(self) -> None:
        super().__init__()
        self.status = 0
        self.interim: list[int] = []
        self.is_closed = False
        """The connection (or stream) ended gracefully after the response."""
        self.raw = b""
        """What came through a tunnel."""
        self.waiting_bytes = 0
        """Bytes that this client has not taken yet."""
        self.exchange: Exchange | None = None

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
        raise NotImplementedError

    def data(self, chunk: bytes, end: bool = False) -> None:
        raise NotImplementedError

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        raise NotImplementedError

    def vanish(self) -> None:
        """The client goes away."""
        raise NotImplementedError

    def half_close(self) -> None:
        """Of a tunnel: nothing more will come from here."""
        raise NotImplementedError

    def block(self) -> None:
        if self.exchange is not None:
            self.exchange.on_front_blocked()

    def drain(self) -> None:
        if self.exchange is not None:
            self.exchange.on_front_drained()


class Work(Seen):
    """A request as its backend sees it, and the pen for the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.method = b""
        self.path = b""
        self.host = b""
        self.raw = b""
        self.is_tunnel_ended = False

    def interim(self, status: int, headers: FieldList | None = None) -> None:
        raise NotImplementedError

    def reply(
        self,
        status: int = 200,
        *,
        headers: FieldList | None = None,
        length: int | None = None,
        end: bool = False,
    ) -> None:
        raise NotImplementedError

    def data(self, chunk: bytes, end: bool = False) -> None:
        raise NotImplementedError

    def finish(self, *trailers: tuple[bytes, bytes]) -> None:
        raise NotImplementedError

    def accept(self, *fields: tuple[bytes, bytes]) -> None:
        """Agree to an upgrade: with these fields, or as one should."""
        raise NotImplementedError

    def vanish(self) -> None:
        """The backend goes away."""
        raise NotImplementedError

    def half_close(self) -> None:
        raise NotImplementedError

    def block(self) -> None:
        """The backend takes no more of the request."""
        raise NotImplementedError

    def drain(self) -> None:
        raise NotImplementedError

    def ok(self, body: bytes = b"ok") -> None:
        self.reply(200, length=len(body))
        self.data(body, True)


class BackSide:
    """A backend with its connections (``Connections``), and the switches for what can go wrong."""

    def __init__(self, world: Settling, backend: Backend) -> None:
        self.world = world
        self.backend = backend
        self.works: list[Work] = []
        self.fault: Fault | None = None
        """Why connecting fails; ``None``: it does not."""
        self.connects = True
        """Whether connecting comes to an end by itself."""
        self.was_delivered = True
        """Whether the backend's kernel has taken what was sent on a connection that turns out to be dead."""
        self.cancelled = 0
        self.dials = 0
        self.waiting_bytes = 0
        self.pending: list[Waiter] = []

    @property
    def work(self) -> Work:
        return self.works[-1]

    def connect(self) -> None:
        """Bring the oldest dial to its end."""
        if not self.pending:
            return
        waiter = self.pending.pop(0)
        if self.fault is None:
            self.admit(waiter)
        else:
            waiter.on_lease_failed(UpstreamError(self.fault, "it failed"))
        self.world.later(self.recount)

    def dial(self, waiter: Waiter) -> None:
        self.dials += 1
        self.pending.append(waiter)
        self.recount()
        if self.connects:
            self.world.later(self.connect)

    def cancel(self, waiter: Waiter) -> None:
        if waiter in self.pending:
            self.pending.remove(waiter)
            self.cancelled += 1
            self.world.later(self.recount)

    def recount(self) -> None:
        """Tell the backend what has become of its connections."""
        backend = self.backend
        while backend.open < self.open:
            backend.opened()
        while backend.open > self.open:
            backend.closed()

    def keep(self) -> None:
        """A connection is there for whoever comes next."""
        if self.backend.on_freed is not None:
            self.backend.on_freed()

    def admit(self, waiter: Waiter) -> None:
        raise NotImplementedError

    def go_stale(self) -> None:
        """The backend closes what is idle; the gateway has not noticed."""
        raise NotImplementedError

    def sweep(self, now: float) -> None:
        pass

    def close_idle(self) -> None:
        pass

    @property
    def has_room(self) -> bool:
        return self.idle > 0

    @property
    def idle(self) -> int:
        return 0

    @property
    def open(self) -> int:
        """Connections open or being opened."""
        return 0
