"""HTTP/2 clients that take their time, take too much, or say what must not be passed on.

What one stream does ends that stream: its siblings on the same connection are served, and so is a good client
on the same worker.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import h2_attacker as h2
from tests.e2e.h2_attacker import Attacker, frame, headers, request
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    Steady,
    certificate,
    eventually,
    listener,
    resident_kib,
)
from tests.ports import free_port

_BODY_TIMEOUT_S = 0.6
_HTTP = "[listeners.http]\nheader_timeout_ms = 400\nbody_timeout_ms = 600\n"
_PATIENT_S = 2.0
_PATIENT_HTTP = "[listeners.http]\nheader_timeout_ms = 2000\nbody_timeout_ms = 2000\n"
"""For clients that are slow and must be let be: also when they get their turn late."""
_KEEP_ALIVE = "[listeners.h2_security]\nkeep_alive_interval_ms = 300\nkeep_alive_timeout_ms = 1500\n"
_RUNTIME = (
    "max_keepalive_requests = 0\nper_ip_connection_cap = 300\n"
    "[runtime.watchdog]\nsweep_interval_ms = 100\nheader_deadline_ms = 2000\n"
)
_SMALL = b"s" * 20_000


class Origin:
    """The backend: what it answers goes by the path, and what it was sent is kept."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.cut = 0
        self.uploads: list[bytearray] = []
        self._lock = threading.Lock()

    def serve(self, connection: BackendConnection) -> None:
        while True:
            head = connection.until(b"\r\n\r\n")
            path = head.split(b" ")[1]
            with self._lock:
                if path != b"/good":
                    self.heads.append(head)
            if path.startswith(b"/upload"):
                self._upload(connection)
                return
            if path == b"/big":
                self._pour(connection)
                return
            elif path == b"/small":
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(_SMALL) + _SMALL)
            elif path == b"/wide":
                connection.send(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nx-wide: " + b"w" * 8000 + b"\r\n\r\n"
                )
            elif path != b"/late":
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")

    def _upload(self, connection: BackendConnection) -> None:
        """Read until the end of the connection, and never answer."""
        received = bytearray(connection.buffer)
        self.uploads.append(received)
        with contextlib.suppress(ConnectionError):
            while got := connection.sock.recv(65_536):
                received += got
        self.cut += 1

    def _pour(self, connection: BackendConnection) -> None:
        with contextlib.suppress(ConnectionError):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
            while True:
                connection.sock.send(b"x" * 262_144)
        self.cut += 1


class World:
    def __init__(self, gateway: Gateway, origin: Origin, ports: dict[str, int], authority: str) -> None:
        self.gateway = gateway
        self.origin = origin
        self.ports = ports
        self.authority = authority
        self.pid = gateway.worker_pids()[0]

    def attacker(
        self,
        name: str = "web",
        settings_of: tuple[tuple[int, int], ...] = (),
        *,
        greets: bool = True,
        buffer_bytes: int = 0,
    ) -> Attacker:
        tls = None if name in ("clear", "patient") else h2.h2_tls(self.authority)
        return Attacker(
            self.ports[name], tls=tls, settings_of=settings_of, greets=greets, buffer_bytes=buffer_bytes
        )

    def events(self, kind: str) -> float:
        return self.gateway.metric("security_events_total", kind=kind)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("h2-streams")
    files = certificate(directory)
    ports = {name: free_port() for name in ("web", "ping", "clear", "patient")}
    tls = f"tls = {{ cert_path = '{files.certificate}', key_path = '{files.key}' }}\n"
    origin = Origin()
    with Backend(origin.serve) as backend:
        config = (
            listener(ports["web"], backend, tls + _HTTP, protocol="h1s")
            + listener(ports["ping"], backend, tls + _KEEP_ALIVE, name="ping", protocol="h1s")
            + listener(ports["clear"], backend, "h2c = true\n" + _HTTP, name="clear")
            + listener(ports["patient"], backend, "h2c = true\n" + _PATIENT_HTTP, name="patient")
        )
        with (
            Gateway(directory, config, runtime=_RUNTIME) as gateway,
            Steady(ports["clear"], source="127.0.0.9"),
        ):
            yield World(gateway, origin, ports, str(files.certificate))


