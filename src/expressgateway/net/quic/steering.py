"""A program in the kernel that gives a QUIC datagram to the worker whose connection ID it carries.

`steer` attaches it to a listener's SO_REUSEPORT group (SO_ATTACH_REUSEPORT_CBPF, Linux 4.5; no privilege is
needed). It is classic BPF: it runs for each datagram, reads the payload, and names a member of the group by
its index. For a number that is no index the kernel chooses as if there were no program, by its hash of both
addresses, which is the same for all datagrams of one pair: that is what becomes of clients' first packets, of
spare CIDs and of garbage. The program's look at a connection ID is that of `cids.worker_of`.

The kernel keeps members in an array, in the order in which they were bound. A connection ID names its
worker's *seat* (`control.seats`), and the program holds a table of which member that worker reads, or the one
that came after it and hands over what is not its own; so it is attached anew whenever a worker comes or goes.

When a member is closed by everybody who has it open, the kernel moves the *last* member into its place.
Therefore the supervisor keeps all members open while it serves, also that of a dead worker, whose replacement
inherits it, and gives up only the last ones, after the table has forgotten them.

Datagrams that the network card or UDP_GRO gathered into one buffer are steered by the first of them.
"""

import array
import logging
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from expressgateway.net.quic.cids import CHECK, CID_BYTES

log = logging.getLogger(__name__)

_SO_ATTACH_REUSEPORT_CBPF: Final = 51  # asm-generic/socket.h
_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, if false, operand
_PROGRAM: Final = struct.Struct("@HP")  # struct sock_fprog: how many, where

# linux/bpf_common.h. A is the accumulator, X the index register, M memory.
_LOAD_BYTE: Final = 0x30  # A = packet[k]; beyond the packet's end the program ends and gives 0
_LOAD_LENGTH: Final = 0x80  # A = the packet's length
_LOAD: Final = 0x60  # A = M[k]
_STORE: Final = 0x02  # M[k] = A
_TO_X: Final = 0x07  # X = A
_XOR: Final = 0xA4
_XOR_X: Final = 0xAC
_ADD_X: Final = 0x0C
_AND: Final = 0x54
_IF_EQUAL: Final = 0x15
_IF_EQUAL_X: Final = 0x1D
_IF_AT_LEAST: Final = 0x35
_IF_SET: Final = 0x45
_JUMP: Final = 0x05  # by the operand
_LOAD_WORD: Final = 0x20
_MODULO: Final = 0x94
_RETURN: Final = 0x06
_RETURN_A: Final = 0x16
_RANDOM: Final = 0xFFFF_F000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM, linux/filter.h

_NO_MEMBER: Final = 0xFFFF_FFFF
_SHORT_CID_AT: Final = 1
_LONG_CID_AT: Final = 6  # after the first byte, the version and the length (RFC 8999 5.1)

_Step = tuple[int, int, bool]
"""Code and operand; whether the program gives up where the condition is not met."""


def steer(members: Sequence[socket.socket], name: str, seats: Mapping[int, int] | None = None) -> bool:
    """Attach the program to the group of these members, which are bound and in this order.

    ``seats``: the member, by index, for each worker's seat; None: each worker reads the member of its number.
    Replaces the program that was there. Where the kernel refuses it, says so in the log and gives False:
    everything works without, with a hand-over for most packets of clients whose address has changed.
    """
    return _attach(
        members,
        _program(seats if seats is not None else {index: index for index in range(len(members))}),
        f"the kernel does not steer QUIC packets of the listener {name!r} to their workers; workers hand "
        "them over to each other",
    )


def spread(members: Sequence[socket.socket], name: str, count: int) -> bool:
    """Have new connections of a TCP group go to the first ``count`` members only, at random. Replaces the
    program that was there; False, and a line in the log, where the kernel refuses it."""
    program = b"".join(
        _INSTRUCTION.pack(code, 0, 0, operand)
        for code, operand in ((_LOAD_WORD, _RANDOM), (_MODULO, count), (_RETURN_A, 0))
    )
    return _attach(
        members,
        program,
        f"the kernel does not keep new connections of the listener {name!r} from workers that leave; a few "
        "may be reset",
    )


def _attach(members: Sequence[socket.socket], program: bytes, otherwise: str) -> bool:
    # The kernel copies it; until then it must stay where it is.
    code = array.array("B", program)
    address, size = code.buffer_info()
    packed = _PROGRAM.pack(size // _INSTRUCTION.size, address)
    try:
        members[0].setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, packed)
    except OSError as error:
        log.warning("%s (%s)", otherwise, error.strerror)
        return False
    return True


def _program(seats: Mapping[int, int]) -> bytes:
    table = _table(seats)
    long_header = _look(
        _LONG_CID_AT,
        table,
        (_LOAD_BYTE, _LONG_CID_AT - 1, False),
        (_IF_EQUAL, CID_BYTES, True),
    )
    short_header = _look(_SHORT_CID_AT, table)
    return b"".join(
        (
            _INSTRUCTION.pack(_LOAD_LENGTH, 0, 0, 0),
            # An empty datagram has no first byte: the next instruction would end the program with 0.
            _INSTRUCTION.pack(_IF_AT_LEAST, 1, 0, 1),
            _INSTRUCTION.pack(_RETURN, 0, 0, _NO_MEMBER),
            _INSTRUCTION.pack(_LOAD_BYTE, 0, 0, 0),
            _INSTRUCTION.pack(_IF_SET, 1, 0, 0x80),
            _INSTRUCTION.pack(_JUMP, 0, 0, len(long_header) // _INSTRUCTION.size),
            long_header,
            short_header,
        )
    )


def _table(seats: Mapping[int, int]) -> bytes:
    """The instructions that give the member for the seat in A, or none."""
    rows = b"".join(
        _INSTRUCTION.pack(_IF_EQUAL, 0, 1, seat) + _INSTRUCTION.pack(_RETURN, 0, 0, member)
        for seat, member in seats.items()
    )
    return rows + _INSTRUCTION.pack(_RETURN, 0, 0, _NO_MEMBER)


def _look(at: int, table: bytes, *before: _Step) -> bytes:
    """The instructions that give the member for the connection ID at this offset, or none."""
    steps: tuple[_Step, ...] = (
        (_LOAD_LENGTH, 0, False),
        (_IF_AT_LEAST, at + CID_BYTES, True),
        *before,
        (_LOAD_BYTE, at, False),
        (_TO_X, 0, False),
        (_LOAD_BYTE, at + 1, False),
        (_XOR_X, 0, False),
        (_STORE, 0, False),  # the worker
        (_XOR, CHECK, False),
        (_TO_X, 0, False),
        (_LOAD_BYTE, at + 2, False),
        (_IF_EQUAL_X, 0, True),
        (_TO_X, 0, False),
        (_LOAD_BYTE, at + 1, False),
        (_ADD_X, 0, False),
        (_TO_X, 0, False),
        (_LOAD_BYTE, at, False),
        (_ADD_X, 0, False),
        (_AND, 0xFF, False),
        (_TO_X, 0, False),
        (_LOAD_BYTE, at + 3, False),
        (_IF_EQUAL_X, 0, True),
        (_LOAD, 0, False),
        (_JUMP, 1, False),
    )
    last = len(steps)  # of what gives no member
    looked = b"".join(
        _INSTRUCTION.pack(code, 0, last - number - 1 if gives_up else 0, operand)
        for number, (code, operand, gives_up) in enumerate(steps)
    )
    # The table may be longer than a conditional jump is.
    return looked + _INSTRUCTION.pack(_RETURN, 0, 0, _NO_MEMBER) + table
