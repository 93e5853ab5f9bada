"""Relays on the wire: listeners `tcp`, `tls` and `udp` between sockets that do as they please."""

import contextlib
import hashlib
import os
import resource
import select
import selectors
import socket
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, House, certificate, eventually
from tests.e2e.http_world import client_context, rss_bytes, send_until_stuck
from tests.ports import free_port

BULK = 50_000_000
CHUNK = 100_000
BLOCK = bytes(os.urandom(1_000_000))
RESET = struct.pack("ii", 1, 0)
CONNECTIONS = 2000
TCP_CLOSE = 7
"""The state that RST leaves a socket in. Python's ssl, in some versions, tells it as an orderly end."""


def listener(
    port: int, *backends: str, name: str = "relay", protocol: str = "tcp", tls: str = "", keys: str = ""
) -> str:
    """``backends``: addresses, or more keys of their tables."""
    tables = ", ".join(f"{{ {each} }}" if "=" in each else f'{{ address = "{each}" }}' for each in backends)
    return f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{protocol}"
backends = [{tables}]
{f"tls = {{ {tls} }}" if tls else ""}
{keys}
"""


class Relay:
    """A ``tcp`` and a ``tls`` listener before one backend, whose script a test may exchange."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = certificate(directory)
        self.ports = {"tcp": free_port(), "tls": free_port()}
        self.script: Callable[[BackendConnection], None] = echo
        self.gateway: Gateway

    def client(self, front: str) -> Client:
        context = client_context(self.files.certificate) if front == "tls" else None
        return Client(self.ports[front], tls=context)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    it = Relay(tmp_path_factory.mktemp("l4"))
    pair = f'cert_path = "{it.files.certificate}", key_path = "{it.files.key}"'

    def current(connection: BackendConnection) -> None:
        it.script(connection)

    with Backend(current) as backend:
        text = listener(it.ports["tcp"], backend.address, name="tcp")
        text += listener(it.ports["tls"], backend.address, name="tls", protocol="tls", tls=pair)
        with Gateway(it.directory, text) as it.gateway:
            yield it


@pytest.fixture
def relay(world: Relay) -> Relay:
    world.script = echo
    return world


both = pytest.mark.parametrize("front", ["tcp", "tls"])

both_but_for_unwrap = pytest.mark.parametrize(
    "front",
    [
        "tcp",
        "tls",
    ],
)


def echo(connection: BackendConnection) -> None:
    while data := connection.sock.recv(262_144):
        connection.send(data)


def read_hash(sock: socket.socket, most: int = sys.maxsize) -> tuple[int, str]:
    """Size and digest of everything until the end, or of so many bytes."""
    digest, size = hashlib.sha256(), 0
    while data := sock.recv(min(262_144, most - size)):
        digest.update(data)
        size += len(data)
    return size, digest.hexdigest()


def bulk_hash() -> str:
    digest = hashlib.sha256()
    for _ in range(BULK // len(BLOCK)):
        digest.update(BLOCK)
    return digest.hexdigest()


def end_sending(sock: socket.socket) -> None:
    """FIN, or in TLS close_notify; reading goes on."""
    if isinstance(sock, ssl.SSLSocket):
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):  # it does not wait for the other side's
            sock.unwrap()
        sock.settimeout(60)
    else:
        sock.shutdown(socket.SHUT_WR)


