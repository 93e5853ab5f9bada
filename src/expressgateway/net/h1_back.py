"""HTTP/1.1 connections to one backend: dialled, leased to one exchange at a time, kept, and reused.

The idle stack is newest first: the connection used last is the one least likely to be closed by the backend,
and a quiet pool shrinks from its old end. A connection is kept shorter than the backend keeps it, so that it
is the gateway who closes; what the backend closes or spoils meanwhile leaves the stack at once, because idle
connections are watched like any other.
"""

from typing import Final

from expressgateway.net.dial import Dialler
from expressgateway.net.h1_shell import StreamShell
from expressgateway.net.reactor import Reactor
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.h1.client import IDLE, H1Client
from expressgateway.wire.h1.fields import FieldReader

MAX_IDLE: Final = 256  # idle connections kept per backend and worker; more are closed
IDLE_S: Final = 4.0  # under the 5 s that common servers keep a connection
MAX_HEAD_BYTES: Final = 65536  # of a backend's response
MAX_FIELDS: Final = 256


class H1Connection(StreamShell):
    """One connection: the stream's owner and the codec's shell."""

    __slots__ = (
        "_group",
        "_is_closing",
        "_is_done",
        "_is_receiving",
        "_is_unsent",
        "_mark",
        "begun_at",
        "codec",
        "due",
        "idle_since",
        "is_open",
        "waiter",
    )

    def __init__(self, group: "H1Connections", waiter: Waiter, due: float) -> None:
        super().__init__()
        # Wiring
        self._group = group
        self.codec = H1Client(self, group.fields, MAX_HEAD_BYTES)
        self.waiter: Waiter | None = waiter
        # Connection
        self.is_open = False
        self.begun_at = group.reactor.now  # seconds, as all times here
        self.due = due  # connected by then
        self.idle_since = 0.0
        self._is_closing = False
        # Exchange
        self._mark = 0  # see Stream.delivery_mark
        self._is_receiving = False
        self._is_done = False  # the exchange ended inside the read under way
        self._is_unsent = False  # nothing of the request was given to the kernel yet

    def begin(self, waiter: Waiter) -> H1Client:
        """Lease this connection out."""
        self.waiter = waiter
        backend = self._group.backend
        backend.leases += 1
        codec = self.codec
        if codec.is_reused:
            backend.reused += 1
        if self.stream is not None:
            self._mark = self.stream.delivery_mark()
        self._is_unsent = True
        codec.open(waiter)
        return codec

    # -- StreamOwner -----------------------------------------------------------------------------------

    def on_open(self) -> None:
        self.is_open = True
        group = self._group
        group.backend.connect_durations.observe(group.reactor.now - self.begun_at)
        waiter = self.waiter
        if waiter is None:  # it gave up meanwhile: a fresh connection is worth keeping
            self._keep_or_close()
            return
        self._group.waiting.pop(waiter, None)
        waiter.on_leased(self.begin(waiter))

    def on_bytes(self, data: bytes) -> None:
        codec = self.codec
        if self._is_unsent and codec.is_open:
            # Leased in this batch of events, and these bytes came before: no answer to what was not asked.
            # The request is taken back, as from a stale connection.
            self._group.backend.unsolicited += 1
            codec.receive_reset()
            return
        self._is_receiving = True
        codec.receive_data(data)
        self._is_receiving = False
        if self._is_done:
            self._is_done = False
            is_clean = codec.reading is IDLE
            if not is_clean:
                self._group.backend.unsolicited += 1
            self._settle(is_clean)
        elif not codec.is_open and not self._is_closing:
            self._unsolicited()

    def on_eof(self) -> None:
        codec = self.codec
        self._is_receiving = True
        codec.receive_eof()
        self._is_receiving = False
        if self._is_done:
            self._is_done = False
            self._settle(False)
        elif not codec.is_open:
            self._close()

    def on_closed(self, error: str) -> None:
        waiter = self.waiter
        if self.is_open:
            self.codec.receive_reset(error)
        elif waiter is not None and self.stream is not None:
            self.waiter = None
            self._group.waiting.pop(waiter, None)
            waiter.on_lease_failed(self._group.dialler.explain(self.stream, error))

    def on_released(self) -> None:
        if self.codec.is_open:  # the safety net closed it: the exchange must hear of that
            self.codec.receive_reset()
        self._group.forget(self)

    def on_congested(self) -> None:
        if self.waiter is not None and self.codec.is_open:
            self.waiter.on_back_blocked()

    def on_drained(self) -> None:
        if self.waiter is not None and self.codec.is_open:
            self.waiter.on_back_drained()

    # -- the codec's shell -----------------------------------------------------------------------------

    def wake(self) -> None:
        self._group.reactor.wake(self)

    def flush(self) -> None:
        """The reactor's call at the end of a batch."""
        codec = self.codec
        out = codec.out
        stream = self.stream
        if out:
            codec.out = []
            self._is_unsent = False
            if stream is not None:
                stream.write(out)

    def was_delivered(self) -> bool:
        if self._is_unsent:
            return False
        return self.stream is None or self.stream.was_delivered(self._mark)

    def exchange_done(self, is_reusable: bool) -> None:
        if self._is_receiving and is_reusable:
            self._is_done = True  # what follows in the same read decides whether it may be used again
        else:
            self._settle(is_reusable)

    def reset(self) -> None:
        self._is_closing = True
        self.waiter = None
        if self.stream is not None:
            self.stream.reset()

    # -- between exchanges -----------------------------------------------------------------------------

    def _settle(self, is_reusable: bool) -> None:
        self.waiter = None
        self.codec.is_reused = True
        if is_reusable:
            self._keep_or_close()
        else:
            self._close()

    def _keep_or_close(self) -> None:
        if self._group.is_single_use:
            self._close()
            return
        if self.stream is not None:
            self.stream.resume()
        self._group.keep(self)

    def _unsolicited(self) -> None:
        """Bytes that no request asked for: the next exchange would take them for its answer."""
        self._group.backend.unsolicited += 1
        self._close()

    def _close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        self._group.drop_idle(self)
        self.flush()
        if self.stream is not None:
            self.stream.close(linger=self.codec.is_tunnel)

    def close(self) -> None:
        self._close()

    def sweep(self, now: float) -> None:
        stream = self.stream
        if stream is None:
            return
        if not self.is_open and now >= self.due and not self._is_closing:
            waiter = self.waiter
            self.waiter = None
            self._is_closing = True
            if waiter is not None:
                self._group.waiting.pop(waiter, None)
                waiter.on_lease_failed(
                    UpstreamError(Fault.CONNECT_TIMEOUT, "the backend did not answer in time")
                )
            stream.reset()
        else:
            stream.sweep(now)


