"""HTTP/3 behind the gateway: backends by ``aioquic``, which come, go, refuse and say nothing.

In front is HTTP/1.1 in clear: what is looked at is behind.
"""

import contextlib
import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.h3.connection import ErrorCode
from aioquic.quic.connection import QuicConnection

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.harness import PATIENCE_S, Client, Gateway, House, certificate, eventually
from tests.e2e.talks import Talk, answer, rest
from tests.e2e.talks_h3 import H3Backend, H3Talk
from tests.e2e.websocket_h2_peers import Asgi
from tests.ports import free_port

SWEEP = "[runtime.watchdog]\nsweep_interval_ms = 100\n"
PATTERN = b"".join(b"%09d\n" % number for number in range(10_000))  # 100 kB
GET = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    return certificate(tmp_path)


def config(port: int, files: CertificateFiles, *addresses: str, more: str = "", http: str = "") -> str:
    """A pool of backends that speak HTTP/3. ``more``: lines of the pool's block."""
    trust = f"tls_ca_path = '{files.certificate}', tls_verify_hostname = 'localhost'"
    tables = ", ".join(f"{{ address = '{each}', protocol = 'h3', {trust} }}" for each in addresses)
    return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
pool = "app"
[listeners.http]
{http}
[[pools]]
name = "app"
backends = [{tables}]
{more}
{SWEEP}"""


class Named:
    """Answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, talk: Talk) -> None:
        rest(talk)
        answer(talk, self.name.encode())


@contextlib.contextmanager
def backends(files: CertificateFiles, *names: str) -> Iterator[list[H3Backend]]:
    with contextlib.ExitStack() as keep:
        yield [keep.enter_context(H3Backend(Named(name), name, files)) for name in names]


def ask(port: int) -> tuple[int, dict[str, str], bytes]:
    with Client(port) as client:
        client.send(GET)
        return client.response()


class TestSharing:
    def test_balanced_over_the_pool_on_one_connection_each(
        self, house: House, files: CertificateFiles
    ) -> None:
        port = house.port
        with backends(files, "one", "two", "three") as pool:
            text = config(port, files, *(each.address for each in pool))
            with house.gateway(text) as gateway:
                found = Counter(ask(port)[2] for _ in range(30))
                assert found == {b"one": 10, b"two": 10, b"three": 10}
                assert [each.connections for each in pool] == [1, 1, 1]
                assert gateway.metric("pool_reuse_total", pool="app") == 27

    def test_many_at_once_share_a_connection(self, house: House, files: CertificateFiles) -> None:
        port = house.port
        go = threading.Event()
        under_way: queue.Queue[None] = queue.Queue()

        def held(talk: Talk) -> None:
            under_way.put(None)
            go.wait(PATIENCE_S)
            answer(talk, b"good")

        with (
            H3Backend(held, "held", files) as backend,
            house.gateway(config(port, files, backend.address)),
        ):
            clients = [Client(port) for _ in range(40)]
            for client in clients:
                client.send(GET)
            for _ in clients:
                under_way.get(timeout=PATIENCE_S)
            go.set()
            for client in clients:
                assert client.response()[2] == b"good"
                client.sock.close()
            assert backend.connections == 1

    def test_what_is_beyond_the_backends_limit_waits(self, house: House, files: CertificateFiles) -> None:
        """It allows two streams at first, and more as they end: nothing fails."""
        port = house.port

        class Few(H3Backend):
            def accept(self, **ids: Any) -> QuicConnection:
                quic = super().accept(**ids)
                quic._local_max_streams_bidi.value = 2
                return quic

        with (
            Few(Named("few"), "few", files) as backend,
            house.gateway(config(port, files, backend.address)),
        ):
            clients = [Client(port) for _ in range(8)]
            for client in clients:
                client.send(GET)
            for client in clients:
                assert client.response()[::2] == (200, b"few")
                client.sock.close()


