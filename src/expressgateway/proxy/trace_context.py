"""W3C Trace Context (https://www.w3.org/TR/trace-context/): reading what came, and new ids.

A *trace parent* is ``version-traceid-parentid-flags`` in lower-case hexadecimal. What does not fit is treated
as if it were not there, and its trace state with it: a new trace begins. Whatever version came, we speak 00.
"""

import os
import re
from collections.abc import Sequence
from typing import Final

TRACE_ID: Final = slice(3, 35)  # of a trace parent as ``read_parent`` gives it
PARENT_ID: Final = slice(36, 52)
FLAGS: Final = slice(53, 55)

MAX_MEMBERS: Final = 32  # 3.3.1.1
MAX_STATE_BYTES: Final = 512  # 3.3.1.5: at least so much is to be passed on; we do no more
_LONG_MEMBER: Final = 128  # 3.3.1.5: such members go first where there are too many bytes

_PARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE: Final = b"0" * 32
_NO_SPAN: Final = b"0" * 16
_KNOWN_FLAGS: Final = 0x03  # sampled, and random (level 2); 3.2.2.5: others are set to zero
# 3.3.1.3: a key is simple or has a tenant; a value is printable ASCII without "," and "=", and does not end
# in a blank.
_MEMBER: Final = re.compile(
    rb"(?:[a-z][_0-9a-z\-*/]{0,255}|[a-z0-9][_0-9a-z\-*/]{0,240}@[a-z][_0-9a-z\-*/]{0,13})"
    rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)

_STEP: Final = 0x9E3779B97F4A7C15  # 2 to the 64th over the golden ratio: odd
_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF


def read_parent(values: Sequence[bytes]) -> bytes | None:
    """The trace parent in these fields, as version 00; None if there is none that counts (3.2.2, 4.3).

    Two fields contradict each other, so they are none.
    """
    if len(values) != 1:
        return None
    match = _PARENT.fullmatch(values[0])
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == b"ff" or trace == _NO_TRACE or span == _NO_SPAN:
        return None
    known = int(flags, 16) & _KNOWN_FLAGS
    if version == b"00":
        if more is not None:
            return None
        if known == int(flags, 16):
            return values[0]
    return b"00-%b-%b-%02x" % (trace, span, known)


def read_state(values: Sequence[bytes]) -> bytes:
    """The trace state in these fields, to be passed on as one; empty if there is none that counts (3.3, 4.3).

    Too many members, or one that is malformed or there twice, spoil the whole. Of too many bytes the longest
    members go first, then the last ones.
    """
    members = [member for part in b",".join(values).split(b",") if (member := part.strip(b" \t"))]
    if len(members) > MAX_MEMBERS or not all(map(_MEMBER.fullmatch, members)):
        return b""
    if len({member.partition(b"=")[0] for member in members}) != len(members):
        return b""
    state = b",".join(members)
    if len(state) <= MAX_STATE_BYTES:
        return state
    members = _shortened(members)
    while sum(map(len, members)) + len(members) - 1 > MAX_STATE_BYTES:
        members.pop()
    return b",".join(members)


def _shortened(members: list[bytes]) -> list[bytes]:
    """Without long members, from the last one on, as far as need be."""
    left = sum(map(len, members)) + len(members) - 1
    kept = []
    for member in reversed(members):
        if left > MAX_STATE_BYTES and len(member) > _LONG_MEMBER:
            left -= len(member) + 1
        else:
            kept.append(member)
    return kept[::-1]


class Ids:
    """Request, trace and span ids: unique over all workers and restarts, cheap, not secret.

    Numbers go through all of 64 bits in steps that spread them evenly, whatever bits one looks at: who
    samples by a share of the trace ids gets that share.
    """

    __slots__ = ("_next", "_prefix", "_trace_prefix")

    def __init__(self) -> None:
        self._prefix = os.urandom(6).hex().encode("ascii") + b"-"
        self._trace_prefix = b"00-" + os.urandom(8).hex().encode("ascii")
        self._next = int.from_bytes(os.urandom(8), "big")

    def make(self) -> bytes:
        """The next number, in 16 hexadecimal digits."""
        self._next = (self._next + _STEP) & _MASK
        return b"%016x" % self._next

    def request_id(self, number: bytes) -> bytes:
        return self._prefix + number

    def traceparent(self, number: bytes) -> bytes:
        """A new trace, not sampled: whoever samples decides (3.2.2.5)."""
        return self._trace_prefix + number + b"-" + number + b"-00"