# -- readers that do not read --------------------------------------------------------------------------------


def test_streams_without_a_window_are_reset(world: World) -> None:
    """Long answers, which the backend still sends: each is held back, and given up after a while."""
    before, cut = world.events("slow_reader"), world.origin.cut
    resident = resident_kib(world.pid)
    with world.attacker(settings_of=h2.NO_WINDOW) as attacker:
        stalled = [attacker.stream() for _ in range(20)]
        began = time.monotonic()
        for stream in stalled:
            attacker.send(headers(stream, request(path=b"/big")))
        for stream in stalled:
            assert attacker.status(stream) == 200
        sibling = attacker.stream()
        attacker.send(headers(sibling, request(path=b"/good")) + h2.window_update(sibling, 100))
        assert attacker.body(sibling) == b"backend"
        assert resident_kib(world.pid) - resident < 20 * 600
        for stream in stalled:
            attacker.reset_of(stream)
            assert not attacker.has_ended(stream)
        assert time.monotonic() - began > _BODY_TIMEOUT_S - 0.2
        assert not attacker.goaways()
        eventually(lambda: world.origin.cut == cut + 20, "the backend was told")
    assert world.events("slow_reader") == before + 20


def test_complete_answers_that_nobody_takes_are_reset(world: World) -> None:
    """Short answers, of which the backend is long rid: the streams must not stay for ever."""
    before = world.events("slow_reader")
    with world.attacker(settings_of=h2.NO_WINDOW) as attacker:
        stalled = [attacker.stream() for _ in range(50)]
        attacker.send(b"".join(headers(each, request(path=b"/small")) for each in stalled))
        for stream in stalled:
            assert attacker.reset_of(stream) == h2.CANCEL
            assert not attacker.has_ended(stream)
        attacker.send(h2.settings((4, 65_535)))
        assert attacker.is_served()
    assert world.events("slow_reader") == before + 50


def test_answers_of_the_gateways_own_that_nobody_takes_are_reset(world: World) -> None:
    before = world.events("slow_reader")
    with world.attacker(settings_of=h2.NO_WINDOW) as attacker:
        refused = attacker.stream()
        attacker.send(headers(refused, request(b"GET", b"/", *[(b"x", b"y")] * 300)))
        assert attacker.status(refused) == 431
        assert attacker.reset_of(refused) == h2.CANCEL
    assert world.events("slow_reader") == before + 1


def test_a_connection_without_a_window(world: World) -> None:
    """Streams could go on, but the connection's own credit is used up."""
    cut = world.origin.cut
    with world.attacker(settings_of=((4, 2**31 - 1),)) as attacker:
        stalled = [attacker.stream() for _ in range(3)]
        attacker.send(b"".join(headers(each, request(path=b"/big")) for each in stalled))
        for stream in stalled:
            attacker.reset_of(stream)
        assert sum(len(body) for kind, _, _, body in attacker.frames if kind == h2.DATA) == 65_535
    eventually(lambda: world.origin.cut == cut + 3, "the backend was told")


def test_a_reader_that_is_slow_but_moves_gets_everything(world: World) -> None:
    before = world.events("slow_reader")
    with world.attacker("patient", settings_of=((4, 100),)) as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, request(path=b"/small")))
        attacker.wait(lambda: attacker.count(h2.DATA, stream), "the first of it")
        for _ in range(13):  # for longer than the timeout
            assert not attacker.resets()
            threading.Event().wait(_PATIENT_S / 10)
            attacker.send(h2.window_update(stream, 100))
        attacker.send(h2.window_update(stream, len(_SMALL)))
        assert attacker.body(stream) == _SMALL
    assert world.events("slow_reader") == before


