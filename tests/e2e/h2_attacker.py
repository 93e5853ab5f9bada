"""An HTTP/2 client that does as it likes: frames by hand, over TLS or in clear text, and what came back.

It keeps to no rule that a test does not make it keep. A *verdict* is how the gateway ended a connection: the
code of its last GOAWAY, and that the end came in order, so that the attacker could see it.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable
from typing import Final

import hpack

from tests.e2e.harness import PATIENCE_S, Client

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 0x20
NO_ERROR, PROTOCOL, INTERNAL, FLOW = range(4)
STREAM_CLOSED, FRAME_SIZE, REFUSED, CANCEL, COMPRESSION, CALM = 5, 6, 7, 8, 9, 11

Fields = Iterable[tuple[bytes, bytes]]
Frame = tuple[int, int, int, bytes]
"""Type, flags, stream, payload."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def number(value: int, prefix: int, first: int = 0) -> bytes:
    """RFC 7541 5.1."""
    most = (1 << prefix) - 1
    if value < most:
        return bytes((first | value,))
    out = bytes((first | most,))
    value -= most
    while value >= 128:
        out += bytes((value & 127 | 128,))
        value >>= 7
    return out + bytes((value,))


def text(value: bytes) -> bytes:
    return number(len(value), 7) + value


def block(fields: Fields) -> bytes:
    """Literals that change no table."""
    return b"".join(b"\x00" + text(name) + text(value) for name, value in fields)


def remembered(name: bytes, value: bytes) -> bytes:
    """A literal that enters the table: index 62 from then on."""
    return b"\x40" + text(name) + text(value)


def request(
    method: bytes = b"GET", path: bytes = b"/", *more: tuple[bytes, bytes]
) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", b"localhost"),
        (b":path", path),
        *more,
    ]


def headers(stream: int, fields: Fields | bytes | None = None, *, end: bool = True) -> bytes:
    """A header block in as many frames as it takes; GET / unless said."""
    raw = fields if isinstance(fields, bytes) else block(request() if fields is None else fields)
    flags = END_STREAM if end else 0
    parts = [raw[at : at + 16_384] for at in range(0, len(raw), 16_384)] or [b""]
    out = b""
    for place, part in enumerate(parts):
        last = END_HEADERS if place == len(parts) - 1 else 0
        out += frame(CONTINUATION if place else HEADERS, last | (0 if place else flags), stream, part)
    return out


def data(stream: int, payload: bytes = b"", *, end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)


def rst(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def priority(stream: int, on: int = 0) -> bytes:
    return frame(PRIORITY, 0, stream, struct.pack(">IB", on, 16))


def goaway(code: int = NO_ERROR) -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", 0, code))


PING_FRAME: Final = frame(PING, 0, 0, b"attacker")
SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)
NO_WINDOW: Final = ((4, 0),)
"""Settings: streams begin without credit."""


def h2_tls(authority: str) -> ssl.SSLContext:
    """A context that trusts ``authority`` and offers HTTP/2 only."""
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    return context


