"""Attacks at the door of a QUIC listener: Initials, junk, tokens, connections.

A good client is served before, meanwhile and afterwards, and the worker does not grow (``Site.unharmed``).
"""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicErrorCode

from expressgateway.net.quic.endpoint import ANSWERS_PER_S, HALF_OPEN_BEFORE_RETRY
from expressgateway.net.quic.tokens import LIFETIME_S, RetryTokens
from expressgateway.wire.quic import RETRY, read_long
from tests.e2e.h3_attacker import Attacker, Site, ask_good, attacked, is_served
from tests.e2e.harness import PATIENCE_S, eventually
from tests.e2e.talks import CutError
from tests.net.quic.world import Forger, open_initial

_SHORT: Final = "handshake_timeout_ms = 3000\n[runtime.watchdog]\nsweep_interval_ms = 100\n"
_INITIAL_BYTES: Final = 1200
_WIDTH: Final = 40  # addresses that a flood comes from


@functools.cache
def hello() -> bytes:
    """What a client of HTTP/3 says first, with the forger's connection ID in it."""
    settings = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost")
    client = QuicConnection(configuration=settings)
    client._local_initial_source_connection_id = Forger().cid
    client.connect(("127.0.0.1", 443), 0.0)
    ((datagram, _),) = client.datagrams_to_send(0.0)
    return open_initial(datagram)[1]


def initial(token: bytes = b"", original: bytes = b"") -> bytes:
    """The first datagram of a client that will never say more."""
    data = hello()
    frames = b"\x06\x00" + (0x4000 | len(data)).to_bytes(2, "big") + data
    return Forger(original=original or os.urandom(8)).initial(frames, token=token)


class Liars:
    """Sockets at many addresses, which never answer: as if those were forged. What comes to each is kept."""

    def __init__(self, site: Site, number: int = _WIDTH) -> None:
        self._socks = []
        for host in range(number):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_194_304)
            sock.bind((f"127.0.7.{host + 1}", 0))
            sock.connect(("127.0.0.1", site.port))
            self._socks.append(sock)
        self.heard: list[list[bytes]] = [[] for _ in self._socks]
        self.sent = [0] * number
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._socks:
            sock.close()

    def source(self, number: int) -> tuple[str, int]:
        host, port = self._socks[number].getsockname()
        return host, port

    def throw(self, datagram: bytes, number: int | None = None) -> None:
        if number is None:
            number, self._next = self._next, (self._next + 1) % len(self._socks)
        with contextlib.suppress(ConnectionError):
            self._socks[number].send(datagram)
            self.sent[number] += len(datagram)

    def listen(self) -> list[bytes]:
        """Everything that has come."""
        for number, sock in enumerate(self._socks):
            with contextlib.suppress(OSError):
                while True:
                    self.heard[number].append(sock.recv(65_535, socket.MSG_DONTWAIT))
        return [datagram for heard in self.heard for datagram in heard]

    def retries(self) -> list[bytes]:
        return [each for each in self.listen() if (header := read_long(each)) and header.type == RETRY]

    def wait(self, number: int) -> None:
        eventually(lambda: len(self.listen()) >= number, f"{number} datagrams have come")


class Flood:
    """Goes on in a thread of its own, until the block is left."""

    def __init__(self, liars: Liars) -> None:
        self._liars = liars
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.thrown = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            for _ in range(20):
                self._liars.throw(initial())
            self.thrown += 20
            self._stop.wait(0.002)  # the machine has other things to do


# -- Initials ------------------------------------------------------------------------------------------------


def _is_proved(client: Attacker) -> bool:
    """Whether it had to prove its address."""
    return client.quic._retry_source_connection_id is not None


def test_initials_from_forged_addresses(tmp_path: Path) -> None:
    with attacked(tmp_path, runtime=_SHORT) as site, site.unharmed(), Liars(site) as liars:
        with site.attacker() as client:
            assert not _is_proved(client), "there is no need yet"
        inflight: list[float] = []
        with Flood(liars) as flood:
            eventually(liars.retries, "an address is to be proved")

            def comes_in() -> bool:
                """A client that comes now; unless a moment ago the old handshakes were given up."""
                with site.attacker() as client:
                    ask_good(client)
                    return _is_proved(client)

            eventually(comes_in, "a good client comes in by a Retry")

            def are_given_up() -> bool:
                inflight.append(site.inflight)
                return flood.thrown > 1000 and site.events("slow_handshake") >= HALF_OPEN_BEFORE_RETRY

            eventually(are_given_up, "those that began first are given up")
        assert max(inflight) <= HALF_OPEN_BEFORE_RETRY + 4
        for heard, sent in zip(liars.heard, liars.sent, strict=True):
            assert sum(map(len, heard)) <= 3 * sent, "RFC 9000 8.1"
        assert all(len(retry) <= _INITIAL_BYTES for retry in liars.retries())
        site.gateway.wait_metric("quic_retries_total", len(liars.retries()), listener="quic")
        eventually(lambda: site.inflight == 1, "all but the good one are gone")
        assert site.gateway.metric("tls_handshakes_total", listener="quic", result="timeout") >= 128


