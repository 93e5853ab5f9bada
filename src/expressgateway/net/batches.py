"""A datagram socket read and written in batches: what QUIC needs of UDP.

With UDP_GRO the kernel hands over what came from one address as one buffer, cut into *segments* of one size
of which only the last may be shorter; with UDP_SEGMENT (GSO) it takes such a buffer and cuts it itself. So a
system call carries up to ``MAX_SEGMENTS`` datagrams. Neither needs a privilege (Linux 4.18 and 5.0); where
the kernel or the device refuses one, datagrams go one by one.

Each buffer comes with what the network said beside it: the address it was sent to, where the socket is bound
to a wildcard (as `LocalAddress` tells it), and the ECN codepoint of its datagrams (RFC 3168; the kernel does
not put datagrams of different codepoints into one buffer).

Nothing is queued here: what the socket does not take is given back to the caller.
"""

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final, Protocol

from expressgateway.net.datagram import Control, LocalAddress

MAX_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS of Linux before 6.9; later ones allow 128
MAX_BATCH_BYTES: Final = 65_000  # an IPv4 packet may have 65,535 with its headers
RECEIVES: Final = 32  # buffers per event: other sockets want their turn, too

UDP_SEGMENT: Final = 103  # linux/udp.h
UDP_GRO: Final = 104
_IP_RECVTOS: Final = 13  # linux/in.h
_SEGMENT: Final = struct.Struct("=H")
_GRO: Final = struct.Struct("=i")
_BUFFER_BYTES: Final = 65_536  # the most that UDP_GRO gives
_ECN: Final = 0b11

Address = tuple[str, int] | tuple[str, int, int, int]

_UNSUPPORTED: Final = frozenset({errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})
"""What ``sendmsg`` says when the kernel or the device cannot cut a buffer."""

_UNCUT: Final = _UNSUPPORTED | {errno.EINVAL, errno.EMSGSIZE}
"""The same, or that it does not cut this one: its datagrams are larger than what this way takes (by which of
the two it says so depends on the kernel's version). They may go one by one, or not."""

_MTU_DISCOVER: Final = {socket.IPPROTO_IP: 10, socket.IPPROTO_IPV6: 23}  # linux/in.h, linux/in6.h
_PMTUDISC_PROBE: Final = 3


class DatagramSink(Protocol):
    """Who reads a `BatchSocket`."""

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        """One or more datagrams of one sender: ``data`` cut every ``segment_bytes``. ``control`` holds the
        local address alone, and is empty where all datagrams come to one address."""


