"""Floods of a QUIC listener beyond its door: junk, and what comes and goes. Nothing is kept of it."""

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from typing import Final, Self

import pytest
from aioquic.quic.packet import QuicPacketType

from tests.e2e.h3_raw import GET, head
from tests.e2e.harness import PATIENCE_S, eventually, resident_kib
from tests.e2e.quic_site import QuicSite, quic_site

# What a flood leaves is to be gone before the test is over.
RUNTIME: Final = "handshake_timeout_ms = 3000\nmax_requests_per_h3_connection = 0\n"
ROOM_KIB: Final = 16_384  # what a worker may grow by: buffers of a burst, and noise
pytestmark = pytest.mark.slow


class SteadyH3:
    """A well-behaved client in a thread of its own: request after request on one connection."""

    def __init__(self, site: QuicSite) -> None:
        self._client = site.client()
        self._stop = threading.Event()
        self._failure = ""
        self.served = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._client.__enter__()
        self._client.begun()
        self._ask()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        if kind is None:
            assert not self._failure, self._failure
            self._ask()
        self._client.__exit__(kind)

    def _ask(self) -> None:
        fields, body = self._client.get()
        assert (fields[b":status"], body) == (b"200", b"backend")
        self.served += 1

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.005):
                self._ask()
        except (OSError, AssertionError) as error:
            self._failure = f"the good client, after {self.served} answers: {error!r}"


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuicSite]:
    with quic_site(tmp_path_factory.mktemp("attacked"), runtime=RUNTIME) as site:
        yield site


def worker(site: QuicSite) -> int:
    (pid,) = site.gateway.worker_pids()
    return pid


@contextlib.contextmanager
def unharmed(site: QuicSite) -> Iterator[SteadyH3]:
    """A good client is served meanwhile, a new one afterwards; the worker is the same, and no larger."""
    pid = worker(site)
    with SteadyH3(site) as steady:
        before = resident_kib(pid)
        served = steady.served
        yield steady
        eventually(lambda: steady.served > served + 10, "the good client goes on")
        with site.client() as client:
            assert client.begun().get()[1] == b"backend"
    assert worker(site) == pid
    assert resident_kib(pid) < before + ROOM_KIB


class Liars:
    """Sockets at many addresses, as if they were forged."""

    def __init__(self, site: QuicSite, number: int = 50) -> None:
        self.socks = []
        for host in range(number):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((f"127.0.7.{host + 1}", 0))
            sock.connect(("127.0.0.1", site.port))
            self.socks.append(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.socks:
            sock.close()

    def throw(self, datagram: bytes, number: int) -> None:
        with contextlib.suppress(ConnectionError):
            self.socks[number % len(self.socks)].send(datagram)

    def heard(self) -> int:
        """Bytes that came back to them."""
        heard = 0
        for sock in self.socks:
            with contextlib.suppress(OSError):
                while True:
                    heard += len(sock.recv(65_535, socket.MSG_DONTWAIT))
        return heard


def test_junk_of_every_kind(site: QuicSite) -> None:
    source = random.Random(3)
    with Liars(site) as liars, unharmed(site):
        for number in range(20_000):
            size = source.choice((0, 1, 5, 7, 20, 60, 1199, 1200, 1350, 1400))
            junk = bytearray(source.randbytes(size))
            if size > 6 and source.random() < 0.7:
                junk[0] |= 0xC0
                junk[1:5] = source.choice((bytes(4), b"\0\0\0\1", b"\x6b\x33\x43\xcf", b"\x0a\x0a\x0a\x0a"))
                junk[5] = source.choice((0, 8, 12, 20, 21, 255))
            liars.throw(bytes(junk), number)
        heard = liars.heard()
    assert heard < 20_000 * 700


def churn(site: QuicSite, connections: int) -> None:
    for _ in range(connections):
        with site.client() as client:
            client.begun()
            for _ in range(4):
                stream_id = client.send(head(*GET), True)
                client.quic.stop_stream(stream_id, 0x10C)
            if client.quic._peer_cid_available:
                client.quic.change_connection_id()
            assert client.get()[1] == b"backend"


def test_connections_that_come_and_go(site: QuicSite) -> None:
    churn(site, 200)  # what a worker keeps for good it has by now
    with unharmed(site):
        churn(site, 600)  # of 50 KiB each, were they kept
        eventually(lambda: site.gateway.metric("connections_inflight", listener="web") <= 1, "all are gone")


def test_ids_that_come_and_go(site: QuicSite) -> None:
    """A client that retires every connection ID that it is given, as fast as it can (RFC 9000 5.1.2)."""
    pid = worker(site)
    with site.client() as client, unharmed(site):
        client.begun()
        before = resident_kib(pid)
        for _ in range(400):
            client.until(lambda: client.quic._peer_cid_available, "a connection ID to change to")
            client.quic.change_connection_id()
            client.quic.send_ping(1)
        assert client.get()[1] == b"backend"
        assert resident_kib(pid) < before + ROOM_KIB


def test_streams_that_come_and_go(site: QuicSite) -> None:
    with site.client() as client, unharmed(site):
        client.begun()
        for _ in range(1500):
            stream_id = client.send(head(*GET), True)
            client.until(lambda number=stream_id: number in client.ends, "an answer")  # type: ignore[misc]
            client.data.pop(stream_id)
        assert client.get()[1] == b"backend"


KINDS: Final = (QuicPacketType.ZERO_RTT, QuicPacketType.HANDSHAKE)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_long_headers_of_no_connection(site: QuicSite, kind: QuicPacketType) -> None:
    first = 0xD0 if kind == QuicPacketType.ZERO_RTT else 0xE0
    with Liars(site) as liars, unharmed(site):
        for number in range(10_000):
            start = bytes((first,)) + b"\0\0\0\1\x08" + os.urandom(8) + b"\x08" + os.urandom(8) + b"\x44\xb0"
            liars.throw(start + os.urandom(1200), number)
        site.gateway.wait_metric("udp_dropped_total", 1000, listener="web", reason="unknown_connection")
        assert not liars.heard()
