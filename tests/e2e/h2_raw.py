"""HTTP/2 by hand over a socket: frames are nine bytes and what one cares to put behind them.

``frame`` and its like build any frame, wrong ones too; ``block`` makes header blocks of literals that change
no table, so that a case owes nothing to the one before. ``RawH2`` is a client in clear text or over TLS: it
says only what it is told to, but acknowledges SETTINGS, answers PINGs and, unless ``grants`` is off, gives
back the credit that a body costs. What it was sent is kept: an ``Answer`` for each stream, ``goaways``.

It shares no code with the gateway; header blocks it reads by the Python package ``hpack``.
"""

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import hpack

from tests.e2e.harness import PATIENCE_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
ENDS = END_STREAM | END_HEADERS
NO_ERROR, PROTOCOL, INTERNAL, FLOW, SETTINGS_TIMEOUT, CLOSED, SIZE, REFUSED, CANCEL, COMPRESSION = range(10)
CALM = 0xB
TABLE_SIZE, PUSH, STREAMS, WINDOW, FRAME_SIZE, LIST_SIZE = range(1, 7)
MAX = 2**31 - 1
LINGER_RESET = struct.pack("ii", 1, 0)

Fields = Iterable[tuple[str | bytes, str | bytes]]
Pairs = list[tuple[str, str]]


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", *, length: int = -1) -> bytes:
    """``length``: what its header says instead of the payload's."""
    size = len(payload) if length < 0 else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def number(value: int, prefix_bits: int, first: int = 0) -> bytes:
    """A number as RFC 7541 5.1 has it, behind the bits of ``first``."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(value: str | bytes) -> bytes:
    """A string without Huffman's code (RFC 7541 5.2)."""
    raw = _bytes(value)
    return number(len(raw), 7) + raw


def block(fields: Fields) -> bytes:
    """A header block of literals without indexing (RFC 7541 6.2.2)."""
    return b"".join(b"\x00" + text(name) + text(value) for name, value in fields)


def request(path: str = "/", method: str = "GET", *more: tuple[str, str]) -> Pairs:
    """A sound request's header list."""
    return [
        (":method", method),
        (":scheme", "https"),
        (":path", path),
        (":authority", "localhost"),
        *more,
    ]


def headers(stream: int, fields: Fields | bytes | None = None, flags: int = ENDS) -> bytes:
    """HEADERS; ``fields`` as pairs or as a block."""
    found = request() if fields is None else fields
    return frame(HEADERS, flags, stream, found if isinstance(found, bytes) else block(found))


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return frame(DATA, flags, stream, payload)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def settings_ack() -> bytes:
    return frame(SETTINGS, ACK, 0)


def ping(payload: bytes = b"whatever") -> bytes:
    return frame(PING, 0, 0, payload)


