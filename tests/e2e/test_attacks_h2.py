"""Floods over HTTP/2 that end the connection: GOAWAY with ENHANCE_YOUR_CALM, then the end.

One worker serves them all: three listeners, whose thresholds are the usual ones, tight and loose, and a good
client that is served throughout. Of each flood as much as is allowed does nothing, and one more ends it.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.e2e import h2_attacker as h2
from tests.e2e.h2_attacker import Attacker, frame, headers, request
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Gateway,
    Steady,
    certificate,
    listener,
    need,
    resident_kib,
    run,
)
from tests.ports import free_port

_KEYS = {
    "usual": "",
    "tight": (
        "max_pending_accept_reset_streams = 5\nmax_local_error_reset_streams = 5\nreset_min_streams = 20\n"
        "max_continuation_frames = 4\nmax_settings_frames = 10\nmax_ping_frames = 5\nmax_empty_frames = 8\n"
        "max_idle_window_updates = 20\nmax_concurrent_streams = 10\nmax_header_list_size = 20000\n"
        "control_window_seconds = 1\nreset_window_seconds = 1\n"
    ),
    "loose": (
        "max_pending_accept_reset_streams = 300\nmax_local_error_reset_streams = 300\nreset_percent = 0\n"
        "max_continuation_frames = 40\nmax_settings_frames = 300\nmax_ping_frames = 300\n"
        "max_empty_frames = 300\nmax_idle_window_updates = 3000\nmax_concurrent_streams = 1000\n"
    ),
}


def _serve(connection: BackendConnection) -> None:
    """/good is answered at once, /late never, /echo with what comes, /big with much."""
    while True:
        head = connection.until(b"\r\n\r\n")
        path = head.split(b" ")[1]
        if path == b"/good":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
        elif path == b"/big":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
            while True:
                connection.sock.send(b"x" * 262_144)
        elif path == b"/echo":
            connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while size := int(connection.until(b"\r\n"), 16):
                connection.send(b"%x\r\n" % size + connection.exactly(size + 2))
            connection.exactly(2)
            connection.send(b"0\r\n\r\n")


class World:
    def __init__(self, gateway: Gateway, ports: dict[str, int], authority: str) -> None:
        self.gateway = gateway
        self.ports = ports
        self.authority = authority
        self.pid = gateway.worker_pids()[0]
        self._sources = (f"127.0.1.{last}" for last in range(1, 250))

    def attacker(self, keys: str = "usual", settings_of: tuple[tuple[int, int], ...] = ()) -> Attacker:
        """Each comes from an address of its own, so that each has its line in the log."""
        tls = h2.h2_tls(self.authority)
        return Attacker(self.ports[keys], tls=tls, source=next(self._sources), settings_of=settings_of)

    def events(self, kind: str) -> float:
        return self.gateway.metric("security_events_total", kind=kind)

    def lines(self, kind: str, source: str) -> list[dict[str, object]]:
        lines = [json.loads(line) for line in self.gateway.log().splitlines()]
        return [line for line in lines if line.get("kind") == kind and line.get("source") == source]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("h2-floods")
    files = certificate(directory)
    ports = {keys: free_port() for keys in _KEYS}
    tls = f"tls = {{ cert_path = '{files.certificate}', key_path = '{files.key}' }}\n"
    runtime = "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 100\n"
    with Backend(_serve) as backend:
        config = "".join(
            listener(
                ports[keys],
                backend,
                f"{tls}[listeners.h2_security]\n{more}",
                name=keys,
                protocol="h1s",
            )
            for keys, more in _KEYS.items()
        )
        with Gateway(directory, config, runtime=runtime) as gateway:
            good = h2.h2_tls(str(files.certificate))
            good.set_alpn_protocols(["http/1.1"])
            with Steady(ports["usual"], tls=good):
                yield World(gateway, ports, str(files.certificate))


# -- floods, by what they count ------------------------------------------------------------------------------

_HELD = request(b"POST", b"/late")


@dataclass
class Flood:
    kind: str
    limits: dict[str, int]
    """By listener."""
    more: Callable[[Attacker, int], bytes]
    """So many of it."""
    opens: bool = False
    """On a stream of its own, opened first and never answered."""
    spent: int = 0
    """Counted already by a connection's beginning."""
    free: int = 0
    """Accounted for by the opened stream."""
    settings_of: tuple[tuple[int, int], ...] = ()


