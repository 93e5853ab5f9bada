"""Conversations with the HTTP/2 codec: frames made and read by hand, and both roles without sockets.

Nothing here uses the codec's own packing: a frame is nine bytes and its payload, a header block is made of
literals or by the Python package ``hpack``. A ``Case`` is what a peer sends and what must become of it;
``check`` runs it in one piece, cut in two at every byte, and byte by byte.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import hpack

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.client import H2Client, H2ClientStream
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.server import H2Server, H2ServerStream
from expressgateway.wire.head import RequestHead, ResponseHead
from expressgateway.wire.sinks import RequestSink, ServerStream
from tests.wire.recorder import Answer, Recorder, answer_ok, pieces

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
NO_ERROR, PROTOCOL, INTERNAL, FLOW, SETTINGS_TIMEOUT, CLOSED, SIZE, REFUSED, CANCEL, COMPRESSION = range(10)
CALM = 0xB
END_STREAM, END_HEADERS, PADDED, PRIORITIZED, ACK = 1, 4, 8, 0x20, 1

GET = ((b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"example.org"))
POST = ((b":method", b"POST"), *GET[1:])
OK = ((b":status", b"200"),)

Fields = Iterable[tuple[bytes, bytes]]
Frame = tuple[int, int, int, bytes]
"""Type, flags, stream, payload."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(fields: Fields) -> bytes:
    """Literals that change no table."""
    out = b""
    for name, value in fields:
        out += b"\x00" + _string(name) + _string(value)
    return out


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest, out = len(text) - 127, b"\x7f"
    while rest >= 128:
        out += bytes((rest & 127 | 128,))
        rest >>= 7
    return out + bytes((rest,)) + text


def headers(stream: int, fields: Fields = GET, flags: int = END_STREAM | END_HEADERS) -> bytes:
    raw = block(fields)
    if len(raw) <= 16_384:
        return frame(HEADERS, flags, stream, raw)
    parts = [raw[at : at + 16_384] for at in range(0, len(raw), 16_384)]
    out = frame(HEADERS, flags & ~END_HEADERS, stream, parts[0])
    for part in parts[1:-1]:
        out += frame(CONTINUATION, 0, stream, part)
    return out + frame(CONTINUATION, END_HEADERS, stream, parts[-1])