def test_initials_when_no_proof_is_asked_for(tmp_path: Path) -> None:
    """Each costs a handshake that is given up in time. No address gets more than three times what it sent."""
    with (
        attacked(tmp_path, retry="never", runtime=_SHORT) as site,
        site.unharmed(64_000),
        Liars(site) as liars,
    ):
        for _ in range(400):
            liars.throw(initial())
        eventually(lambda: site.events("slow_handshake") >= 300, "they are given up")
        eventually(lambda: site.inflight == 1, "all but the good one are gone")
        liars.listen()
        for heard, sent in zip(liars.heard, liars.sent, strict=True):
            assert 0 < sum(map(len, heard)) <= 3 * sent
        assert not liars.retries()


# -- junk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with attacked(tmp_path_factory.mktemp("junk")) as site:
        yield site


def test_short_headers_of_nobody(calm: Site) -> None:
    """A stateless reset for some of them, each smaller than what it answers."""
    before = calm.dropped("unknown_connection")
    began = time.monotonic()
    with calm.unharmed(), Liars(calm) as liars:
        for number in range(20_000):
            liars.throw(bytes((0x40 | number % 64,)) + os.urandom(41))
        eventually(lambda: calm.dropped("unknown_connection") - before > 5000, "they are counted")
        last = liars.sent[0]
        answers = liars.listen()
        assert answers, last
        assert max(map(len, answers)) < 42
        assert min(map(len, answers)) >= 21, "RFC 9000 10.3"
        assert len(answers) <= ANSWERS_PER_S * (time.monotonic() - began + 1)


@pytest.mark.parametrize("size", [1, 21])
def test_what_is_too_small_to_be_answered(calm: Site, size: int) -> None:
    before = calm.dropped("unknown_connection")
    with calm.unharmed(), Liars(calm) as liars:
        for _ in range(1000):
            liars.throw(b"\x40" + os.urandom(size - 1))
        eventually(lambda: calm.dropped("unknown_connection") > before, "they are counted")
        assert not liars.listen()


@pytest.mark.parametrize("size", [100, 1199])
def test_initials_in_datagrams_that_are_too_short(calm: Site, size: int) -> None:
    """RFC 9000 14.1: they prove nothing, and an answer could be larger."""
    before = calm.dropped("short_initial")
    with calm.unharmed(), Liars(calm) as liars:
        for _ in range(500):
            liars.throw(Forger(original=os.urandom(8)).initial(b"\x01", size=size))
        eventually(lambda: calm.dropped("short_initial") > before, "they are counted")
        assert not liars.listen()
        eventually(lambda: calm.inflight == 1, "nothing is kept for them")


def test_versions_that_nobody_speaks(calm: Site) -> None:
    before = calm.dropped("version")
    began = time.monotonic()
    with calm.unharmed(), Liars(calm) as liars:
        for _ in range(5000):
            liars.throw(b"\xc0\x1a\x2a\x3a\x4a\x08" + os.urandom(8) + b"\x08" + os.urandom(8) + bytes(1200))
        eventually(lambda: calm.dropped("version") - before > 500, "they are counted")
        answers = liars.listen()
        assert answers
        assert max(map(len, answers)) < 60
        assert len(answers) <= ANSWERS_PER_S * (time.monotonic() - began + 1)


# -- tokens --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with attacked(tmp_path_factory.mktemp("tokens"), retry="always", runtime=_SHORT) as site:
        yield site


def _proof(liars: Liars) -> tuple[bytes, bytes]:
    """A token for the first of them, and the connection ID that it goes with."""
    known = len(liars.retries())
    liars.throw(initial(), 0)
    eventually(lambda: len(liars.retries()) > known, "a Retry")
    retry = liars.heard[0][-1]
    header = read_long(retry)
    assert header is not None
    return retry[header.end : -16], header.source


def _is_nothing_kept(site: Site) -> bool:
    return site.inflight == 1  # the good client's


def test_a_token_that_comes_again(strict: Site) -> None:
    before, dropped = strict.events("quic_token_replay"), strict.dropped("token_replayed")
    with strict.unharmed(), Liars(strict) as liars:
        token, cid = _proof(liars)
        first = initial(token, cid)
        liars.throw(first, 0)
        eventually(lambda: strict.inflight == 2, "it is good once")
        eventually(lambda: _is_nothing_kept(strict), "it is over")
        heard = len(liars.listen())
        for _ in range(50):
            liars.throw(first, 0)
        eventually(lambda: strict.dropped("token_replayed") == dropped + 50, "they are dropped")
        assert strict.events("quic_token_replay") == before + 50
        eventually(lambda: _is_nothing_kept(strict), "nothing is kept")
        assert len(liars.listen()) == heard, "not a word"


