"""What holds for any bytes: neither role raises, cuts change nothing, memory is bounded."""

import struct
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from expressgateway.wire.h2.client import H2Client
from expressgateway.wire.head import ResponseHead
from tests.wire.h2_world import (
    BEGIN,
    GET,
    OK,
    POST,
    ClientWorld,
    ServerWorld,
    World,
    block,
    frame,
    outcome,
    request,
)
from tests.wire.recorder import Answer, Recorder, answer, answer_ok, no_answer

MANY = settings(max_examples=250, deadline=None)

IDS = st.sampled_from([0, 1, 1, 1, 2, 3, 3, 5, 7, 2**31 - 1, 1 | 1 << 31])
FLAGS = st.sampled_from([0, 1, 4, 5, 5, 8, 0x20, 0x24, 0x25, 0x2D, 0xFF])
BLOCKS = st.sampled_from(
    [
        block(GET),
        block(POST),
        block(OK),
        block((*POST, (b"content-length", b"5"))),
        block((*OK, (b"content-length", b"5"))),
        block([(b":status", b"103")]),
        block([(b"a", b"b")]),
        block([(b"te", b"trailers"), *GET]),
        block((*GET, (b"X", b"y"))),
        b"\x82\x87\x84\x40\x0a:authority\x01x",
        b"\x88\x40\x01k\x01v",
        b"\x82\x87\x84\xbe",
        b"\x20\x3f\xe1\x1f\x88",
        b"\x40",
        b"\xff\x80",
    ]
)
NUMBERS = st.sampled_from([0, 1, 100, 65_535, 2**31 - 1, 2**31, 2**32 - 1])
PAYLOADS = (
    st.binary(max_size=20)
    | BLOCKS
    | BLOCKS.map(lambda raw: b"\x02" + raw + b"\0\0")
    | BLOCKS.map(lambda raw: bytes(5) + raw)
    | NUMBERS.map(lambda number: struct.pack(">I", number))
    | st.lists(st.tuples(st.integers(0, 9), NUMBERS), max_size=3).map(
        lambda pairs: b"".join(struct.pack(">HI", *pair) for pair in pairs)
    )
    | st.just(bytes(8))
)
FRAMES = st.builds(
    frame, st.sampled_from([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]), FLAGS, IDS, PAYLOADS
)
SOUND = st.sampled_from(
    [
        frame(1, 5, 1, block(GET)),
        frame(1, 4, 3, block(POST)) + frame(0, 1, 3, b"hello"),
        frame(1, 4, 5, block(POST)) + frame(0, 0, 5, b"hello") + frame(1, 5, 5, block([(b"a", b"b")])),
        frame(1, 1, 7, block(GET)[:9]) + frame(9, 4, 7, block(GET)[9:]),
        frame(1, 4, 1, block(OK)) + frame(0, 1, 1, b"hello"),
        frame(1, 5, 3, block(OK)),
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    raw = b"".join(draw(st.lists(FRAMES | SOUND, max_size=8)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(raw)))
        match draw(st.integers(0, 2)):
            case 0:
                raw = raw[:at] + draw(st.binary(max_size=5)) + raw[at:]
            case 1:
                raw = raw[:at] + bytes((draw(st.integers(0, 255)),)) + raw[at + 1 :]
            case _:
                raw = raw[:at]
    return raw


def cut(draw: Any, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def tunnel(recorder: Recorder) -> None:
    if recorder.stream is not None:
        recorder.stream.send_informational(ResponseHead(101, ()))


ANSWERS: list[Answer] = [
    answer_ok,
    no_answer,
    tunnel,
    answer(200, b"x" * 3000, length=3000),
    answer(200, b"toolong", length=4),
    answer(204),
    answer(200, b"x", trailers=((b"a", b"b"),)),
]


def poke(world: World, draw: Any) -> None:
    """What an exchange may do at any time."""
    streams_of = list(world.codec.streams.values())
    if not streams_of:
        return
    stream: Any = draw(st.sampled_from(streams_of))
    match draw(st.integers(0, 8)):
        case 0:
            stream.pause()
        case 1:
            stream.resume()
        case 2:
            stream.abort(None)
        case 3:
            stream.send_data(b"x" * draw(st.sampled_from([0, 1, 20_000])), draw(st.booleans()))
        case 4:
            stream.send_trailers(((b"a", b"b"),))
        case 5:
            stream.close()
        case 6:
            world.codec.go_away()
        case 7:
            world.codec.congested()
        case _:
            world.codec.drained()


def bounded(world: World) -> None:
    codec = world.codec
    assert len(codec._held) <= 16_384 + 9
    assert len(codec.streams) <= codec.limits.max_concurrent_streams
    assert sum(map(len, codec._block)) <= codec.limits.max_header_list_size
    assert len(codec._resets) <= 256
    assert len(set(map(id, codec.turns))) == len(codec.turns)
    assert all(stream.queued >= 0 for stream in codec.streams.values())
    if isinstance(codec, H2Client):
        assert len(codec._known) <= 4


def finish(world: World, draw: Any) -> None:
    ending = draw(st.sampled_from(["receive_eof", "receive_reset", "go_away", "go_away_soon"]))
    getattr(world.codec, ending)()
    world.codec.sweep(world.now + draw(st.sampled_from([1, 40, 400])))
    world.feed(b"\0" * 30)
    world.codec.take_out()
    bounded(world)


class TestServer:
    @MANY
    @given(data=st.data(), raw=streams() | st.binary(max_size=200))
    @example(data=None, raw=frame(1, 5, 1, b"\x40"))
    def test_never_raises_in_any_state(self, data: Any, raw: bytes) -> None:
        if data is None:
            ServerWorld().feed(raw)
            return
        world = ServerWorld(
            data.draw(st.sampled_from(ANSWERS)),
            websocket=data.draw(st.booleans()),
            max_concurrent_streams=3,
            max_header_list_size=data.draw(st.sampled_from([100, 65_536])),
            max_send_buf_size=1000,
        )
        for piece in cut(data.draw, raw):
            world.feed(piece)
            bounded(world)
            if data.draw(st.integers(0, 3)) == 0:
                poke(world, data.draw)
            if data.draw(st.booleans()):
                world.take()
        finish(world, data.draw)
        exchanges = world.exchanges
        done = world.shell.done
        assert len(done) == len(set(done)), "each stream is done once"
        assert all(each.aborts <= 1 for each in exchanges)

    @MANY
    @given(data=st.data(), raw=streams(), reply=st.sampled_from(ANSWERS))
    def test_cuts_change_nothing(self, data: st.DataObject, raw: bytes, reply: Answer) -> None:
        whole, parts = ServerWorld(reply), ServerWorld(reply)
        whole.feed(raw)
        parts.feed(*cut(data.draw, raw))
        assert outcome(parts) == outcome(whole)

    @MANY
    @given(raw=st.binary(max_size=60))
    def test_first_bytes(self, raw: bytes) -> None:
        world = ServerWorld(raw=True)
        world.feed(raw)
        world.feed(BEGIN)
        bounded(world)


class TestClient:
    @MANY
    @given(data=st.data(), raw=streams() | st.binary(max_size=200))
    def test_never_raises_in_any_state(self, data: st.DataObject, raw: bytes) -> None:
        world = ClientWorld(
            settings_of=((8, 1),),
            max_header_list_size=data.draw(st.sampled_from([100, 65_536])),
            max_send_buf_size=1000,
        )
        methods = st.sampled_from([b"GET", b"HEAD", b"POST"])
        for piece in cut(data.draw, raw):
            if world.codec.can_open and data.draw(st.booleans()):
                protocol = data.draw(st.sampled_from([None, None, b"websocket"]))
                world.ask(
                    request(data.draw(methods), protocol=protocol), data.draw(st.booleans()) and not protocol
                )
            world.feed(piece)
            bounded(world)
            if data.draw(st.integers(0, 3)) == 0:
                poke(world, data.draw)
            if data.draw(st.booleans()):
                world.take()
        finish(world, data.draw)
        assert all(sink.aborts <= 1 for _, sink in world.asked)
        done = [stream for stream in world.shell.done if stream]
        assert len(done) == len(set(done))

    @MANY
    @given(data=st.data(), raw=streams())
    def test_cuts_change_nothing(self, data: st.DataObject, raw: bytes) -> None:
        worlds = []
        for pieces_of in ([raw], cut(data.draw, raw)):
            world = ClientWorld()
            for method in (b"GET", b"HEAD", b"POST"):
                world.ask(request(method))
            world.feed(*pieces_of)
            worlds.append((outcome(world), [sink.meaning() for _, sink in world.asked]))
        assert worlds[0] == worlds[1]