class Attacker(Client):
    """``frames`` has everything that came, in order."""

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        source: str = "",
        settings_of: Iterable[tuple[int, int]] = (),
        greets: bool = True,
        buffer_bytes: int = 0,
    ) -> None:
        """``buffer_bytes``: of the socket's receiving side, for those who do not read."""
        super().__init__(port, tls=tls, source=source)
        if buffer_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self.frames: list[Frame] = []
        self.heads: dict[int, dict[str, str]] = {}
        """Header fields of the responses (or their trailers), by stream."""
        self._decoder = hpack.Decoder()
        self.next_id = 1
        self.is_ended = False
        self.is_reset = False
        if greets:
            self.send(PREFACE + settings(*settings_of) + SETTINGS_ACK)

    def stream(self) -> int:
        self.next_id += 2
        return self.next_id - 2

    def push(self, raw: bytes) -> None:
        """Send, though the gateway may have had enough already."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.send(raw)

    def read(self) -> bool:
        """Wait for more, once. False: there is no more."""
        if self.is_ended:
            return False
        try:
            got = self.sock.recv(262_144)
        except (ConnectionError, ssl.SSLError):
            self.is_reset = True
            got = b""
        if not got:
            self.is_ended = True
            return False
        self.buffer += got
        while len(self.buffer) >= 9:
            length = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + length:
                break
            kind, flags, stream = struct.unpack(">BBI", self.buffer[3:9])
            payload = self.buffer[9 : 9 + length]
            self.buffer = self.buffer[9 + length :]
            self.frames.append((kind, flags, stream, payload))
            if kind == HEADERS:
                assert flags & END_HEADERS
                fields = self._decoder.decode(payload, raw=True)
                self.heads[stream] = {name.decode(): value.decode("latin-1") for name, value in fields}
        return True

    def wait(self, check: Callable[[], object], what: str) -> None:
        """Read until it is true."""
        ends = time.monotonic() + PATIENCE_S
        while not check():
            if not self.read() or time.monotonic() > ends:
                raise AssertionError(f"{what}: got {self.frames[-5:]}, ended={self.is_ended}")

    def has_input(self, within_s: float) -> bool:
        """Whether anything comes within that time."""
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return True
        return bool(select.select([self.sock], [], [], within_s)[0])

    def drip(self, part: bytes, every_s: float, for_s: float) -> None:
        """Send ``part`` again and again until something else than a WINDOW_UPDATE is heard."""
        ends = time.monotonic() + for_s
        before = self.told()
        while self.told() == before and not self.is_ended:
            if time.monotonic() > ends:
                raise AssertionError("the gateway went along with it")
            if self.has_input(every_s):
                self.read()
            else:
                self.push(part)

    def told(self) -> int:
        return sum(kind in (HEADERS, RST_STREAM, GOAWAY) for kind, *_ in self.frames)

    # -- what came ---------------------------------------------------------------------------------------

    def count(self, kind: int, stream: int | None = None) -> int:
        return sum(each == kind and stream in (None, of) for each, _, of, _ in self.frames)

    def resets(self) -> dict[int, int]:
        return {of: int.from_bytes(body, "big") for kind, _, of, body in self.frames if kind == RST_STREAM}

    def goaways(self) -> list[int]:
        return [struct.unpack(">II", body[:8])[1] for kind, _, _, body in self.frames if kind == GOAWAY]

    def status(self, stream: int) -> int:
        """Of the response's head; waits for it."""
        self.wait(lambda: stream in self.heads, f"a head on stream {stream}")
        return int(self.heads[stream][":status"])

    def body(self, stream: int) -> bytes:
        """Of a whole response; waits for its end."""
        self.wait(lambda: self.has_ended(stream), f"the end of stream {stream}")
        return b"".join(body for kind, _, of, body in self.frames if kind == DATA and of == stream)

    def has_ended(self, stream: int) -> bool:
        return any(
            kind in (DATA, HEADERS) and flags & END_STREAM and of == stream
            for kind, flags, of, _ in self.frames
        )

    def reset_of(self, stream: int) -> int:
        """The code that a stream was reset with; waits for it."""
        self.wait(lambda: stream in self.resets(), f"a reset of stream {stream}")
        return self.resets()[stream]

    def verdict(self) -> int:
        """The code of the GOAWAY that ended the connection; fails unless an end in order followed."""
        ends = time.monotonic() + PATIENCE_S
        while self.read():
            assert time.monotonic() < ends, f"the connection goes on: {self.frames[-5:]}"
        assert not self.is_reset, "cut: the GOAWAY could have been lost"
        assert self.goaways(), f"an end without GOAWAY: {self.frames[-5:]}"
        return self.goaways()[-1]

    def is_served(self) -> bool:
        """Whether a request is answered by the backend now."""
        stream = self.stream()
        self.send(headers(stream, request(path=b"/good")))
        return self.status(stream) == 200 and self.body(stream) == b"backend"
