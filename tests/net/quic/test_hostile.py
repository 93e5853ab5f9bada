"""Whatever comes: nothing is raised, and nobody but the one connection is harmed."""

import functools
import os
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from aioquic.quic import connection as theirs
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import push_quic_transport_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.net.quic.credit import varint
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import CRYPTO_BUFFER_EXCEEDED, INTERNAL_ERROR
from expressgateway.net.quic.opening import MAX_CRYPTO_BYTES, MAX_HANDSHAKE_DATAGRAMS
from expressgateway.net.quic.refusal import refuse_initial
from expressgateway.net.quic.tls import Grants
from expressgateway.wire.quic import VERSION_1, VERSION_2
from tests.net.quic.world import (
    ALPN,
    CLIENT,
    SERVER,
    AioClient,
    AioServer,
    Ear,
    End,
    Forger,
    Link,
    OurClient,
    OurServer,
    Weather,
    add_frame,
    both_open,
    noise,
    open_initial,
)

PROTOCOL_VIOLATION = 0xA


@functools.cache
def hello() -> bytes:
    """A ClientHello that would do, with transport parameters for the forger's connection ID."""
    one = QuicConnection(
        configuration=QuicConfiguration(is_client=True, alpn_protocols=[ALPN], server_name="localhost")
    )
    one._local_initial_source_connection_id = Forger().cid
    one.connect(SERVER, 0.0)
    ((data, _),) = one.datagrams_to_send(0.0)
    return open_initial(data)[1]


def comes_to_an_end(server: OurServer, now: float = 0.0) -> None:
    """It is over at last, whatever state it was left in."""
    for _ in range(500):
        server.transmit(now)
        timer = server.timer()
        if timer is None:
            break
        now = max(now, timer)
        server.on_timer(now)
    assert server.engine.is_over
    assert server.ear.endings == 1
    assert now < 120


