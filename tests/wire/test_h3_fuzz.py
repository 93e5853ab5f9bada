"""What holds for any bytes: neither role raises, cuts change nothing, credit comes back, all is bounded."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.wire.h3.client import H3Client
from expressgateway.wire.head import ResponseHead
from tests.wire.h3_world import (
    CAPACITY,
    CONNECT,
    GET,
    OK,
    POST,
    ClientWorld,
    Sent,
    ServerWorld,
    World,
    block,
    data,
    frame,
    headers,
    insert,
    integer,
    outcome,
    request,
)
from tests.wire.h3_world import settings as settings_frame
from tests.wire.recorder import Answer, Recorder, answer, answer_ok, no_answer

MANY = settings(max_examples=250, deadline=None)

BLOCKS = st.sampled_from(
    [
        block(GET),
        block(POST),
        block(OK),
        block(CONNECT),
        block((*POST, (b"content-length", b"5"))),
        block((*OK, (b"content-length", b"5"))),
        block([(b":status", b"103")]),
        block([(b"a", b"b")]),
        block([(b"te", b"trailers"), *GET]),
        block((*GET, (b"X", b"y"))),
        block((*GET, (b"x", b"\xe4")), marked=True),
        b"\0\0\xd1\xd7\xc1\x50\x01x",
        b"\0\0\xd9",
        b"\0\0",
        b"\x02\0\x80",
        b"\x02\0\xd1\xd7\xc1\x50\x01x\x80",
        b"\x03\x80\xd9\x10",
        b"\xff\x80",
        b"",
    ]
)
INTEGERS = st.sampled_from([0, 1, 4, 5, 63, 64, 100, 2**14, 2**30, 2**62 - 1]).map(integer)
SETTING = st.tuples(st.sampled_from([0, 1, 2, 6, 7, 8, 0x21, 0x33]), st.sampled_from([0, 1, 16, 4096, 2**40]))
PAYLOADS = st.binary(max_size=20) | BLOCKS | INTEGERS
KINDS = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 7, 0xD, 0x21, 0xF0700, 2**40])
FRAMES = st.builds(frame, KINDS, PAYLOADS)
SOUND = st.sampled_from(
    [
        headers(GET),
        headers(POST) + data(b"hello"),
        headers((*POST, (b"content-length", b"5"))) + data(b"he") + data(b"llo"),
        headers(POST) + data(b"hello") + headers([(b"a", b"b")]),
        headers(OK) + data(b"hello"),
        headers(CONNECT) + data(b"x"),
    ]
)
INSERTIONS = st.sampled_from(
    [CAPACITY, CAPACITY + insert(b"a", b"b"), insert(b"c", b"d" * 100), b"\x3f\xe2\x1f", b"\x00", b"\x20"]
) | st.binary(max_size=6)
ACKS = st.sampled_from([b"\x80", b"\x84", b"\x40", b"\x44", b"\x01", b"\x00"]) | st.binary(max_size=3)
CONTROL = st.lists(SETTING, max_size=3).map(lambda pairs: settings_frame(*pairs)) | FRAMES


@st.composite
def conversations(draw: st.DrawFn, base: int) -> list[Sent]:
    """Pieces of streams, their order kept in each."""
    out: list[Sent] = []
    ended: set[int] = set()
    for _ in range(draw(st.integers(1, 10))):
        match draw(st.integers(0, 9)):
            case 0:
                number, raw = base, draw(CONTROL)
            case 1:
                number, raw = base + 4, draw(INSERTIONS)
            case 2:
                number, raw = base + 8, draw(ACKS)
            case 3:
                number, raw = base + 12, draw(st.binary(max_size=9))
            case _:
                number = draw(st.sampled_from([0, 0, 4, 4, 8, 12, 1]))
                raw = draw(FRAMES | SOUND | SOUND | st.binary(max_size=9))
                if draw(st.integers(0, 5)) == 0:
                    at = draw(st.integers(0, len(raw)))
                    raw = raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 2)) :]
        if number in ended:
            continue
        end = draw(st.integers(0, 3)) == 0 and (not number & 2 or draw(st.integers(0, 5)) == 0)
        if end:
            ended.add(number)
        out.append((number, raw, end))
    return out


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
    """What an exchange, the peer or the shell may do at any time."""
    streams_of = list(world.codec.streams.values())
    match draw(st.integers(0, 3)):
        case 0:
            world.codec.go_away_soon()
        case 1:
            world.flush()
        case _:
            pass
    if not streams_of:
        return
    stream: Any = draw(st.sampled_from(streams_of))
    match draw(st.integers(0, 9)):
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
            if stream.id not in world.gone:
                world.reset(stream.id, draw(st.sampled_from([0x100, 0x10B, 0x10C, 2**61])))
        case 8:
            world.stop(stream.id, draw(st.sampled_from([0x100, 0x10B, 0x10C])))
        case _:
            world.transport.holds.add(stream.id)


def bounded(world: World) -> None:
    codec = world.codec
    assert len(codec.streams) <= codec.limits.max_concurrent_streams
    assert len(codec._parked) <= 16
    assert len(codec._control_held) <= 1024 + 16
    assert all(len(held) <= 7 for held in codec._types_held.values())
    assert len({id(each) for each in codec._busy}) == len(codec._busy)
    for stream in codec.streams.values():
        assert len(stream._held) <= 15
        assert len(stream._block or b"") <= codec.limits.max_header_list_size
    assert len(codec.known) <= 4
    world.account()


def finish(world: World, draw: Any) -> None:
    match draw(st.integers(0, 2)):
        case 0:
            world.codec.receive_closed("gone")
        case 1:
            world.codec.go_away()
        case _:
            pass
    world.codec.sweep(world.now + draw(st.sampled_from([1, 40, 400])))
    world.flush()
    world.feed(16, b"\0" * 30)
    bounded(world)


class TestServer:
    @MANY
    @given(draw=st.data(), sent=conversations(2))
    def test_never_raises_in_any_state(self, draw: st.DataObject, sent: list[Sent]) -> None:
        world = ServerWorld(
            draw.draw(st.sampled_from(ANSWERS)),
            raw=draw.draw(st.booleans()),
            websocket=draw.draw(st.booleans()),
            max_concurrent_streams=3,
            max_header_list_size=draw.draw(st.sampled_from([100, 65_536])),
            max_send_buf_size=1000,
        )
        for stream_id, raw, end in sent:
            if stream_id == 1:  # a transport knows whose streams are whose
                continue
            if stream_id in world.gone:
                continue
            world.feed(stream_id, raw, end)
            bounded(world)
            if draw.draw(st.integers(0, 2)) == 0:
                poke(world, draw.draw)
        finish(world, draw.draw)
        done = world.shell.done
        assert len(done) == len(set(done)), "each stream is done once"
        assert all(each.aborts <= 1 for each in world.exchanges)

    @MANY
    @given(draw=st.data(), sent=conversations(2), reply=st.sampled_from(ANSWERS))
    def test_cuts_change_nothing(self, draw: st.DataObject, sent: list[Sent], reply: Answer) -> None:
        sent = [each for each in sent if each[0] != 1]
        whole, parts = ServerWorld(reply, websocket=True), ServerWorld(reply, websocket=True)
        for each in sent:
            whole.feed(*each)
        for stream_id, raw, end in sent:
            places = sorted(draw.draw(st.lists(st.integers(0, len(raw)), max_size=4)))
            for start, stop in zip([0, *places], [*places, len(raw)], strict=True):
                parts.feed(stream_id, raw[start:stop], False)
            if end:
                parts.feed(stream_id, b"", True)
        assert_alike(parts, whole)


def assert_alike(parts: World, whole: World) -> None:
    """Where an end comes by itself, what was told before it may be more, and an exchange may have begun; what
    became of it is the same."""
    if any(each.error is not None for world in (parts, whole) for each in world.shell.exchanges):
        assert parts.transport.closed == whole.transport.closed
        assert parts.transport.resets == whole.transport.resets
    else:
        assert outcome(parts) == outcome(whole)


class TestClient:
    @MANY
    @given(draw=st.data(), sent=conversations(3))
    def test_never_raises_in_any_state(self, draw: st.DataObject, sent: list[Sent]) -> None:
        world = ClientWorld(
            raw=draw.draw(st.booleans()),
            peer=((8, 1),),
            max_header_list_size=draw.draw(st.sampled_from([100, 65_536])),
            max_send_buf_size=1000,
        )
        assert isinstance(world.codec, H3Client)
        methods = st.sampled_from([b"GET", b"HEAD", b"POST"])
        for stream_id, raw, end in sent:
            if world.codec.can_open and draw.draw(st.booleans()):
                protocol = draw.draw(st.sampled_from([None, None, b"websocket"]))
                world.ask(
                    request(draw.draw(methods), protocol=protocol), draw.draw(st.booleans()) and not protocol
                )
            if stream_id in world.gone:
                continue
            world.feed(stream_id, raw, end)
            bounded(world)
            if draw.draw(st.integers(0, 2)) == 0:
                poke(world, draw.draw)
        finish(world, draw.draw)
        assert all(sink.aborts <= 1 for _, sink in world.asked)
        done = [stream for stream in world.shell.done if stream >= 0]
        assert len(done) == len(set(done))
