"""What a client may not do in HTTP/3 and QPACK, and the error that names it, on a running gateway.

Each case is one sentence of RFC 9114 or 9204 with a MUST and an error code in it. What QUIC has to say is in
``test_quic_rfc``.
"""

from collections.abc import Callable, Iterator
from typing import Final

import pytest

from expressgateway.net.quic.credit import varint
from tests.e2e.h3_raw import (
    CANCEL_PUSH,
    CONTROL,
    DATA,
    DECODER,
    ENCODER,
    GET,
    GOAWAY,
    HEADERS,
    MAX_PUSH_ID,
    PUSH_PROMISE,
    SETTINGS,
    RawH3,
    frame,
    head,
)
from tests.e2e.quic_site import Case, name_of, quic_site

# RFC 9114 8.1
STREAM_CREATION_ERROR: Final = 0x103
CLOSED_CRITICAL_STREAM: Final = 0x104
FRAME_UNEXPECTED: Final = 0x105
FRAME_ERROR: Final = 0x106
ID_ERROR: Final = 0x108
SETTINGS_ERROR: Final = 0x109
MISSING_SETTINGS: Final = 0x10A
REQUEST_INCOMPLETE: Final = 0x10D
MESSAGE_ERROR: Final = 0x10E
# RFC 9204 6
DECOMPRESSION_FAILED: Final = 0x200
ENCODER_STREAM_ERROR: Final = 0x201
DECODER_STREAM_ERROR: Final = 0x202


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with quic_site(tmp_path_factory.mktemp("rfc")) as site:
        yield site.port
        with site.client() as client:  # whatever went before
            assert client.begun().get()[1] == b"backend"


def code(client: RawH3) -> int:
    """Of the close that comes."""
    closed = client.closing()
    assert closed.frame_type is None, closed
    return closed.error_code


# -- HTTP/3 (RFC 9114) ---------------------------------------------------------------------------------


def on_request(data: bytes, end: bool = False) -> Callable[[RawH3], object]:
    return lambda client: client.begun().send(data, end)


def on_control(data: bytes, end: bool = False) -> Callable[[RawH3], object]:
    """After SETTINGS."""
    return lambda client: client.opened().send(CONTROL + frame(SETTINGS) + data, end, client.unidirectional())


def on_new(data: bytes, end: bool = False) -> Callable[[RawH3], object]:
    """On a stream of one direction, beside a control stream."""
    return lambda client: client.begun().send(data, end, client.unidirectional())


def twice(data: bytes) -> Callable[[RawH3], object]:
    def do(client: RawH3) -> None:
        client.opened()
        for _ in range(2):
            client.send(data, False, client.unidirectional())

    return do


def resets(data: bytes) -> Callable[[RawH3], object]:
    def do(client: RawH3) -> None:
        stream_id = client.opened().send(data, False, client.unidirectional())
        client.until(lambda: not client.quic._loss.bytes_in_flight, "it has arrived")
        client.quic.reset_stream(stream_id, 0x10C)

    return do


def stops(client: RawH3) -> None:
    """The gateway's own control stream."""
    client.begun()
    client.until(lambda: any(data[:1] == CONTROL for data in client.data.values()), "its control stream")
    stream_id = next(number for number, data in client.data.items() if data[:1] == CONTROL)
    client.quic.stop_stream(stream_id, 0x10C)


def setting(*pairs: tuple[int, int]) -> bytes:
    return CONTROL + frame(SETTINGS, b"".join(varint(number) + varint(value) for number, value in pairs))


def begins_with(data: bytes) -> Callable[[RawH3], object]:
    return lambda client: client.opened().send(data, False, client.unidirectional())