def test_a_socket_that_nobody_reads_is_reset(world: World) -> None:
    before = world.events("slow_reader")
    resident = resident_kib(world.pid)
    with world.attacker("clear", ((4, 2**31 - 1),), buffer_bytes=4096) as attacker:
        attacker.send(h2.window_update(0, 2**31 - 1 - 65_535))
        for _ in range(20):
            attacker.send(headers(attacker.stream(), request(path=b"/big")))
        eventually(lambda: world.events("slow_reader") > before, "it was found")
        assert resident_kib(world.pid) - resident < 20 * 1024
        while attacker.read():
            pass
        assert attacker.is_reset
    eventually(lambda: world.events("slow_reader") >= before + 1, "counted")


def test_a_client_that_only_asks_is_not_listened_to(world: World) -> None:
    """Heads are not flow controlled: only the socket holds them back, and then they are not asked for."""
    before = world.events("slow_reader")
    resident = resident_kib(world.pid)
    asked = 0
    begun = len(world.origin.heads)

    def is_heard() -> bool:
        return len(world.origin.heads) >= begun + asked

    with world.attacker("clear", buffer_bytes=4096) as attacker:
        with contextlib.suppress(ConnectionError):
            while asked < 10_000 and world.events("slow_reader") == before:
                wide = [headers(attacker.stream(), request(b"HEAD", b"/wide")) for _ in range(50)]
                attacker.send(b"".join(wide))
                asked += 50
                eventually(lambda: is_heard() or world.events("slow_reader") > before, "one or the other")
        assert len(world.origin.heads) - begun < 2000, "it was listened to"
        assert resident_kib(world.pid) - resident < 8192
        eventually(lambda: world.events("slow_reader") == before + 1, "it was given up")
        while attacker.read():
            pass
        assert attacker.is_reset


# -- peers that are not there --------------------------------------------------------------------------------


def test_a_peer_that_answers_no_ping_is_dead(world: World) -> None:
    before = world.events("dead_peer")
    with world.attacker("ping") as dead, world.attacker("ping") as alive:
        dead.send(headers(dead.stream(), request(path=b"/late")))
        dead.wait(lambda: dead.count(h2.SETTINGS) == 2, "SETTINGS")
        answered = 0
        while not dead.is_ended or answered < 3:
            reading = (alive,) if dead.is_ended else (alive, dead)
            for each in reading:
                if each.has_input(0.01):
                    assert each.read() or each is dead, "it answers"
            pings = [body for kind, _, _, body in alive.frames if kind == h2.PING]
            for ping in pings[answered:]:
                alive.send(frame(h2.PING, h2.ACK, 0, ping))
            answered = len(pings)
        assert dead.count(h2.PING) == 1
        assert alive.is_served()
        assert world.events("dead_peer") == before + 1
        eventually(lambda: world.gateway.metric("pool_connections", state="busy") <= 1, "nobody waits for it")


def test_settings_that_are_not_acknowledged(world: World) -> None:
    with world.attacker("ping", greets=False) as attacker:
        attacker.send(h2.PREFACE + h2.settings())
        assert attacker.verdict() == 4


def test_a_connection_over_which_nothing_is_said(world: World) -> None:
    """ALPN has said HTTP/2, and then comes not even the preface."""
    with world.attacker("ping", greets=False) as attacker:
        assert attacker.verdict() == 4
    with world.attacker("clear", greets=False) as silent:
        assert not silent.has_input(0.6), "nothing was begun: only the idle timeout is for it"


# -- slow heads ----------------------------------------------------------------------------------------------

_RAW = h2.block(request())
_PARTS = {
    "HEADERS without END_HEADERS": frame(h2.HEADERS, h2.END_STREAM, 3, _RAW),
    "CONTINUATION without END_HEADERS": frame(h2.HEADERS, 1, 3, _RAW[:9]) + frame(9, 0, 3, _RAW[9:]),
    "a frame of HEADERS that stops": headers(3)[:-1],
    "a header of a frame of HEADERS": headers(3)[:9],
    "no more than its type": headers(3)[:4],
}


