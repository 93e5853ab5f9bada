"""A listening socket that takes no more handshakes, but goes on with those it has taken.

What completes its handshake between the last ``accept`` and the close of a listening socket is reset by the
kernel, though its client was told that it is connected. So before the last look into the queue, the first
packets of clients (SYN without ACK) are dropped: they are sent again a second later and then refused, which
tells a client that nothing of its request was read. A classic BPF program does it (SO_ATTACH_FILTER); for TCP
it sees the packet from the TCP header on, whose 14th byte holds the flags (RFC 9293 3.1).
"""

import array
import logging
import socket
import struct
from typing import Final

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, if false, operand
_PROGRAM: Final = struct.Struct("@HP")  # struct sock_fprog: how many, where

_FLAGS_AT: Final = 13
_SYN: Final = 0x02
_ACK: Final = 0x10

_CODE: Final = b"".join(
    (
        _INSTRUCTION.pack(0x30, 0, 0, _FLAGS_AT),  # A = packet[13]
        _INSTRUCTION.pack(0x54, 0, 0, _SYN | _ACK),  # A &= SYN | ACK
        _INSTRUCTION.pack(0x15, 0, 1, _SYN),  # a SYN alone:
        _INSTRUCTION.pack(0x06, 0, 0, 0),  # drop it
        _INSTRUCTION.pack(0x06, 0, 0, 0xFFFF_FFFF),  # else take all of it
    )
)


def drop_new(sock: socket.socket) -> bool:
    """From now on, for everybody who has the socket. False, and a line in the log, where the kernel refuses
    it: then a client or two may be reset."""
    code = array.array("B", _CODE)
    address, size = code.buffer_info()
    try:
        sock.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(size // _INSTRUCTION.size, address)
        )
    except OSError as error:
        log.debug("the kernel does not drop new connections of a socket that is closed (%s)", error.strerror)
        return False
    return True