_RESETS = {"usual": 100, "tight": 5, "loose": 300}
_SETTINGS = {"usual": 100, "tight": 10, "loose": 300}
_PINGS = {"usual": 50, "tight": 5, "loose": 300}
_EMPTY = {"usual": 100, "tight": 8, "loose": 300}
_IDLE = {"usual": 1000, "tight": 20, "loose": 3000}


def _rapid_reset(attacker: Attacker, number: int) -> bytes:
    ids = [attacker.stream() for _ in range(number)]
    return b"".join(headers(each, request(path=b"/late")) + h2.rst(each) for each in ids)


def _provoke(by: Callable[[int], bytes]) -> Callable[[Attacker, int], bytes]:
    def more(attacker: Attacker, number: int) -> bytes:
        return b"".join(by(attacker.stream()) for _ in range(number))

    return more


def _empty_blocks(attacker: Attacker, number: int) -> bytes:
    """Blocks of which no frame but the last has anything, three to a block: fewer than count by number."""
    out = b""
    while number > 0:
        stream = attacker.stream()
        empty = min(number, 3)
        out += frame(h2.HEADERS, h2.END_STREAM, stream)
        out += frame(h2.CONTINUATION, 0, stream) * (empty - 1)
        out += frame(h2.CONTINUATION, h2.END_HEADERS, stream, h2.block(request(path=b"/good")))
        number -= empty
    return out


def _repeat(raw: bytes) -> Callable[[Attacker, int], bytes]:
    return lambda _, number: raw * number


_FLOODS = {
    "rapid reset": Flood("rapid_reset", _RESETS, _rapid_reset),
    "made-you-reset by WINDOW_UPDATE 0": Flood(
        "made_you_reset", _RESETS, _provoke(lambda n: headers(n, _HELD, end=False) + h2.window_update(n, 0))
    ),
    "made-you-reset by a window too large": Flood(
        "made_you_reset",
        _RESETS,
        _provoke(lambda n: headers(n, _HELD, end=False) + h2.window_update(n, 2**31 - 1)),
    ),
    "made-you-reset by DATA behind the end": Flood(
        "made_you_reset", _RESETS, _provoke(lambda n: headers(n, request(path=b"/late")) + h2.data(n, b"x"))
    ),
    "made-you-reset by HEADERS behind the end": Flood(
        "made_you_reset", _RESETS, _provoke(lambda n: headers(n, request(path=b"/late")) + headers(n))
    ),
    "made-you-reset by PRIORITY": Flood(
        "made_you_reset", _RESETS, _provoke(lambda n: headers(n, _HELD, end=False) + h2.priority(n, n))
    ),
    "made-you-reset by malformed requests": Flood(
        "made_you_reset", _RESETS, _provoke(lambda n: headers(n, request(b"GET", b"/", (b"Upper", b"x"))))
    ),
    "made-you-reset by a body of the wrong size": Flood(
        "made_you_reset",
        _RESETS,
        _provoke(
            lambda n: headers(n, [*_HELD, (b"content-length", b"1")], end=False) + h2.data(n, b"xx", end=True)
        ),
    ),
    "SETTINGS": Flood("settings_flood", _SETTINGS, _repeat(h2.settings()), spent=2),
    "SETTINGS with content": Flood(
        "settings_flood", _SETTINGS, _repeat(h2.settings((4, 65_535), (1, 0), (99, 1))), spent=2
    ),
    "SETTINGS acknowledgements": Flood("settings_flood", _SETTINGS, _repeat(h2.SETTINGS_ACK), spent=2),
    "PING": Flood("ping_flood", _PINGS, _repeat(h2.PING_FRAME)),
    "PING answers": Flood("ping_flood", _PINGS, _repeat(frame(h2.PING, h2.ACK, 0, b"12345678"))),
    "empty DATA": Flood("empty_frame_flood", _EMPTY, _repeat(h2.data(1)), opens=True),
    "DATA that is padding": Flood(
        "empty_frame_flood",
        _EMPTY,
        _repeat(frame(h2.DATA, h2.PADDED, 1, b"\x03\0\0\0")),
        opens=True,
    ),
    "empty HEADERS and CONTINUATION": Flood("empty_frame_flood", _EMPTY, _empty_blocks),
    "WINDOW_UPDATE": Flood("window_update_flood", _IDLE, _repeat(h2.window_update(0, 1))),
    "WINDOW_UPDATE of a stream": Flood(
        "window_update_flood", _IDLE, _repeat(h2.window_update(1, 1)), opens=True, free=2
    ),
    "PRIORITY": Flood("priority_flood", _IDLE, _repeat(h2.priority(1))),
    "unknown frames": Flood("unknown_frame_flood", _IDLE, _repeat(frame(0x77, 0, 0, b"x"))),
    "GOAWAY": Flood("goaway_flood", _IDLE, _repeat(h2.goaway())),
    "RST_STREAM of a closed stream": Flood(
        "reset_flood", _IDLE, lambda _, number: h2.rst(1) * number, opens=True, free=2
    ),
}


