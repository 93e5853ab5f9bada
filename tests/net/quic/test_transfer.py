"""Bytes through our engine, to and from aioquic, whatever the link does to the datagrams."""

import os
from collections.abc import Callable

import pytest
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite

from expressgateway.net.quic.tls import Grants
from expressgateway.wire import quic
from expressgateway.wire.quic import VERSION_1, VERSION_2, read_long
from tests.net.quic.world import (
    ALPN,
    ONE_WAY_S,
    ROUND_TRIP_S,
    SERVER,
    AioClient,
    AioServer,
    Fate,
    Link,
    Nameless,
    OurClient,
    OurServer,
    Weather,
    both_open,
    large_certificate,
    noise,
    open_initial,
)

MEGABYTE = 1_000_000
CALM = Weather(1)


def upload_and_echo(link: Link, data: bytes, *, seconds: float = 300.0) -> float:
    """From whichever end is the client, and back; gives the seconds that it took."""
    client = link.client
    if isinstance(client, OurClient):
        engine = client.engine
        stream_id = engine.open_stream(False)
        assert stream_id is not None
        engine.send(stream_id, data, True)
        ear = client.ear
        took = link.run(lambda: stream_id in ear.finished, seconds)
        assert ear.data[stream_id] == data
        return took
    assert isinstance(client, AioClient)
    stream_id = client.send(data)
    took = link.run(lambda: stream_id in client.finished, seconds)
    assert client.data[stream_id] == data
    return took


def aio_to_ours(fate: Fate) -> Link:
    return Link(AioClient(), OurServer(), fate)


def ours_to_aio(fate: Fate) -> Link:
    return Link(OurClient(), AioServer(), fate)


ROLES = pytest.mark.parametrize("make", [aio_to_ours, ours_to_aio])


class TestBytes:
    @ROLES
    def test_a_calm_link(self, make: Callable[[Fate], Link]) -> None:
        link = make(CALM)
        both_open(link)
        assert upload_and_echo(link, noise(MEGABYTE)) < 20 * ROUND_TRIP_S

    @ROLES
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_one_in_twenty_is_lost(self, make: Callable[[Fate], Link], seed: int) -> None:
        link = make(Weather(seed, drop=0.05))
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE))

    @ROLES
    def test_one_in_five_is_lost(self, make: Callable[[Fate], Link]) -> None:
        link = make(Weather(7, drop=0.2))
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE))

    @ROLES
    @pytest.mark.parametrize("seed", range(5))
    def test_everything_at_once(self, make: Callable[[Fate], Link], seed: int) -> None:
        weather = Weather(seed, drop=0.03, duplicate=0.1, reorder=0.2, corrupt=0.03, truncate=0.03)
        link = make(weather)
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE // 2, seed))

    @ROLES
    def test_many_streams_at_once(self, make: Callable[[Fate], Link]) -> None:
        link = make(Weather(5, drop=0.02, reorder=0.1))
        both_open(link)
        payloads = [noise(20_000 + n, n) for n in range(30)]
        client = link.client
        if isinstance(client, OurClient):
            ids = []
            for payload in payloads:
                stream_id = client.engine.open_stream(False)
                assert stream_id is not None
                client.engine.send(stream_id, payload, True)
                ids.append(stream_id)
            heard, finished = client.ear.data, client.ear.finished
        else:
            assert isinstance(client, AioClient)
            ids = [client.send(payload) for payload in payloads]
            heard, finished = client.data, client.finished
        link.run(lambda: finished.issuperset(ids), 200)
        assert [bytes(heard[one]) for one in ids] == payloads

    @pytest.mark.parametrize(
        "suite",
        [
            CipherSuite.AES_128_GCM_SHA256,
            CipherSuite.AES_256_GCM_SHA384,
            CipherSuite.CHACHA20_POLY1305_SHA256,
        ],
    )
    @pytest.mark.parametrize("versions", [(VERSION_1,), (VERSION_2,)])
    def test_grants_under_every_cipher_and_version(
        self, suite: CipherSuite, versions: tuple[int, ...]
    ) -> None:
        client = AioClient(
            cipher_suites=[suite], supported_versions=list(versions), original_version=versions[0]
        )
        link = Link(client, OurServer())
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE))
        assert client.quic._version == versions[0]

    def test_a_version_1_client_may_be_moved_to_version_2(self) -> None:
        # RFC 9368: compatible versions
        client = AioClient(supported_versions=[QuicProtocolVersion.VERSION_2, QuicProtocolVersion.VERSION_1])
        link = Link(client, OurServer())
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE // 2))

    def test_more_streams_than_are_allowed_at_once(self) -> None:
        server = OurServer(grants=Grants(streams=5))
        link = Link(AioClient(), server)
        both_open(link)
        client = link.client
        assert isinstance(client, AioClient)
        ids = [client.send(b"x" * 100) for _ in range(50)]
        link.run(lambda: client.finished.issuperset(ids))

    def test_our_client_waits_for_streams_to_be_allowed(self) -> None:
        client = OurClient()
        link = Link(client, AioServer())
        both_open(link)
        ids: list[int] = []
        while (stream_id := client.engine.open_stream(False)) is not None:
            ids.append(stream_id)
            client.engine.send(stream_id, b"x", True)
        assert len(ids) == 128  # aioquic's
        link.run(lambda: client.ear.finished.issuperset(ids) and client.ear.allowed)
        assert client.engine.open_stream(False) is not None