class TestGarbage:
    @given(st.binary(min_size=1, max_size=1500))
    @settings(max_examples=200)
    def test_random_bytes_before_the_handshake(self, data: bytes) -> None:
        server = OurServer()
        server.receive(Forger().crypto(b"\x01"), CLIENT, 0.0)
        server.receive(data, CLIENT, 0.1)
        server.transmit(0.1)
        assert server.ear.ended is None

    def test_random_bytes_at_an_open_connection(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        source = random.Random(1)
        for _ in range(3000):
            data = source.randbytes(source.randrange(1, 1300))
            if source.random() < 0.5:
                data = bytes((data[0] & 0x7F | 0x40,)) + server.engine.cid + data
            server.receive(data, CLIENT, link.now)
            server.transmit(link.now)
        stream_id = client.send(noise(100_000))
        link.run(lambda: stream_id in client.finished)

    def test_segments_of_any_size(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        source = random.Random(2)
        for _ in range(500):
            data = source.randbytes(source.randrange(1, 60_000))
            server.engine.receive(data, source.randrange(1, 1500), CLIENT, link.now)
        stream_id = client.send(noise(10_000))
        link.run(lambda: stream_id in client.finished)

    @pytest.mark.parametrize("seed", range(40))
    def test_mutated_datagrams_of_a_real_handshake(self, seed: int) -> None:
        source = random.Random(seed)
        pairs: list[tuple[End, End]] = [(AioClient(), OurServer()), (OurClient(), AioServer())]
        for client, server in pairs:

            def mangle(sender: End, data: bytes, number: int) -> Any:
                yield 0.02, data
                if isinstance(sender, OurServer | OurClient):
                    return  # aioquic may raise
                for _ in range(3):
                    yield 0.01 * source.random(), mutated(source, data)

            link = Link(client, server, mangle)
            link.run(seconds=3)
            ours = server if isinstance(server, OurServer) else client
            assert isinstance(ours, OurServer | OurClient)
            assert ours.ear.is_open
            assert ours.ear.ended is None

    @pytest.mark.parametrize("seed", range(10))
    def test_frames_of_every_kind_by_a_peer_with_keys(self, seed: int) -> None:
        # Authenticated packets with anything in them: an error of the wire, never a failure of the transport.
        source = random.Random(seed)
        for kind in [*range(0x20), 0x30, 0x31, 0x40, 0x1234]:
            client = AioClient()
            server = OurServer(grants=Grants(datagram_bytes=1000))
            link = Link(client, server)
            both_open(link)
            client.send(b"hello", end=False)
            body = varint(source.choice([0, 1, 4, 100, (1 << 62) - 1]))
            body += source.randbytes(source.randrange(40))
            add_frame(client, kind, body)
            link.run(seconds=0.5)
            ended = server.ear.ended
            assert ended is None or "transport failed" not in ended.reason, (hex(kind), body, str(ended))


def mutated(source: random.Random, data: bytes) -> bytes:
    one = bytearray(data)
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(one))
        match source.randrange(5):
            case 0:
                one[at] = source.randrange(256)
            case 1:
                one[at] ^= 1 << source.randrange(8)
            case 2:
                del one[at + 1 :]
            case 3:
                one[at:at] = source.randbytes(source.randrange(20))
            case _:
                one += source.randbytes(source.randrange(100))
    return bytes(one)


class TestHello:
    def test_the_forged_one_is_taken(self) -> None:
        server = OurServer()
        server.receive(Forger().crypto(hello()), CLIENT, 0.0)
        assert sum(len(data) for data, _ in server.transmit(0.0)) > 1200

    @pytest.mark.parametrize("seed", range(20))
    def test_mutated(self, seed: int) -> None:
        source = random.Random(seed)
        for _ in range(25):
            data = mutated(source, hello())[:1000]
            server = OurServer()
            server.receive(Forger().crypto(data), CLIENT, 0.0)
            server.transmit(0.0)
            ended = server.ear.ended
            if ended is not None:
                assert ended.code != INTERNAL_ERROR, (data, str(ended))
                assert ended.is_ours

    @given(st.binary(max_size=900))
    @settings(max_examples=200)
    def test_anything_else_in_its_place(self, data: bytes) -> None:
        server = OurServer()
        body = b"\x01" + struct.pack(">I", len(data))[1:] + data
        server.receive(Forger().crypto(body), CLIENT, 0.0)
        assert server.ear.ended is not None
        assert 0x100 <= server.ear.ended.code < 0x200
        comes_to_an_end(server)

    def test_other_messages_in_its_place(self) -> None:
        for kind in range(256):
            if kind == 1:
                continue
            server = OurServer()
            server.receive(Forger().crypto(bytes((kind, 0, 0, 4)) + b"1234"), CLIENT, 0.0)
            assert server.ear.ended is not None, kind
            assert 0x100 <= server.ear.ended.code < 0x200, (kind, str(server.ear.ended))

    def test_without_end(self) -> None:
        server = OurServer()
        forger = Forger()
        offset = 0
        data = b"\x01\xff\xff\xff" + bytes(1000)
        while server.ear.ended is None:
            server.receive(forger.crypto(data, offset), CLIENT, 0.0)
            server.transmit(0.0)
            offset += len(data)
            data = bytes(1000)
            assert offset < MAX_CRYPTO_BYTES + 2000
        assert server.ear.ended.code == CRYPTO_BUFFER_EXCEEDED
        comes_to_an_end(server)

    def test_in_pieces_that_never_join(self) -> None:
        server = OurServer()
        forger = Forger()
        for n in range(1, 1000):
            server.receive(forger.crypto(bytes(500), 1000 * n), CLIENT, 0.0)
            if server.ear.ended is not None:
                break
        assert server.ear.ended is not None
        assert server.ear.ended.code == CRYPTO_BUFFER_EXCEEDED
        assert n == MAX_HANDSHAKE_DATAGRAMS + 1

    def test_a_handshake_without_end(self) -> None:
        server = OurServer()
        forger = Forger()
        server.receive(forger.crypto(hello()), CLIENT, 0.0)
        for n in range(2 * MAX_HANDSHAKE_DATAGRAMS):
            server.receive(forger.initial(b"\x01"), CLIENT, 0.001 * n)
            server.transmit(0.001 * n)
        assert server.ear.ended is not None
        assert server.ear.ended.code == CRYPTO_BUFFER_EXCEEDED
        comes_to_an_end(server, 1.0)

    def test_at_the_largest_offset(self) -> None:
        server = OurServer()
        server.receive(Forger().initial(b"\x06" + varint((1 << 62) - 1) + varint(5) + b"12345"), CLIENT, 0.0)
        assert server.ear.ended is not None
        assert server.ear.ended.code == 0x7  # FRAME_ENCODING_ERROR

    def test_transport_parameters_of_every_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = [0, 1, 2, 63, 1199, 1200, 1 << 14, 1 << 20, 1 << 60, (1 << 60) + 1, (1 << 62) - 1]
        names = [
            "max_idle_timeout",
            "max_udp_payload_size",
            "initial_max_data",
            "initial_max_stream_data_bidi_local",
            "initial_max_stream_data_bidi_remote",
            "initial_max_stream_data_uni",
            "initial_max_streams_bidi",
            "initial_max_streams_uni",
            "ack_delay_exponent",
            "max_ack_delay",
            "active_connection_id_limit",
            "max_datagram_frame_size",
        ]
        for name in names:
            for value in values:

                def push(buffer: Any, parameters: Any, name: str = name, value: int = value) -> None:
                    setattr(parameters, name, value)
                    push_quic_transport_parameters(buffer, parameters)

                monkeypatch.setattr(theirs, "push_quic_transport_parameters", push)
                client, server = AioClient(), OurServer()
                link = Link(client, server)
                link.run(seconds=0.2)
                ended = server.ear.ended
                assert ended is None or ended.code == 0x8, (
                    name,
                    value,
                    str(ended),
                )  # TRANSPORT_PARAMETER_ERROR
                assert ended is not None or server.ear.is_open


class TestAcknowledgements:
    def acknowledge(self, link: Link, number: int) -> None:
        client = link.client
        assert isinstance(client, AioClient)
        add_frame(client, 0x02, varint(number) + varint(0) + varint(0) + varint(0))
        link.run(seconds=1)

    def open(self, *, grants: bool) -> tuple[Link, OurServer]:
        client, server = AioClient(), OurServer(Ear())
        link = Link(client, server)
        both_open(link)
        if grants:
            stream_id = client.send(noise(1_000_000))
            link.run(lambda: stream_id in server.ear.finished)
        link.run(seconds=1)
        return link, server

    @pytest.mark.parametrize("grants", [False, True])
    @pytest.mark.parametrize("ahead", [1, 2, 1000, 1 << 40])
    def test_of_what_was_not_sent(self, grants: bool, ahead: int) -> None:
        link, server = self.open(grants=grants)
        assert server.ear.endings == 0
        self.acknowledge(link, server.engine._polled + ahead)
        assert server.ear.ended is not None
        assert server.ear.ended.code == PROTOCOL_VIOLATION

    def test_of_the_number_behind_the_last_grant(self) -> None:
        client, server = AioClient(), OurServer(Ear(holds=True))
        link = Link(client, server)
        both_open(link)
        stream_id = client.send(noise(262_144), end=False)
        link.run(seconds=2)
        server.ear.use(stream_id)
        link.flush()  # the last that we sent is a grant
        number = server.engine._polled - 1
        self.acknowledge(link, number)
        assert server.ear.endings == 0
        self.acknowledge(link, server.engine._polled + 1)
        assert server.ear.ended is not None
        assert server.ear.ended.code == PROTOCOL_VIOLATION

    def test_of_our_own_packets_is_fine(self) -> None:
        link, server = self.open(grants=True)
        link.run(seconds=5)
        assert server.ear.ended is None


class TestChallenges:
    def test_more_than_anybody_needs(self) -> None:
        # Each is owed a datagram of its own, of full size (RFC 9000 8.2.2).
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        asked = 0
        while server.ear.ended is None:
            add_frame(client, 0x1A, os.urandom(8) + b"".join(b"\x1a" + os.urandom(8) for _ in range(99)))
            asked += 100
            link.run(seconds=0.1)
            assert asked < 20_000
        assert server.ear.ended.code == PROTOCOL_VIOLATION
        assert server.ear.ended.is_violation
        assert asked > 2000
        assert link.count[server] < 8000
        comes_to_an_end(server, link.now)

    def test_what_is_sent_on_streams_is_accounted_for(self) -> None:
        client, server = AioClient(), OurServer(Ear(echoes=True))
        link = Link(client, server, Weather(3, drop=0.2))
        both_open(link)
        for _ in range(5):
            stream_id = client.send(noise(1_000_000))
            link.run(lambda one=stream_id: one in client.finished, 600)  # type: ignore[misc]
            assert server.engine._unasked < 100
        assert server.ear.ended is None


class PanicException(BaseException):
    pass


class Brittle:
    """The core, which breaks at one call; like the real one it is no use from then on."""

    def __init__(self, core: Any, breaks_at: str, error: BaseException) -> None:
        self._core = core
        self._breaks_at = breaks_at
        self._error = error
        self._is_broken = False

    def __getattr__(self, name: str) -> Any:
        if self._is_broken or name == self._breaks_at:
            self._is_broken = True
            if name in ("send_key_phase", "stream_limits", "active_path", "smoothed_rtt", "version"):
                raise self._error

            def broken(*arguments: Any) -> None:
                raise self._error

            return broken
        return getattr(self._core, name)


def granting(engine: Engine) -> None:
    engine._credit.receive(0, 200_000, False)
    engine.consumed(0, 200_000)
    engine.transmit(1.0, 10)


CALLS: dict[str, Callable[[Engine], object]] = {
    "receive_datagram": lambda engine: engine.receive(b"\x40" * 50, 50, CLIENT, 1.0),
    "receive_gro_buffer": lambda engine: engine.receive(b"\x40" * 100, 50, CLIENT, 1.0),
    "next_event": lambda engine: engine.receive(b"\x40" * 50, 50, CLIENT, 1.0),
    "poll_transmit": lambda engine: engine.transmit(1.0, 10),
    "handle_timer": lambda engine: engine.handle_timer(1.0),
    "get_timer": lambda engine: engine.timer(),
    "open_stream": lambda engine: engine.open_stream(False),
    "stream_limits": lambda engine: engine.open_stream(False),
    "send_stream": lambda engine: engine.send(0, b"x", False),
    "reset_stream": lambda engine: engine.reset(0, 1),
    "stop_sending": lambda engine: engine.stop(0, 1),
    "get_send_buffer_size": lambda engine: engine.queued(0),
    "send_datagram": lambda engine: engine.send_datagram(b"x"),
    "send_ping": lambda engine: engine.ping(),
    "close": lambda engine: engine.close(1, ""),
    "restore_send_packet_number": granting,
}


class TestPanics:
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("kind", [PanicException, RuntimeError])
    def test_end_this_connection_alone(self, call: str, kind: type[BaseException]) -> None:
        client, server = AioClient(), OurServer(grants=Grants(datagram_bytes=1000))
        link = Link(client, server)
        both_open(link)
        client.send(b"x", end=False)
        link.run(seconds=0.5)
        engine = server.engine
        core: Any = Brittle(engine._core, call, kind("it broke"))
        engine._core = core
        CALLS[call](engine)
        if not (kind is RuntimeError and call == "send_datagram"):  # the core's word for "not so large"
            assert server.ear.endings == 1
        # nothing after it raises, and nothing is told twice
        for again in CALLS.values():
            again(engine)
        assert engine.timer() is None or not engine.is_over
        assert server.ear.endings == 1
        assert engine.is_over

    def test_what_is_no_panic_is_not_held_back(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        engine = server.engine
        core: Any = Brittle(engine._core, "receive_datagram", KeyboardInterrupt())
        engine._core = core
        with pytest.raises(KeyboardInterrupt):
            engine.receive(b"\x40" * 50, 50, CLIENT, 1.0)

    def test_a_sink_that_raises(self) -> None:
        class Clumsy(Ear):
            def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
                raise ZeroDivisionError

        client, server = AioClient(), OurServer(Clumsy())
        link = Link(client, server)
        both_open(link)
        client.send(b"x")
        link.run(lambda: client.ended, 2)
        assert client.ended is not None
        assert client.ended.error_code == INTERNAL_ERROR


class TestDatagrams:
    def test_one_that_fits_no_packet_is_refused(self) -> None:
        # In the core's queue it would block everything behind it, for ever.
        client = AioClient(max_datagram_frame_size=65_536)
        server = OurServer(grants=Grants(datagram_bytes=65_535))
        link = Link(client, server)
        both_open(link)
        sizes = [size for size in range(1, 3000) if server.engine.send_datagram(bytes(size))]
        assert 1100 < max(sizes) < 1232
        stream_id = client.send(b"hello")
        link.run(lambda: stream_id in client.finished, 30)
        assert max(map(len, client.datagrams)) == max(sizes)

    def test_a_peer_that_takes_none(self) -> None:
        client, server = AioClient(), OurServer()
        both_open(Link(client, server))
        assert not server.engine.send_datagram(b"x")

    def test_both_ways(self) -> None:
        client = AioClient(max_datagram_frame_size=65_536)
        server = OurServer(grants=Grants(datagram_bytes=65_535))
        link = Link(client, server)
        both_open(link)
        client.quic.send_datagram_frame(b"ping")
        assert server.engine.send_datagram(b"pong")
        link.run(lambda: client.datagrams and server.ear.datagrams)
        assert (client.datagrams, server.ear.datagrams) == ([b"pong"], [b"ping"])


class TestRefusals:
    @given(st.binary(min_size=7, max_size=1300))
    @settings(max_examples=200)
    def test_anything(self, data: bytes) -> None:
        assert refuse_initial(data, b"c" * 12, CLIENT, 2, 1.0) == []

    @pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
    def test_an_initial(self, version: int) -> None:
        client = AioClient(supported_versions=[version], original_version=version)
        ((data, _),) = client.transmit(0.0)
        (answer,) = refuse_initial(data, b"c" * 12, CLIENT, 2, 1.0)
        assert len(answer) <= len(data)
        client.receive(answer, SERVER, 0.1)
        client.on_timer(10.0)
        assert client.ended is not None
        assert client.ended.error_code == 2

    def test_mutated_ones(self) -> None:
        source = random.Random(3)
        ((data, _),) = AioClient().transmit(0.0)
        for _ in range(2000):
            refuse_initial(mutated(source, data), os.urandom(12), CLIENT, 2, 1.0)


class TestEndings:
    @pytest.mark.parametrize("when", ["at once", "half open", "open"])
    def test_a_close_is_heard_and_the_connection_forgotten(self, when: str) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        if when == "open":
            both_open(link)
        else:
            link.flush(client)
            link.step(1)
            if when == "half open":
                link.flush(server)
        server.engine.close(0x77, "no more")
        link.run(lambda: server.engine.is_over and client.ended, 30)
        assert client.ended is not None
        assert client.ended.error_code == 0x77
        assert server.ear.endings == 1

    def test_our_clients_close(self) -> None:
        client, server = OurClient(), AioServer()
        link = Link(client, server)
        both_open(link)
        client.engine.close(0x100, "done")
        link.run(lambda: client.engine.is_over and server.ended, 30)
        assert server.ended is not None
        assert server.ended.error_code == 0x100

    def test_a_client_that_gives_up_before_anything_was_heard(self) -> None:
        client, server = OurClient(), AioServer()
        link = Link(client, server, lambda end, data, number: ())
        link.run(seconds=1)
        client.engine.close(0x100, "done")
        link.run(lambda: client.engine.is_over, 30)
        assert client.ear.endings == 1

    def test_silence(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        link.fate = lambda end, data, number: ()
        link.run(lambda: server.engine.is_over, 100)
        assert server.ear.ended is not None
        assert server.ear.ended.is_ours

    def test_the_peers_close(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        client.quic.close(0x99, None, "bye")
        link.run(lambda: server.engine.is_over, 30)
        ended = server.ear.ended
        assert ended is not None
        assert (ended.code, ended.is_application, ended.is_ours, ended.reason) == (0x99, True, False, "bye")

    def test_a_reason_that_is_no_text(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server)
        both_open(link)
        add_frame(client, 0x1D, varint(5) + varint(2) + b"\xff\xfe")
        link.run(lambda: server.ear.ended, 5)

    def test_a_stateless_reset(self) -> None:
        client, server = OurClient(), AioServer()
        link = Link(client, server)
        both_open(link)
        token = server.quic._host_cids[0].stateless_reset_token
        client.receive(b"\x40" + os.urandom(40) + token, SERVER, link.now)
        assert client.ear.ended is not None
        assert client.engine.is_over

    def test_a_clock_that_goes_back(self) -> None:
        client, server = AioClient(), OurServer()
        link = Link(client, server, Weather(1))
        both_open(link)
        engine = server.engine
        engine.ping()
        for data, _ in server.transmit(link.now + 5):
            link.throw(client, data, SERVER, 0.02)
        stream_id = client.send(noise(50_000))
        link.run(lambda: stream_id in client.finished, 60)
