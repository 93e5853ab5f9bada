"""The programs that speak HTTP/2 to a gateway: curl, nghttp, h2load, python's ``h2``, HAProxy and nginx."""

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from tests.e2e.h2_raw import h2_context
from tests.e2e.harness import BackendConnection, Client, need, program, run, server
from tests.e2e.http_world import World, answer, chunked, field, http_world, read_body
from tests.ports import free_port

BLOB = bytes(range(256)) * 20_000
H2C = """
[[listeners]]
name = "h2c"
address = "127.0.0.1:{port_h2c}"
protocol = "h1"
h2c = true
backends = [{ address = "{backend}" }]
"""


def echo(connection: BackendConnection, head: bytes) -> None:
    """Give the body back; without one, say who asked, and how."""
    if field(head, "expect") == "100-continue":
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = read_body(connection, head)
    if head.startswith(b"HEAD"):
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4242\r\n\r\n")
    else:
        answer(connection, body or f"{field(head, 'host')}|{field(head, 'via')}".encode())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with http_world(tmp_path_factory.mktemp("h2peers"), runtime="max_keepalive_requests = 0", more=H2C) as it:
        it.on(echo, "/echo")
        it.on(lambda connection, _: answer(connection, BLOB), "/blob")
        it.on(lambda connection, _: answer(connection, b"small"), "/small")
        it.on(
            lambda connection, _: connection.send(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                + chunked(b"body")[:-2]
                + b"x-sum: 7\r\n\r\n"
            ),
            "/trailers",
        )
        yield it
        assert it.gateway.metric("worker_faults_total") == 0
        assert it.gateway.metric("security_events_total") == 0, "none of them is an attacker"