def _begin(flood: Flood, attacker: Attacker) -> None:
    if flood.opens:
        stream = attacker.stream()
        attacker.send(headers(stream, _HELD, end=False))
        if flood.kind == "reset_flood":
            attacker.send(h2.rst(stream))


@pytest.mark.parametrize("keys", ["usual", "tight", "loose"])
@pytest.mark.parametrize("flood", _FLOODS.values(), ids=list(_FLOODS))
def test_as_much_as_is_allowed_and_one_more(world: World, flood: Flood, keys: str) -> None:
    before = world.events(flood.kind)
    resident = resident_kib(world.pid)
    with world.attacker(keys) as attacker:
        attacker.wait(lambda: attacker.count(h2.SETTINGS) == 2, "the gateway's SETTINGS and its ACK")
        _begin(flood, attacker)
        attacker.send(flood.more(attacker, flood.limits[keys] - flood.spent + flood.free))
        # Answered behind all that: none of it was too much.
        attacker.send(headers(999_999, request(path=b"/good")))
        assert attacker.status(999_999) == 200
        assert attacker.body(999_999) == b"backend"
        attacker.next_id = 1_000_001
        assert not attacker.goaways()
        assert world.events(flood.kind) == before
        source = str(attacker.sock.getsockname()[0])
        # That request accounts for two frames that only count while nothing moves, and the one DATA frame of
        # its answer for two WINDOW_UPDATEs.
        free = 2 if flood.limits in (_IDLE, _PINGS) else 0
        free += 2 if flood.kind == "window_update_flood" else 0
        attacker.push(flood.more(attacker, free + 1))
        assert attacker.verdict() == h2.CALM
    assert world.events(flood.kind) == before + 1
    assert world.gateway.metric("security_events_total", listener=keys, kind=flood.kind) >= 1
    (line,) = world.lines(flood.kind, source)
    assert line["listener"] == keys
    assert resident_kib(world.pid) - resident < 8192