class TestRelay:
    @both
    def test_small_messages(self, relay: Relay, front: str) -> None:
        with relay.client(front) as client:
            for number in range(200):
                text = b"message %d" % number
                client.send(text)
                assert client.exactly(len(text)) == text
        relay.gateway.wait_metric("relay_bytes_total", 2000, listener=front, direction="from_client")

    @both
    def test_bulk_both_ways_at_once(self, relay: Relay, front: str) -> None:
        """In clear text it goes through the kernel's splice, in TLS it cannot."""
        (worker,) = relay.gateway.worker_pids()
        rss = rss_bytes(worker)
        got: list[tuple[int, str]] = []

        def both_ways(connection: BackendConnection) -> None:
            sender = threading.Thread(target=send_bulk, args=(connection.sock,))
            sender.start()
            got.append(read_hash(connection.sock, BULK))
            sender.join()
            connection.send(b"done")

        relay.script = both_ways
        with relay.client(front) as client:
            digest = exchange_bulk(client.sock)
            assert client.exactly(4) == b"done"
        assert digest == bulk_hash()
        assert got == [(BULK, bulk_hash())]
        assert rss_bytes(worker) - rss < 4_000_000

    @both
    def test_the_clients_half_close(self, relay: Relay, front: str) -> None:
        def script(connection: BackendConnection) -> None:
            size, _ = read_hash(connection.sock)
            connection.send(b"%d" % size + bytes(1_000_000))

        relay.script = script
        with relay.client(front) as client:
            client.send(bytes(300_000))
            end_sending(client.sock)
            assert client.rest() == b"300000" + bytes(1_000_000)

    @both_but_for_unwrap
    def test_the_backends_half_close(self, relay: Relay, front: str) -> None:
        got: list[tuple[int, str]] = []

        def script(connection: BackendConnection) -> None:
            connection.send(b"all I have to say")
            connection.sock.shutdown(socket.SHUT_WR)
            got.append(read_hash(connection.sock))

        relay.script = script
        with relay.client(front) as client:
            assert client.rest() == b"all I have to say"
            client.send(bytes(300_000))
            client.send(bytes(200_000))
            end_sending(client.sock)
            eventually(lambda: got, "the backend got the end")
        assert got[0][0] == 500_000

    @both_but_for_unwrap
    def test_the_backends_half_close_in_the_middle_of_an_upload(self, relay: Relay, front: str) -> None:
        got: list[tuple[int, str]] = []

        def script(connection: BackendConnection) -> None:
            connection.sock.recv(1, socket.MSG_PEEK)
            connection.sock.shutdown(socket.SHUT_WR)
            got.append(read_hash(connection.sock))

        relay.script = script
        with relay.client(front) as client:
            for _ in range(20):
                client.send(BLOCK)
            end_sending(client.sock)
            eventually(lambda: got, "the backend got the end")
        assert got[0][0] == 20 * len(BLOCK)

    @both
    @pytest.mark.parametrize("size", [10, 20_000_000], ids=["small", "bulk"])
    def test_a_clients_reset_is_one_for_the_backend(self, relay: Relay, front: str, size: int) -> None:
        ends: list[str] = []
        read = threading.Event()

        def script(connection: BackendConnection) -> None:
            connection.exactly(size // 2)
            read.set()
            try:
                read_hash(connection.sock)
                ends.append("FIN")
            except ConnectionResetError:
                ends.append("RST")

        relay.script = script
        with relay.client(front) as client:
            client.send(bytes(size))
            assert read.wait(30)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        eventually(lambda: ends, "the backend saw an end")
        assert ends == ["RST"]

    @both
    @pytest.mark.parametrize("size", [10, 20_000_000], ids=["small", "bulk"])
    def test_a_backends_reset_is_one_for_the_client(self, relay: Relay, front: str, size: int) -> None:
        go = threading.Event()

        def script(connection: BackendConnection) -> None:
            connection.send(bytes(size))
            go.wait(30)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

        relay.script = script
        with relay.client(front) as client:
            client.exactly(size)
            go.set()
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):
                assert client.sock.recv(1) == b""
            assert client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE

    @both
    def test_a_slow_reader_stops_the_sender(self, relay: Relay, front: str) -> None:
        (worker,) = relay.gateway.worker_pids()
        gate = threading.Event()

        def stalled(connection: BackendConnection) -> None:
            gate.wait(20)

        relay.script = stalled
        with relay.client(front) as client:
            client.send(bytes(1_000_000))
            rss = rss_bytes(worker)
            sent = send_until_stuck(client.sock, 300_000_000)
            assert sent < 48_000_000
            assert rss_bytes(worker) - rss < 2_000_000
            gate.set()

    def test_nothing_is_left(self, relay: Relay) -> None:
        eventually(lambda: relay.gateway.metric("connections_inflight") == 0, "all have ended")
        eventually(lambda: relay.gateway.metric("backend_inflight") == 0, "on the other side, too")
        assert relay.gateway.metric("worker_faults_total") == 0


