"""What a relay asks of an engine beside streams: two of them joined in memory."""

from __future__ import annotations

import os
from typing import Any

import pytest

from expressgateway.demo.certificate import make_certificate
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import Address
from expressgateway.net.quic.tls import Grants, TicketStore, client_tls, server_tls
from expressgateway.wire.quic import VERSION_1

NAME = "engine.example"
CLIENT: Address = ("192.0.2.1", 1111)
SERVER: Address = ("192.0.2.2", 2222)
PEM = make_certificate(NAME, local=False)


class Recorder:
    """Both of an engine's listeners: calls as tuples."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def wake(self) -> None:
        """Both are asked in each turn."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Joined:
    """A client and a server whose handshake is complete."""

    def __init__(self, ours: Grants, peers: Grants) -> None:
        self.now = 1.0
        original = os.urandom(16)
        self.heard = (Recorder(), Recorder())
        self.client = Engine(
            self.heard[0], Recorder(), client_tls(["x"], ours, server_name=NAME, ca=PEM.certificate),
            SERVER, os.urandom(12), self.now, version=VERSION_1, original_cid=original,
        )  # fmt: skip
        self.server = Engine(
            self.heard[1], Recorder(), server_tls(PEM.certificate, PEM.key, ["x"], peers, TicketStore()),
            CLIENT, os.urandom(12), self.now, version=VERSION_1, original_cid=original,
            destination_cid=original,
        )  # fmt: skip
        self.client.connect()
        self.run()
        assert self.client.is_open
        assert self.server.is_open

    def run(self) -> None:
        """Until both have nothing more to say."""
        silences = 0
        while silences < 3:
            moved = False
            for engine, other, address in (
                (self.client, self.server, CLIENT),
                (self.server, self.client, SERVER),
            ):
                for datagram, _ in engine.transmit(self.now, 64):
                    other.receive(datagram, len(datagram), address, self.now)
                    moved = True
            silences = 0 if moved else silences + 1
            self.now += 0.03
            self.client.handle_timer(self.now)
            self.server.handle_timer(self.now)


def joined(datagram_bytes: int = 65_535, **server: Any) -> Joined:
    return Joined(Grants(datagram_bytes=datagram_bytes), Grants(datagram_bytes=datagram_bytes, **server))


class TestDatagrams:
    @pytest.mark.parametrize("size", [0, 1188])
    def test_what_fits_arrives(self, size: int) -> None:
        pair = joined()
        assert pair.client.send_datagram(bytes(size))
        pair.run()
        assert pair.heard[1].of("on_datagram") == [(bytes(size),)]

    @pytest.mark.parametrize("size", [1189, 1300, 60_000])
    def test_what_fits_no_packet_is_not_taken(self, size: int) -> None:
        """The library takes it and never sends anything again."""
        pair = joined()
        assert not pair.client.send_datagram(bytes(size))
        stream = pair.client.open_stream(False)
        assert stream is not None
        pair.client.send(stream, b"goes on", True)
        pair.run()
        assert pair.heard[1].of("on_stream_data") == [(stream, b"goes on", True)]

    def test_none_are_taken(self) -> None:
        assert not joined(datagram_bytes=0).client.send_datagram(b"x")


class TestCongestion:
    def test_room_and_what_is_in_flight(self) -> None:
        pair = joined(stream_bytes=1_000_000, connection_bytes=1_000_000)
        assert pair.client.in_flight_bytes == 0
        room = pair.client.room_bytes
        assert room > 10_000
        stream = pair.client.open_stream(False)
        assert stream is not None
        pair.client.send(stream, bytes(500_000), False)
        sent = pair.client.transmit(pair.now, 1000)
        assert sum(len(datagram) for datagram, _ in sent) >= pair.client.in_flight_bytes > room - 2000
        assert pair.client.room_bytes < 2000
        for datagram, _ in sent:
            pair.server.receive(datagram, len(datagram), CLIENT, pair.now)
        pair.run()
        assert pair.client.in_flight_bytes == 0


class TestEnds:
    def test_with_an_error_of_the_transport(self) -> None:
        pair = joined()
        pair.client.close_transport(0x1, "the way is gone")
        pair.run()
        ((ended,),) = pair.heard[1].of("on_ended")
        assert (ended.code, ended.reason, ended.is_application) == (0x1, "the way is gone", False)

    def test_the_lower_idle_timeout_holds(self) -> None:
        pair = joined(idle_timeout_s=7.0)
        assert pair.client.idle_timeout_s == 7.0
        assert pair.server.idle_timeout_s == 7.0


class TestFirstWindows:
    def test_a_small_one_is_a_whole_one_after_the_first_use(self) -> None:
        pair = joined(first_bytes=1000, stream_bytes=50_000)
        stream = pair.client.open_stream(True)
        assert stream is not None
        pair.client.send(stream, bytes(200_000), False)
        pair.run()

        def received() -> int:
            return sum(len(data) for _, data, _ in pair.heard[1].of("on_stream_data"))

        assert received() == 1000
        pair.server.consumed(stream, 1)
        pair.run()
        assert received() == 50_001
        assert pair.client.queued(stream) == 200_000 - 50_001
