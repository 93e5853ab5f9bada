"""WebSocket frames (RFC 6455): a follower of a relayed stream, and what the gateway needs to say itself.

The gateway relays WebSocket bytes untouched. A *follower* reads along in one direction: it steps from frame
header to frame header, counts, and names the first *violation* with the close code for it. It never holds,
copies or unmasks a payload. A *boundary* is a place in the stream between two frames: only there may the
gateway put a Close frame of its own. After a Close frame nothing is followed any more (5.5.1: no data may
come; what comes is its receiver's business).

RSV bits pass: extensions are negotiated between the two ends, so their meaning is not ours to judge, and a
message's size is counted as it travels, compressed or not.

This module refuses to know time (the caller asks for pings once per window, and how long `is_mid_frame` has
been so), payloads, extensions and subprotocols.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Final

__all__ = [
    "GOING_AWAY",
    "MESSAGE_TOO_BIG",
    "POLICY_VIOLATION",
    "PROTOCOL_ERROR",
    "FrameFollower",
    "Violation",
    "accept_value",
    "close_frame",
    "is_valid_key",
    "make_key",
]

# Close codes the gateway itself uses (RFC 6455 7.4.1).
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
POLICY_VIOLATION: Final = 1008
MESSAGE_TOO_BIG: Final = 1009

# Opcodes (5.2). Bit 3 tells control frames.
CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
KNOWN_OPCODES: Final = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})

FIN: Final = 0x80
MASKED: Final = 0x80
MAX_CONTROL_PAYLOAD: Final = 125  # 5.5
MAX_HEADER_BYTES: Final = 14

ACCEPT_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3


@dataclass(frozen=True, slots=True)
class Violation:
    """Why the stream must end: the close code to send, and the reason, which is fit to send along."""

    code: int
    reason: str


class FrameFollower:
    """Reads along in one direction of one WebSocket connection. Never raises on what a peer sends.

    `is_client`: this direction comes from the client, so frames must be masked (5.1). `max_message_bytes`
    caps the payload of one message over all its fragments.
    """

    __slots__ = (
        "_head",
        "_in_message",
        "_is_client",
        "_is_closing",
        "_max_message_bytes",
        "_message_bytes",
        "_payload_left",
        "boundary",
        "close_at",
        "pings",
        "saw_close",
        "violation",
    )

    def __init__(self, *, is_client: bool, max_message_bytes: int) -> None:
        # Wiring
        self._is_client = is_client
        self._max_message_bytes = max_message_bytes

        # Connection
        self._head = b""  # a frame header cut off by the end of a chunk; under MAX_HEADER_BYTES
        self._payload_left = 0  # bytes of the current frame still to come
        self._is_closing = False  # the current frame is a Close frame, or one went by
        self._in_message = False  # a fragmented message is open
        self._message_bytes = 0  # payload of the current message so far
        self.pings = 0
        """PING frames since `take_pings`."""
        self.boundary = 0
        """Where, in the chunk fed last, the stream last stood between two frames; -1 if nowhere.

        Everything before it is sound and complete, also after a violation: the caller may pass it on, add a
        Close frame, and drop the rest. With -1 the receiver stands inside a frame and can be told nothing.
        """
        self.close_at: int | None = None
        """Where the header of a Close frame begins in the chunk that completed it, negative if before that
        chunk. ``None``: none came. There is no second: nothing is followed behind the first.
        """
        self.saw_close = False
        """A Close frame went by, whole. What follows it is not followed."""
        self.violation: Violation | None = None
        """The first violation; final."""

    @property
    def is_mid_frame(self) -> bool:
        """Part of a frame, header or payload, is still to come."""
        return self._payload_left > 0 or self._head != b""

    @property
    def is_between_frames(self) -> bool:
        """All bytes fed so far end at a boundary: a frame of the gateway's own may be put here."""
        return self._payload_left == 0 and self._head == b"" and self.violation is None

    @property
    def payload_left(self) -> int:
        """Bytes of the current frame's payload still to come."""
        return self._payload_left

    @property
    def header_bytes(self) -> int:
        """Bytes of a frame header that the last chunk ended in; under MAX_HEADER_BYTES."""
        return len(self._head)

    def take_pings(self) -> int:
        """PING frames since the last call; counted when their header is complete."""
        pings = self.pings
        self.pings = 0
        return pings

    def feed(self, data: bytes | bytearray | memoryview) -> Violation | None:
        """Read along over the next chunk; the first violation, which every later call returns again.

        Costs a step per frame, whatever the payloads' size. On a violation `boundary` says how much of this
        chunk is still sound.
        """
        end = len(data)
        # fast path: the chunk lies inside one payload
        if self._payload_left > end:
            self._payload_left -= end
            self.boundary = -1
            return None
        if self.violation is not None:
            self.boundary = -1
            return self.violation
        at, boundary = 0, -1
        if self._head:
            kept = len(self._head)
            head = self._head + bytes(data[: MAX_HEADER_BYTES - kept])
            size = self._read_header(head, 0, len(head))
            if size <= 0:
                self._head = head
                self.boundary = -1
                return self.violation
            self._head = b""
            if self.close_at is not None:
                self.close_at = -kept
            at = size - kept
        while True:
            left = self._payload_left
            if left > end - at:
                self._payload_left = left - (end - at)
                break
            at = boundary = at + left
            self._payload_left = 0
            if self._is_closing:
                self.saw_close = True
                boundary = end
                break
            if at == end:
                break
            size = self._read_header(data, at, end)
            if size <= 0:
                if size == 0:
                    self._head = bytes(data[at:end])
                break
            at += size
        self.boundary = boundary
        return self.violation

    def _read_header(self, data: bytes | bytearray | memoryview, at: int, end: int) -> int:
        """The length of the frame header at `at`, of which there is a byte at least; 0: not all there yet,
        nothing is changed; -1: a violation.
        """
        # What the first byte says is judged before it is passed on: behind it there is no place for a Close.
        first = data[at]
        opcode = first & 0x0F
        if opcode not in KNOWN_OPCODES:
            return self._fail(PROTOCOL_ERROR, "reserved opcode")
        is_control = opcode >= CLOSE
        if is_control:
            if first < FIN:
                return self._fail(PROTOCOL_ERROR, "control frame fragmented")
        elif self._in_message is not (opcode == CONTINUATION):
            return self._fail(PROTOCOL_ERROR, "fragments out of order")
        if end - at < 2:
            return 0
        second = data[at + 1]
        length = second & 0x7F
        if (second >= MASKED) is not self._is_client:
            return self._fail(PROTOCOL_ERROR, "frame not masked" if self._is_client else "frame masked")
        if is_control:
            if length > MAX_CONTROL_PAYLOAD:
                return self._fail(PROTOCOL_ERROR, "control frame too long")
            if opcode == CLOSE and length == 1:
                return self._fail(PROTOCOL_ERROR, "close code cut short")
        size = 6 if self._is_client else 2
        if length == 126:
            size += 2
            if end - at < size:
                return 0
            length = data[at + 2] << 8 | data[at + 3]
            if length < 126:
                return self._fail(PROTOCOL_ERROR, "length not in its shortest form")
        elif length == 127:
            size += 8
            if end - at < size:
                return 0
            length = int.from_bytes(data[at + 2 : at + 10], "big")
            if length < 65536 or length >> 63:
                return self._fail(PROTOCOL_ERROR, "length not in its shortest form")
        elif end - at < size:
            return 0
        if not is_control:
            total = length if opcode else self._message_bytes + length
            if total > self._max_message_bytes:
                return self._fail(MESSAGE_TOO_BIG, "message too big")
            self._message_bytes = total
            self._in_message = first < FIN
        elif opcode == PING:
            self.pings += 1
        elif opcode == CLOSE:
            self._is_closing = True
            self.close_at = at
        self._payload_left = length
        return size

    def _fail(self, code: int, reason: str) -> int:
        self.violation = Violation(code, reason)
        return -1


