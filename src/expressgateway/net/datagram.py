"""What a datagram socket adds to an address and to an error: the local address, and words for ``errno``.

A socket bound to a wildcard learns with each datagram which of the machine's addresses the client used; the
reply must come from there, or the client will not take it for one. The *local address* is what the kernel
says about that, cut down to the bytes that tell two of them apart. Knows nothing of flows or backends.
"""

import errno
import os
import select
import socket
import struct
from typing import Final

MAX_DATAGRAM_BYTES: Final = 65536  # more than any UDP payload has: nothing is ever cut off

Control = tuple[int, int, bytes]
"""One control message: level, type, data."""

IP_PKTINFO: Final = 8  # linux/in.h; ``socket`` has the name from Python 3.12 on
_IPV4: Final = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, local address, destination
_IPV6: Final = struct.Struct("=16si")  # struct in6_pktinfo: local address, interface

_REASONS: Final = {
    errno.ENOBUFS: "no_buffers",
    errno.ENOMEM: "no_buffers",
    errno.EPERM: "not_permitted",
    errno.EACCES: "not_permitted",
    errno.EMSGSIZE: "too_big",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ENETDOWN: "unreachable",
}


def reason_of(error: OSError) -> str:
    """A closed set of labels for what keeps a datagram from being sent."""
    return _REASONS.get(error.errno or 0, "send_failed")


def has_come(sock: socket.socket) -> bool:
    """Whether there is something to read, be it an error."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def stand_in(sock: socket.socket, other: socket.socket) -> None:
    """Have a socket become a copy of another one. What it was is closed; whoever has its number goes on with
    it. It must not be watched meanwhile."""
    if sock.fileno() >= 0:
        os.dup2(other.fileno(), sock.fileno(), inheritable=False)


class LocalAddress:
    """How a bound socket's datagrams tell the address they were sent to."""

    __slots__ = ("_is_ipv6", "control_bytes", "identity")

    def __init__(self, sock: socket.socket) -> None:
        """Asks the kernel for it if the socket is bound to a wildcard."""
        self._is_ipv6 = sock.family == socket.AF_INET6
        self.identity = slice(0, 16) if self._is_ipv6 else slice(4, 8)
        """The part of a control message's data that is the local address. The rest is the interface, which
        may change from one datagram of a client to the next."""
        self.control_bytes = 0
        """The size of the buffer that ``recvmsg`` needs; 0: all datagrams came to one address."""
        if sock.getsockname()[0] not in ("0.0.0.0", "::"):
            return
        if self._is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            self.control_bytes = socket.CMSG_SPACE(_IPV6.size)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            self.control_bytes = socket.CMSG_SPACE(_IPV4.size)

    def reply(self, control: list[Control]) -> list[Control]:
        """What to send with the answer to a datagram that came with ``control``. Empty: nothing to say."""
        if not control:
            return []
        data = control[0][2]
        local = data[self.identity]
        if not self._is_ipv6:
            # No interface: the way back is the routing table's to choose.
            return [(socket.IPPROTO_IP, IP_PKTINFO, _IPV4.pack(0, local, bytes(4)))]
        if local[0] == 0xFF:
            return []  # multicast can be sent to, not from
        # fe80::/10 means something on one interface only.
        is_link_local = local[0] == 0xFE and local[1] & 0xC0 == 0x80
        interface = _IPV6.unpack(data)[1] if is_link_local else 0
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IPV6.pack(local, interface))]