@pytest.fixture(params=["tls", "h2c"])
def front(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def url(world: World, front: str, path: str) -> str:
    return f"{'https' if front == 'tls' else 'http'}://localhost:{world.ports[front]}{path}"


def has_http2() -> bool:
    found = shutil.which("curl")
    return found is not None and "HTTP2" in run("curl", "--version")


@need("curl")
@pytest.mark.skipif(not has_http2(), reason="needs curl with HTTP/2")
class TestCurl:
    def curl(self, world: World, front: str, path: str, *options: str) -> str:
        how = ["--http2", "--cacert", str(world.trust)] if front == "tls" else ["--http2-prior-knowledge"]
        address = f"localhost:{world.ports[front]}:127.0.0.1"
        return run("curl", "-sS", "-m", "30", "--resolve", address, *how, *options, url(world, front, path))

    def test_get(self, world: World, front: str) -> None:
        shown = self.curl(world, front, "/echo", "-w", "|%{http_version}|%{http_code}")
        assert shown == f"localhost:{world.ports[front]}|2 expressgateway|2|200"

    def test_head(self, world: World, front: str) -> None:
        shown = self.curl(world, front, "/echo", "-I")
        assert shown.startswith("HTTP/2 200")
        assert "content-length: 4242" in shown

    @pytest.mark.parametrize("expect", ["", "100-continue"])
    def test_bodies_both_ways(self, world: World, front: str, tmp_path: Path, expect: str) -> None:
        (tmp_path / "up").write_bytes(BLOB)
        options = ["--data-binary", f"@{tmp_path}/up", "-o", f"{tmp_path}/down", "-H", f"Expect: {expect}"]
        self.curl(world, front, "/echo", *options)
        assert (tmp_path / "down").read_bytes() == BLOB

    def test_an_upload_without_a_length(self, world: World, front: str, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(BLOB)
        with (tmp_path / "up").open("rb") as source:
            how = ["--http2", "--cacert", str(world.trust)] if front == "tls" else ["--http2-prior-knowledge"]
            address = f"localhost:{world.ports[front]}:127.0.0.1"
            done = subprocess.run(
                [
                    program("curl"),
                    "-sS",
                    "-m",
                    "30",
                    "--resolve",
                    address,
                    *how,
                    "-T",
                    "-",
                    url(world, front, "/echo"),
                ],
                stdin=source,
                capture_output=True,
                timeout=60,
                check=True,
            )
        assert done.stdout == BLOB

    def test_many_at_once_on_one_connection(self, world: World, tmp_path: Path) -> None:
        """Not by prior knowledge: curl 7.88 fails at that, with any server."""
        before = world.gateway.metric("connections_total", listener="tls")
        self.curl(world, "tls", "/blob?[1-20]", "-Z", "--parallel-max", "20", "-o", f"{tmp_path}/#1")
        for number in range(1, 21):
            assert (tmp_path / str(number)).read_bytes() == BLOB
        assert world.gateway.metric("connections_total", listener="tls") - before < 20

    def test_without_http2(self, world: World) -> None:
        shown = self.curl(world, "tls", "/small", "--http1.1", "-w", "|%{http_version}")
        assert shown == "small|1.1"


@need("nghttp")
class TestNghttp:
    def test_get_with_statistics(self, world: World, front: str) -> None:
        shown = run("nghttp", "-nv", url(world, front, "/small").replace("localhost", "127.0.0.1"))
        assert ":status: 200" in shown
        assert "END_STREAM" in shown
        assert not re.search(r"recv (RST_STREAM|GOAWAY)", shown), shown

    def test_upload_and_small_windows(self, world: World, front: str, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(BLOB[:500_000])
        address = url(world, front, "/echo").replace("localhost", "127.0.0.1")
        done = subprocess.run(
            [program("nghttp"), "-w", "10", "-W", "12", "-d", str(tmp_path / "up"), address],
            capture_output=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == BLOB[:500_000]

    def test_padding_trailers_and_continuation(self, world: World, front: str) -> None:
        address = url(world, front, "/trailers").replace("localhost", "127.0.0.1")
        shown = run("nghttp", "-nv", "-b", "200", "--continuation", address)
        assert "x-sum: 7" in shown
        assert ":status: 200" in shown

    def test_with_priorities_and_multiple_requests(self, world: World, front: str) -> None:
        address = url(world, front, "/small").replace("localhost", "127.0.0.1")
        shown = run("nghttp", "-ns", "-m", "50", "-p", "200", address)
        assert shown.count(" 200 ") == 50, shown


@need("h2load")
class TestH2load:
    @pytest.mark.parametrize("path", ["/small", "/blob"])
    def test_many_streams(self, world: World, front: str, path: str) -> None:
        count = 2000 if path == "/small" else 40
        address = url(world, front, path).replace("localhost", "127.0.0.1")
        shown = run("h2load", f"-n{count}", "-c4", "-m16", address)
        wanted = f"{count} total, {count} started, {count} done, {count} succeeded, 0 failed, 0 errored"
        assert wanted in shown, shown

    def test_uploads(self, world: World, front: str, tmp_path: Path) -> None:
        (tmp_path / "up").write_bytes(BLOB[:100_000])
        address = url(world, front, "/echo").replace("localhost", "127.0.0.1")
        shown = run("h2load", "-n100", "-c2", "-m8", "-d", str(tmp_path / "up"), address)
        assert "100 succeeded, 0 failed, 0 errored" in shown, shown

    def test_small_windows(self, world: World, front: str) -> None:
        address = url(world, front, "/blob").replace("localhost", "127.0.0.1")
        shown = run("h2load", "-n6", "-c2", "-m3", "-w10", "-W12", address)
        assert "6 succeeded, 0 failed, 0 errored" in shown, shown


class Hyper:
    """A client on python's ``h2``, which checks what it is sent by itself."""

    def __init__(self, port: int, tls: ssl.SSLContext | None) -> None:
        sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = tls.wrap_socket(sock, server_hostname="localhost") if tls else sock
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.initiate_connection()
        self.bodies: dict[int, bytearray] = {}
        self.trailers: dict[int, list[tuple[str, str]]] = {}
        self.statuses: dict[int, str] = {}
        self.ended: set[int] = set()
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.connection.data_to_send())

    def ask(self, method: str, path: str, *, end: bool = True) -> int:
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "https"), (":authority", "localhost"), (":path", path)]
        self.connection.send_headers(stream, head, end_stream=end)
        self.bodies[stream] = bytearray()
        self.flush()
        return stream

    def step(self) -> None:
        """Take what comes next. Whatever ``h2`` does not like raises."""
        for event in self.connection.receive_data(self.sock.recv(65_536)):
            if isinstance(event, h2.events.ResponseReceived):
                self.statuses[event.stream_id] = next(str(value) for name, value in event.headers)
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.TrailersReceived):
                self.trailers[event.stream_id] = [(str(name), str(value)) for name, value in event.headers]
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                raise AssertionError(repr(event))
        self.flush()

    def upload(self, stream: int, body: bytes) -> None:
        at = 0
        while at < len(body):
            room = self.connection.local_flow_control_window(stream)
            size = min(room, self.connection.max_outbound_frame_size, len(body) - at)
            if size <= 0:
                self.step()
                continue
            self.connection.send_data(stream, body[at : at + size], end_stream=at + size == len(body))
            at += size
            self.flush()

    def until_ended(self, *streams: int) -> None:
        while not self.ended >= set(streams):
            self.step()