class BatchSocket:
    """A bound or connected UDP socket. It is this object's from here on."""

    __slots__ = ("_ancillary_bytes", "_can_cut", "local", "sock")

    def __init__(self, sock: socket.socket, *, tells_ecn: bool = True) -> None:
        """Without ``tells_ecn`` every codepoint is given as 0, which costs less."""
        self.sock = sock
        self.local = LocalAddress(sock)
        self._can_cut = True
        _try_option(sock, socket.IPPROTO_UDP, UDP_GRO)
        is_ipv6 = sock.family == socket.AF_INET6
        if not tells_ecn:
            pass
        elif is_ipv6:
            _try_option(sock, socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)
        else:
            _try_option(sock, socket.IPPROTO_IP, _IP_RECVTOS)
        self._ancillary_bytes = self.local.control_bytes + socket.CMSG_SPACE(4) + socket.CMSG_SPACE(4)

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    @property
    def local_address(self) -> tuple[str, int]:
        """Where it is bound."""
        host, port = self.sock.getsockname()[:2]
        return host, port

    def set_receive_buffer(self, size: int) -> None:
        """In bytes; cut to net.core.rmem_max. Kernel memory, shared by all who send here."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def receive(self, sink: DatagramSink, limit: int = RECEIVES) -> int:
        """Give the sink what has come, at most ``limit`` buffers; gives how many there were.

        Raises ``OSError``, never ``BlockingIOError``: a socket may report an ICMP error of an earlier send.
        """
        recvmsg = self.sock.recvmsg
        ancillary_bytes = self._ancillary_bytes
        for count in range(limit):
            try:
                data, ancillary, _flags, address = recvmsg(_BUFFER_BYTES, ancillary_bytes)
            except BlockingIOError:
                return count
            segment_bytes = len(data)
            ecn = 0
            control: list[Control] = []
            for message in ancillary:
                level, kind, value = message
                if level == socket.IPPROTO_UDP:
                    if kind == UDP_GRO:
                        segment_bytes = _GRO.unpack(value)[0]
                elif (level == socket.IPPROTO_IP and kind == socket.IP_TOS) or (
                    level == socket.IPPROTO_IPV6 and kind == socket.IPV6_TCLASS
                ):
                    ecn = value[0] & _ECN
                else:
                    control.append(message)
            sink.on_datagrams(data, segment_bytes or len(data), address, control, ecn)
        return limit

    def send(
        self, datagrams: Sequence[bytes], address: Address | None, control: Sequence[Control] = ()
    ) -> int:
        """Send in order; gives how many the socket took. Those that it did not take were not sent.
        ``address`` is ``None`` on a socket that is connected.

        Raises ``OSError`` if the first is one that it never will (``EMSGSIZE`` and the like); before a later
        one it stops. ``BlockingIOError`` is not raised.
        """
        sent = 0
        alone = 0  # up to here datagrams go one by one
        total = len(datagrams)
        sendmsg = self.sock.sendmsg
        while sent < total:
            first = datagrams[sent]
            size = len(first)
            count = 1
            if self._can_cut and size and sent >= alone:
                end = min(total, sent + MAX_SEGMENTS, sent + MAX_BATCH_BYTES // size)
                # All of one size, and one last that is shorter.
                while sent + count < end:
                    following = len(datagrams[sent + count])
                    if following != size:
                        if 0 < following < size:
                            count += 1
                        break
                    count += 1
            try:
                if count == 1:
                    sendmsg((first,), control, 0, address)
                else:
                    cut = (socket.IPPROTO_UDP, UDP_SEGMENT, _SEGMENT.pack(size))
                    sendmsg(datagrams[sent : sent + count], [*control, cut], 0, address)
            except BlockingIOError:
                return sent
            except OSError as error:
                if count > 1 and error.errno in _UNCUT:
                    self._can_cut = self._can_cut and error.errno not in _UNSUPPORTED
                    alone = sent + count
                    continue
                if sent:
                    return sent
                raise
            sent += count
        return sent

    def send_cut(
        self, data: bytes, segment_bytes: int, address: Address | None, control: Sequence[Control] = ()
    ) -> int:
        """As ``send``, for datagrams that are one buffer as it was received: ``data`` cut every
        ``segment_bytes``, at most `MAX_BATCH_BYTES`."""
        if self._can_cut and segment_bytes < len(data) <= MAX_BATCH_BYTES:
            # fast path: as it came, so it goes
            cut = (socket.IPPROTO_UDP, UDP_SEGMENT, _SEGMENT.pack(segment_bytes))
            try:
                self.sock.sendmsg((data,), (*control, cut), 0, address)
            except BlockingIOError:
                return 0
            except OSError as error:
                if error.errno not in _UNCUT:
                    raise
            else:
                return -(-len(data) // segment_bytes)
        return self.send(cut_up(data, segment_bytes), address, control)


def cut_up(data: bytes, segment_bytes: int) -> list[bytes]:
    """The datagrams of a buffer."""
    return [data[at : at + segment_bytes] for at in range(0, len(data), segment_bytes)]


def never_fragment(sock: socket.socket) -> None:
    """Datagrams that are too large for the way are lost, not cut into fragments, and what the kernel believes
    of the way does not matter: to find out is for those whose datagrams they are (RFC 9000 14, RFC 8899)."""
    level = socket.IPPROTO_IPV6 if sock.family == socket.AF_INET6 else socket.IPPROTO_IP
    _try_option(sock, level, _MTU_DISCOVER[level], _PMTUDISC_PROBE)


def _try_option(sock: socket.socket, level: int, option: int, value: int = 1) -> None:
    """Without it there is less to know, or more to do."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        pass