@pytest.mark.parametrize("part", _PARTS.values(), ids=list(_PARTS))
def test_heads_that_are_not_completed(world: World, part: bytes) -> None:
    before = world.events("slow_head")
    with world.attacker() as attacker:
        assert attacker.is_served()
        began = time.monotonic()
        attacker.send(part)
        assert attacker.verdict() == h2.CALM
        assert 0.3 < time.monotonic() - began < 10
    assert world.events("slow_head") == before + 1


def test_a_head_that_trickles(world: World) -> None:
    """Byte by byte, so that something comes all the time."""
    before = world.events("slow_head")
    with world.attacker() as attacker:
        attacker.wait(lambda: attacker.count(h2.SETTINGS) == 2, "SETTINGS")
        attacker.send(frame(h2.HEADERS, 1, 1, b"x" * 16_000)[:9])
        attacker.drip(b"x", 0.03, 20)
        assert attacker.verdict() == h2.CALM
    assert world.events("slow_head") == before + 1


@pytest.mark.parametrize("name", ["web", "clear"])
def test_a_preface_that_trickles(world: World, name: str) -> None:
    before = world.events("slow_head")
    with world.attacker(name, greets=False) as attacker:
        for at in range(len(h2.PREFACE) - 1):
            attacker.push(h2.PREFACE[at : at + 1])
            threading.Event().wait(0.04)
        while attacker.read():
            pass
        assert attacker.goaways() == ([h2.CALM] if name == "web" else [])
    assert world.events("slow_head") == before + 1


def test_whole_heads_all_the_time_are_not_slow(world: World) -> None:
    """At whatever moment one looks, some head is not complete; it is another one each time."""
    with world.attacker("patient") as attacker:
        raw = headers(1, request(path=b"/good"))
        attacker.send(raw[:20])
        for number in range(1, 30):
            following = raw[:5] + (1 + 2 * number).to_bytes(4, "big") + raw[9:]
            current = raw[:5] + (2 * number - 1).to_bytes(4, "big") + raw[9:]
            threading.Event().wait(_PATIENT_S / 25)
            attacker.send(current[20:] + following[:20])
        assert attacker.status(57) == 200
        assert not attacker.goaways()


# -- slow bodies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_declared", [True, False], ids=["declared", "not declared"])
def test_a_body_that_trickles_or_stops(world: World, is_declared: bool) -> None:
    """408 and a reset, of this stream alone; the backend never sees an end."""
    before = world.events("slow_body")
    more = ((b"content-length", b"1000"),) if is_declared else ()
    for every_s in (0.03, 9.0):
        cut = world.origin.cut
        with world.attacker() as attacker:
            stream = attacker.stream()
            attacker.send(headers(stream, request(b"POST", b"/upload", *more), end=False))
            attacker.send(h2.data(stream, b"x"))
            attacker.wait(lambda a=attacker: a.count(h2.SETTINGS) == 2, "SETTINGS")  # type: ignore[misc]
            attacker.drip(h2.data(stream, b"x"), every_s, 20)
            assert attacker.status(stream) == 408
            assert attacker.reset_of(stream) == h2.NO_ERROR
            assert attacker.is_served()
        eventually(lambda cut=cut: world.origin.cut == cut + 1, "cut")  # type: ignore[misc]
        received = world.origin.uploads[-1]
        assert b"0\r\n\r\n" not in received
        assert len(received) < 1000
    assert world.events("slow_body") == before + 2


# -- what must not be passed on ------------------------------------------------------------------------------