def test_a_token_of_another_address(strict: Site) -> None:
    before = strict.dropped("token_address")
    with strict.unharmed(), Liars(strict) as liars:
        token, cid = _proof(liars)
        for number in range(1, _WIDTH):
            liars.throw(initial(token, cid), number)
        liars.throw(initial(token, b"another!"), 0)
        eventually(lambda: strict.dropped("token_address") == before + _WIDTH, "they are dropped")
        eventually(lambda: _is_nothing_kept(strict), "nothing is kept")
        assert len(liars.listen()) == 1, "the Retry"
        liars.throw(initial(token, cid), 0)
        eventually(lambda: strict.inflight == 2, "it is good still, for whom it was made")


@pytest.mark.parametrize("age_s", [LIFETIME_S + 2, 3600, -3600])
def test_a_token_of_another_time(strict: Site, age_s: int) -> None:
    """Made with the right key: the secret is known here."""
    before = strict.dropped("token_expired")
    with strict.unharmed(), Liars(strict, 1) as liars:
        cid = os.urandom(12)
        made_s = int(time.time()) - age_s  # noqa: TID251 - as the gateway does
        token = RetryTokens(strict.secret).make(liars.source(0), b"original", cid, made_s)
        liars.throw(initial(token, cid), 0)
        eventually(lambda: strict.dropped("token_expired") == before + 1, "it is dropped")
        assert not liars.listen()


def _forged(strict: Site, source: tuple[str, int], cid: bytes) -> dict[str, bytes]:
    now_s = int(time.time())  # noqa: TID251 - as above
    right = RetryTokens(strict.secret).make(source, b"original", cid, now_s)
    return {
        "of another key": RetryTokens(bytes(32)).make(source, b"original", cid, now_s),
        "with a bit changed": right[:-1] + bytes((right[-1] ^ 1,)),
        "cut short": right[:-1],
        "of random bytes": os.urandom(100),
        "of one byte": b"x",
    }


def test_forged_tokens_are_as_good_as_none(strict: Site) -> None:
    """RFC 9000 8.1.3: they may have been made by NEW_TOKEN elsewhere, so the client is asked for a proof."""
    with strict.unharmed(), Liars(strict, 1) as liars:
        cid = os.urandom(12)
        for number, token in enumerate(_forged(strict, liars.source(0), cid).values(), 1):
            liars.throw(initial(token, cid), 0)
            liars.wait(number)
        assert len(liars.retries()) == len(liars.listen())
        eventually(lambda: _is_nothing_kept(strict), "nothing is kept")


# -- connections ---------------------------------------------------------------------------------------------


def _is_refused(site: Site, source: str) -> bool:
    with pytest.raises(CutError, match=f"error_code={QuicErrorCode.CONNECTION_REFUSED:d},"):
        site.attacker(source=source).close()
    return True


def test_one_address_cannot_have_more_than_its_cap(tmp_path: Path) -> None:
    with (
        attacked(tmp_path, runtime="per_ip_connection_cap = 5\n") as site,
        site.unharmed(),
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(site.attacker(source="127.0.0.5")) for _ in range(5)]
        for _ in range(3):
            assert _is_refused(site, "127.0.0.5")
        assert is_served(site), "others come in"
        assert all(client.is_served() for client in clients), "those who are in are left alone"
        # A client may have sent its first packet twice, and was refused twice then.
        refused = site.gateway.metric("accept_reject_total", listener="quic", reason="ip_cap")
        assert site.events("connection_flood") == refused >= 3
        clients.pop().close()
        eventually(lambda: site.inflight == 5, "one has left")
        with site.attacker(source="127.0.0.5") as client:
            assert client.is_served()


def test_the_process_as_a_whole_has_a_cap(tmp_path: Path) -> None:
    runtime = "max_inflight_connections = 100\n" + _SHORT
    with attacked(tmp_path, retry="never", runtime=runtime) as site, Liars(site) as liars:
        client = site.good()

        def is_full() -> bool:
            for _ in range(20):
                liars.throw(initial())
            ask_good(client)
            return site.gateway.metric("accept_reject_total", listener="quic", reason="process_cap") > 0

        eventually(is_full, "there is no more room")
        assert site.inflight <= 100
        assert site.events("connection_flood") >= 1
        eventually(lambda: site.events("slow_handshake") > 50, "they are given up")
        assert is_served(site), "there is room again"
        client.close()