HTTP: Final = [
    Case("DATA before HEADERS (4.1)", on_request(frame(DATA, b"x")), (FRAME_UNEXPECTED,)),
    Case(
        "HEADERS behind trailers (4.1)",
        on_request(head(*GET) + head((b"a", b"b")) + head((b"c", b"d"))),
        (FRAME_UNEXPECTED,),
    ),
    Case(
        "DATA behind trailers (4.1)",
        on_request(head(*GET) + head((b"a", b"b")) + frame(DATA, b"x")),
        (FRAME_UNEXPECTED,),
    ),
    Case(
        "CANCEL_PUSH on a request stream (7.2.3)", on_request(frame(CANCEL_PUSH, b"\0")), (FRAME_UNEXPECTED,)
    ),
    Case("SETTINGS on a request stream (7.2.4)", on_request(frame(SETTINGS)), (FRAME_UNEXPECTED,)),
    Case(
        "PUSH_PROMISE of a client (7.2.5)", on_request(head(*GET) + frame(PUSH_PROMISE, b"\0\0\0")), (0x105,)
    ),
    Case("GOAWAY on a request stream (7.2.6)", on_request(frame(GOAWAY, b"\0")), (FRAME_UNEXPECTED,)),
    Case(
        "MAX_PUSH_ID on a request stream (7.2.7)", on_request(frame(MAX_PUSH_ID, b"\0")), (FRAME_UNEXPECTED,)
    ),
    *(
        Case(f"HTTP/2's frame {kind:#x} on a request stream (7.2.8)", on_request(frame(kind, b"x")), (0x105,))
        for kind in (0x2, 0x6, 0x8, 0x9)
    ),
    *(
        Case(
            f"HTTP/2's frame {kind:#x} on the control stream (7.2.8)", on_control(frame(kind, b"x")), (0x105,)
        )
        for kind in (0x2, 0x6, 0x8, 0x9)
    ),
    Case("a frame that its stream's end cuts short (7.1)", on_request(head(*GET)[:-1], True), (FRAME_ERROR,)),
    Case("DATA on the control stream (7.2.1)", on_control(frame(DATA, b"x")), (FRAME_UNEXPECTED,)),
    Case("HEADERS on the control stream (7.2.2)", on_control(head(*GET)), (FRAME_UNEXPECTED,)),
    Case(
        "PUSH_PROMISE on the control stream (7.2.5)",
        on_control(frame(PUSH_PROMISE, b"\0")),
        (FRAME_UNEXPECTED,),
    ),
    Case("a second SETTINGS (7.2.4)", on_control(frame(SETTINGS)), (FRAME_UNEXPECTED,)),
    Case("no SETTINGS first (6.2.1)", begins_with(CONTROL + frame(GOAWAY, b"\0")), (MISSING_SETTINGS,)),
    *(
        Case(f"HTTP/2's setting {number:#x} (7.2.4.1)", begins_with(setting((number, 1))), (SETTINGS_ERROR,))
        for number in (0x2, 0x3, 0x4, 0x5)
    ),
    Case("a setting twice (7.2.4)", begins_with(setting((0x6, 1), (0x6, 1))), (SETTINGS_ERROR,)),
    Case("ENABLE_CONNECT_PROTOCOL of 2 (RFC 8441 3)", begins_with(setting((0x8, 2))), (SETTINGS_ERROR,)),
    Case(
        "a setting that is cut short (7.1)", begins_with(CONTROL + frame(SETTINGS, b"\x06")), (FRAME_ERROR,)
    ),
    Case("an empty GOAWAY (7.1)", on_control(frame(GOAWAY)), (FRAME_ERROR,)),
    Case("a GOAWAY with more behind it (7.1)", on_control(frame(GOAWAY, b"\0\0")), (FRAME_ERROR,)),
    Case(
        "a GOAWAY that takes back (5.2)", on_control(frame(GOAWAY, b"\0") + frame(GOAWAY, b"\4")), (ID_ERROR,)
    ),
    Case("CANCEL_PUSH of what was not promised (7.2.3)", on_control(frame(CANCEL_PUSH, b"\1")), (ID_ERROR,)),
    Case(
        "MAX_PUSH_ID that is lower (7.2.7)",
        on_control(frame(MAX_PUSH_ID, b"\4") + frame(MAX_PUSH_ID, b"\3")),
        (0x108,),
    ),
    Case("a push stream of a client (6.2.2)", on_new(b"\x01\x00"), (STREAM_CREATION_ERROR,)),
    Case("two control streams (6.2.1)", twice(CONTROL + frame(SETTINGS)), (STREAM_CREATION_ERROR,)),
    Case("a control stream that ends (6.2.1)", on_control(b"", True), (CLOSED_CRITICAL_STREAM,)),
    Case(
        "a control stream that is reset (6.2.1)", resets(CONTROL + frame(SETTINGS)), (CLOSED_CRITICAL_STREAM,)
    ),
    Case("the gateway's control stream stopped (6.2.1)", stops, (CLOSED_CRITICAL_STREAM,)),
]


@pytest.mark.parametrize("case", HTTP, ids=name_of)
def test_http(port: int, case: Case) -> None:
    with RawH3(port) as client:
        case.do(client)
        assert code(client) in case.codes


# -- QPACK (RFC 9204) ----------------------------------------------------------------------------------

PREFIX: Final = b"\x00\x00"  # no dynamic table