@pytest.mark.parametrize("name", list(_FLOODS))
def test_a_flood_at_full_speed_ends_at_once(world: World, name: str) -> None:
    """Not only one too many, but all that the attacker has got: it costs no more than that."""
    flood = _FLOODS[name]
    resident = resident_kib(world.pid)
    with world.attacker() as attacker:
        _begin(flood, attacker)
        attacker.push(flood.more(attacker, 5000))
        while attacker.read():
            pass
        assert h2.CALM in attacker.goaways()
    assert resident_kib(world.pid) - resident < 8192


@pytest.mark.parametrize("name", ["rapid reset", "PING", "SETTINGS", "empty DATA", "PRIORITY"])
def test_counts_begin_anew_with_each_window(world: World, name: str) -> None:
    flood = _FLOODS[name]
    with world.attacker("tight") as attacker:
        _begin(flood, attacker)
        for _ in range(2):
            attacker.send(flood.more(attacker, flood.limits["tight"] - flood.spent))
            threading.Event().wait(1.05)  # the window, as configured
        stream = attacker.stream()
        attacker.send(headers(stream, request(path=b"/good")))
        assert attacker.status(stream) == 200
        assert not attacker.goaways()


# -- what is not only counted --------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "least"), [("usual", 200), ("tight", 20)])
def test_more_than_half_of_all_streams_reset(world: World, keys: str, least: int) -> None:
    """Each was answered before, so that none counts as too early."""
    before = world.events("rapid_reset")
    with world.attacker(keys, h2.NO_WINDOW) as attacker:
        attacker.wait(lambda: attacker.count(h2.SETTINGS) == 2, "the gateway's SETTINGS and its ACK")
        for _ in range(least):
            stream = attacker.stream()
            attacker.send(headers(stream, request(path=b"/good")))
            assert attacker.status(stream) == 200
            attacker.send(h2.rst(stream))
        stream = attacker.stream()
        attacker.send(headers(stream, request(path=b"/good")))
        assert attacker.status(stream) == 200, "as many as may be"
        assert not attacker.goaways()
        attacker.send(h2.rst(stream))
        assert attacker.verdict() == h2.CALM
    assert world.events("rapid_reset") == before + 1


def test_a_share_of_zero_is_off(world: World) -> None:
    with world.attacker("loose", h2.NO_WINDOW) as attacker:
        for _ in range(210):
            stream = attacker.stream()
            attacker.send(headers(stream, request(path=b"/good")))
            assert attacker.status(stream) == 200
            attacker.send(h2.rst(stream))
        assert not attacker.goaways()


@pytest.mark.parametrize(("keys", "most"), [("usual", 16), ("tight", 4), ("loose", 40)])
def test_continuation_frames_of_one_head(world: World, keys: str, most: int) -> None:
    before = world.events("continuation_flood")
    raw = h2.block(request(path=b"/good"))
    with world.attacker(keys) as attacker:
        stream = attacker.stream()
        attacker.send(frame(h2.HEADERS, h2.END_STREAM, stream, raw[:1]))
        for at in range(1, most):
            attacker.send(frame(h2.CONTINUATION, 0, stream, raw[at : at + 1]))
        attacker.send(frame(h2.CONTINUATION, h2.END_HEADERS, stream, raw[most:]))
        assert attacker.status(stream) == 200
        stream = attacker.stream()
        attacker.send(frame(h2.HEADERS, h2.END_STREAM, stream, b"\xff"))
        attacker.push(frame(h2.CONTINUATION, 0, stream, b"\xff") * most)
        assert not attacker.goaways()
        attacker.push(frame(h2.CONTINUATION, h2.END_HEADERS, stream, b"\xff"))
        assert attacker.verdict() == h2.CALM, "before decoding: it could not be decoded"
    assert world.events("continuation_flood") == before + 1