class TestThoseThatFail:
    def test_nobody_there_and_the_other_is_asked(self, house: House, files: CertificateFiles) -> None:
        """The kernel says that the port is closed (ICMP)."""
        port = house.port
        with backends(files, "one") as (one,):
            text = config(port, files, f"127.0.0.1:{free_port()}", one.address)
            with house.gateway(text):
                assert [ask(port)[::2] for _ in range(6)] == [(200, b"one")] * 6

    def test_one_that_says_nothing_and_the_other_is_asked(
        self, house: House, files: CertificateFiles
    ) -> None:
        port = house.port
        with backends(files, "one", "two") as (one, two):
            one.is_mute = True
            text = config(port, files, one.address, two.address, more="", http="")
            with house.gateway(text, runtime="connect_timeout_ms = 1000"):
                assert [ask(port)[::2] for _ in range(4)] == [(200, b"two")] * 4

    def test_goaway_is_honoured(self, house: House, files: CertificateFiles) -> None:
        port = house.port
        with backends(files, "one") as (one,), house.gateway(config(port, files, one.address)):
            assert ask(port)[0] == 200
            (end,) = one.everyone
            with end.changed:
                assert end.h3 is not None
                end.h3.go_away(4)
                end.flush()
            end.until_closed()
            assert ask(port)[0] == 200
            assert one.connections == 2

    @pytest.mark.parametrize("kind", ["nobody", "silent", "certificate", "alpn"])
    def test_the_answer_says_why(
        self, tmp_path: Path, house: House, files: CertificateFiles, kind: str
    ) -> None:
        port = house.port
        others = certificate(tmp_path, stem="other")
        served = others if kind == "certificate" else files
        with H3Backend(Named("x"), "x", served, alpn="hq" if kind == "alpn" else "h3") as backend:
            backend.is_mute = kind == "silent"
            address = f"127.0.0.1:{free_port()}" if kind == "nobody" else backend.address
            text = config(port, files, address)
            # Only there: a handshake may take longer on a busy machine.
            runtime = "connect_timeout_ms = 300" if kind == "silent" else ""
            with house.gateway(text, runtime=runtime):
                status, headers, _ = ask(port)
        wanted = {
            "nobody": (502, "connection_refused"),
            "silent": (504, "connection_timeout"),
            "certificate": (502, "tls_certificate_error"),
            "alpn": (502, "http_protocol_error"),
        }
        assert (status, headers["proxy-status"].split("error=")[1].split(";")[0]) == wanted[kind]

    def test_one_that_dies_between_requests(self, house: House, files: CertificateFiles) -> None:
        """What is asked of a connection that nobody answers any more is asked elsewhere."""
        port = house.port
        with (
            backends(files, "one", "two") as (one, two),
            house.gateway(config(port, files, one.address, two.address)),
        ):
            assert {ask(port)[2] for _ in range(4)} == {b"one", b"two"}
            one.close()
            eventually(lambda: ask(port)[::2] == (200, b"two"), "it is found out")
            assert {ask(port)[::2] for _ in range(6)} == {(200, b"two")}


@pytest.mark.parametrize("kind", ["http", "tls", "tcp"])
def test_one_that_loses_its_datagrams_falls_out_by_health(
    house: House, files: CertificateFiles, kind: str
) -> None:
    port = house.port
    path = 'path = "/x"\n' if kind == "http" else ""
    health = (
        f'[pools.health]\ntype = "{kind}"\n{path}interval_ms = 200\ntimeout_ms = 1000\nfall = 2\nrise = 1\n'
    )
    with backends(files, "one", "two") as (one, two):
        text = config(port, files, one.address, two.address, more=health)
        with house.gateway(text) as gateway:
            up = {"pool": "app", "backend": one.address}
            eventually(
                lambda: gateway.metric("backend_state", state="healthy", pool="app") == 2, "all are well"
            )
            one.is_mute = True
            eventually(lambda: gateway.metric("backend_up", **up) == 0, "it is out")
            eventually(lambda: {ask(port)[2] for _ in range(4)} == {b"two"}, "workers know as well")
            one.is_mute = False
            eventually(lambda: gateway.metric("backend_up", **up) == 1, "it is back")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nobody", "connection refused"),
        ("certificate", "certificate not accepted"),
        ("alpn", "does not agree to speak HTTP/3"),
        ("status", "status 404"),
    ],
)
def test_what_a_probe_says_of_a_backend_that_is_not_well(
    tmp_path: Path, house: House, files: CertificateFiles, kind: str, said: str
) -> None:
    def missing(talk: Talk) -> None:
        talk.send_head([(":status", "404")], end=True)

    served = certificate(tmp_path, stem="other") if kind == "certificate" else files
    health = '[pools.health]\ntype = "http"\ninterval_ms = 5000\ntimeout_ms = 4000\nfall = 1\n'
    with H3Backend(missing, "x", served, alpn="hq" if kind == "alpn" else "h3") as backend:
        address = f"127.0.0.1:{free_port()}" if kind == "nobody" else backend.address
        with house.gateway(config(house.port, files, address, more=health)) as gateway:
            eventually(lambda: said in gateway.log(), said)