QPACK: Final = [
    Case(
        "a static index that there is not (3.1)", on_request(frame(HEADERS, PREFIX + b"\xff\x24")), (0x200,)
    ),
    Case(
        "a dynamic index without insertions (3.2.5)", on_request(frame(HEADERS, PREFIX + b"\x80")), (0x200,)
    ),
    Case("a literal that is cut short (2.2)", on_request(frame(HEADERS, PREFIX + b"\x51\x05a")), (0x200,)),
    Case("no prefix (4.5.1)", on_request(frame(HEADERS, b"\x00")), (0x200,)),
    Case("a capacity above ours (4.3.1)", on_new(ENCODER + b"\x3f\xff\xff\xff\x7f"), (ENCODER_STREAM_ERROR,)),
    Case(
        "an insertion by a static index that there is not (3.1)", on_new(ENCODER + b"\xff\x24\x01a"), (0x201,)
    ),
    Case(
        "an insertion by a dynamic index that there is not (2.2.3)", on_new(ENCODER + b"\x80\x01a"), (0x201,)
    ),
    Case("an entry larger than the table (3.2.2)", on_new(ENCODER + b"\x20\x41a\x01b"), (0x201,)),
    Case("a duplicate of nothing (4.3.4)", on_new(ENCODER + b"\x00"), (ENCODER_STREAM_ERROR,)),
    Case("an increment of zero (4.4.3)", on_new(DECODER + b"\x00"), (DECODER_STREAM_ERROR,)),
    Case(
        "an increment beyond what was inserted (4.4.3)",
        on_new(DECODER + b"\x3f\x7f"),
        (DECODER_STREAM_ERROR,),
    ),
    Case("an acknowledgement of no section (4.4.1)", on_new(DECODER + b"\x80"), (DECODER_STREAM_ERROR,)),
    Case("two encoder streams (4.2)", twice(ENCODER), (STREAM_CREATION_ERROR,)),
    Case("two decoder streams (4.2)", twice(DECODER), (STREAM_CREATION_ERROR,)),
    Case("an encoder stream that ends (4.2)", on_new(ENCODER, True), (CLOSED_CRITICAL_STREAM,)),
    Case("a decoder stream that ends (4.2)", on_new(DECODER, True), (CLOSED_CRITICAL_STREAM,)),
    Case("an encoder stream that is reset (4.2)", resets(ENCODER), (CLOSED_CRITICAL_STREAM,)),
]


@pytest.mark.parametrize("case", QPACK, ids=name_of)
def test_qpack(port: int, case: Case) -> None:
    with RawH3(port) as client:
        case.do(client)
        assert code(client) in case.codes


# -- malformed requests (RFC 9114 4.1.2): the stream ends, the connection goes on ----------------------

MALFORMED: Final = {
    "a pseudo-header field twice (4.3)": (*GET, (b":path", b"/")),
    "no :method (4.3.1)": GET[1:],
    "no :scheme (4.3.1)": (GET[0], *GET[2:]),
    "no :path (4.3.1)": GET[:3],
    "an empty :path (4.3.1)": (*GET[:3], (b":path", b"")),
    "an unknown pseudo-header field (4.3)": (*GET, (b":foo", b"x")),
    ":status in a request (4.3)": (*GET, (b":status", b"200")),
    "a pseudo-header field behind others (4.3)": (*GET[:3], (b"a", b"b"), GET[3]),
    "capitals (4.2)": (*GET, (b"Accept", b"x")),
    "connection (4.2)": (*GET, (b"connection", b"close")),
    "transfer-encoding (4.2)": (*GET, (b"transfer-encoding", b"chunked")),
    "te that is not trailers (4.2)": (*GET, (b"te", b"gzip")),
    "a line break (4.2)": (*GET, (b"a", b"b\r\nc: d")),
    "a content-length without content (4.1.2)": (*GET, (b"content-length", b"5")),
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_malformed(port: int, fields: tuple[tuple[bytes, bytes], ...]) -> None:
    with RawH3(port) as client:
        stream_id = client.begun().send(head(*fields), True)
        client.until(lambda: stream_id in client.resets or stream_id in client.ends, "an end")
        if stream_id in client.ends:
            assert client.answer(stream_id)[0][b":status"] == b"400"
        else:
            assert client.resets[stream_id] == MESSAGE_ERROR
        assert client.get()[0][b":status"] == b"200"


def test_a_request_that_is_not_complete(port: int) -> None:
    """RFC 9114 4.1."""
    with RawH3(port) as client:
        stream_id = client.begun().send(b"", True)
        client.until(lambda: stream_id in client.resets, "a reset")
        assert client.resets[stream_id] == REQUEST_INCOMPLETE
        assert client.get()[0][b":status"] == b"200"


UNKNOWN: Final = {
    "a frame of a reserved type (7.2.8)": lambda client: client.send(
        frame(0x21 + 0x1F * 5, b"grease") + head(*GET), True
    ),
    "a stream of a reserved type (6.2.3)": lambda client: client.send(
        b"\x21grease", True, client.unidirectional()
    ),
    "a stream without a type (6.2)": lambda client: client.send(b"", True, client.unidirectional()),
}


@pytest.mark.parametrize("do", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_is_ignored(port: int, do: Callable[[RawH3], object]) -> None:
    with RawH3(port) as client:
        do(client.begun())
        assert client.get()[0][b":status"] == b"200"


def test_settings_that_are_unknown_are_ignored(port: int) -> None:
    """RFC 9114 7.2.4.1."""
    with RawH3(port) as client:
        client.opened()
        client.send(setting((0x21, 7), (0x1F * 9 + 0x21, 1 << 60)), False, client.unidirectional())
        assert client.get()[0][b":status"] == b"200"
