"""Conversations with the HTTP/3 codec: frames made and read by hand, and both roles without QUIC.

Nothing here uses the codec's own packing: an integer is four cases, a header block is made of literals or
read by ``pylsqpack``. A ``Case`` is what a peer sends on its streams and what must become of it; ``check``
runs it in one piece, with each stream's bytes cut in two at every place, and byte by byte. Every byte that
was given to a codec must have been consumed, or be withheld by a stream that is still open: ``account``
looks at that.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pylsqpack

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h3.client import H3Client, H3ClientStream
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.server import H3Server, H3ServerStream
from expressgateway.wire.head import RequestHead, ResponseHead
from expressgateway.wire.sinks import RequestSink, ServerStream
from tests.wire.recorder import Answer, Recorder, answer_ok

DATA, HEADERS, CANCEL_PUSH, SETTINGS, PUSH_PROMISE, GOAWAY, MAX_PUSH_ID = 0, 1, 3, 4, 5, 7, 0xD
CONTROL, PUSH, ENCODER, DECODER = range(4)
(
    NO_ERROR,
    GENERAL,
    INTERNAL,
    CREATION,
    CRITICAL,
    UNEXPECTED,
    FRAME,
    EXCESSIVE,
    ID,
    SETTINGS_ERROR,
    MISSING,
    REJECTED,
    CANCELLED,
    INCOMPLETE,
    MESSAGE,
) = range(0x100, 0x10F)
DECOMPRESSION, ENCODER_ERROR, DECODER_ERROR = 0x200, 0x201, 0x202

GET = ((b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"example.org"))
POST = ((b":method", b"POST"), *GET[1:])
CONNECT = ((b":method", b"CONNECT"), *GET[1:], (b":protocol", b"websocket"))
OK = ((b":status", b"200"),)

Fields = Iterable[tuple[bytes, bytes]]
Sent = tuple[int, bytes, bool]
"""Stream, bytes, whether it ends with them."""


def integer(number: int, size: int = 0) -> bytes:
    """RFC 9000 16; ``size``: in that many bytes, though fewer would do."""
    for exponent, width in enumerate((1, 2, 4, 8)):
        if number < 1 << (8 * width - 2) and width >= size:
            return (number | exponent << (8 * width - 2)).to_bytes(width, "big")
    raise ValueError(number)


def read_integer(raw: bytes) -> tuple[int, bytes]:
    width = 1 << (raw[0] >> 6)
    assert len(raw) >= width, "an integer cut short"
    return int.from_bytes(raw[:width], "big") & ((1 << (8 * width - 2)) - 1), raw[width:]


def frame(kind: int, payload: bytes = b"") -> bytes:
    return integer(kind) + integer(len(payload)) + payload


def _prefixed(first: int, bits: int, number: int) -> bytes:
    most = (1 << bits) - 1
    if number < most:
        return bytes((first | number,))
    out = [first | most]
    number -= most
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def block(fields: Fields, marked: bool = False) -> bytes:
    """Literals with literal names (RFC 9204 4.5.6); ``marked``: never to be indexed."""
    out = b"\0\0"
    for name, value in fields:
        out += _prefixed(0x30 if marked else 0x20, 3, len(name)) + name
        out += _prefixed(0, 7, len(value)) + value
    return out


def insert(name: bytes, value: bytes) -> bytes:
    """Into the dynamic table (RFC 9204 4.3.3)."""
    return _prefixed(0x40, 5, len(name)) + name + _prefixed(0, 7, len(value)) + value


CAPACITY = b"\x3f\xe1\x1f"  # 4096


def headers(fields: Fields = GET) -> bytes:
    return frame(HEADERS, block(fields))


def data(payload: bytes) -> bytes:
    return frame(DATA, payload)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, b"".join(integer(number) + integer(value) for number, value in pairs))


def frames(raw: bytes) -> list[tuple[int, bytes]]:
    """Cut bytes into frames; they must end with a whole one."""
    out = []
    while raw:
        kind, raw = read_integer(raw)
        length, raw = read_integer(raw)
        assert len(raw) >= length, "a frame cut short"
        out.append((kind, raw[:length]))
        raw = raw[length:]
    return out


class Transport:
    """A QUIC connection that carries nothing: it notes what it was asked."""

    def __init__(self, is_client: bool, streams: int = 100_000) -> None:
        self.next_id = {False: 0 if is_client else 1, True: 2 if is_client else 3}
        self.left = streams
        self.sent: dict[int, bytes] = {}
        self.ends: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.eaten: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.holds: set[int] = set()
        """Streams whose peer takes nothing."""
        self.closed: list[tuple[int, str]] = []
        self.outgoing: list[Sent] = []

    def open_stream(self, unidirectional: bool) -> int | None:
        if not unidirectional:
            if not self.left:
                return None
            self.left -= 1
        number = self.next_id[unidirectional]
        self.next_id[unidirectional] += 4
        return number

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id in self.resets:
            return
        assert stream_id not in self.ends, "sent behind the end"
        assert type(data) is bytes
        self.sent[stream_id] = self.sent.get(stream_id, b"") + data
        self.waiting[stream_id] = self.waiting.get(stream_id, 0) + len(data)
        self.outgoing.append((stream_id, data, end))
        if end:
            self.ends.add(stream_id)

    def reset(self, stream_id: int, code: int) -> None:
        self.resets.setdefault(stream_id, code)
        self.waiting.pop(stream_id, None)

    def stop(self, stream_id: int, code: int) -> None:
        self.stops.setdefault(stream_id, code)

    def consumed(self, stream_id: int, size: int) -> None:
        assert size > 0
        self.eaten[stream_id] = self.eaten.get(stream_id, 0) + size

    def queued(self, stream_id: int) -> int:
        return self.waiting.get(stream_id, 0)

    def close(self, code: int, reason: str) -> None:
        self.closed.append((code, reason))

    def flush(self) -> None:
        for stream_id in list(self.waiting):
            if stream_id not in self.holds:
                del self.waiting[stream_id]


class Shell:
    """The connection around either role."""

    def __init__(self, answer: Answer | None) -> None:
        self.answer = answer
        self.exchanges: list[Recorder] = []
        self.refusals: list[tuple[int, WireError]] = []
        self.refused_heads: list[RequestHead | None] = []
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
        assert isinstance(stream, H3ServerStream)
        self.refusals.append((stream.id, error))
        self.refused_heads.append(head)
        stream.send_head(ResponseHead(error.status, ()), True)

    def limits_changed(self) -> None:
        self.told.append("limits")

    def unavailable(self) -> None:
        self.told.append("unavailable")


def limits(**more: Any) -> H3Limits:
    rules = FieldRules(
        more.pop("max_count", 256), more.pop("max_target", 16_384), more.pop("underscore", "reject")
    )
    return H3Limits(rules, **more)


class World:
    """What both roles' worlds share. ``base``: the peer's first unidirectional stream."""

    codec: H3Server | H3Client
    transport: Transport
    shell: Shell
    now: float
    base: int

    def __init__(self) -> None:
        self.now = 100.0
        self.fed: dict[int, int] = {}
        self.gone: set[int] = set()
        """Streams that have ended or were reset: a transport brings nothing more of them."""

    def feed(self, stream_id: int, raw: bytes = b"", end: bool = False) -> "World":
        self.fed[stream_id] = self.fed.get(stream_id, 0) + len(raw)
        if end:
            self.gone.add(stream_id)
        self.codec.receive(stream_id, raw, end, self.now)
        return self

    def reset(self, stream_id: int, code: int = CANCELLED) -> "World":
        self.gone.add(stream_id)
        self.codec.receive_reset(stream_id, code, self.now)
        return self

    def stop(self, stream_id: int, code: int = CANCELLED) -> "World":
        self.codec.receive_stop(stream_id, code, self.now)
        return self

    def flush(self) -> None:
        self.transport.flush()
        self.codec.sent()

    def begin_peer(self, *pairs: tuple[int, int]) -> None:
        self.feed(self.base, integer(CONTROL) + settings(*pairs))
        self.feed(self.base + 4, integer(ENCODER))
        self.feed(self.base + 8, integer(DECODER))

    def control(self, *raw: bytes) -> "World":
        return self.feed(self.base, b"".join(raw))

    def insertions(self, *raw: bytes) -> "World":
        return self.feed(self.base + 4, b"".join(raw))

    def account(self) -> None:
        """Every byte was consumed once, or is withheld."""
        for stream_id, size in self.fed.items():
            stream = self.codec.streams.get(stream_id)
            kept = 0 if stream is None else stream._withheld + stream._parked_bytes
            if not self.codec.is_closed:
                assert self.transport.eaten.get(stream_id, 0) + kept == size, stream_id
            else:
                assert self.transport.eaten.get(stream_id, 0) + kept <= size, stream_id

    def said(self, stream_id: int) -> list[tuple[int, bytes]]:
        return frames(self.transport.sent.get(stream_id, b""))

    def goaways(self) -> list[int]:
        own = frames(self.transport.sent[self.codec.control_id][1:])
        return [read_integer(body)[0] for kind, body in own if kind == GOAWAY]

    def verdict(self) -> Any:
        """What became of it: the connection's code, or the streams that were reset."""
        if self.transport.closed:
            assert len(self.transport.closed) == 1
            assert self.shell.closed == [False]
            return ("connection", self.transport.closed[0][0])
        return sorted(self.transport.resets.items())