@pytest.mark.parametrize(("keys", "frames"), [("usual", 4), ("tight", 1)])
def test_continuation_bytes_of_one_head(world: World, keys: str, frames: int) -> None:
    """64 KiB, and 20 kB: the bytes of the block are too many, though its frames are few."""
    before = world.events("continuation_flood")
    resident = resident_kib(world.pid)
    with world.attacker(keys) as attacker:
        stream = attacker.stream()
        piece = b"\xff" * 16_384
        attacker.send(frame(h2.HEADERS, h2.END_STREAM, stream, piece))
        attacker.push(frame(h2.CONTINUATION, 0, stream, piece) * (frames - 1))
        assert not attacker.has_input(0.05) or (attacker.read() and not attacker.goaways())
        attacker.push(frame(h2.CONTINUATION, 0, stream, piece))
        assert attacker.verdict() == h2.CALM
    assert world.events("continuation_flood") == before + 1
    assert resident_kib(world.pid) - resident < 2048


@pytest.mark.parametrize(("keys", "fields"), [("usual", 16), ("tight", 4)])
def test_indexed_fields_that_stand_for_much(world: World, keys: str, fields: int) -> None:
    """4 kB in the table, and a byte for each time it is said: 431 first, and the end if it is repeated."""
    oversized, bombs = world.events("head_too_large"), world.events("hpack_bomb")
    resident = resident_kib(world.pid)
    with world.attacker(keys) as attacker:
        stream = attacker.stream()
        entry = h2.remembered(b"x-bomb", b"x" * 3900)
        attacker.send(headers(stream, h2.block(request(path=b"/good")) + entry))
        assert attacker.status(stream) == 200
        stream = attacker.stream()
        attacker.send(headers(stream, h2.block(request(path=b"/good")) + b"\xbe" * fields))
        assert attacker.status(stream) == 200, "within the limit"
        began = time.process_time()
        for _ in range(3):
            stream = attacker.stream()
            attacker.send(headers(stream, h2.block(request(path=b"/good")) + b"\xbe" * 16_000))
            assert attacker.status(stream) == 431
        assert attacker.is_served(), "the table is right, and the connection goes on"
        stream = attacker.stream()
        attacker.push(headers(stream, h2.block(request(path=b"/good")) + b"\xbe" * 16_000))
        assert attacker.verdict() == h2.CALM
        assert time.process_time() - began < 2
    assert world.events("head_too_large") == oversized + 3
    assert world.events("hpack_bomb") == bombs + 1
    assert resident_kib(world.pid) - resident < 4096, "64 MB were asked for, four times"


@pytest.mark.parametrize(("keys", "most", "refusals"), [("usual", 256, 1000), ("tight", 10, 20)])
def test_streams_that_are_hoarded(world: World, keys: str, most: int, refusals: int) -> None:
    """Those over the limit are refused, and hurt nobody; who does not stop asking is sent away."""
    hoarded, floods = world.events("stream_hoarding"), world.events("stream_flood")
    resident = resident_kib(world.pid)
    with world.attacker(keys) as attacker:
        held = [attacker.stream() for _ in range(most)]
        attacker.send(b"".join(headers(each, request(path=b"/late")) for each in held))
        for number in range(1, 4):
            stream = attacker.stream()
            attacker.send(headers(stream))
            assert attacker.reset_of(stream) == h2.REFUSED
            assert world.events("stream_hoarding") == hoarded + number
        assert list(attacker.resets()) == [stream - 4, stream - 2, stream]
        attacker.send(h2.rst(held.pop()))
        assert attacker.is_served(), "there is room again"
        attacker.send(headers(attacker.stream(), request(path=b"/late")))
        # Each stream that was opened accounts for two frames.
        attacker.push(b"".join(headers(attacker.stream()) for _ in range(refusals + 2 * most + 8)))
        assert attacker.verdict() == h2.CALM
    assert world.events("stream_flood") == floods + 1
    assert resident_kib(world.pid) - resident < 40 * most + 8192