def rst(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def priority(stream: int, depends_on: int = 0, weight: int = 16, exclusive: bool = False) -> bytes:
    return frame(PRIORITY, 0, stream, priority_of(depends_on, weight, exclusive))


def priority_of(depends_on: int, weight: int = 16, exclusive: bool = False) -> bytes:
    """A stream's place as PRIORITY and HEADERS carry it; ``weight`` from 1 to 256."""
    return struct.pack(">IB", depends_on | exclusive << 31, weight - 1)


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def goaway(last: int = 0, code: int = NO_ERROR, stream: int = 0, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, stream, struct.pack(">II", last, code) + debug)


class Answer:
    """What came on one stream."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Pairs = []
        self.informational: list[tuple[int, Pairs]] = []
        self.chunks: list[bytes] = []
        self.size = 0  # of the body
        self.trailers: Pairs | None = None
        self.is_complete = False
        """It was ended by END_STREAM."""
        self.reset: int | None = None
        """The code that it was reset with."""

    @property
    def is_over(self) -> bool:
        return self.is_complete or self.reset is not None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def get(self, name: str) -> str | None:
        """The values of a header, joined; None if there is none."""
        found = [value for each, value in self.headers if each == name]
        return ", ".join(found) if found else None

    def take_block(self, fields: Pairs) -> None:
        status = int(dict(fields).get(":status", 0))
        if self.status:
            self.trailers = fields
        elif 100 <= status < 200:
            self.informational.append((status, fields[1:]))
        else:
            self.status = status
            self.headers = fields[1:]

    def __repr__(self) -> str:
        return f"<Answer {self.status} body={self.size} complete={self.is_complete} reset={self.reset}>"


class RawH2:
    """See the module's text."""

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        sni: str = "localhost",
        source: str = "",
        first: bytes | None = None,
        offer: Iterable[tuple[int, int]] = (),
        grants: bool = True,
        receive_buffer: int = 0,
    ) -> None:
        """``first``: sent instead of the preface and a SETTINGS frame of what is in ``offer``."""
        self.sock: socket.socket = socket.socket(socket.AF_INET)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE_S)
        try:
            if source:
                self.sock.bind((source, 0))
            self.sock.connect(("127.0.0.1", port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls:
                self.sock = tls.wrap_socket(self.sock, server_hostname=sni)
        except OSError:
            self.sock.close()
            raise
        self.alpn = self.sock.selected_alpn_protocol() if isinstance(self.sock, ssl.SSLSocket) else None
        self.answers: dict[int, Answer] = {}
        self.goaways: list[tuple[int, int, bytes]] = []
        """Last stream, code, and what was said to the operator."""
        self.pongs: list[bytes] = []
        self.acks = 0  # of our SETTINGS
        self.granted = 0  # by the gateway's WINDOW_UPDATE on the connection
        self.settings: dict[int, int] = {}
        self.grants = grants
        self.encoder = hpack.Encoder()
        self.decoder = hpack.Decoder()
        self.window = 65_535
        self.windows: dict[int, int] = {}
        self._buffer = bytearray()
        self._blocks = bytearray()
        self._block_flags = 0
        self._next = 1
        try:
            self.send(PREFACE + settings(*offer) if first is None else first)
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, raw: bytes) -> None:
        self.sock.sendall(raw)

    def open(self, fields: Fields, *, end: bool = True) -> int:
        """Send a request's head, on the next stream. Give the stream."""
        stream = self._next
        self._next += 2
        self.answers[stream] = Answer()
        self.windows[stream] = self.settings.get(WINDOW, 65_535)
        made = self.encoder.encode([(_bytes(name), _bytes(value)) for name, value in fields])
        flags = END_STREAM if end else 0
        pieces = [made[at : at + 16_384] for at in range(0, len(made), 16_384)]
        self.send(frame(HEADERS, flags | (END_HEADERS if len(pieces) == 1 else 0), stream, pieces[0]))
        for each in pieces[1:]:
            self.send(frame(CONTINUATION, END_HEADERS if each is pieces[-1] else 0, stream, each))
        return stream

    def send_body(self, stream: int, body: bytes, *, end: bool = True, size: int = 16_384) -> None:
        """Send a body as the windows allow; reads while it has to wait. Stops if the stream is reset."""
        at = 0
        while at < len(body) and not self.answer(stream).is_over:
            room = min(size, self.window, self.windows[stream], len(body) - at)
            if room <= 0:
                self.read()
                continue
            at += room
            is_last = end and at == len(body)
            self.send(data(stream, body[at - room : at], END_STREAM if is_last else 0))
            self.window -= room
            self.windows[stream] -= room
        if end and not body:
            self.send(data(stream, b"", END_STREAM))

    def send_trailers(self, stream: int, fields: Fields) -> None:
        self.send(headers(stream, fields, ENDS))

    def reset_tcp(self) -> None:
        """Close by RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.sock.close()

    # -- reading ---------------------------------------------------------------------------------------

    def answer(self, stream: int) -> Answer:
        return self.answers.setdefault(stream, Answer())

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            got = self.sock.recv(262_144)
            if not got:
                raise EOFError
            self._buffer += got
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def read(self) -> Frame:
        """One frame, and its effect. Raises ``EOFError`` at the end."""
        head = self._exactly(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        found = Frame(kind, flags, stream, self._exactly(int.from_bytes(head[:3], "big")))
        self._take(found)
        return found

    def _take(self, found: Frame) -> None:
        kind, flags, stream, payload = found
        if kind == DATA:
            answer = self.answer(stream)
            answer.chunks.append(payload)
            answer.size += len(payload)
            answer.is_complete = flags & END_STREAM != 0
            if payload and self.grants:
                self._reply(window_update(0, len(payload)) + window_update(stream, len(payload)))
        elif kind in (HEADERS, CONTINUATION):
            if kind == HEADERS:
                self._block_flags = flags
            self._blocks += payload
            if flags & END_HEADERS:
                fields = self.decoder.decode(bytes(self._blocks), raw=True)
                self._blocks.clear()
                answer = self.answer(stream)
                answer.take_block(
                    [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]
                )
                answer.is_complete = self._block_flags & END_STREAM != 0
        elif kind == RST_STREAM:
            self.answer(stream).reset = struct.unpack(">I", payload)[0]
        elif kind == SETTINGS:
            self._take_settings(flags, payload)
        elif kind == PING:
            if flags & ACK:
                self.pongs.append(payload)
            else:
                self._reply(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.goaways.append((*struct.unpack_from(">II", payload), payload[8:]))
        elif kind == WINDOW_UPDATE:
            increment = struct.unpack(">I", payload)[0]
            if stream:
                self.windows[stream] = self.windows.get(stream, 0) + increment
            else:
                self.window += increment
                self.granted += increment

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            self.acks += 1
            return
        before = self.settings.get(WINDOW, 65_535)
        self.settings.update(struct.iter_unpack(">HI", payload))
        for stream in self.windows:
            self.windows[stream] += self.settings.get(WINDOW, 65_535) - before
        self._reply(settings_ack())

    def _reply(self, raw: bytes) -> None:
        """What nobody hears if the gateway has gone meanwhile."""
        with contextlib.suppress(OSError):
            self.send(raw)

    def until(self, check: Callable[[], object], what: str = "it happens") -> None:
        """Read until it is true."""
        while not check():
            try:
                self.read()
            except (EOFError, OSError) as error:
                raise AssertionError(f"not until {what}: {error!r}; {self!r}") from None

    def response(self, stream: int) -> Answer:
        """Read until this stream is over."""
        answer = self.answer(stream)
        self.until(lambda: answer.is_over, f"stream {stream} is over")
        return answer

    def ask(self, fields: Fields, body: bytes | None = None) -> Answer:
        """A request and its response."""
        stream = self.open(fields, end=body is None)
        if body is not None:
            self.send_body(stream, body)
        return self.response(stream)

    def pong(self, payload: bytes = b"are you?") -> None:
        """A PING that must be answered: what was sent before has been read then."""
        self.send(ping(payload))
        self.until(lambda: payload in self.pongs, "PING is answered")

    def rest(self) -> None:
        """Read until the gateway closes. A reset counts as an end."""
        with contextlib.suppress(EOFError, ConnectionError, ssl.SSLError):
            while True:
                self.read()

    def __repr__(self) -> str:
        return f"<RawH2 goaways={self.goaways} answers={self.answers}>"


def h2_context(trust: str, *alpn: str) -> ssl.SSLContext:
    """A TLS client that trusts one certificate and offers ``alpn``: h2, if nothing is named."""
    context = ssl.create_default_context(cafile=trust)
    context.set_alpn_protocols(list(alpn) or ["h2"])
    return context