class ServerWorld(World):
    """One client's connection, its control and QPACK streams begun unless ``raw``."""

    base = 2

    def __init__(
        self,
        answer: Answer | None = answer_ok,
        *,
        raw: bool = False,
        peer: tuple[tuple[int, int], ...] = (),
        **more: Any,
    ) -> None:
        super().__init__()
        self.shell = Shell(answer)
        self.transport = Transport(False)
        self.codec: H3Server = H3Server(self.shell, self.transport, limits(**more))
        self.codec.begin(self.now)
        if not raw:
            self.begin_peer(*peer)
        self.flush()

    @property
    def exchanges(self) -> list[Recorder]:
        return self.shell.exchanges

    @property
    def last(self) -> Recorder:
        return self.shell.exchanges[-1]

    def stream(self, number: int = -1) -> H3ServerStream:
        stream = self.shell.exchanges[number].stream
        assert isinstance(stream, H3ServerStream)
        return stream


class ClientWorld(World):
    """One backend's connection, likewise."""

    base = 3

    def __init__(
        self, raw: bool = False, peer: tuple[tuple[int, int], ...] = (), streams: int = 100_000, **more: Any
    ) -> None:
        super().__init__()
        self.shell = Shell(None)
        self.transport = Transport(True, streams)
        more.setdefault("underscore", "allow")
        self.codec: H3Client = H3Client(self.shell, self.transport, limits(**more))
        self.codec.begin(self.now)
        self.asked: list[tuple[H3ClientStream, Recorder]] = []
        if not raw:
            self.begin_peer(*peer)
        self.flush()

    def ask(self, head: RequestHead | None = None, end: bool = True) -> Recorder:
        sink = Recorder()
        stream = self.codec.open(sink)
        self.asked.append((stream, sink))
        stream.send_head(head or request(), end)
        return sink

    @property
    def stream(self) -> H3ClientStream:
        return self.asked[-1][0]

    @property
    def sink(self) -> Recorder:
        return self.asked[-1][1]


