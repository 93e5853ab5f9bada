"""One HTTP/2 connection that is kept busy while its gateway is reloaded, and drained: no request fails.

The client is the `h2` library over TLS, with several requests under way at any time and one that lasts: an
upload that is begun before the first change and completed after the last.
"""

import select
import signal
import socket
import ssl
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded, StreamReset

from tests.e2e.h2_backends import H2There
from tests.e2e.h2_raw import GOAWAY, MAX, NO_ERROR, h2_context
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Gateway,
    certificate,
    eventually,
)
from tests.e2e.http_world import answer, read_body
from tests.ports import free_port

AT_ONCE = 6
RELOADS = 10
TARGET = ((b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/x"))
PART = b"part of an upload, " * 100


class Asked:
    """A request under way: what is to come back, and what has."""

    def __init__(self, body: bytes, turn: int) -> None:
        self.body = body
        self.turn = turn
        self.status = b""
        self.got = b""


class Busy:
    """See the module's text. Requests are GETs and POSTs in turn; ``echo`` is what answers them."""

    def __init__(self, port: int, tls: ssl.SSLContext) -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self._sock = tls.wrap_socket(sock, server_hostname="localhost")
        self._sock.setblocking(False)
        self._h2 = H2Connection(H2Configuration(header_encoding=None))
        self._lock = threading.Lock()
        self._raw = b""
        self._open: dict[int, Asked] = {}
        self.turn = 0
        """Of the configuration that holds; 0 while it changes."""
        self.names: defaultdict[int, Counter[bytes]] = defaultdict(Counter)
        """Who answered the requests of each turn."""
        self.failed: list[str] = []
        self.total = 0
        self.goaways: list[tuple[int, int]] = []
        self._last: int | None = None
        """The upload that lasts."""
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._h2.initiate_connection()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._sock.close()

    def stop(self) -> None:
        """Ask no more, and wait for what is under way."""
        self._stops.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"{len(self._open)} are never answered"

    def begin_upload(self) -> None:
        with self._lock:
            self._last = self._ask(b"", end=False)

    def upload(self, part: bytes, *, end: bool = False) -> None:
        with self._lock:
            assert self._last is not None
            self._open[self._last].body += part
            self._h2.send_data(self._last, part, end_stream=end)
            self._flush()
            if end:
                self._last = None

    # -- its thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._open or not self._stops.is_set():
                with self._lock:
                    while self._is_asking and len(self._open) < AT_ONCE:
                        self._ask(b"" if self.total % 2 else PART)
                if not self._read():
                    break
        except (OSError, AssertionError) as error:
            self.failed.append(repr(error))
        self.failed += [f"never answered: stream {stream}" for stream in self._open]

    @property
    def _is_asking(self) -> bool:
        return len(self.goaways) < 2 and not self._stops.is_set()

    def _ask(self, body: bytes, *, end: bool = True) -> int:
        stream: int = self._h2.get_next_available_stream_id()
        method = b"POST" if body or not end else b"GET"
        fields = [(b":method", method), *TARGET]
        self._h2.send_headers(stream, fields, end_stream=end and not body)
        if body:
            self._h2.send_data(stream, body, end_stream=end)
        self._open[stream] = Asked(body, self.turn)
        self.total += 1
        self._flush()
        return stream

    def _flush(self) -> None:
        """With the lock held."""
        self._sock.settimeout(PATIENCE_S)
        self._sock.sendall(self._h2.data_to_send())
        self._sock.setblocking(False)

    def _read(self) -> bool:
        """What came. False: the end."""
        select.select([self._sock], [], [], 0.02)
        with self._lock:  # for the library of TLS is not made for two threads at once
            try:
                got = self._sock.recv(262_144)
            except ssl.SSLWantReadError:
                return True
            self._raw += got
            while len(self._raw) >= (size := 9 + int.from_bytes(self._raw[:3], "big")):
                frame, self._raw = self._raw[:size], self._raw[size:]
                if frame[3] == GOAWAY:  # by hand, for the library would stop at it
                    self._on_goaway(*struct.unpack(">II", frame[9:17]))
                else:
                    for event in self._h2.receive_data(frame):
                        self._take(event)
            if len(self.goaways) < 2:
                self._flush()
        return bool(got)

    def _on_goaway(self, last: int, code: int) -> None:
        self.goaways.append((last, code))
        for stream in [each for each in self._open if each > last]:
            del self._open[stream]  # it was not looked at, and could be asked elsewhere

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            raise AssertionError("GOAWAY")
        if isinstance(event, ResponseReceived):
            self._open[event.stream_id].status = dict(event.headers)[b":status"]
        elif isinstance(event, DataReceived):
            self._open[event.stream_id].got += event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamReset):
            self.failed.append(f"stream {event.stream_id} was reset: {event.error_code}")
            self._open.pop(event.stream_id, None)
        elif isinstance(event, StreamEnded):
            asked = self._open.pop(event.stream_id)
            name, _, body = asked.got.partition(b":")
            if asked.status != b"200" or body != asked.body:
                self.failed.append(f"stream {event.stream_id}: {asked.status!r} {asked.got[:80]!r}")
            self.names[asked.turn][name] += 1


def echo_h1(connection: BackendConnection) -> None:
    """A script: the backend's name, and the body that came."""
    while True:
        head = connection.until(b"\r\n\r\n")
        answer(connection, connection.backend.name.encode() + b":" + read_body(connection, head))


def echo_h2(connection: BackendConnection) -> None:
    name = connection.backend.name.encode()
    H2There(connection).serve(lambda request: name + b":" + bytes(request.body))


ECHOES: dict[str, Callable[[BackendConnection], None]] = {"h1": echo_h1, "h2": echo_h2}


class Site:
    """A gateway over TLS before the backends ``one`` and ``two``."""

    def __init__(self, directory: Path, back: str) -> None:
        self._files = certificate(directory)
        self._back = back
        self.port = free_port()
        self.tls = h2_context(str(self._files.certificate))
        self.backends = {name: Backend(ECHOES[back], name) for name in ("one", "two")}

    def __enter__(self) -> Self:
        for backend in self.backends.values():
            backend.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self.backends.values():
            backend.__exit__()

    def config(
        self, weights: dict[str, int], *, policy: str = "weighted_round_robin", head_timeout_ms: int = 30_000
    ) -> str:
        tables = ", ".join(
            f'{{ address = "{self.backends[name].address}", protocol = "{self._back}", weight = {weight} }}'
            for name, weight in weights.items()
        )
        return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{self.port}"
protocol = "h1s"
pool = "app"
tls = {{ cert_path = "{self._files.certificate}", key_path = "{self._files.key}" }}
[listeners.http]
head_timeout_ms = {head_timeout_ms}
total_timeout_ms = {2 * head_timeout_ms}
[[pools]]
name = "app"
backends = [{tables}]
load_balancing = {{ policy = "{policy}" }}
"""


@pytest.fixture(params=ECHOES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path, request.param) as it:
        yield it


CHANGES = (
    {"one": 1},
    {"one": 1, "two": 1},
    {"one": 9, "two": 1},
    {"one": 0, "two": 1},
    {"two": 1},
)


def test_ten_reloads_while_one_connection_is_busy(tmp_path: Path, site: Site) -> None:
    """Backends come and go, weights, policy and times change: what is asked then goes by what holds then."""
    with (
        Gateway(
            tmp_path, site.config({"two": 1}), workers=2, runtime="max_keepalive_requests = 0"
        ) as gateway,
        Busy(site.port, site.tls) as client,
    ):
        client.begin_upload()
        eventually(lambda: client.names[0][b"two"] > 50, "there is load")
        for turn in range(1, RELOADS + 1):
            weights = CHANGES[(turn - 1) % len(CHANGES)]
            policy = "weighted_round_robin" if turn <= len(CHANGES) else "least_connections"
            client.upload(PART)
            assert gateway.reload(site.config(weights, policy=policy, head_timeout_ms=20_000 + turn)), (
                gateway.log()
            )
            client.turn = turn
            wanted = {name.encode() for name, weight in weights.items() if weight}
            eventually(lambda: client.names[client.turn].total() > 50, "there is load")
            client.turn = 0
            assert not client.failed
            assert set(client.names[turn]) == wanted
        client.upload(PART, end=True)
        client.stop()
        assert client.failed == []
        assert client.goaways == [], "a reload leaves connections alone"
        assert sum(each.total() for each in client.names.values()) == client.total
        assert gateway.metric("connections_total", listener="web") == 1
        assert gateway.metric("config_reload_total", result="applied") == RELOADS
        assert gateway.metric("http_requests_total", status_class="2xx") == client.total
        assert gateway.metric("worker_restarts_total") == gateway.metric("worker_faults_total") == 0


def test_a_drain_while_one_connection_is_busy(tmp_path: Path, site: Site) -> None:
    """It is told twice; what it asks in between is served, and an upload under way is completed."""
    with (
        Gateway(
            tmp_path,
            site.config({"one": 1, "two": 1}),
            workers=2,
            runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 10000",
        ) as gateway,
        Busy(site.port, site.tls) as client,
    ):
        client.begin_upload()
        client.upload(PART)
        eventually(lambda: client.names[0].total() > 50, "there is load")
        gateway.process.send_signal(signal.SIGTERM)
        eventually(lambda: client.goaways, "the first GOAWAY")
        client.turn = 1
        eventually(lambda: len(client.goaways) == 2, "the second GOAWAY")
        assert client.names[1].total() > 0, "asked after the first, and answered"
        assert gateway.process.poll() is None, "it waits for the upload"
        client.upload(PART, end=True)
        client.stop()
        assert client.failed == []
        (first, second) = client.goaways
        assert first == (MAX, NO_ERROR)
        assert second[1] == NO_ERROR
        assert 0 < second[0] < MAX
        assert gateway.process.wait(PATIENCE_S) == 0
