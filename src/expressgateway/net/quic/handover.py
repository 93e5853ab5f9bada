"""Datagrams that reached one worker and belong to another are passed on, once.

Each worker has a pair of Unix datagram sockets: its own end, and one that all others write to. A message
is what `DatagramSink.on_datagrams` is told, and the listener's position. Answers go out of the owner's own
member of the group, which has the same address and port, so nothing is sent back.

Passing on never waits. What the queue does not take is lost and counted, as on a network; the queue is
bounded by the socket's send buffer, one for all writers. A datagram is passed on at most once: whoever is
handed one keeps it, or two workers with different ideas of an owner would play with it for ever.

The supervisor holds both ends of every pair, so that a replacement finds what came while there was nobody; it
answers with resets, and the clients know where they are. A supervisor that took over from another one holds
only the writing ends of that one's workers: `is_there` says whether anybody still reads.
"""

import errno
import logging
import socket
import struct
from collections.abc import Mapping
from typing import Final, Protocol

from expressgateway.net.batches import RECEIVES, Address
from expressgateway.net.datagram import Control
from expressgateway.net.reactor import IN, Reactor
from expressgateway.observe.counters import Tally

log = logging.getLogger(__name__)

QUEUE_BYTES: Final = 2**20
"""Send buffer asked for; the kernel doubles it, and limits it to ``net.core.wmem_max`` where we have no
privilege. 900 datagrams of 1,200 bytes, or 30 buffers of 64 KiB."""

_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h

# Position, ECN, bytes of address and of control data; level and type of the control message; segment size,
# port, flow information, scope; the address; the control data.
_HEADER: Final = struct.Struct("=HBBBiiIHII16s32s")
_MESSAGE_BYTES: Final = _HEADER.size + 65_536
_IPV4_BYTES: Final = 4
_IPV6_BYTES: Final = 16
_NOTHING: Final = b"\0"  # too short for a message: asks only whether there is a reader

FULL: Final = "full"
TWICE: Final = "twice"
NOBODY: Final = "nobody"
FAILED: Final = "failed"


class HandedSink(Protocol):
    """Who owns connections and is handed their datagrams."""

    def on_handed(
        self,
        position: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: list[Control],
        ecn: int,
    ) -> None:
        """As `DatagramSink.on_datagrams`, of the listener at this position. Not to be given on, now or later,
        whoever seems to own it."""


class Pair:
    """The supervisor's end of one worker's queue."""

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        # In a pair of two, neither end obeys ``net.unix.max_dgram_qlen``, which is 10.
        self.reader, self.writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        """Where the worker is handed datagrams; where all others hand them to it."""
        _enlarge(self.writer)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


def is_there(writer: socket.socket) -> bool:
    """Whether somebody has the other end of a pair open."""
    try:
        writer.send(_NOTHING)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class Handover:
    """A worker's end. Datagrams may be given away at once, and are taken from `start` on."""

    __slots__ = ("_is_handing", "_reactor", "_reader", "_sink", "_writers", "dropped", "given", "taken")

    def __init__(self, reader: socket.socket, writers: Mapping[int, socket.socket]) -> None:
        """The sockets are this object's from here on."""
        self._reader = reader
        self._writers = dict(writers)
        reader.setblocking(False)
        for writer in writers.values():
            writer.setblocking(False)
        self._reactor: Reactor | None = None
        self._sink: HandedSink | None = None
        self._is_handing = False
        self.given = 0
        """Messages the other workers' queues took."""
        self.taken = 0
        """Messages received."""
        self.dropped = Tally()
        """Messages that were not given, by reason: the queue was ``full``, it was handed over before
        (``twice``), there is no such worker (``nobody``), or sending ``failed``."""

    def start(self, reactor: Reactor, sink: HandedSink) -> None:
        """From now on the sink is told what other workers give."""
        self._reactor = reactor
        self._sink = sink
        reactor.add(self._reader.fileno(), IN, self._on_ready)

    def connect(self, worker: int, writer: socket.socket) -> None:
        """There is another worker. The socket is this object's from here on."""
        self.disconnect(worker)
        writer.setblocking(False)
        self._writers[worker] = writer

    def disconnect(self, worker: int) -> None:
        """It is gone. Does nothing if it was not there."""
        writer = self._writers.pop(worker, None)
        if writer is not None:
            writer.close()

    @property
    def others(self) -> list[int]:
        """The workers to whom something can be given."""
        return list(self._writers)

    def close(self) -> None:
        """Idempotent."""
        if self._reactor is not None:
            self._reactor.remove(self._reader.fileno())
            self._reactor = None
        self._reader.close()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def give(
        self,
        worker: int,
        position: int,
        data: bytes,
        segment_bytes: int,
        address: Address,
        control: list[Control],
        ecn: int,
    ) -> bool:
        """Pass on what `DatagramSink.on_datagrams` was told. Never blocks and never raises; False: it is
        dropped and counted, or part of it is. ``worker`` may be any number a packet names."""
        if self._is_handing:
            self.dropped.add(TWICE)
            return False
        writer = self._writers.get(worker)
        if writer is None:
            self.dropped.add(NOBODY)
            return False
        level, kind, local = control[0] if control else (0, 0, b"")
        if len(address) == 2:
            host, port = address
            packed = socket.inet_pton(socket.AF_INET, host)
            flow = scope = 0
        else:
            host, port, flow, scope = address
            packed = socket.inet_pton(socket.AF_INET6, host)
        header = _HEADER.pack(
            position,
            ecn,
            len(packed),
            len(local),
            level,
            kind,
            segment_bytes,
            port,
            flow,
            scope,
            packed,
            local,
        )
        try:
            writer.sendmsg((header, data))
        except BlockingIOError:
            self.dropped.add(FULL)
            return False
        except OSError as error:
            if error.errno == errno.EMSGSIZE and 0 < segment_bytes < len(data):
                # A send buffer of less than 64 KiB. Both halves are whole datagrams.
                half = (len(data) // segment_bytes + 1) // 2 * segment_bytes
                return self.give(
                    worker, position, data[:half], segment_bytes, address, control, ecn
                ) and self.give(worker, position, data[half:], segment_bytes, address, control, ecn)
            self.dropped.add(FAILED)
            return False
        self.given += 1
        return True

    def _on_ready(self, _events: int) -> None:
        sink = self._sink
        if sink is None:
            return
        receive = self._reader.recv
        self._is_handing = True
        try:
            for _ in range(RECEIVES):
                try:
                    message = receive(_MESSAGE_BYTES)
                except BlockingIOError:
                    return
                if len(message) < _HEADER.size:
                    continue
                self.taken += 1
                (
                    position,
                    ecn,
                    address_bytes,
                    local_bytes,
                    level,
                    kind,
                    segment_bytes,
                    port,
                    flow,
                    scope,
                    packed,
                    local,
                ) = _HEADER.unpack_from(message)
                address: Address
                if address_bytes == _IPV4_BYTES:
                    address = (socket.inet_ntop(socket.AF_INET, packed[:_IPV4_BYTES]), port)
                else:
                    address = (socket.inet_ntop(socket.AF_INET6, packed), port, flow, scope)
                control = [(level, kind, local[:local_bytes])] if local_bytes else []
                sink.on_handed(position, message[_HEADER.size :], segment_bytes, address, control, ecn)
        finally:
            self._is_handing = False


def _enlarge(sock: socket.socket) -> None:
    """As far as we may. What any system allows at first is enough for one message of 64 KiB."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, QUEUE_BYTES)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_BYTES)
