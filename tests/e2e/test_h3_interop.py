"""What QUIC implementations show each other, version negotiation to migration; aioquic is the client."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from aioquic.quic.connection import QuicConnection
from aioquic.quic.logger import QuicLogger
from aioquic.quic.packet import QuicProtocolVersion

from tests.e2e.h3_raw import GET, RawH3, head
from tests.e2e.harness import BackendConnection, eventually
from tests.e2e.quic_site import QuicSite, quic_site

BODY = os.urandom(300_000)


def serve_bodies(connection: BackendConnection) -> None:
    while True:
        head, body = connection.request()
        connection.backend.requests.append((head, body))
        answer = body or BODY
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuicSite]:
    with quic_site(tmp_path_factory.mktemp("interop"), script=serve_bodies) as site:
        yield site


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuicSite]:
    """Two workers: a client that moves may come to the other one."""
    with quic_site(tmp_path_factory.mktemp("shared"), script=serve_bodies, workers=2) as site:
        yield site


def packets(client: RawH3, direction: str) -> list[dict[str, Any]]:
    """What aioquic's own log says of packets received or sent."""
    logger = client.quic.configuration.quic_logger
    assert isinstance(logger, QuicLogger)
    events = logger.to_dict()["traces"][0]["events"]
    return [event["data"] for event in events if event["name"] == f"transport:packet_{direction}"]


def kinds(client: RawH3) -> set[str]:
    return {packet["header"]["packet_type"] for packet in packets(client, "received")}


def frames_received(client: RawH3) -> set[str]:
    return {
        frame["frame_type"] for packet in packets(client, "received") for frame in packet.get("frames", ())
    }


def is_served(client: RawH3, size: int = len(BODY)) -> None:
    """A download and an upload."""
    fields, body = client.get()
    assert (fields[b":status"], body) == (b"200", BODY)
    fields, body = client.get(body=BODY[:size])
    assert (fields[b":status"], body) == (b"200", BODY[:size])


def test_version_negotiation(site: QuicSite) -> None:
    """RFC 9000 6."""
    versions = [0x1A2A3A4A, int(QuicProtocolVersion.VERSION_1)]
    with site.client(
        quic_logger=QuicLogger(), supported_versions=versions, original_version=versions[0]
    ) as client:
        is_served(client.begun())
        assert "version_negotiation" in kinds(client)


@pytest.mark.parametrize("version", [QuicProtocolVersion.VERSION_1, QuicProtocolVersion.VERSION_2])
def test_each_version(site: QuicSite, version: int) -> None:
    with site.client(supported_versions=[version], original_version=version) as client:
        is_served(client.begun())
        assert client.quic._version == version


def test_handshake_transfer_and_close(tmp_path_factory: pytest.TempPathFactory) -> None:
    with quic_site(tmp_path_factory.mktemp("close"), script=serve_bodies) as site:
        with site.client() as client:
            is_served(client.begun())
            assert site.gateway.metric("connections_inflight", listener="web") == 1
        eventually(
            lambda: site.gateway.metric("connections_inflight", listener="web") == 0, "the close was heard"
        )


def test_retry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """RFC 9000 8.1.2."""
    with quic_site(tmp_path_factory.mktemp("retry"), script=serve_bodies, retry="always") as site:
        with site.client(quic_logger=QuicLogger()) as client:
            is_served(client.begun())
            assert "retry" in kinds(client)
        assert site.gateway.metric("quic_retries_total", listener="web") == 1


def ticket_of(site: QuicSite) -> Any:
    with site.client() as client:
        client.begun()
        client.until(lambda: client.tickets, "a ticket")
        return client.tickets[0]


def test_resumption(site: QuicSite) -> None:
    """RFC 8446 2.2."""
    with site.client(session_ticket=ticket_of(site)) as client:
        is_served(client.begun())
        assert client.is_resumed
    with site.client(session_ticket=client.quic.configuration.session_ticket) as client:
        is_served(client.begun())
        assert not client.is_resumed, "a ticket is good for once"


