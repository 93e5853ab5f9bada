"""Bytes in any order, connections that end at any moment: a clear status or a close, nothing left behind.

After each batch ``Watch`` asks for what must always hold: no connection, exchange or descriptor is left, no
traceback is in the log, and a good client is served.
"""

import contextlib
import random
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    Steady,
    certificate,
    descriptors,
    eventually,
    listener,
)
from tests.ports import free_port

_RUNTIME = """max_keepalive_requests = 0
handshake_timeout_ms = 1000
[runtime.watchdog]
sweep_interval_ms = 100
header_deadline_ms = 1000
"""
# A client that has sent further requests is not read from while it waits, so its FIN is not seen before the
# answer: the head timeout bounds that.
_HTTP = "[listeners.http]\nbody_timeout_ms = 1000\nidle_timeout_ms = 20000\nhead_timeout_ms = 3000\n"
_RESET = struct.pack("ii", 1, 0)


def _serve(connection: BackendConnection) -> None:
    """``/echo`` gives the body back; ``/big`` ten megabytes; ``/wait`` nothing before the end."""
    while True:
        head, body = connection.request()
        if head.startswith(b"GET /big"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n")
            for _ in range(100):
                connection.send(b"x" * 100_000)
        elif head.startswith(b"GET /wait"):
            while connection.sock.recv(65536):
                pass
            return
        elif head.startswith(b"POST /echo"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        else:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")


class Watch:
    """A gateway with a good client on its worker, and what it looked like at rest."""

    def __init__(self, gateway: Gateway, port: int, tls_port: int, context: ssl.SSLContext) -> None:
        self.gateway = gateway
        self.port = port
        self.tls_port = tls_port
        self.context = context
        (self.worker,) = gateway.worker_pids()
        self._base = descriptors(self.worker)

    def inflight(self) -> float:
        return self.gateway.metric("connections_inflight")

    def check(self) -> None:
        eventually(lambda: self.inflight() == 1, "only the good client's connection is left")
        eventually(lambda: self.gateway.metric("backend_inflight") <= 1, "no exchange is left")
        eventually(lambda: self.gateway.metric("pool_connections", state="busy") <= 1, "none is leased")
        assert self.gateway.metric("pool_connections") < 40
        # idle connections to the backend come and go; clients' are gone
        pooled = self.gateway.metric("pool_connections")
        eventually(lambda: descriptors(self.worker) <= self._base + pooled + 2, "descriptors are back")
        assert self.gateway.metric("worker_faults_total") == 0
        log = self.gateway.log()
        assert "Traceback" not in log
        assert '"traceback"' not in log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.check()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    directory = tmp_path_factory.mktemp("bad")
    files = certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.certificate)
    port, tls_port = free_port(), free_port()
    tls = f"{_HTTP}[listeners.tls]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
    with Backend(_serve) as backend:
        config = listener(port, backend, _HTTP) + listener(
            tls_port, backend, tls, name="secure", protocol="h1s"
        )
        with Gateway(directory, config, runtime=_RUNTIME) as gateway, Steady(port):
            yield Watch(gateway, port, tls_port, context)


def _echo(framing: str) -> tuple[bytes, bytes]:
    """A valid request, and the body that comes back."""
    body = b"\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    if framing == "sized":
        head = b"POST /echo?a=b HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\nX: y\r\n\r\n" % len(body)
        return head + body, body
    head = b"POST /echo?a=b HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"a;x=y\r\n" + body[:10] + b"\r\n%X\r\n" % (len(body) - 10) + body[10:]
    return head + chunks + b"\r\n0\r\nX-T: z\r\n\r\n", body


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_a_request_split_at_every_byte(world: Watch, framing: str) -> None:
    """Two pieces on one connection per position; a second connection's exchange in between, so that the
    worker has read the first piece before it gets the second.
    """
    whole, body = _echo(framing)
    with world, Client(world.port) as client, Client(world.port) as fence:
        for position in range(1, len(whole)):
            client.send(whole[:position])
            fence.send(b"GET /fence HTTP/1.1\r\nHost: a\r\n\r\n")
            assert fence.response()[0] == 200
            client.send(whole[position:])
            assert client.response()[::2] == (200, body), position


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_a_request_byte_by_byte(world: Watch, framing: str) -> None:
    whole, body = _echo(framing)
    with world, Client(world.port) as client, Client(world.tls_port, tls=world.context) as secure:
        for each in (client, secure):
            for _ in range(2):
                for byte in whole:
                    each.send(bytes((byte,)))
                assert each.response()[::2] == (200, body)


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_pipelined_requests_split_at_every_byte(world: Watch, framing: str) -> None:
    whole, body = _echo(framing)
    with world, Client(world.port) as client:
        for position in range(1, len(whole), 3):
            client.send(whole + whole[:position])
            assert client.response()[::2] == (200, body), position
            client.send(whole[position:])
            assert client.response()[::2] == (200, body), position


# -- garbage -------------------------------------------------------------------------------------------------


def _garbage(random_: random.Random) -> bytes:
    """Noise, or a valid request with some bytes changed, doubled, dropped or swapped."""
    kind = random_.randrange(4)
    if kind == 0:
        return random_.randbytes(random_.randrange(1, 5000))
    if kind == 1:
        alphabet = b"GET /HTP1.\r\n:; ,abc0123456789\x00\t\xff"
        return bytes(random_.choice(alphabet) for _ in range(random_.randrange(1, 2000)))
    whole = bytearray(_echo(random_.choice(["sized", "chunked"]))[0])
    for _ in range(random_.randrange(1, 6)):
        at = random_.randrange(len(whole))
        match random_.randrange(4):
            case 0:
                whole[at] = random_.randrange(256)
            case 1:
                del whole[at : at + random_.randrange(1, 9)]
            case 2:
                whole[at:at] = random_.choice([b"\r\n", b"\n", b"\x00", b" ", b"0\r\n\r\n", whole[:at]])
            case _:
                whole[at:at] = whole[max(0, at - 20) : at]
        if not whole:
            whole = bytearray(b"x")
    return bytes(whole)


@pytest.mark.parametrize("seed", range(3))
def test_garbage(world: Watch, seed: int) -> None:
    """300 connections in all: each gets answers that are answers, or nothing, and then the end."""
    random_ = random.Random(seed)
    with world:
        for number in range(100):
            garbage = _garbage(random_)
            with Client(world.port) as client:
                with contextlib.suppress(ConnectionError):
                    client.send(garbage)
                    client.sock.shutdown(socket.SHUT_WR)
                answer = client.rest()
            assert not answer or answer.startswith(b"HTTP/1.1 "), (number, garbage, answer)


def test_garbage_over_tls(world: Watch) -> None:
    random_ = random.Random(99)
    with world:
        for _ in range(30):
            with contextlib.suppress(OSError), Client(world.tls_port, tls=world.context) as client:
                client.send(_garbage(random_))
                client.sock.settimeout(30)
                client.sock.shutdown(socket.SHUT_WR)
        for _ in range(60):
            with Client(world.tls_port) as plain:
                with contextlib.suppress(OSError):
                    plain.send(random_.choice([b"", b"\x16\x03\x01"]) + random_.randbytes(300))
                    plain.sock.shutdown(socket.SHUT_WR)
                plain.rest()


# -- half-closed ---------------------------------------------------------------------------------------------


def test_half_closed_at_every_byte(world: Watch) -> None:
    """FIN in the middle of a request: an end without an answer that looks like one; nothing waits on."""
    whole, _ = _echo("chunked")
    with world:
        for position in range(len(whole)):
            with Client(world.port) as client:
                client.send(whole[:position])
                client.sock.shutdown(socket.SHUT_WR)
                assert client.rest() == b"", position


def test_half_closed_while_waiting_gives_the_backend_up(world: Watch) -> None:
    with world:
        before = world.gateway.metric("http_gateway_errors_total", reason="client_closed")
        for _ in range(20):
            with Client(world.port) as client:
                client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
                client.sock.shutdown(socket.SHUT_WR)
                assert client.is_closed()
        assert world.gateway.metric("http_gateway_errors_total", reason="client_closed") == before + 20


def test_half_closed_right_behind_a_request_on_a_fast_backend(world: Watch) -> None:
    """The answer may win or lose that race; either way there is an end."""
    with world:
        for _ in range(50):
            with Client(world.port) as client:
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                client.sock.shutdown(socket.SHUT_WR)
                answer = client.rest()
                assert not answer or answer.endswith(b"backend"), answer


# -- resets --------------------------------------------------------------------------------------------------


def _reset(client: Client) -> None:
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    client.sock.close()


def _nothing(client: Client) -> None:
    pass


def _in_the_head(client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\nX")


def _in_the_body(client: Client) -> None:
    client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhello")


def _in_a_chunk(client: Client) -> None:
    client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhello")


def _in_a_large_upload(client: Client) -> None:
    client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 2_000_000)


def _while_waiting(client: Client) -> None:
    client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")


def _in_the_answer(client: Client) -> None:
    client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
    client.until(b"\r\n\r\n")


def _with_the_answer_unread(client: Client) -> None:
    client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
    assert select.select([client.sock], [], [], 5)[0]


def _after_the_answer(client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.response()[0] == 200


def _with_requests_waiting(client: Client) -> None:
    client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 50)


def _after_a_refusal(client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n")
    assert client.response()[0] == 400


STAGES: list[Callable[[Client], None]] = [
    _nothing,
    _in_the_head,
    _in_the_body,
    _in_a_chunk,
    _in_a_large_upload,
    _while_waiting,
    _in_the_answer,
    _with_the_answer_unread,
    _after_the_answer,
    _with_requests_waiting,
    _after_a_refusal,
]


@pytest.mark.parametrize("is_seen", [True, False], ids=["after it was read", "at once"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("stage", STAGES, ids=[stage.__name__.strip("_") for stage in STAGES])
def test_a_reset_at_every_stage(
    world: Watch, stage: Callable[[Client], None], is_tls: bool, is_seen: bool
) -> None:
    with world:
        for _ in range(3 if is_tls else 6):
            if is_tls:
                client = Client(world.tls_port, tls=world.context)
            else:
                client = Client(world.port)
            stage(client)
            if is_seen:
                with Client(world.port) as fence:
                    fence.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                    assert fence.response()[0] == 200
            _reset(client)


def test_a_reset_in_the_handshake(world: Watch) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = world.context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    with world:
        for size in (0, 1, 5, 100, len(hello)):
            for waits in (False, True):
                client = Client(world.tls_port)
                client.send(hello[:size])
                if waits and size == len(hello):
                    assert select.select([client.sock], [], [], 5)[0]
                _reset(client)


def test_backend_connections_are_bounded(world: Watch) -> None:
    """A crowd that gives up takes its backend connections with it."""
    with world:
        crowd = []
        for _ in range(60):
            client = Client(world.port)
            client.send(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            crowd.append(client)
        eventually(lambda: world.gateway.metric("backend_inflight") >= 60, "all are waiting")
        for client in crowd:
            _reset(client)


def test_a_storm_of_everything(world: Watch) -> None:
    """All stages at once from several threads."""

    def some(seed: int) -> None:
        random_ = random.Random(seed)
        for _ in range(25):
            with Client(world.port) as client:
                with contextlib.suppress(OSError, AssertionError):
                    random_.choice(STAGES)(client)
                if random_.random() < 0.5:
                    _reset(client)

    with world:
        threads = [threading.Thread(target=some, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_the_other_listeners_take_garbage_too(tmp_path: Path) -> None:
    """tcp relays it as it is, tls ends its handshakes, and both end with their clients."""
    files = certificate(tmp_path)
    tcp, tls = free_port(), free_port()
    random_ = random.Random(7)

    def echo(connection: BackendConnection) -> None:
        while data := connection.sock.recv(65536):
            connection.send(data)

    with Backend(echo) as backend:
        keys = f"[listeners.tls]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
        config = listener(tcp, backend, name="tcp", protocol="tcp")
        config += listener(tls, backend, keys, name="tls", protocol="tls")
        with Gateway(tmp_path, config, runtime=_RUNTIME) as gateway:
            (worker,) = gateway.worker_pids()
            base = descriptors(worker)
            for _ in range(50):
                noise = random_.randbytes(random_.randrange(1, 3000))
                with Client(tcp) as client:
                    client.send(noise)
                    client.sock.shutdown(socket.SHUT_WR)
                    assert client.rest() == noise
                with Client(tls) as client:
                    with contextlib.suppress(OSError):
                        client.send(noise)
                        client.sock.shutdown(socket.SHUT_WR)
                    assert len(client.rest()) < 20
                client = Client(random_.choice([tcp, tls]))
                client.send(noise)
                _reset(client)
            eventually(lambda: gateway.metric("connections_inflight") == 0, "nothing is left")
            eventually(lambda: descriptors(worker) <= base + 1, "descriptors are back")
            assert gateway.metric("backend_inflight") == 0
