"""WebSocket abuse, in raw frames: floods, size, frames that stop, silence, frames that break the rules."""

import os
import struct

from expressgateway.wire.ws import accept_value
from tests.e2e.harness import Backend, BackendConnection, Client, House, Steady, eventually, listener

_KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
_HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + _KEY + b"\r\n\r\n"
)
_RUNTIME = "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 100\n"
_LIMITS = """
[listeners.websocket]
idle_timeout_seconds = {idle}
max_message_size_bytes = 1000
ping_rate_limit_per_window = 10
ping_rate_limit_window_seconds = 60
read_frame_timeout_seconds = {frame}
"""
PING, CLOSE, TEXT, MORE = 0x89, 0x88, 0x81, 0x01


def frame(first: int, payload: bytes = b"", *, mask: bool = True, declared: int | None = None) -> bytes:
    """One frame; ``declared``: a length other than the payload's."""
    size = len(payload) if declared is None else declared
    bit = 0x80 if mask else 0
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65536:
        head = bytes((first, bit | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, bit | 127)) + struct.pack("!Q", size)
    if not mask:
        return head + payload
    key = os.urandom(4)
    return head + key + bytes(byte ^ key[at & 3] for at, byte in enumerate(payload))


class Sessions:
    """A backend's script that accepts WebSockets and records what it is sent."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.over = 0
        """Sessions whose bytes have all been received."""
        self.cut = 0
        """Sessions that were reset."""
        self.says = b""
        """Sent right after the handshake."""

    def serve(self, connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            if not head.startswith(b"GET /ws"):
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
                continue
            connection.send(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-accept: " + accept_value(_KEY) + b"\r\n\r\n" + self.says
            )
            received = bytearray(connection.buffer)
            self.received.append(received)
            try:
                while data := connection.sock.recv(65536):
                    received += data
            except ConnectionError:
                self.cut += 1
            else:
                self.over += 1
            return


def opened(port: int) -> Client:
    client = Client(port)
    client.send(_HANDSHAKE)
    assert client.response()[0] == 101
    return client


def close_code(frames: bytes) -> int:
    """The code of the one frame that must be left, a Close frame, unmasked as a server's are."""
    assert frames[:1] == bytes((CLOSE,)), frames
    assert len(frames) == 2 + frames[1], frames
    code: int = struct.unpack("!H", frames[2:4])[0]
    return code


def unmasked_close_code(frames: bytes) -> int:
    """The same of a frame that a client sends."""
    assert frames[:1] == bytes((CLOSE,)), frames
    assert frames[1] & 0x80, "towards a backend we are a client: masked"
    key, payload = frames[2:6], frames[6:]
    code: int = struct.unpack("!H", bytes(byte ^ key[at & 3] for at, byte in enumerate(payload))[:2])[0]
    return code


ABUSE: list[tuple[str, bytes, int, str]] = [
    ("a ping flood", frame(PING) * 11, 1008, "websocket_ping_flood"),
    ("a ping flood with payloads", frame(PING, b"x" * 125) * 30, 1008, "websocket_ping_flood"),
    ("a message over the cap", frame(TEXT, b"x" * 1001), 1009, "websocket_1009"),
    ("a declared exabyte", frame(TEXT, declared=1 << 60), 1009, "websocket_1009"),
    (
        "fragments over the cap",
        frame(MORE, b"x" * 600) + frame(0, b"x" * 600),
        1009,
        "websocket_1009",
    ),
    (
        "an endless message of small fragments",
        frame(MORE, b"x") + frame(0, b"x" * 50) * 30,
        1009,
        "websocket_1009",
    ),
    ("an unmasked frame", frame(TEXT, b"hello", mask=False), 1002, "websocket_1002"),
    ("an unmasked close", frame(CLOSE, b"\x03\xe8", mask=False), 1002, "websocket_1002"),
    ("a reserved opcode", frame(0x83, b"x"), 1002, "websocket_1002"),
    ("a reserved control opcode", frame(0x8B), 1002, "websocket_1002"),
    ("a ping of 126 bytes", frame(PING, b"x" * 126), 1002, "websocket_1002"),
    ("a fragmented ping", frame(0x09, b"x"), 1002, "websocket_1002"),
    ("a continuation of nothing", frame(0x80, b"x"), 1002, "websocket_1002"),
    ("a message inside a message", frame(MORE, b"x") + frame(TEXT, b"y"), 1002, "websocket_1002"),
    ("a negative length", bytes((TEXT, 0xFF)) + b"\xff" * 8 + b"mask", 1002, "websocket_1002"),
    ("a length that is too long", bytes((TEXT, 0xFE)) + b"\x00\x05mask" + b"hello", 1002, "websocket_1002"),
]


