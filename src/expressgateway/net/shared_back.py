"""Connections to one backend that many exchanges share, whatever version of HTTP is spoken on them.

An exchange is given a stream at once where a connection has one left; else it waits for the connection that
is being made, or for a stream that ends. A new connection is given one exchange until its backend has said
how many it allows: what is above that may cost the whole connection, and cannot always be sent again.

Another connection is made only when all that there are allow no more; if it cannot be made, who waits goes
on waiting for a stream of the others. A backend that says it goes away (GOAWAY) is asked on another
connection from then on; what it has not looked at comes back to its exchange, which may send it again.
"""

from typing import Final, Generic, Protocol, TypeVar

from expressgateway.net.reactor import Reactor
from expressgateway.upstream.backend import Backend, Waiter
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.sinks import ClientStream

MAX_CONNECTIONS: Final = 16  # to one backend and worker; beyond it exchanges wait for a stream
MAX_WAITING: Final = 4096  # exchanges; more are refused
IDLE_S: Final = 60.0  # without a stream
REDIAL_S: Final = 1.0  # after one more connection could not be made, while there are others


class SharedConnection(Protocol):
    """One of them, as the group sees it."""

    only_for: Waiter | None
    """The one whose client it speaks for; ``None``: everybody's."""
    is_open: bool
    is_told: bool
    """Whether the backend has said how many streams it allows; until then one is used."""

    @property
    def can_open(self) -> bool:
        """Whether it has a stream left."""

    @property
    def is_lasting(self) -> bool:
        """Open, and streams will be given again when others end."""

    @property
    def is_idle(self) -> bool: ...
    def lease(self, waiter: Waiter) -> ClientStream:
        """A stream of this connection, which has one left."""

    def leave(self) -> None:
        """Take no more exchanges, and close after the last."""

    def sweep(self, now: float) -> None: ...


C = TypeVar("C", bound=SharedConnection)