class H1Connections:
    """All connections of one worker to one backend. Implements ``upstream.backend.Connections``."""

    __slots__ = (
        "_everyone",
        "_idle",
        "_is_leaving",
        "backend",
        "dialler",
        "fields",
        "is_single_use",
        "reactor",
        "waiting",
    )

    def __init__(self, backend: Backend, reactor: Reactor, dialler: Dialler) -> None:
        self.backend = backend
        self.reactor = reactor
        self.dialler = dialler
        self.fields = FieldReader(MAX_FIELDS, underscore="allow")
        self._everyone: set[H1Connection] = set()
        self._idle: list[H1Connection] = []  # oldest first; at most MAX_IDLE
        self.waiting: dict[Waiter, H1Connection] = {}
        self._is_leaving = False
        self.is_single_use = backend.settings.send_proxy is not None
        """A PROXY header speaks for one client: such a connection cannot serve another."""

    def lease(self, waiter: Waiter, fresh: bool = False) -> H1Client | None:
        idle = self._idle
        if idle and not fresh:
            self.backend.resumed()
            return idle.pop().begin(waiter)
        due = self.reactor.now + self.dialler.connect_timeout_s
        connection = H1Connection(self, waiter, due)
        try:
            connection.stream = self.dialler.dial(self.backend, connection, waiter.addresses)
        except OSError as error:
            failure = UpstreamError(Fault.OVER_CAPACITY, f"no socket for a connection: {error.strerror}")
            self.reactor.call_soon(waiter.on_lease_failed, failure)
            return None
        self._everyone.add(connection)
        self.waiting[waiter] = connection
        self.backend.opened()
        return None

    def cancel(self, waiter: Waiter) -> None:
        connection = self.waiting.pop(waiter, None)
        if connection is not None:
            connection.waiter = None

    def keep(self, connection: H1Connection) -> None:
        """Put an unused connection on the stack, or close it."""
        if self._is_leaving or len(self._idle) >= MAX_IDLE:
            connection.close()
        else:
            connection.idle_since = self.reactor.now
            self._idle.append(connection)
            self.backend.rested()

    def drop_idle(self, connection: H1Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
            self.backend.resumed()  # until it is closed

    def forget(self, connection: H1Connection) -> None:
        self.drop_idle(connection)
        if connection in self._everyone:
            self._everyone.remove(connection)
            self.backend.closed()

    def sweep(self, now: float) -> None:
        idle = self._idle
        while idle and now - idle[0].idle_since > _idle_limit(idle[0].codec.keep_alive_hint):
            self.backend.resumed()  # until it is closed
            idle.pop(0).close()
        for connection in list(self._everyone):
            connection.sweep(now)

    def close_idle(self) -> None:
        self._is_leaving = True
        for connection in list(self._idle):
            connection.close()

    @property
    def has_room(self) -> bool:
        return bool(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def open(self) -> int:
        return len(self._everyone)

    def __repr__(self) -> str:
        return (
            f"<H1Connections {self.backend.id} open={self.open} idle={self.idle} waiting={len(self.waiting)}>"
        )


def _idle_limit(hint: bytes) -> float:
    """Seconds to keep an idle connection, from the backend's ``Keep-Alive: timeout=N`` if it sent one."""
    for parameter in hint.split(b","):
        name, _, value = parameter.strip(b" \t").partition(b"=")
        if name.lower() == b"timeout" and value.isdigit() and len(value) < 7:
            seconds = int(value)
            return seconds - 1.0 if seconds > 1 else seconds / 2
    return IDLE_S