_GET = request()
_BAD: dict[str, tuple[list[tuple[bytes, bytes]], str]] = {
    "CR in a name": ([*_GET, (b"x\rhost", b"a")], "malformed_request"),
    "LF in a name": ([*_GET, (b"x\nhost", b"a")], "malformed_request"),
    "NUL in a name": ([*_GET, (b"x\0", b"a")], "malformed_request"),
    "a blank in a name": ([*_GET, (b"x y", b"a")], "malformed_request"),
    "a colon in a name": ([*_GET, (b"x:y", b"a")], "malformed_request"),
    "a colon behind a name": ([*_GET, (b"transfer-encoding:chunked", b"a")], "malformed_request"),
    "an empty name": ([*_GET, (b"", b"a")], "malformed_request"),
    "upper case": ([*_GET, (b"Host", b"a")], "malformed_request"),
    "CR in a value": ([*_GET, (b"x", b"a\rb")], "malformed_request"),
    "LF in a value": ([*_GET, (b"x", b"a\nb")], "malformed_request"),
    "CRLF and a field in a value": ([*_GET, (b"x", b"a\r\ntransfer-encoding: chunked")], "malformed_request"),
    "CRLF and a request in a value": ([*_GET, (b"x", b"a\r\n\r\nGET /evil HTTP/1.1")], "malformed_request"),
    "NUL in a value": ([*_GET, (b"x", b"a\0b")], "malformed_request"),
    "Connection": ([*_GET, (b"connection", b"close")], "malformed_request"),
    "Keep-Alive": ([*_GET, (b"keep-alive", b"1")], "malformed_request"),
    "Proxy-Connection": ([*_GET, (b"proxy-connection", b"close")], "malformed_request"),
    "Transfer-Encoding": ([*_GET, (b"transfer-encoding", b"chunked")], "malformed_request"),
    "Upgrade": ([*_GET, (b"upgrade", b"h2c")], "malformed_request"),
    "TE": ([*_GET, (b"te", b"gzip")], "malformed_request"),
    "TE, a list": ([*_GET, (b"te", b"trailers, gzip")], "malformed_request"),
    ":path with a blank": (request(path=b"/ HTTP/1.1"), "malformed_request"),
    ":path with CRLF": (request(path=b"/ HTTP/1.1\r\nHost: evil"), "malformed_request"),
    ":path with a tab": (request(path=b"/\t"), "malformed_request"),
    ":path that is none": (request(path=b"evil"), "malformed_request"),
    ":method with a blank": (request(b"GET /evil HTTP/1.1"), "malformed_request"),
    ":method with CRLF": (request(b"GET\r\n"), "malformed_request"),
    ":scheme with CRLF": ([(b":scheme", b"http\r\n"), *_GET[:1], *_GET[2:]], "malformed_request"),
    "Content-Length without a body": ([*_GET, (b"content-length", b"5")], "request_smuggling"),
    "two of it": ([*_GET, (b"content-length", b"0"), (b"content-length", b"0")], "request_smuggling"),
    "a signed one": ([*_GET, (b"content-length", b"+0")], "request_smuggling"),
    "a list of it": ([*_GET, (b"content-length", b"0, 0")], "request_smuggling"),
}


@pytest.mark.parametrize(("fields", "kind"), _BAD.values(), ids=list(_BAD))
def test_requests_that_would_mean_another_thing_elsewhere(
    world: World, fields: list[tuple[bytes, bytes]], kind: str
) -> None:
    before, seen = world.events(kind), len(world.origin.heads)
    with world.attacker("clear") as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, fields))
        assert attacker.reset_of(stream) == h2.PROTOCOL
        assert not attacker.heads
        assert attacker.is_served(), "the connection goes on"
    assert len(world.origin.heads) == seen, "nothing was forwarded"
    assert world.events(kind) == before + 1


@pytest.mark.parametrize("size", [4, 6])
def test_bodies_that_contradict_their_length(world: World, size: int) -> None:
    before, cut, begun = world.events("request_smuggling"), world.origin.cut, len(world.origin.uploads)
    with world.attacker("clear") as attacker:
        stream = attacker.stream()
        fields = request(b"POST", b"/upload", (b"content-length", b"5"))
        attacker.send(headers(stream, fields, end=False))
        eventually(lambda: len(world.origin.uploads) > begun, "the backend has its head")
        attacker.send(h2.data(stream, b"GET /x"[:size], end=True))
        assert attacker.reset_of(stream) == h2.PROTOCOL
        assert attacker.is_served()
    assert world.events("request_smuggling") == before + 1
    eventually(lambda: world.origin.cut > cut, "cut")
    assert not world.origin.uploads[-1], "the body was never told"