class Resetting:
    """Gives streams up, where the path says."""

    def __init__(self) -> None:
        self.turned_away = 0
        self.has_come = threading.Event()
        """What was sent first is with the client."""

    def __call__(self, talk: Talk) -> None:
        assert isinstance(talk, H3Talk)
        path = talk.headers[":path"]
        if path == "/before":
            talk.cut(ErrorCode.H3_INTERNAL_ERROR)
        elif path == "/upload":
            talk.read()
            talk.cut(ErrorCode.H3_INTERNAL_ERROR)
        elif path.startswith("/within"):
            length = [("content-length", "10")] if path == "/within-length" else []
            talk.send_head([(":status", "200"), *length])
            talk.send(b"half,")
            self.has_come.wait(PATIENCE_S)
            talk.cut(ErrorCode.H3_INTERNAL_ERROR)
        elif path == "/rejected" and not self.turned_away:
            self.turned_away += 1
            talk.cut(ErrorCode.H3_REQUEST_REJECTED)
        else:
            rest(talk)
            answer(talk, b"served")


Site = tuple[int, Resetting]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("resets")
    files = certificate(directory)
    port = free_port()
    script = Resetting()
    with (
        H3Backend(script, "resets", files) as backend,
        Gateway(directory, config(port, files, backend.address)),
    ):
        yield port, script
        assert ask(port)[::2] == (200, b"served")
        assert backend.connections == 1


class TestResets:
    """What a client got of a response is never taken for a whole one; the connection is as good as before."""

    def test_before_the_head(self, site: Site) -> None:
        with Client(site[0]) as client:
            client.send(b"GET /before HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.response()[0] == 502
            client.send(GET)
            assert client.response()[0] == 200

    def test_in_the_middle_of_an_upload(self, site: Site) -> None:
        with Client(site[0]) as client:
            client.send(b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
            assert client.response()[0] == 502

    @pytest.mark.parametrize("path", ["/within-length", "/within-chunks"])
    def test_within_the_body(self, site: Site, path: str) -> None:
        port, script = site
        script.has_come.clear()
        with Client(port) as client:
            client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert b" 200 " in client.until(b"half,")
            script.has_come.set()
            try:
                left = client.rest()
            except ConnectionResetError:
                left = b""
            assert left.strip() == b"", "no last chunk"

    def test_what_was_not_looked_at_is_asked_again(self, site: Site) -> None:
        """H3_REQUEST_REJECTED (RFC 9114 4.1.1), whatever the method."""
        port, script = site
        with Client(port) as client:
            client.send(b"POST /rejected HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc")
            assert client.response()[::2] == (200, b"served")
            assert script.turned_away == 1


@pytest.fixture(scope="module")
def hypercorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        digest, size = hashlib.sha256(), 0
        while True:
            event = await receive()
            if event["type"] != "http.request":
                return
            digest.update(event["body"])
            size += len(event["body"])
            if not event.get("more_body"):
                break
        fields = [
            (b"x-version", scope["http_version"].encode()),
            (b"x-client", str(scope["client"]).encode()),
            (b"x-digest", digest.hexdigest().encode()),
            (b"x-size", b"%d" % size),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        at, wanted = 0, int(scope["path"].rpartition("/")[2])
        while at < wanted:
            part = PATTERN[at % 100_000 : at % 100_000 + min(20_000, wanted - at)]
            at += len(part)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    directory = tmp_path_factory.mktemp("hypercorn")
    files = certificate(directory)
    port = free_port()
    with Asgi(app, files) as asgi, Gateway(directory, config(port, files, asgi.address)):
        yield port


class TestHypercorn:
    """An ordinary server: its own HTTP/3 on ``aioquic``, with the credit that this gives."""

    @staticmethod
    def ask(client: Client, wanted: int, body: bytes = b"") -> dict[str, str]:
        client.send(
            f"POST /{wanted} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        client.send(body)
        status, headers, found = client.response()
        assert status == 200
        assert headers["x-version"] == "3"
        assert (headers["x-size"], headers["x-digest"]) == (str(len(body)), hashlib.sha256(body).hexdigest())
        assert found == (PATTERN * (wanted // len(PATTERN) + 1))[:wanted]
        return headers

    def test_small_ones_on_one_connection(self, hypercorn: int) -> None:
        with Client(hypercorn) as client, Client(hypercorn) as other:
            seen = {
                self.ask(each, size, bytes(size))["x-client"]
                for size in (0, 1, 5, 1000)
                for each in (client, other)
            }
            assert len(seen) == 1, "the address of one connection of the gateway's"

    def test_a_large_response(self, hypercorn: int) -> None:
        with Client(hypercorn) as client:
            self.ask(client, 3_000_000)

    def test_a_large_request(self, hypercorn: int) -> None:
        with Client(hypercorn) as client:
            self.ask(client, 10, PATTERN * 20)

    def test_both(self, hypercorn: int) -> None:
        with Client(hypercorn) as client:
            self.ask(client, 1_000_000, PATTERN * 10)