@pytest.mark.parametrize("raw", [headers(1), h2.data(1), h2.data(1, b"x")], ids=["HEADERS", "DATA", "a byte"])
def test_frames_for_a_stream_that_was_reset_by_us(world: World, raw: bytes) -> None:
    """They may have been under way (RFC 9113 5.1), but not for ever."""
    before = world.events("closed_stream_flood")
    with world.attacker() as attacker:
        attacker.send(headers(attacker.stream(), _HELD, end=False) + h2.window_update(1, 0))
        assert attacker.reset_of(1) == h2.PROTOCOL
        attacker.push(raw * 900)
        assert attacker.is_served()
        attacker.push(raw * 110)
        assert attacker.verdict() == h2.CALM
    assert world.events("closed_stream_flood") == before + 1


def test_many_attackers_at_once_beside_good_ones(world: World) -> None:
    """All floods together, and clients of HTTP/2 that are served in between."""
    resident = resident_kib(world.pid)
    with world.attacker() as good, world.attacker("tight") as other:
        for flood in _FLOODS.values():
            with world.attacker() as attacker:
                _begin(flood, attacker)
                attacker.push(flood.more(attacker, 2000))
                assert good.is_served()
                while attacker.read():
                    pass
                assert h2.CALM in attacker.goaways()
            assert other.is_served()
    assert resident_kib(world.pid) - resident < 8192


# -- much, and all of it meant well --------------------------------------------------------------------------


def _security(world: World) -> float:
    return world.gateway.metric("security_events_total")


@need("h2load")
def test_load_with_many_streams(world: World) -> None:
    before = _security(world)
    url = f"https://127.0.0.1:{world.ports['usual']}/good"
    output = run("h2load", "-n3000", "-c4", "-m100", url)
    assert "3000 succeeded, 0 failed" in output, output
    assert _security(world) == before


def test_messages_both_ways_with_credit_and_pings_for_each(world: World) -> None:
    """As gRPC does it: small messages, each with its WINDOW_UPDATEs, and a PING now and then."""
    before = _security(world)
    with world.attacker() as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, request(b"POST", b"/echo"), end=False))
        assert attacker.status(stream) == 200
        size = 0
        for number in range(1, 601):
            attacker.send(h2.data(stream, b"m" * 600))
            size += 600
            while sum(len(body) for kind, _, _, body in attacker.frames if kind == h2.DATA) < size:
                assert attacker.read(), attacker.goaways()
            attacker.send(h2.window_update(0, 600) + h2.window_update(stream, 600))
            if number % 6 == 0:
                attacker.send(h2.PING_FRAME)
            attacker.frames = [each for each in attacker.frames if each[0] == h2.DATA]
        attacker.send(h2.data(stream, end=True))
        assert len(attacker.body(stream)) == size
    assert _security(world) == before


def test_pages_that_are_left(world: World) -> None:
    """A browser cancels what it does not want to see any more: many, but not most."""
    before = _security(world)
    with world.attacker() as attacker:
        for _ in range(3):
            left = [attacker.stream() for _ in range(30)]
            attacker.send(b"".join(headers(each, request(path=b"/late")) for each in left))
            attacker.send(b"".join(h2.rst(each) for each in left))
            for _ in range(40):
                assert attacker.is_served()
        assert not attacker.goaways()
    assert _security(world) == before


def test_a_long_download_through_small_windows(world: World) -> None:
    """Thousands of WINDOW_UPDATEs, each for a kilobyte that has come."""
    before = _security(world)
    with world.attacker() as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, request(path=b"/big")))
        size = granted = 0
        while size < 4_000_000:
            assert attacker.read(), attacker.goaways()
            size += sum(len(body) for kind, _, _, body in attacker.frames if kind == h2.DATA)
            attacker.frames.clear()
            steps = (size - granted) // 1000
            attacker.send((h2.window_update(0, 1000) + h2.window_update(stream, 1000)) * steps)
            granted += steps * 1000
        attacker.send(h2.rst(stream) + h2.window_update(0, 1_000_000))
        assert attacker.is_served()
    assert _security(world) == before