class SharedConnections(Generic[C]):
    """All connections of one worker to one backend. Implements ``upstream.backend.Connections``."""

    __slots__ = (
        "_begun",
        "_dial_at",
        "_everyone",
        "_failing",
        "_is_serving_later",
        "_waiting",
        "backend",
        "is_leaving",
        "is_single_use",
        "reactor",
    )

    def __init__(self, backend: Backend, reactor: Reactor) -> None:
        self.backend = backend
        self.reactor = reactor
        self._everyone: list[C] = []  # at most MAX_CONNECTIONS, and those that close
        self._begun: dict[C, float] = {}  # of these, those not open yet: since when, in seconds
        self._waiting: dict[Waiter, float] = {}  # by when they must be served; at most MAX_WAITING
        self._failing: dict[Waiter, UpstreamError] = {}  # to be told after this batch of events
        self._dial_at = 0.0  # seconds: not before then
        self.is_leaving = False
        self._is_serving_later = False
        self.is_single_use = backend.settings.send_proxy is not None
        """A PROXY header speaks for one client: such a connection cannot serve another."""

    @property
    def connect_timeout_s(self) -> float:
        """For a connection to be made."""
        raise NotImplementedError

    def make(self, due: float, waiter: Waiter, only_for: Waiter | None) -> C:
        """Begin a connection that is to be open by ``due``, on behalf of ``waiter``. Raises ``OSError``."""
        raise NotImplementedError

    def lease(self, waiter: Waiter, fresh: bool = False) -> ClientStream | None:
        """``fresh`` makes no difference: a connection that failed gives no more streams."""
        if not self._waiting and not self.is_single_use:
            for connection in self._everyone:
                if connection.can_open:
                    return connection.lease(waiter)
        if len(self._waiting) >= MAX_WAITING:
            self._fail_later(waiter, UpstreamError(Fault.SATURATED, "too many exchanges wait for a stream"))
            return None
        self._waiting[waiter] = self.reactor.now + self.connect_timeout_s
        if self.is_single_use:
            self._dial(waiter, waiter)
        else:
            self._dial_if_needed()
        return None

    def _dial_if_needed(self) -> None:
        """Make a connection for those who wait, unless there is one that will do."""
        lasting = 0
        for each in self._everyone:
            if each.can_open:
                self.stream_ended()
                return
            if not each.is_open or (each.is_lasting and not each.is_told):
                return
            lasting += each.is_lasting
        if (
            lasting < MAX_CONNECTIONS
            and len(self._everyone) < 2 * MAX_CONNECTIONS
            and self.reactor.now >= self._dial_at
        ):
            self._dial(next(iter(self._waiting)), None)
        # Else the next stream that ends, or the next sweep, helps.

    def _dial(self, waiter: Waiter, only_for: Waiter | None) -> None:
        """``waiter``: on whose behalf."""
        try:
            connection = self.make(self.reactor.now + self.connect_timeout_s, waiter, only_for)
        except OSError as error:
            failure = UpstreamError(Fault.OVER_CAPACITY, f"no socket for a connection: {error.strerror}")
            for each in self._left_alone(only_for):
                del self._waiting[each]
                self._fail_later(each, failure)
            return
        self._everyone.append(connection)
        self._begun[connection] = self.reactor.now
        self.backend.opened()

    def _fail_later(self, waiter: Waiter, error: UpstreamError) -> None:
        self._failing[waiter] = error
        self.reactor.call_soon(self._fail, waiter)

    def _fail(self, waiter: Waiter) -> None:
        error = self._failing.pop(waiter, None)
        if error is not None:
            waiter.on_lease_failed(error)

    def cancel(self, waiter: Waiter) -> None:
        self._waiting.pop(waiter, None)
        self._failing.pop(waiter, None)

    def opened(self, connection: C) -> None:
        begun_at = self._begun.pop(connection, None)
        if begun_at is not None:
            self.backend.connect_durations.observe(self.reactor.now - begun_at)
        waiter = connection.only_for
        if waiter is None:
            self.serve_waiting()
            self.room_changed()
        elif self._waiting.pop(waiter, None) is not None:
            waiter.on_leased(connection.lease(waiter))

    def serve_waiting(self) -> None:
        """Give streams to those who wait, first come, first served."""
        self._is_serving_later = False
        if self.is_single_use:
            return
        while self._waiting:
            connection = next((each for each in self._everyone if each.can_open), None)
            if connection is None:
                self._dial_if_needed()
                return
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.on_leased(connection.lease(waiter))

    def stream_ended(self) -> None:
        """There may be a stream for one who waits: not from inside the codec's call."""
        if self._waiting and not self._is_serving_later:
            self._is_serving_later = True
            self.reactor.call_soon(self.serve_waiting)

    def room_changed(self) -> None:
        """There may be streams that no exchange has left: for those, too, who wait in the pool."""
        self.stream_ended()
        if self.backend.on_freed is not None:
            self.backend.on_freed()

    def dial_failed(self, connection: C, error: UpstreamError) -> None:
        """A connection could not be made."""
        for waiter in self._left_alone(connection.only_for):
            if self._waiting.pop(waiter, None) is not None:  # it may have left because of the one before
                waiter.on_lease_failed(error)

    def _left_alone(self, only_for: Waiter | None) -> list[Waiter]:
        """Who of those who wait has nothing left to wait for, without a connection that failed."""
        if only_for is not None:
            return [only_for] if only_for in self._waiting else []
        if any(each.is_lasting for each in self._everyone):
            self._dial_at = self.reactor.now + REDIAL_S
            return []
        return list(self._waiting)

    def forget(self, connection: C) -> None:
        self._begun.pop(connection, None)
        if connection in self._everyone:
            self._everyone.remove(connection)
            self.backend.closed()
            self.stream_ended()

    def sweep(self, now: float) -> None:
        for connection in list(self._everyone):
            connection.sweep(now)
        late = [waiter for waiter, due in self._waiting.items() if now >= due]
        for waiter in late:
            if self._waiting.pop(waiter, None) is not None:
                waiter.on_lease_failed(
                    UpstreamError(Fault.SATURATED, "no connection had a stream left in time")
                )
        self.stream_ended()  # a connection may be made now that could not be before

    def close_idle(self) -> None:
        self.is_leaving = True
        for connection in list(self._everyone):
            if connection.is_open:
                connection.leave()
        self.stream_ended()

    @property
    def has_room(self) -> bool:
        return not self.is_single_use and any(each.can_open for each in self._everyone)

    @property
    def idle(self) -> int:
        return sum(each.is_idle for each in self._everyone)

    @property
    def open(self) -> int:
        return len(self._everyone)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.backend.id} open={self.open} waiting={len(self._waiting)}>"