def request(method: bytes = b"GET", path: bytes = b"/", **more: Any) -> RequestHead:
    return RequestHead(method, b"https", b"example.org", path, more.pop("headers", ()), **more)


def lists(world: World, stream_id: int) -> list[list[tuple[bytes, bytes]]]:
    """Header lists that were sent on a stream, as ``pylsqpack`` reads them."""
    decoder = pylsqpack.Decoder(4096, 16)
    decoder.feed_encoder(world.transport.sent[world.codec.encoder_id][1:])
    return [
        decoder.feed_header(stream_id, body)[1] for kind, body in world.said(stream_id) if kind == HEADERS
    ]


@dataclass
class Case:
    """``verdict``: a connection error's code, resets by stream, or ``[]`` for none."""

    name: str
    into: list[Sent]
    verdict: Any
    requests: int | None = None
    """How many exchanges are opened."""
    more: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name


def error(code: int) -> tuple[str, int]:
    return ("connection", code)


def outcome(world: World) -> Any:
    shell = world.shell
    # Where a read ends says nothing: the same frames, whatever the cut. But whether a peer is asked to stop
    # depends on whether its end has come.
    return (
        world.transport.sent,
        world.transport.ends,
        world.transport.resets,
        world.verdict(),
        [each.meaning() for each in shell.exchanges],
        [(stream, type(each)) for stream, each in shell.refusals],
        shell.done,
        shell.closed,
        shell.events,
    )


def cuts(sent: list[Sent]) -> Iterator[list[Sent]]:
    """Each stream's bytes in two at every place, and one by one. The end comes with the last, or alone."""
    for number, (stream_id, raw, end) in enumerate(sent):
        for at in range(1, len(raw) + end):
            two = [(stream_id, raw[:at], False), (stream_id, raw[at:], end)]
            yield [*sent[:number], *two, *sent[number + 1 :]]
    singles: list[Sent] = []
    for stream_id, raw, end in sent:
        singles += [(stream_id, raw[at : at + 1], False) for at in range(len(raw))]
        if end:
            singles.append((stream_id, b"", True))
    yield singles


def run(world: World, sent: list[Sent]) -> World:
    for each in sent:
        world.feed(*each)
    world.account()
    return world


def check(case: Case, make: Callable[[], World]) -> None:
    """Run a case whole and in pieces."""
    whole = run(make(), case.into)
    assert whole.verdict() == case.verdict
    if case.requests is not None:
        assert len(whole.shell.exchanges) == case.requests
    expected = outcome(whole)
    if sum(len(raw) for _, raw, _ in case.into) > 600:
        return
    for cut in cuts(case.into):
        assert outcome(run(make(), cut)) == expected, cut