def send_bulk(sock: socket.socket) -> None:
    for _ in range(BULK // len(BLOCK)):
        sock.sendall(BLOCK)


def exchange_bulk(sock: socket.socket) -> str:
    """Send and read it at once; the digest of what came. In one thread: an SSLSocket is not for two."""
    digest, to_read, to_send = hashlib.sha256(), BULK, BULK
    sock.setblocking(False)
    while to_read or to_send:
        select.select([sock] if to_read else [], [sock] if to_send else [], [], 20)
        if to_send:
            with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                begin = (BULK - to_send) % len(BLOCK)
                to_send -= sock.send(memoryview(BLOCK)[begin : begin + CHUNK])
        if to_read:
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                data = sock.recv(min(CHUNK, to_read))
                if not data:
                    raise AssertionError(f"it ended {to_read} bytes too soon")
                digest.update(data)
                to_read -= len(data)
    sock.settimeout(60)
    return digest.hexdigest()


class TestBackends:
    def test_one_that_refuses_is_replaced_by_another(self, house: House) -> None:
        port, dead = house.port, f"127.0.0.1:{free_port()}"
        with Backend(echo) as backend, house.gateway(listener(port, dead, backend.address)) as gateway:
            for _ in range(10):
                with Client(port) as client:
                    client.send(b"hello")
                    assert client.exactly(5) == b"hello"
            assert gateway.metric("backend_connect_failures_total", backend=dead) >= 5
            assert gateway.metric("relay_errors_total") == 0

    def test_all_down(self, house: House) -> None:
        port, dead = house.port, [f"127.0.0.1:{free_port()}" for _ in range(2)]
        with house.gateway(listener(port, *dead)) as gateway:
            with contextlib.suppress(ConnectionResetError), Client(port) as client:
                assert client.is_closed()
            gateway.wait_metric("relay_errors_total", 1, listener="relay", reason="connect_refused")

    def test_shares(self, house: House) -> None:
        port = house.port

        def name(connection: BackendConnection) -> None:
            connection.send(connection.backend.name.encode())

        with Backend(name, "a") as a, Backend(name, "b") as b:
            tables = [f'address = "{a.address}", weight = 3', f'address = "{b.address}"']
            keys = 'load_balancing = { policy = "weighted_round_robin" }'
            with house.gateway(listener(port, *tables, keys=keys)):
                counts: Counter[bytes] = Counter()
                for _ in range(40):
                    with Client(port) as client:
                        counts[client.rest()] += 1
        assert counts == {b"a": 30, b"b": 10}

    @both
    def test_tls_to_the_backend(self, tmp_path: Path, house: House, front: str) -> None:
        port = house.port
        files = certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        pair = f'cert_path = "{files.certificate}", key_path = "{files.key}"'
        with Backend(echo, tls=context) as backend:
            table = f'address = "{backend.address}", tls = true, tls_ca_path = "{files.certificate}"'
            text = listener(port, table, protocol=front, tls=pair if front == "tls" else "")
            trust = client_context(files.certificate) if front == "tls" else None
            with house.gateway(text), Client(port, tls=trust) as client:
                client.send(b"hello")
                assert client.exactly(5) == b"hello"
                assert exchange_bulk(client.sock) == bulk_hash()

    def test_an_unverified_backend_gets_nothing(self, tmp_path: Path, house: House) -> None:
        port = house.port
        files, other = certificate(tmp_path), certificate(tmp_path, stem="other")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        with Backend(echo, tls=context) as backend:
            table = f'address = "{backend.address}", tls = true, tls_ca_path = "{other.certificate}"'
            with house.gateway(listener(port, table)) as gateway:
                with contextlib.suppress(ConnectionResetError), Client(port) as client:
                    assert client.is_closed()
                gateway.wait_metric("relay_errors_total", 1, reason="backend_certificate")


class TestTlsListener:
    def test_client_certificates_and_names(self, tmp_path: Path, house: House) -> None:
        port = house.port
        first, second = certificate(tmp_path), certificate(tmp_path, "second.example", stem="second")
        mine = certificate(tmp_path, "client.example", stem="mine")
        tls = (
            f'cert_path = "{first.certificate}", key_path = "{first.key}", client_auth = "required", '
            f'client_ca_path = "{mine.certificate}", '
            f'certificates = [{{ cert_path = "{second.certificate}", key_path = "{second.key}" }}]'
        )
        with Backend(echo) as backend:
            with house.gateway(listener(port, backend.address, protocol="tls", tls=tls)) as gateway:
                for name, files in (("localhost", first), ("second.example", second)):
                    context = ssl.create_default_context(cafile=str(files.certificate))
                    context.load_cert_chain(mine.certificate, mine.key)
                    with Client(port, tls=context, sni=name) as client:
                        client.send(b"hello")
                        assert client.exactly(5) == b"hello"
                bare = ssl.create_default_context(cafile=str(first.certificate))
                with pytest.raises(ssl.SSLError), Client(port, tls=bare) as client:
                    client.sock.recv(1)
                gateway.wait_metric("tls_handshakes_total", 1, listener="relay", result="failed")
            assert backend.connections == 2, "who has no certificate reaches no backend"


class TestProxyProtocol:
    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_both_ways(self, tmp_path: Path, version: str) -> None:
        """Two relays in a row: the outer one says who the client is, the inner one hands it on."""
        outer, inner = free_port(), free_port()

        def first_bytes(connection: BackendConnection) -> None:
            connection.backend.received.append(connection.sock.recv(1000))
            connection.send(b"seen")

        with Backend(first_bytes) as backend:
            text = listener(outer, f'address = "127.0.0.1:{inner}", send_proxy = "{version}"', name="outer")
            text += listener(
                inner,
                f'address = "{backend.address}", send_proxy = "v1"',
                name="inner",
                keys="proxy_protocol = true",
            )
            trusted = 'trusted_proxies = ["127.0.0.1/32"]'
            with Gateway(tmp_path, text, runtime=trusted), Client(outer, source="127.0.0.77") as client:
                port = client.sock.getsockname()[1]
                client.send(b"hello")
                assert client.rest() == b"seen"
            header = f"PROXY TCP4 127.0.0.77 127.0.0.1 {port} {outer}\r\n".encode()
            assert backend.received[0].startswith(header)
            assert backend.received[0][len(header) :] in (b"", b"hello")


class Echo:
    """An echo of many connections in one thread."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Echo":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.1):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._sock:
                    self._selector.register(sock.accept()[0], selectors.EVENT_READ)
                elif data := sock.recv(65536):
                    sock.sendall(data)
                else:
                    self._selector.unregister(sock)
                    sock.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * CONNECTIONS
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_two_thousand_connections(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(Echo())
        runtime = f"per_ip_connection_cap = {CONNECTIONS + 10}"
        gateway = stack.enter_context(Gateway(tmp_path, listener(port, backend.address), runtime=runtime))
        (worker,) = gateway.worker_pids()
        rss = rss_bytes(worker)
        clients = [stack.enter_context(Client(port)) for _ in range(CONNECTIONS)]
        for number, client in enumerate(clients):
            client.send(b"%06d" % number)
        for number, client in enumerate(clients):
            assert client.exactly(6) == b"%06d" % number
        assert gateway.metric("connections_inflight") == CONNECTIONS
        assert (rss_bytes(worker) - rss) / CONNECTIONS < 16 * 1024
        for client in clients:
            client.sock.close()
        eventually(lambda: gateway.metric("connections_inflight") == 0, "all have ended")


class UdpEcho:
    """Echoes datagrams with its name in front."""

    def __init__(self, name: bytes = b"") -> None:
        self.name = name
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self.peers: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "UdpEcho":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"stop", self.sock.getsockname())
        self._thread.join()
        self.sock.close()

    def _run(self) -> None:
        while True:
            data, peer = self.sock.recvfrom(65536)
            if data == b"stop":
                return
            self.peers.add(peer)
            self.sock.sendto(self.name + data, peer)


@contextlib.contextmanager
def udp_client(port: int) -> Iterator[Callable[[bytes], bytes]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.connect(("127.0.0.1", port))

        def ask(data: bytes) -> bytes:
            sock.send(data)
            return sock.recv(65536)

        yield ask


SOON = "drain_timeout_ms = 100"
"""Flows do not end by themselves: stopping takes the whole time."""


class TestUdp:
    def test_datagrams_stay_as_they_are(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            UdpEcho() as backend,
            Gateway(tmp_path, listener(port, backend.address, protocol="udp"), runtime=SOON) as gateway,
        ):
            with udp_client(port) as ask:
                for size in (0, 1, 1200, 9000, 60_000):
                    data = os.urandom(size)
                    assert ask(data) == data
            assert len(backend.peers) == 1, "one flow, one socket"
            gateway.wait_metric("udp_datagrams_total", 5, listener="relay", direction="from_backend")

    def test_a_flow_stays_with_its_backend(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            UdpEcho(b"a") as a,
            UdpEcho(b"b") as b,
            Gateway(tmp_path, listener(port, a.address, b.address, protocol="udp"), runtime=SOON) as gateway,
        ):
            counts: Counter[bytes] = Counter()
            with contextlib.ExitStack() as keep:  # else a port, which is a flow, may be had again
                for _ in range(20):
                    ask = keep.enter_context(udp_client(port))
                    (answer,) = {ask(b"x") for _ in range(3)}
                    counts[answer] += 1
            assert counts == {b"ax": 10, b"bx": 10}
            assert gateway.metric("connections_inflight", listener="relay") == 20

    def test_a_dead_backend_loses_its_flow(self, tmp_path: Path) -> None:
        port = free_port()
        dead = f"127.0.0.1:{free_port()}"
        with (
            UdpEcho() as backend,
            Gateway(tmp_path, listener(port, dead, backend.address, protocol="udp"), runtime=SOON),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            sock.settimeout(0.1)
            sock.connect(("127.0.0.1", port))

            def is_answered() -> bool:
                sock.send(b"again")
                with contextlib.suppress(TimeoutError):
                    return sock.recv(100) == b"again"
                return False

            eventually(is_answered, "another backend answers")