class TestNameless:
    """A client without a connection ID of its own: what it is sent goes to none."""

    @pytest.mark.parametrize("retries", [False, True])
    @pytest.mark.parametrize("versions", [(VERSION_1,), (VERSION_2,), (VERSION_2, VERSION_1)])
    def test_upload(self, retries: bool, versions: tuple[int, ...]) -> None:
        client = Nameless(supported_versions=list(versions), original_version=versions[-1])
        link = Link(client, OurServer(retries=retries))
        link.keeps_log = True
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE))
        for end, data, _ in link.log:
            header = read_long(data)
            assert end is client or header is None or header.destination == b""


class TestHandshake:
    @ROLES
    @pytest.mark.parametrize("seed", range(12))
    def test_through_anything(self, make: Callable[[Fate], Link], seed: int) -> None:
        link = make(Weather(seed, drop=0.2, duplicate=0.2, reorder=0.3, corrupt=0.05, truncate=0.05))
        both_open(link)

    @ROLES
    def test_in_one_round_trip_and_a_half(self, make: Callable[[Fate], Link]) -> None:
        link = make(CALM)
        both_open(link)
        assert link.now == pytest.approx(3 * ONE_WAY_S, abs=ONE_WAY_S / 2)

    def test_a_large_chain_to_a_client_with_a_short_hello(self) -> None:
        # The budget against amplification is three datagrams, then an acknowledgement, then the rest:
        # nothing of it may be lost on the way out of the core, which costs a probe timeout of a second.
        client = AioClient()
        link = Link(client, OurServer(chain=large_certificate()))
        both_open(link)
        assert link.now < 3 * ROUND_TRIP_S
        assert link.sent_bytes[link.server] > 6000

    def test_nothing_above_the_budget_is_sent_to_an_address_that_proves_nothing(self) -> None:
        # RFC 9000 8.1: three times what has come
        server = OurServer(chain=large_certificate())
        ((hello, address),) = AioClient().transmit(0.0)
        server.receive(hello, address, 0.0)
        sent = wakes = 0
        now = 0.0
        while now < 29:
            sent += sum(len(data) for data, _ in server.transmit(now))
            timer = server.timer()
            assert timer is not None
            now = max(now, timer)
            server.on_timer(now)
            wakes += 1
        assert 2 * len(hello) < sent <= 3 * len(hello)
        assert wakes < 40, "it wakes for nothing"

    def test_a_hello_of_two_datagrams(self) -> None:
        # Post-quantum key shares make it that large.
        client = AioClient(alpn_protocols=[ALPN, *(f"{n:03}" * 50 for n in range(12))])
        link = Link(client, OurServer())
        both_open(link)
        assert link.now < 2.5 * ROUND_TRIP_S


class TestRetry:
    def test_our_server_asks_for_it(self) -> None:
        client = AioClient()
        server = OurServer(retries=True)
        link = Link(client, server)
        both_open(link)
        upload_and_echo(link, noise(10_000))
        assert link.now < 10 * ROUND_TRIP_S

    def test_our_client_does_as_it_is_told(self) -> None:
        client = OurClient()
        server = AioServer(retries=True)
        link = Link(client, server)
        both_open(link)
        upload_and_echo(link, noise(MEGABYTE))

    def test_the_same_hello_under_the_next_number(self) -> None:
        # RFC 9000 17.2.5.3: "A client MUST use the same cryptographic handshake message it included", and
        # "MUST NOT reset the packet number for any packet number space".
        server = AioServer(retries=True)
        both_open(Link(OurClient(), server))
        before = [open_initial(one) for one in server.initials if not token(one)]
        after = [open_initial(one) for one in server.initials if one[6:14] == b"retry-id"]
        assert b"".join(crypto for _, crypto in before) == b"".join(crypto for _, crypto in after)
        assert max(number for number, _ in before) < min(number for number, _ in after)

    def test_a_forged_one_is_dropped(self) -> None:
        client = OurClient()
        server = AioServer()
        link = Link(client, server)
        first = client.transmit(0.0)
        header = read_long(first[0][0])
        assert header is not None
        forged = bytearray(quic.retry(header, b"an evil one", b"token"))
        forged[-1] ^= 1
        client.receive(bytes(forged), server.address, 0.0)
        assert client.transmit(0.0) == []
        for data, _ in first:
            server.receive(data, client.address, 0.0)
        both_open(link)

    def test_a_second_one_is_dropped(self) -> None:
        client = OurClient()
        header = read_long(client.transmit(0.0)[0][0])
        assert header is not None
        for name in (b"a token", b"another"):
            client.receive(quic.retry(header, os.urandom(8), name), SERVER, 0.0)
        assert {token(data) for data, _ in client.transmit(0.0)} == {b"a token"}


def token(datagram: bytes) -> bytes | None:
    header = read_long(datagram)
    assert header is not None
    return quic.token_of(datagram, header)