class TestPythonH2:
    @pytest.fixture
    def client(self, world: World, front: str) -> Iterator[Hyper]:
        client = Hyper(world.ports[front], h2_context(str(world.trust)) if front == "tls" else None)
        with contextlib.closing(client.sock):
            yield client

    def test_many_streams(self, client: Hyper) -> None:
        streams = [client.ask("GET", "/blob" if number % 5 == 0 else "/small") for number in range(25)]
        client.until_ended(*streams)
        for number, stream in enumerate(streams):
            assert client.bodies[stream] == (BLOB if number % 5 == 0 else b"small")

    def test_upload(self, client: Hyper) -> None:
        stream = client.ask("POST", "/echo", end=False)
        client.upload(stream, BLOB)
        client.until_ended(stream)
        assert client.bodies[stream] == BLOB

    def test_trailers(self, client: Hyper) -> None:
        stream = client.ask("GET", "/trailers")
        client.until_ended(stream)
        assert client.bodies[stream] == b"body"
        assert client.trailers[stream] == [("x-sum", "7")]

    def test_head_and_own_answers(self, client: Hyper) -> None:
        streams = [client.ask("HEAD", "/echo"), client.ask("GET", "/nobody")]
        client.until_ended(*streams)
        assert [client.statuses[stream] for stream in streams] == ["200", "404"]


@need("haproxy")
class TestHaproxyInFront:
    """HAProxy speaks HTTP/2 to the gateway, for clients of HTTP/1.1 and of HTTP/2."""

    @pytest.fixture(scope="class")
    @classmethod
    def edge(cls, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
        ports = {"tls": free_port(), "h2c": free_port()}
        text = "".join(
            f"listen {front}\n  bind 127.0.0.1:{port}\n  http-reuse always\n"
            f"  server it 127.0.0.1:{world.ports[front]} {how}\n"
            for front, port, how in (
                (
                    "tls",
                    ports["tls"],
                    f"ssl verify required ca-file {world.trust} verifyhost localhost alpn h2",
                ),
                ("h2c", ports["h2c"], "proto h2"),
            )
        )
        path = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
        path.write_text(
            "global\n  maxconn 256\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n"
            f"  timeout client 10s\n  timeout server 10s\n{text}"
        )
        with server("haproxy", "-db", "-q", "-f", str(path), port=ports["tls"]):
            yield ports

    def test_requests_and_bodies(self, world: World, edge: dict[str, int], front: str) -> None:
        before = world.gateway.metric("http_requests_total", listener=front, version="2")
        with Client(edge[front]) as client:
            for _ in range(20):
                client.send(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.response()[::2] == (200, b"small")
            client.send(
                b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BLOB) + BLOB
            )
            assert client.response()[::2] == (200, BLOB)
            client.send(
                b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
                + chunked(BLOB)
            )
            assert client.response()[::2] == (200, BLOB)
            client.send(b"HEAD /echo HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.response(head_only=True)[1]["content-length"] == "4242"
        assert world.gateway.metric("http_requests_total", listener=front, version="2") >= before + 22

    @need("h2load")
    def test_load(self, world: World, edge: dict[str, int], front: str) -> None:
        shown = run("h2load", "-n1000", "-c4", "-m4", f"http://127.0.0.1:{edge[front]}/small")
        assert "1000 succeeded, 0 failed, 0 errored" in shown, shown


def nginx_speaks_h2_upstream() -> bool:
    try:
        version = re.search(r"nginx/1\.(\d+)\.(\d+)", run("nginx", "-v"))
    except FileNotFoundError:
        return False
    return version is not None and (int(version[1]), int(version[2])) >= (29, 4)


@need("nginx")
@pytest.mark.skipif(not nginx_speaks_h2_upstream(), reason="needs nginx 1.29.4 (HTTP/2 to servers)")
class TestNginxInFront:
    def test_requests_and_bodies(self, world: World, front: str, tmp_path: Path) -> None:
        port = free_port()
        temporary = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        secure = (
            f"proxy_ssl_verify on; proxy_ssl_trusted_certificate {world.trust}; proxy_ssl_name localhost;"
        )
        path = tmp_path / "nginx.conf"
        path.write_text(
            f"daemon off; user root; worker_processes 1; pid {tmp_path}/nginx.pid; error_log stderr warn;\n"
            f"events {{ worker_connections 512; }}\nhttp {{ access_log off;\n{temporary}"
            f"server {{ listen 127.0.0.1:{port}; client_max_body_size 0;\n"
            "location / { proxy_http_version 2;\n"
            f"{secure if front == 'tls' else ''}\nproxy_set_header Host localhost;\n"
            f"proxy_pass {'https' if front == 'tls' else 'http'}://127.0.0.1:{world.ports[front]}; }} }} }}\n"
        )
        with (
            server("nginx", "-p", str(tmp_path), "-c", str(path), "-e", "stderr", port=port),
            Client(port) as client,
        ):
            for _ in range(20):
                client.send(b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.response()[::2] == (200, b"small")
            client.send(
                b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BLOB) + BLOB
            )
            assert client.response()[::2] == (200, BLOB)
