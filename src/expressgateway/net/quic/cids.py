"""Connection IDs that carry their worker: *host CIDs*.

12 bytes: a random one; the worker's index, masked with it; two that check the first two; eight random ones.

    byte 0      r
    byte 1      r ^ worker
    byte 2      byte 0 ^ byte 1 ^ 0xA5
    byte 3      (byte 0 + byte 1 + byte 2) & 0xFF
    bytes 4-11  random

The check lets somebody without state (a program in the kernel, a worker that never saw the connection) tell
ours from random ones: of these, one in 65,536 passes. It is no secret and no defence. Anybody can make a
connection ID that passes, and reach a worker of their choice with it; that worker then knows no such
connection. An observer can read the worker, too, and so tell connections of different workers apart; beyond
that the IDs of one connection have nothing in common (RFC 9000 5.1 asks that they cannot be correlated).
"""

import os
from typing import Final

from expressgateway.wire.quic import read_long

CID_BYTES: Final = 12

CHECK: Final = 0xA5
"""What makes byte 2 other than the worker's index."""

_LONG: Final = 0x80


def make_cid(worker: int) -> bytes:
    """A new host CID of this worker. Raises ``ValueError`` if it has no such index."""
    random = os.urandom(CID_BYTES - 3)
    first = random[0]
    second = first ^ worker
    third = first ^ second ^ CHECK
    return bytes((first, second, third, (first + second + third) & 0xFF)) + random[1:]


def worker_of(cid: bytes) -> int | None:
    """The worker that a host CID names, 0 to 255: there may be no such worker. ``None``: it is none of ours,
    or a spare one."""
    if len(cid) != CID_BYTES:
        return None
    first = cid[0]
    second = cid[1]
    third = cid[2]
    if third != first ^ second ^ CHECK or cid[3] != (first + second + third) & 0xFF:
        return None
    return first ^ second


def destination_of(packet: bytes) -> bytes | None:
    """The destination connection ID of a datagram's first packet, if it can be one of ours: of 12 bytes, in a
    long header or, as nothing there says how long it is, in a short one. ``None``: it cannot.

    Of a buffer with several datagrams, ask for each: a client may have many connections on one port.
    """
    if not packet:
        return None
    if packet[0] < _LONG:  # fast path: all but the first few packets of a connection
        return packet[1 : 1 + CID_BYTES] if len(packet) > CID_BYTES else None
    header = read_long(packet)
    if header is None or len(header.destination) != CID_BYTES:
        return None
    return header.destination