def close_frame(code: int, reason: str = "", mask: bytes | None = None) -> bytes:
    """A Close frame (5.5.1). Without `mask` it is for a client; with four random bytes, for a backend (5.3).

    A reason that does not fit is cut at a character. Raises ValueError on a code that must not be sent
    (7.4) and on a mask of another length: those are our own mistakes.
    """
    if not ((1000 <= code <= 1014 and code not in {1004, 1005, 1006}) or 3000 <= code <= 4999):
        raise ValueError(f"{code} is not a close code that may be sent")
    text = reason.encode("utf-8", "replace")[: MAX_CONTROL_PAYLOAD - 2].decode("utf-8", "ignore")
    payload = code.to_bytes(2, "big") + text.encode()
    if mask is None:
        return bytes((FIN | CLOSE, len(payload))) + payload
    if len(mask) != 4:
        raise ValueError("a mask has four bytes")
    masked = bytes(byte ^ mask[position & 3] for position, byte in enumerate(payload))
    return bytes((FIN | CLOSE, MASKED | len(payload))) + mask + masked


def accept_value(key: bytes) -> bytes:
    """What a server must answer in Sec-WebSocket-Accept to this Sec-WebSocket-Key (4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + ACCEPT_GUID, usedforsecurity=False).digest())


def is_valid_key(key: bytes) -> bool:
    """Whether a Sec-WebSocket-Key is sixteen bytes in base64 (4.2.1). Never raises."""
    try:
        return len(key) == 24 and len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        return False


def make_key(random: bytes) -> bytes:
    """A Sec-WebSocket-Key from sixteen random bytes (4.1), for a backend that a client without one is
    bridged to.
    """
    if len(random) != 16:
        raise ValueError("a key is made of sixteen bytes")
    return base64.b64encode(random)