def test_fields_of_other_versions_are_never_forwarded(world: World) -> None:
    """An upgrade to HTTP/2 in clear text is not one: the request is served as it is, without those fields."""
    for port in (world.ports["clear"], world.ports["web"]):
        context = h2.h2_tls(world.authority)
        context.set_alpn_protocols(["http/1.1"])
        with Client(port, tls=context if port == world.ports["web"] else None) as client:
            client.send(
                b"GET /seen HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
                b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n"
            )
            assert client.response()[0] == 200
        head = world.origin.heads[-1].lower()
        assert head.startswith(b"get /seen ")
        assert b"upgrade" not in head
        assert b"http2-settings" not in head
    with world.attacker("clear") as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, request(b"GET", b"/seen2", (b"http2-settings", b"AAMAAABk"))))
        assert attacker.status(stream) == 200
        head = world.origin.heads[-1].lower()
        assert head.startswith(b"get /seen2 ")
        assert b"http2-settings" not in head


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        (request(b"GET", b"/", *[(b"x", b"y")] * 252), 200, ""),
        (request(b"GET", b"/", *[(b"x", b"y")] * 253), 431, "head_too_large"),
        (request(b"GET", b"/", (b"x", b"y" * 65_000)), 200, ""),
        (request(b"GET", b"/", (b"x", b"y" * 65_450)), 431, "head_too_large"),
        (request(b"GET", b"/", *[(b"x", b"y")] * 2000), 431, "head_too_large"),
        (request(path=b"/" + b"x" * 16_383), 200, ""),
        (request(path=b"/" + b"x" * 16_384), 414, "uri_too_long"),
    ],
    ids=["256 fields", "257 fields", "just under 64 KiB", "over 64 KiB", "many fields", "16 KiB", "more"],
)
def test_heads_have_a_size(world: World, fields: list[tuple[bytes, bytes]], status: int, kind: str) -> None:
    before = world.events(kind)
    with world.attacker("clear") as attacker:
        stream = attacker.stream()
        attacker.send(headers(stream, fields))
        assert attacker.status(stream) == status
        assert attacker.is_served()
    if kind:
        assert world.events(kind) == before + 1


def test_bodies_have_a_size(tmp_path: Path) -> None:
    """The answer comes while the client still sends, and no backend sees the request whole."""
    port = free_port()
    origin = Origin()
    config_more = "h2c = true\n[listeners.http]\nmax_request_body_bytes = 1000\n"
    with (
        Backend(origin.serve) as backend,
        Gateway(tmp_path, listener(port, backend, config_more), runtime=_RUNTIME) as gateway,
        Steady(port),
        Attacker(port) as attacker,
    ):
        for number, more in enumerate(((), ((b"content-length", b"1001"),)), 1):
            stream = attacker.stream()
            attacker.send(headers(stream, request(b"POST", b"/upload", *more), end=False))
            attacker.send(h2.data(stream, b"x" * 1000))
            attacker.push(h2.data(stream, b"x", end=True))
            assert attacker.status(stream) == 413
            assert gateway.metric("security_events_total", listener="web", kind="body_too_large") == number
        assert attacker.is_served()
        eventually(lambda: origin.cut == len(origin.uploads), "the backend was cut")
        assert not any(b"0\r\n\r\n" in upload for upload in origin.uploads)


# -- connections ---------------------------------------------------------------------------------------------


def test_many_connections(world: World) -> None:
    """As many as one address may have, each of which has asked and could ask again; one more is closed."""
    resident = resident_kib(world.pid)
    before = world.events("connection_flood")
    clients = []
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            client = stack.enter_context(world.attacker("clear"))
            clients.append(client)
            client.send(headers(1, request(path=b"/good")))
        for client in clients:
            assert client.status(1) == 200
        grown = resident_kib(world.pid) - resident
        assert grown < 300 * 64, f"{grown / 300} KiB each"
        with Client(world.ports["clear"]) as refused:
            assert refused.response()[0] == 503
        with contextlib.suppress(OSError), Client(world.ports["web"]) as refused:
            assert refused.is_closed()
        assert world.events("connection_flood") >= before + 1
    eventually(lambda: world.gateway.metric("connections_inflight") <= 2, "they have left")