def test_early_data_is_declined(site: QuicSite) -> None:
    """RFC 8470: a request in 0-RTT could be replayed. The client is told, and sends it again afterwards."""
    ticket = ticket_of(site)
    assert not ticket.max_early_data_size, "it is not even offered"
    ticket.max_early_data_size = 0xFFFFFFFF  # a client that does not care
    before = len(site.backend.requests)
    with site.client(session_ticket=ticket, quic_logger=QuicLogger()) as client:
        client.quic._local_max_streams_bidi.value = 100
        client.quic._remote_max_streams_bidi = client.quic._remote_max_streams_uni = 10
        client.quic._remote_max_data = client.quic._remote_max_stream_data_bidi_remote = 10_000
        stream_id = client.send(head(*GET), True)
        client.flush()
        assert "0RTT" in {packet["header"]["packet_type"] for packet in packets(client, "sent")}
        assert client.answer(stream_id)[1] == BODY
        assert client.is_resumed
        assert not client.is_early
    assert len(site.backend.requests) == before + 1


def test_key_update(site: QuicSite) -> None:
    """RFC 9001 6."""
    with site.client() as client:
        is_served(client.begun())
        for _ in range(5):
            client.quic.request_key_update()
            is_served(client)


def test_the_server_is_called_by_another_id(site: QuicSite) -> None:
    """RFC 9000 5.1."""
    with site.client() as client:
        is_served(client.begun())
        for _ in range(3):
            client.until(lambda: client.quic._peer_cid_available, "a connection ID to change to")
            before = client.quic._peer_cid.cid
            client.quic.change_connection_id()
            assert client.quic._peer_cid.cid != before
            is_served(client)


@pytest.mark.parametrize("number", range(4))
def test_another_port(shared: QuicSite, number: int) -> None:
    """RFC 9000 9.3: a NAT has rebound; the client does not know."""
    with shared.client(quic_logger=QuicLogger()) as client:
        is_served(client.begun())
        assert "path_challenge" not in frames_received(client)
        client.move()
        is_served(client)
        assert "path_challenge" in frames_received(client)


@pytest.mark.parametrize("number", range(4))
def test_another_address(shared: QuicSite, number: int) -> None:
    """RFC 9000 9.5: the client moves, and calls the server by another ID."""
    with shared.client(quic_logger=QuicLogger()) as client:
        is_served(client.begun())
        for _ in range(3):
            client.until(lambda: client.quic._peer_cid_available, "a connection ID to change to")
            client.move()
            client.quic.change_connection_id()
            is_served(client)
        assert "path_challenge" in frames_received(client)


def test_moving_in_the_middle_of_a_transfer(shared: QuicSite) -> None:
    with shared.client() as client:
        client.begun()
        stream_id = client.send(head(*GET), True)
        client.until(lambda: len(client.data[stream_id]) > 50_000, "a part of it")
        client.move()
        client.quic.change_connection_id()
        assert client.answer(stream_id)[1] == BODY


class Unnamed(QuicConnection):
    """Its own connection ID is empty, as Chromium's is."""

    def connect(self, *arguments: Any, **more: Any) -> None:
        self._peer_cid.cid = self._original_destination_connection_id = os.urandom(8)
        super().connect(*arguments, **more)

    def _replenish_connection_ids(self) -> None:
        """Who has an empty ID issues no more (RFC 9000 5.1.1)."""


@pytest.mark.parametrize("retry", ["never", "always"])
def test_a_client_without_a_connection_id(tmp_path_factory: pytest.TempPathFactory, retry: str) -> None:
    with quic_site(tmp_path_factory.mktemp("unnamed"), script=serve_bodies, retry=retry) as site:
        for _ in range(3):
            with site.client(kind=Unnamed, connection_id_length=0) as client:
                is_served(client.begun())


def test_many_streams_at_once(site: QuicSite) -> None:
    with site.client() as client:
        client.begun()
        streams = [client.send(head(*GET), True) for _ in range(60)]
        for stream_id in streams:
            assert client.answer(stream_id)[1] == BODY