def data(stream: int, payload: bytes = b"", end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def window_update(stream: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", increment))


def rst(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


def ping(payload: bytes = b"12345678", flags: int = 0) -> bytes:
    return frame(PING, flags, 0, payload)


def goaway(last: int, code: int = NO_ERROR, stream: int = 0) -> bytes:
    return frame(GOAWAY, 0, stream, struct.pack(">II", last, code))


SETTINGS_ACK = frame(SETTINGS, ACK, 0)
BEGIN = PREFACE + settings() + SETTINGS_ACK


def frames(raw: bytes) -> list[Frame]:
    """Cut bytes into frames; they must end with a whole one."""
    out = []
    while raw:
        length = int.from_bytes(raw[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", raw[3:9])
        assert len(raw) >= 9 + length, "a frame cut short"
        out.append((kind, flags, stream, raw[9 : 9 + length]))
        raw = raw[9 + length :]
    return out


def resets(out: list[Frame]) -> list[tuple[int, int]]:
    return [(stream, int.from_bytes(body, "big")) for kind, _, stream, body in out if kind == RST_STREAM]


def goaways(out: list[Frame]) -> list[tuple[int, int]]:
    return [struct.unpack(">II", body[:8]) for kind, _, _, body in out if kind == GOAWAY]


def bodies(out: list[Frame], stream: int) -> bytes:
    return b"".join(body for kind, _, each, body in out if kind == DATA and each == stream)


def ended(out: list[Frame], stream: int) -> bool:
    return any(kind in (DATA, HEADERS) and flags & 1 and each == stream for kind, flags, each, _ in out)


def lists(out: list[Frame], decoder: hpack.Decoder | None = None) -> list[list[tuple[bytes, bytes]]]:
    """Header lists as the Python package reads them."""
    decoder = decoder or hpack.Decoder()
    return [
        [(bytes(name), bytes(value)) for name, value in decoder.decode(body, raw=True)]
        for kind, _, _, body in out
        if kind == HEADERS
    ]


class Shell:
    """The connection around either role."""

    def __init__(self, answer: Answer | None) -> None:
        self.answer = answer
        self.exchanges: list[Recorder] = []
        self.refusals: list[tuple[int, WireError]] = []
        self.done: list[int] = []
        self.closed: list[bool] = []
        self.events: list[str] = []
        self.rejections: list[WireError] = []
        self.told: list[str] = []
        self.wakes = 0

    def wake(self) -> None:
        self.wakes += 1

    def stream_done(self, stream: Any) -> None:
        self.done.append(stream.id)

    def close(self, linger: bool) -> None:
        self.closed.append(linger)

    def security_event(self, kind: str, detail: str) -> None:
        self.events.append(kind)

    def rejected(self, error: WireError) -> None:
        self.rejections.append(error)

    def open_exchange(self, stream: ServerStream) -> RequestSink:
        recorder = Recorder(stream, self.answer)
        self.exchanges.append(recorder)
        return recorder

    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        assert isinstance(stream, H2ServerStream)
        self.refusals.append((stream.id, error))
        stream.send_head(ResponseHead(error.status, ()), True)

    def limits_changed(self) -> None:
        self.told.append("limits")

    def unavailable(self) -> None:
        self.told.append("unavailable")


def limits(**more: Any) -> H2Limits:
    rules = FieldRules(
        more.pop("max_count", 256), more.pop("max_target", 16_384), more.pop("underscore", "reject")
    )
    return H2Limits(rules, **more)


class World:
    """What both roles' worlds share."""

    codec: H2Server | H2Client
    shell: Shell
    now: float

    def feed(self, *pieces_of: bytes) -> "World":
        for piece in pieces_of:
            self.codec.receive_data(piece, self.now)
        return self

    def take(self) -> list[Frame]:
        """What is sent, by frame, since the last look."""
        raw = b""
        for _ in range(10_000):
            new = b"".join(self.codec.take_out())
            if not new:
                break
            raw += new
        self.seen += frames(raw.removeprefix(PREFACE))
        return frames(raw.removeprefix(PREFACE))

    seen: list[Frame]

    def verdict(self) -> Any:
        """What became of it: the GOAWAY's code, or the resets."""
        self.take()
        codes = [code for _, code in goaways(self.seen)]
        if codes:
            assert self.shell.closed == [True]
            return ("connection", codes[-1])
        return resets(self.seen)


class ServerWorld(World):
    """One client's connection, its preface and SETTINGS exchanged unless ``raw``."""

    def __init__(self, answer: Answer | None = answer_ok, *, raw: bool = False, **more: Any) -> None:
        self.shell = Shell(answer)
        self.now = 100.0
        self.seen = []
        self.codec: H2Server = H2Server(self.shell, limits(**more), b"https")
        self.codec.begin()
        if not raw:
            self.feed(BEGIN)
            self.take()
            self.seen.clear()

    @property
    def exchanges(self) -> list[Recorder]:
        return self.shell.exchanges

    @property
    def last(self) -> Recorder:
        return self.shell.exchanges[-1]

    def stream(self, number: int = -1) -> H2ServerStream:
        stream = self.shell.exchanges[number].stream
        assert isinstance(stream, H2ServerStream)
        return stream


class ClientWorld(World):
    """One backend's connection, likewise."""

    def __init__(self, raw: bool = False, settings_of: tuple[tuple[int, int], ...] = (), **more: Any) -> None:
        self.shell = Shell(None)
        self.now = 100.0
        self.seen = []
        more.setdefault("underscore", "allow")
        self.codec: H2Client = H2Client(self.shell, limits(**more))
        self.codec.begin()
        self.asked: list[tuple[H2ClientStream, Recorder]] = []
        if not raw:
            self.feed(settings(*settings_of), SETTINGS_ACK)
            self.take()
            self.seen.clear()

    def ask(self, head: RequestHead | None = None, end: bool = True) -> Recorder:
        sink = Recorder()
        stream = self.codec.open(sink)
        self.asked.append((stream, sink))
        stream.send_head(head or request(), end)
        return sink

    @property
    def stream(self) -> H2ClientStream:
        return self.asked[-1][0]

    @property
    def sink(self) -> Recorder:
        return self.asked[-1][1]


def request(method: bytes = b"GET", path: bytes = b"/", **more: Any) -> RequestHead:
    return RequestHead(method, b"https", b"example.org", path, more.pop("headers", ()), **more)


@dataclass
class Case:
    """``verdict``: a connection error's code, a list of resets, or ``[]`` for none."""

    name: str
    into: bytes
    verdict: Any
    requests: int | None = None
    """How many exchanges are opened."""
    more: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name


def error(code: int) -> tuple[str, int]:
    return ("connection", code)


def outcome(world: World) -> Any:
    world.take()
    shell = world.shell
    # Where a read ends says nothing: the same frames, whatever the cut.
    return (
        world.seen,
        [each.meaning() for each in shell.exchanges],
        [(stream, type(each)) for stream, each in shell.refusals],
        shell.done,
        shell.closed,
        shell.events,
    )


def check(case: Case, make: Callable[[], World]) -> None:
    """Run a case whole and in pieces."""
    whole = make().feed(case.into)
    assert whole.verdict() == case.verdict
    if case.requests is not None:
        assert len(whole.shell.exchanges) == case.requests
    expected = outcome(whole)
    size = len(case.into)
    for cut in pieces(case.into) if size < 600 else [[case.into[:7], case.into[7:]]]:
        parts = make().feed(*cut)
        assert outcome(parts) == expected, [len(piece) for piece in cut]
