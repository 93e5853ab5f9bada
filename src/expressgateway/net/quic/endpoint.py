"""A QUIC endpoint: one bound socket, its connections by connection ID, and who becomes one.

Nothing is kept for a client before it has passed the door: a version that is offered (else Version
Negotiation), an Initial in a datagram of 1200 bytes, an address proved by a Retry where that is asked for,
and room under the caps. What belongs to a connection of another worker is handed over (`Sharing`); what
belongs to none is answered by a stateless reset, within a budget, so that peers of a connection we lost
learn of it.

The socket is read in batches; each buffer goes to its connection as it is, if all of it is one's.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.net.batches import BatchSocket
from expressgateway.net.datagram import Control, reason_of, stand_in
from expressgateway.net.listener import Census, limited, plain_ip
from expressgateway.net.quic.cids import CID_BYTES, worker_of
from expressgateway.net.quic.connection import NOBODY, QuicConnection, Session, without_zone
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import CONNECTION_REFUSED, Address, Ended
from expressgateway.net.quic.refusal import refuse_initial
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import TlsSettings
from expressgateway.net.quic.tokens import BadTokenError, RetryTokens
from expressgateway.net.reactor import IN, OUT, Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.wire import quic
from expressgateway.wire.quic import INITIAL, KNOWN_VERSIONS, LongHeader, read_long, token_of

log = logging.getLogger(__name__)

RECEIVE_BUFFER_BYTES: Final = 4 * 2**20
ANSWERS_PER_S: Final = 500  # stateless ones: resets, refusals, Version Negotiation
HALF_OPEN_BEFORE_RETRY: Final = 128  # adaptive: handshakes under way on this worker
_LAST_READS: Final = 256


class Sharing(Protocol):
    """How workers of one address share its connections."""

    def make_cid(self) -> bytes:
        """A connection ID of ours, which leads to this worker."""

    def owner(self, cid: bytes) -> int | None:
        """The worker that a connection ID leads to, if that is known."""

    def add(self, cid: bytes) -> None: ...
    def remove(self, cid: bytes) -> None: ...
    def give(
        self,
        worker: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: Sequence[Control],
        ecn: int,
    ) -> None:
        """Have the worker take datagrams, if it can."""

    index: int

    @property
    def is_moving(self) -> bool:
        """Whether another worker reads this socket too, or is about to."""
        ...


@dataclass(slots=True)
class EndpointSettings:
    """What a reload may change; connections keep what they began with."""

    tls: TlsSettings
    secret: bytes
    """Of Retry tokens and reset tokens."""
    retry: str
    """``always``, ``adaptive`` or ``never``."""
    handshake_timeout_s: float
    max_datagram_bytes: int
    """Larger ones are dropped."""


class Budget:
    """So many a second, and no burst above that."""

    __slots__ = ("_left", "_per_s", "_since")

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._left = float(per_s)
        self._since = 0.0

    def spend(self, now: float) -> bool:
        self._left = min(self._per_s, self._left + (now - self._since) * self._per_s)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class QuicEndpoint:
    """See the module's text. Implements ``DatagramSink`` and ``Way``."""

    def __init__(
        self,
        reactor: Reactor,
        timers: Timers,
        batch: BatchSocket,
        census: Census,
        counters: ListenerCounters,
        settings: EndpointSettings,
        open_session: Callable[[QuicConnection, str, Address], Session],
        sharing: Sharing,
    ) -> None:
        """``open_session``: what is spoken with a client, given its plain address. It must not raise."""
        self.reactor = reactor
        self.timers = timers
        self.counters = counters
        self.tokens = RetryTokens(settings.secret)
        self._settings = settings
        self._batch = batch
        self._census = census
        self._open_session = open_session
        self.sharing = sharing
        self._by_cid: dict[bytes, QuicConnection] = {}  # a few for each connection
        self._connections: dict[QuicConnection, _Book] = {}  # as many as the census lets in
        self._half_open: dict[QuicConnection, float] = {}  # of these; and since when
        self._newly_open: dict[QuicConnection, float] = {}  # of these, too; and until when
        self._blocked: dict[QuicConnection, None] = {}  # of these: waiting for the socket
        self._answers = Budget(ANSWERS_PER_S)
        self._interest = 0
        self._is_reading = False
        self.is_draining = False
        self._is_stopped = False
        batch.set_receive_buffer(RECEIVE_BUFFER_BYTES)

    @property
    def settings(self) -> EndpointSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: EndpointSettings) -> None:
        if settings.secret != self._settings.secret:
            self.tokens = RetryTokens(settings.secret)
        self._settings = settings

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._is_reading = True
        self._watch(IN)

    def stop(self, *, hands_over: bool = False) -> None:
        """Take what is in the queue, then no new connection; the socket stays open while there are some.

        ``hands_over``: another worker reads the socket from now on, and hands over what is for this one.
        """
        if self._is_stopped:
            return
        if hands_over:
            self._is_reading = False
            self._watch(OUT if self._blocked else 0)
        elif self._is_reading:
            for _ in range(_LAST_READS):
                if not self._read():
                    break
        self.is_draining = self._is_stopped = True
        if not self._connections:
            self._close()

    def leave_group(self, other: socket.socket) -> None:
        """Take what is in the queue, then read no more, and send through ``other``: it is bound to the same
        address, and another worker reads it and hands over what is for this one."""
        if not self._is_reading:
            return
        for _ in range(_LAST_READS):
            if not self._read():
                break
        self._is_reading = False
        self._watch(0)
        stand_in(self._batch.sock, other)
        self._watch(OUT if self._blocked else 0)

    def share_firsts(self) -> None:
        """Let other workers know what clients chose for their first packets: see `Sharing.is_moving`."""
        for connection in (*self._half_open, *self._newly_open):
            first = self._connections[connection].first
            if worker_of(first) is None:
                self.sharing.add(first)

    def _close(self) -> None:
        self._is_reading = False
        self._watch(0)
        self._batch.close()

    def _watch(self, interest: int) -> None:
        before, self._interest = self._interest, interest
        if interest == before:
            return
        if not before:
            self.reactor.add(self._batch.fileno(), interest, self._on_ready)
        elif interest:
            self.reactor.modify(self._batch.fileno(), interest)
        else:
            self.reactor.remove(self._batch.fileno())

    @property
    def open(self) -> int:
        return len(self._connections)

    def connections(self) -> list[QuicConnection]:
        return list(self._connections)

    def sweep(self, now: float) -> None:
        """End handshakes that take too long. To be called a few times in that time."""
        limit_s = self._settings.handshake_timeout_s
        late = []
        for connection, since in self._half_open.items():
            if now - since <= limit_s:
                break  # in the order of their beginning
            late.append(connection)
        for connection in late:
            self.counters.handshake("", False, "timeout")
            self.counters.security.add("slow_handshake")
            connection.forget()
        known = []
        for connection, until in self._newly_open.items():
            if until > now:
                break
            known.append(connection)
        for connection in known:
            # What a client chose for its first packet is used no more. Until now a copy of that packet, late
            # or sent again, would have begun another connection.
            del self._newly_open[connection]
            self.on_cid_retired(connection, self._connections[connection].first)

    # -- reading ---------------------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        if events & OUT:
            self._watch(IN if self._is_reading else 0)
            blocked, self._blocked = self._blocked, {}
            for connection in blocked:
                connection.writable()
        if self._is_reading:
            self._read()

    def _read(self) -> int:
        try:
            return self._batch.receive(self)
        except OSError as error:
            # The kernel's word on an earlier datagram of ours, whose peer is the engine's business.
            self.counters.accept_errors.add(errno.errorcode.get(error.errno or 0, "other"))
            return 1

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        if not data:
            return
        self._take(data, segment_bytes, address, control, ecn, None)

    def on_handed(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        """Another worker received what is ours. It is not handed on."""
        if data:
            self._take(data, segment_bytes, address, control, ecn, self.sharing.index)

    def _take(
        self,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: Sequence[Control],
        ecn: int,
        handed_to: int | None,
    ) -> None:
        if len(address) == 4:
            address = without_zone(address)
        cid = _destination(data)
        size = len(data)
        if handed_to is None:
            self.counters.quic_wire[0] += 1 if size <= segment_bytes else -(-size // segment_bytes)
        if size > segment_bytes:
            # One sender's datagrams may be of several connections.
            start = 0
            for at in range(segment_bytes, size, segment_bytes):
                other = _destination_at(data, at)
                if other != cid:
                    self._dispatch(cid, data[start:at], segment_bytes, address, control, ecn, handed_to)
                    cid, start = other, at
            if start:
                data = data[start:]
        self._dispatch(cid, data, segment_bytes, address, control, ecn, handed_to)

    def _dispatch(
        self,
        cid: bytes,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: Sequence[Control],
        ecn: int,
        handed_to: int | None,
    ) -> None:
        connection = self._by_cid.get(cid)
        if connection is not None:
            connection.receive(data, segment_bytes, address, control, self.reactor.now)
            return
        if handed_to is None:
            worker = self.sharing.owner(cid)
            if worker is not None and worker != self.sharing.index:
                self.sharing.give(worker, data, segment_bytes, address, control, ecn)
                return
        for at in range(0, len(data), segment_bytes):
            datagram = data[at : at + segment_bytes]
            if datagram[0] >= 0x80:
                self._on_unknown_long(datagram, address, control)
                connection = self._by_cid.get(cid)
                if connection is not None:
                    # It has begun with this one; a ClientHello may need several.
                    rest = data[at + segment_bytes :]
                    if rest:
                        connection.receive(rest, segment_bytes, address, control, self.reactor.now)
                    return
            else:
                self._on_unknown_short(datagram, cid, address, control)

    # -- what belongs to nobody ------------------------------------------------------------------------

    def _drop(self, reason: str) -> None:
        self.counters.dropped.add(reason)

    def _on_unknown_short(
        self, datagram: bytes, cid: bytes, address: Address, control: Sequence[Control]
    ) -> None:
        self._drop("unknown_connection")
        if len(datagram) > quic.MIN_RESET_BYTES and self._answers.spend(self.reactor.now):
            token = quic.reset_token(self._settings.secret, cid)
            packet = quic.stateless_reset(token, len(datagram), os.urandom(64))
            if packet:
                self.counters.quic_resets += 1
                self._answer(packet, address, control)

    def _on_unknown_long(self, datagram: bytes, address: Address, control: Sequence[Control]) -> None:
        header = read_long(datagram)
        if header is None:
            self._drop("malformed")
        elif len(datagram) < quic.MIN_INITIAL_BYTES:
            self._drop("short_initial")
        elif header.version not in KNOWN_VERSIONS:
            if header.version and self._answers.spend(self.reactor.now):
                packet = quic.version_negotiation(header, KNOWN_VERSIONS, os.urandom(1)[0])
                self.counters.quic_versions += 1
                self._answer(packet, address, control)
            self._drop("version")
        elif header.type != INITIAL:
            self._drop("unknown_connection")
        elif len(datagram) > self._settings.max_datagram_bytes:
            self._drop("too_big")
        else:
            self._on_initial(datagram, header, address, control)

    def _answer(self, packet: bytes, address: Address, control: Sequence[Control]) -> None:
        """Send what nothing is kept for; never more than was received."""
        try:
            self.counters.quic_wire[1] += self._batch.send(
                [packet], address, self._batch.local.reply(list(control))
            )
        except OSError as error:
            self._drop(reason_of(error))

    # -- the door --------------------------------------------------------------------------------------

    def _on_initial(
        self, datagram: bytes, header: LongHeader, address: Address, control: Sequence[Control]
    ) -> None:
        token = token_of(datagram, header)
        if token is None:
            self._drop("malformed")
            return
        ip = plain_ip(address[0])
        source = (ip, address[1])
        original = header.destination
        retry_cid: bytes | None = None
        if token:
            try:
                original = self.tokens.read(token, source, header.destination, _wall_s())
                retry_cid = header.destination
            except BadTokenError as error:
                if str(error) != "foreign":
                    self._drop(f"token_{error}")
                    if str(error) == "replayed":
                        self.counters.security.add("quic_token_replay")
                    return
                # Not a Retry token of ours: as if there were none (RFC 9000 8.1.3).
        if retry_cid is None and len(header.destination) < quic.MIN_CLIENT_DCID_BYTES:
            self._drop("malformed")
            return
        if retry_cid is None and self._wants_retry():
            cid = self.sharing.make_cid()
            made = self.tokens.make(source, header.destination, cid, _wall_s())
            self.counters.quic_retries += 1
            self._answer(quic.retry(header, cid, made), address, control)
            return
        reason = "draining" if self.is_draining else self._census.enter(ip)
        if reason is not None:
            self._refuse(datagram, header, address, control, ip, reason)
            return
        self._open(datagram, header, address, control, ip, original, retry_cid)

    def _wants_retry(self) -> bool:
        retry = self._settings.retry
        return retry == "always" or (retry == "adaptive" and len(self._half_open) >= HALF_OPEN_BEFORE_RETRY)

    def _refuse(
        self,
        datagram: bytes,
        header: LongHeader,
        address: Address,
        control: Sequence[Control],
        ip: str,
        reason: str,
    ) -> None:
        counters = self.counters
        counters.rejects.add(reason)
        if reason != "draining":
            counters.security.add("connection_flood")
            # The source of a datagram proves nothing: a line for each would be the sender's to choose.
            limited.warning(
                "connection_flood", counters.name, f"a connection was refused: {reason}", client=ip
            )
        if self._answers.spend(self.reactor.now):
            cid = self.sharing.make_cid()
            for packet in refuse_initial(datagram, cid, address, CONNECTION_REFUSED, self.reactor.now):
                self._answer(packet, address, control)

    def _open(
        self,
        datagram: bytes,
        header: LongHeader,
        address: Address,
        control: Sequence[Control],
        ip: str,
        original: bytes,
        retry_cid: bytes | None,
    ) -> None:
        settings = self._settings
        now = self.reactor.now
        # The ID of our Retry leads to this worker already: it goes on as the connection's own.
        cid = self.sharing.make_cid()
        connection = QuicConnection(self)
        book = _Book(ip, header.destination)
        self._connections[connection] = book
        self._half_open[connection] = now
        self.counters.connections += 1
        self.counters.inflight += 1
        connection.engine = Engine(
            NOBODY,
            connection,
            settings.tls,
            address,
            cid,
            now,
            version=header.version,
            original_cid=original,
            destination_cid=header.destination,
            retry_cid=retry_cid,
            is_unnamed=not header.source,
            reset_token=quic.reset_token(settings.secret, cid),
        )
        self._register(connection, cid)
        self._register(connection, header.destination)
        if self.sharing.is_moving and retry_cid is None:
            self.sharing.add(header.destination)
        connection.session = self._open_session(connection, ip, address)
        connection.receive(datagram, len(datagram), address, control, now)

    def _register(self, connection: QuicConnection, cid: bytes) -> None:
        if cid not in self._by_cid:
            self._by_cid[cid] = connection
            self._connections[connection].cids.append(cid)

    # -- Way -------------------------------------------------------------------------------------------

    def opened(self, connection: QuicConnection) -> None:
        if self._half_open.pop(connection, None) is not None:
            self.counters.handshake("TLSv1.3", connection.engine.is_resumed, "ok")
            self._newly_open[connection] = self.reactor.now + self._settings.handshake_timeout_s

    def ended(self, connection: QuicConnection, ended: Ended) -> None:
        if ended.is_violation:
            self.counters.security.add("quic_violation")
            limited.warning("quic_violation", self._connections[connection].ip, f"a QUIC connection: {ended}")
        if self._half_open.pop(connection, None) is not None:
            self.counters.handshake("", False, "failed")
            limited.warning("tls_failed", self._connections[connection].ip, f"QUIC handshake failed: {ended}")

    def on_cid_issued(self, connection: QuicConnection, cid: bytes) -> None:
        self._register(connection, cid)
        self.sharing.add(cid)

    def on_cid_retired(self, connection: QuicConnection, cid: bytes) -> None:
        book = self._connections.get(connection)
        if book is not None and cid in book.cids and self._by_cid.get(cid) is connection:
            book.cids.remove(cid)
            del self._by_cid[cid]
            self.sharing.remove(cid)

    def send(self, datagrams: list[bytes], address: Address, control: Sequence[Control]) -> int:
        try:
            taken = self._batch.send(
                datagrams, address, self._batch.local.reply(list(control)) if control else ()
            )
        except OSError as error:
            # It will never be taken. To QUIC that is a loss like any other.
            self._drop(reason_of(error))
            return len(datagrams)
        self.counters.quic_wire[1] += taken
        if taken < len(datagrams) and not self._blocked:
            self._watch(IN | OUT if self._is_reading else OUT)
        return taken

    def blocked(self, connection: QuicConnection) -> None:
        """It has datagrams left, to be offered when the socket takes more."""
        self._blocked[connection] = None

    def forget(self, connection: QuicConnection) -> None:
        book = self._connections.pop(connection, None)
        if book is None:
            return
        self._half_open.pop(connection, None)
        self._newly_open.pop(connection, None)
        self._blocked.pop(connection, None)
        for cid in book.cids:
            if self._by_cid.get(cid) is connection:
                del self._by_cid[cid]
                self.sharing.remove(cid)
        self.counters.inflight -= 1
        self._census.leave(book.ip)
        if self._is_stopped and not self._connections:
            self._close()


class _Book:
    """What the endpoint keeps of a connection."""

    __slots__ = ("cids", "first", "ip")

    def __init__(self, ip: str, first: bytes) -> None:
        self.ip = ip
        self.first = first
        """The connection ID that the client chose for its first packet."""
        self.cids: list[bytes] = []


def _destination(data: bytes) -> bytes:
    """The connection ID that a datagram goes to, if it is one of ours; for a long header, of any length."""
    return data[6 : 6 + data[5]] if data[0] >= 0x80 and len(data) > 5 else data[1 : 1 + CID_BYTES]


def _destination_at(data: bytes, at: int) -> bytes:
    if data[at] >= 0x80:
        return _destination(data[at : at + 6 + 255])
    return data[at + 1 : at + 1 + CID_BYTES]


def _wall_s() -> int:
    return int(time.time())  # noqa: TID251 - tokens outlive the process