def test_abuse_ends_the_session_with_its_code(house: House) -> None:
    """Both sides are told; the backend gets whole frames and the Close, never the frame that did it."""
    port = house.port
    sessions = Sessions()
    limits = _LIMITS.format(idle=60, frame=60)
    hello = frame(TEXT, b"hello")
    with (
        Backend(sessions.serve) as backend,
        house.gateway(listener(port, backend, limits), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        for name, abuse, code, kind in ABUSE:
            before = gateway.metric("security_events_total", listener="web", kind=kind)
            closed = gateway.metric("websocket_closed_total", listener="web", code=str(code))
            with opened(port) as client:
                client.send(hello)
                eventually(lambda: sessions.received[-1:] == [hello], "the session works")
                client.send(abuse)
                assert close_code(client.rest()) == code, name
            assert gateway.metric("security_events_total", listener="web", kind=kind) == before + 1, name
            assert gateway.metric("websocket_closed_total", code=str(code)) == closed + 1, name
            eventually(lambda: sessions.over == len(sessions.received), "the backend has been told")
            received = bytes(sessions.received[-1])
            assert received.startswith(hello)
            assert unmasked_close_code(_last_frame(received)) == code, name
        eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "all sessions are over")


HELLO, ANSWER = frame(TEXT, b"hello"), frame(TEXT, b"hello yourself", mask=False)


def answer_late(connection: BackendConnection) -> None:
    """What a backend says after the gateway has told it that its client broke the protocol."""
    assert connection.exactly(len(HELLO)) == HELLO
    assert connection.exactly(1) == bytes((CLOSE,))
    connection.send(ANSWER + frame(CLOSE, struct.pack("!H", 1000), mask=False))
    connection.rest()


def test_the_answers_to_what_came_before_come_before_the_code(house: House) -> None:
    port = house.port

    def serve(connection: BackendConnection) -> None:
        connection.request()
        connection.send(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-accept: " + accept_value(_KEY) + b"\r\n\r\n"
        )
        answer_late(connection)

    limits = _LIMITS.format(idle=60, frame=60)
    with (
        Backend(serve) as backend,
        house.gateway(listener(port, backend, limits), runtime=_RUNTIME) as gateway,
    ):
        with opened(port) as client:
            client.send(HELLO + frame(0x83, b"x"))
            said = client.rest()
        assert said.startswith(ANSWER)
        assert close_code(said[len(ANSWER) :]) == 1002
        assert gateway.metric("websocket_closed_total", code="1002") == 1
        eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the session is over")


def _last_frame(stream: bytes) -> bytes:
    at = last = 0
    while at < len(stream):
        last = at
        size = stream[at + 1] & 0x7F
        at += 2
        if size == 126:
            (size,) = struct.unpack_from("!H", stream, at)
            at += 2
        at += 4 + size
    assert at == len(stream), "a frame was cut off"
    return stream[last:]


def test_pings_under_the_rate_pass(house: House) -> None:
    port = house.port
    sessions = Sessions()
    limits = _LIMITS.format(idle=60, frame=60)
    with Backend(sessions.serve) as backend, house.gateway(listener(port, backend, limits)):
        pings = b"".join(frame(PING, b"%d" % number) for number in range(10))
        largest = frame(TEXT, b"x" * 1000)
        with opened(port) as client:
            client.send(pings + largest)
            eventually(lambda: sessions.received[-1:] == [pings + largest], "they arrived")


def test_half_a_frame_ends_the_session(house: House) -> None:
    """Cut in its header, its length, its mask, its payload."""
    port = house.port
    sessions = Sessions()
    limits = _LIMITS.format(idle=60, frame=1)
    whole = frame(TEXT, b"x" * 500)
    cuts = (1, 3, 7, 20)
    with (
        Backend(sessions.serve) as backend,
        house.gateway(listener(port, backend, limits), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        clients = [opened(port) for _ in cuts]
        for client, cut in zip(clients, cuts, strict=True):
            client.send(whole[:cut])
        for client in clients:
            assert close_code(client.rest()) == 1008
            client.sock.close()
        assert gateway.metric("security_events_total", kind="websocket_frame_stall") == len(cuts)
        eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the sessions are over")
        eventually(lambda: sessions.over + sessions.cut == len(cuts), "the backend has heard the end of each")
    received = sorted(bytes(each) for each in sessions.received)
    assert received == [whole[:cut] for cut in cuts], "in mid-frame there is no place for a Close frame"


def test_a_backend_that_stops_in_a_frame(house: House) -> None:
    port = house.port
    sessions = Sessions()
    sessions.says = frame(TEXT, b"x" * 50, mask=False)[:10]
    limits = _LIMITS.format(idle=60, frame=1)
    with (
        Backend(sessions.serve) as backend,
        house.gateway(listener(port, backend, limits), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        with opened(port) as client:
            assert client.rest() == sessions.says, "cut in the frame, without a Close frame inside it"
        assert gateway.metric("security_events_total", kind="websocket_frame_stall") == 1
        eventually(lambda: len(sessions.received[-1]) > 0, "the backend is told")
    assert unmasked_close_code(bytes(sessions.received[-1])) == 1008


def test_silence_ends_the_session(house: House) -> None:
    port = house.port
    sessions = Sessions()
    limits = _LIMITS.format(idle=1, frame=60)
    with (
        Backend(sessions.serve) as backend,
        house.gateway(listener(port, backend, limits), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        with opened(port) as client:
            assert close_code(client.rest()) == 1001
        assert gateway.metric("websocket_closed_total", code="1001") == 1
        eventually(lambda: len(sessions.received[-1]) > 0, "the backend is told")
    assert unmasked_close_code(bytes(sessions.received[-1])) == 1001


def test_nothing_switches_before_the_backend_has(house: House) -> None:
    """A request right behind a handshake that is declined is a request, not the tunnel's bytes."""
    port = house.port

    def serve(connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            connection.backend.requests.append((head, b""))
            connection.send(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n")

    limits = _LIMITS.format(idle=60, frame=60)
    with Backend(serve) as backend, house.gateway(listener(port, backend, limits)):
        with Client(port) as client:
            client.send(_HANDSHAKE)
            assert client.response()[0] == 426
        with Client(port) as client:
            client.send(_HANDSHAKE + b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.response()[0] == 426
            assert client.response()[0] == 426, "declined: what follows is the next request"
    assert not any(b"/next HTTP/1.1\r\nHost" in data for data in backend.received), "it went past unread"
    (after,) = [head for head, _ in backend.requests if head.startswith(b"GET /next ")]
    assert b"\r\nx-forwarded-for: " in after
