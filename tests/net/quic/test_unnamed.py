"""Clients whose connection ID is empty, as Chromium's is (RFC 9000 5.1): they drop what goes to any other."""

import os
import random
from typing import Any

import pytest
from aioquic.quic.connection import QuicConnection

from expressgateway.net.quic.refusal import refuse_initial
from expressgateway.net.quic.unnamed import UnnamedClient, full_number
from expressgateway.wire.quic import VERSION_1, VERSION_2, payload_of, read_long
from tests.net.quic.world import (
    CLIENT,
    ONE_WAY_S,
    SERVER,
    AioClient,
    Ear,
    Link,
    OurServer,
    Weather,
    both_open,
    large_certificate,
    noise,
)

CHOSEN_BYTES = 8


class Unnamed(QuicConnection):
    """An empty ID of its own, and one of the usual length made up for the first packets."""

    def connect(self, *arguments: Any, **more: Any) -> None:
        self._peer_cid.cid = self._original_destination_connection_id = os.urandom(CHOSEN_BYTES)
        super().connect(*arguments, **more)

    def _replenish_connection_ids(self) -> None:
        """Who has an empty ID issues no more (RFC 9000 5.1.1)."""


class UnnamedAioClient(AioClient):
    def __init__(self, **options: Any) -> None:
        super().__init__(kind=Unnamed, connection_id_length=0, **options)


def is_served(link: Link, size: int = 300_000) -> None:
    client = link.client
    assert isinstance(client, AioClient)
    both_open(link)
    data = noise(size)
    stream_id = client.send(data)
    link.run(lambda: stream_id in client.finished)
    assert bytes(client.data[stream_id]) == data
    assert client.ended is None


@pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
def test_is_answered_without_one(version: int) -> None:
    client = UnnamedAioClient(original_version=version, supported_versions=[version])
    server = OurServer()
    link = Link(client, server)
    link.keeps_log = True
    is_served(link)
    headers = [read_long(data) for end, data, _ in link.log if end is server and data[0] >= 0x80]
    assert {header.destination for header in headers if header} == {b""}


def test_one_that_is_offered_a_newer_version() -> None:
    client = UnnamedAioClient(original_version=VERSION_1, supported_versions=[VERSION_2, VERSION_1])
    link = Link(client, OurServer())
    is_served(link)
    assert client.quic._version == VERSION_2


def test_after_a_retry() -> None:
    is_served(Link(UnnamedAioClient(), OurServer(retries=True)))


def test_with_a_certificate_that_takes_several_round_trips() -> None:
    is_served(Link(UnnamedAioClient(), OurServer(chain=large_certificate())))


@pytest.mark.parametrize("protocols", [1, 40, 80])
def test_first_messages_of_several_datagrams(protocols: int) -> None:
    names = ["hq-interop", *(f"another-protocol-{n:020}" for n in range(protocols))]
    is_served(Link(UnnamedAioClient(alpn_protocols=names), OurServer()))


@pytest.mark.parametrize("seed", range(20))
def test_in_any_weather(seed: int) -> None:
    weather = Weather(seed, drop=0.2, duplicate=0.2, reorder=0.3)
    names = ["hq-interop", *(f"another-protocol-{n:020}" for n in range(40))]
    is_served(
        Link(UnnamedAioClient(alpn_protocols=names), OurServer(chain=large_certificate()), weather), 20_000
    )


def test_one_that_moves() -> None:
    client, server = UnnamedAioClient(), OurServer()
    link = Link(client, server)
    is_served(link)
    client.address = ("10.0.0.9", 4009)
    data = noise(300_000)
    stream_id = client.send(data)
    link.run(lambda: stream_id in client.finished)
    assert bytes(client.data[stream_id]) == data
    assert server.engine.peer_address == client.address


def test_one_that_is_closed_at_once() -> None:
    client, server = UnnamedAioClient(), OurServer()
    link = Link(client, server)
    link.flush(client)
    link.step(ONE_WAY_S)
    server.engine.close(0x77, "no more")
    link.run(lambda: client.ended, 30)
    assert client.ended is not None
    assert client.ended.error_code in (0x77, 0xC)  # APPLICATION_ERROR stands for it (RFC 9000 10.2.3)


def test_one_that_asks_for_credit() -> None:
    client, server = UnnamedAioClient(), OurServer(Ear(holds=True))
    link = Link(client, server)
    both_open(link)
    stream_id = client.send(noise(400_000))
    link.run(seconds=2)
    assert stream_id not in server.ear.finished
    server.ear.use(stream_id)
    link.run(lambda: stream_id in server.ear.finished)


@pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
def test_one_that_is_refused(version: int) -> None:
    client = UnnamedAioClient(supported_versions=[version], original_version=version)
    ((data, _),) = client.transmit(0.0)
    (answer,) = refuse_initial(data, b"c" * 12, CLIENT, 2, 1.0)
    assert len(answer) <= len(data)
    client.receive(answer, SERVER, 0.1)
    client.on_timer(10.0)
    assert client.ended is not None
    assert client.ended.error_code == 2


def test_what_is_not_genuine_stays_as_it_came() -> None:
    ((data, _),) = UnnamedAioClient().transmit(0.0)
    header = read_long(data)
    assert header is not None
    source = random.Random(4)
    _, end = payload_of(data, header)
    data = data[:end]
    for _ in range(2000):
        at = source.randrange(len(data))
        packet = data[:at] + bytes((data[at] ^ 1 << source.randrange(8),)) + data[at + 1 :]
        if source.random() < 0.5:
            packet = packet[: source.randrange(len(packet))]
        assert UnnamedClient(header.destination, b"o" * 12).readdressed(packet) == packet
    assert UnnamedClient(header.destination, b"o" * 12).readdressed(data) != data


@pytest.mark.parametrize(
    ("truncated", "bits", "expected", "number"),
    [
        (0x9B32, 16, 0xA82F30EA + 1, 0xA82F9B32),  # RFC 9000 A.3
        (0, 8, 0, 0),
        (255, 8, 0, 255),
        (0, 8, 256, 256),
        (1, 8, 255, 257),
        (255, 8, 256, 255),
    ],
)
def test_packet_numbers(truncated: int, bits: int, expected: int, number: int) -> None:
    assert full_number(truncated, bits, expected) == number
