"""Our roles on a QUIC connection that exists: ``aioquic``'s, in memory, with its HTTP/3 at the other end."""

from pathlib import Path
from typing import Any

import pytest
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from expressgateway.demo.certificate import CertificateFiles, make_certificate, write_certificate
from expressgateway.wire.errors import StreamResetError
from expressgateway.wire.h3.client import H3Client
from expressgateway.wire.h3.server import H3Server
from expressgateway.wire.head import ResponseHead
from tests.wire.h3_world import CANCELLED, NO_ERROR, REJECTED, UNEXPECTED, Shell, data, limits, request
from tests.wire.recorder import Answer, Recorder, answer, no_answer

ADDRESS = ("127.0.0.1", 4433)
FIELDS = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")]


class Transport:
    """The codec's view of it."""

    def __init__(self, quic: QuicConnection) -> None:
        self.quic = quic
        self.is_gone: set[int] = set()

    def open_stream(self, unidirectional: bool) -> int | None:
        number = self.quic.get_next_available_stream_id(unidirectional)
        self.quic.send_stream_data(number, b"")
        return number

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id not in self.is_gone:
            self.quic.send_stream_data(stream_id, data, end)

    def reset(self, stream_id: int, code: int) -> None:
        if stream_id not in self.is_gone:
            self.is_gone.add(stream_id)
            self.quic.reset_stream(stream_id, code)

    def stop(self, stream_id: int, code: int) -> None:
        self.quic.stop_stream(stream_id, code)

    def consumed(self, stream_id: int, size: int) -> None:
        """It grants credit by itself."""

    def queued(self, stream_id: int) -> int:
        return 0

    def close(self, code: int, reason: str) -> None:
        self.quic.close(error_code=code, reason_phrase=reason)


class World:
    """One of our roles at one end, ``aioquic``'s HTTP/3 at the other."""

    def __init__(self, files: CertificateFiles, is_server: bool, reply: Answer | None = None) -> None:
        there = QuicConfiguration(is_client=True, alpn_protocols=["h3"], server_name="localhost")
        there.load_verify_locations(str(files.certificate))
        here = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
        here.load_cert_chain(str(files.certificate), str(files.key))
        self.now = 0.0
        client = QuicConnection(configuration=there)
        client.connect(ADDRESS, self.now)
        server = QuicConnection(
            configuration=here,
            original_destination_connection_id=client.original_destination_connection_id,
        )
        self.ends = (client, server)
        self.ours, self.theirs = (server, client) if is_server else (client, server)
        self.transport = Transport(self.ours)
        self.shell = Shell(reply)
        self.codec: Any = (H3Server if is_server else H3Client)(
            self.shell, self.transport, limits(websocket=True)
        )
        self.h3: H3Connection | None = None
        self.events: list[H3Event] = []
        self.quic_events: list[events.QuicEvent] = []
        self.has_begun = False
        self.run()
        assert self.has_begun
        self.h3 = H3Connection(self.theirs)
        self.run()

    def _hear(self) -> None:
        while (event := self.ours.next_event()) is not None:
            match event:
                case events.HandshakeCompleted():
                    self.has_begun = True
                    self.codec.begin(self.now)
                case events.StreamDataReceived():
                    self.codec.receive(event.stream_id, event.data, event.end_stream, self.now)
                case events.StreamReset():
                    self.codec.receive_reset(event.stream_id, event.error_code, self.now)
                case events.StopSendingReceived():
                    self.codec.receive_stop(event.stream_id, event.error_code, self.now)
                case events.ConnectionTerminated():
                    self.codec.receive_closed(event.reason_phrase)
        while (event := self.theirs.next_event()) is not None:
            self.quic_events.append(event)
            if self.h3 is not None:
                self.events += self.h3.handle_event(event)

    def run(self) -> None:
        for _ in range(500):
            moved = False
            for each in (self.ours, self.theirs):
                timer = each.get_timer()
                if timer is not None and timer <= self.now:
                    each.handle_timer(self.now)
            for source, into in (self.ends, self.ends[::-1]):
                for datagram, _ in source.datagrams_to_send(self.now):
                    into.receive_datagram(datagram, ADDRESS, self.now)
                    moved = True
            self.codec.sent()
            self._hear()
            self.now += 0.01
            if not moved:
                return
        raise AssertionError("does not end")

    @property
    def peer(self) -> H3Connection:
        assert self.h3 is not None
        return self.h3

    def of(self, kind: type[events.QuicEvent]) -> list[Any]:
        return [each for each in self.quic_events if isinstance(each, kind)]

    def heads(self, stream_id: int) -> list[Any]:
        return [e.headers for e in self.events if isinstance(e, HeadersReceived) and e.stream_id == stream_id]

    def body(self, stream_id: int) -> bytes:
        return b"".join(
            e.data for e in self.events if isinstance(e, DataReceived) and e.stream_id == stream_id
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    directory: Path = tmp_path_factory.mktemp("quic")
    return write_certificate(directory, make_certificate("localhost", local=False))


class TestServer:
    def test_bodies_both_ways(self, files: CertificateFiles) -> None:
        def echo(recorder: Recorder) -> None:
            answer(200, recorder.payload, trailers=((b"t", b"u"),))(recorder)

        world = World(files, True, echo)
        for number in range(0, 40, 4):
            world.peer.send_headers(number, FIELDS)
            world.peer.send_data(number, b"%d" % number * 50_000, end_stream=True)
        world.run()
        for number in range(0, 40, 4):
            assert world.heads(number) == [[(b":status", b"200")], [(b"t", b"u")]]
            assert world.body(number) == b"%d" % number * 50_000
        assert len(world.shell.done) == 10

    def test_answered_before_the_end(self, files: CertificateFiles) -> None:
        """RFC 9114 4.1: the client is asked to stop, its answer to that harms nothing."""
        world = World(files, True, no_answer)
        world.peer.send_headers(0, FIELDS)
        world.run()
        stream = world.shell.exchanges[0].stream
        assert stream is not None
        stream.send_head(ResponseHead(413, ()), True)
        world.run()
        assert world.heads(0) == [[(b":status", b"413")]]
        assert [each.error_code for each in world.of(events.StopSendingReceived)] == [NO_ERROR]
        assert world.of(events.StreamReset) == []
        world.theirs.reset_stream(0, NO_ERROR)
        world.run()
        assert not world.codec._ignored
        assert world.shell.done == [0]

    def test_the_client_gives_up(self, files: CertificateFiles) -> None:
        world = World(files, True, no_answer)
        world.peer.send_headers(0, FIELDS)
        world.run()
        world.theirs.reset_stream(0, CANCELLED)
        world.theirs.stop_stream(0, CANCELLED)
        world.run()
        error = world.shell.exchanges[0].error
        assert isinstance(error, StreamResetError)
        assert error.code == CANCELLED
        assert [each.error_code for each in world.of(events.StreamReset)] == [CANCELLED]

    def test_a_connection_error(self, files: CertificateFiles) -> None:
        world = World(files, True, no_answer)
        world.theirs.send_stream_data(0, data(b"x"))
        world.run()
        world.now += 10.0  # as below
        world.run()
        assert [each.error_code for each in world.of(events.ConnectionTerminated)] == [UNEXPECTED]

    def test_goaway(self, files: CertificateFiles) -> None:
        world = World(files, True, no_answer)
        world.codec.go_away_soon()
        world.peer.send_headers(0, FIELDS, end_stream=True)
        world.run()
        world.codec.go_away()
        world.run()
        world.peer.send_headers(4, FIELDS, end_stream=True)
        world.run()
        assert [(each.stream_id, each.error_code) for each in world.of(events.StreamReset)] == [(4, REJECTED)]


class TestClient:
    def test_bodies_both_ways(self, files: CertificateFiles) -> None:
        world = World(files, False)
        sinks = []
        for number in range(10):
            sinks.append(Recorder())
            assert world.codec.can_open
            stream = world.codec.open(sinks[-1])
            stream.send_head(request(b"POST", b"/%d" % number), False)
            stream.send_data(b"%d" % number * 50_000, True)
        world.run()
        for number in range(10):
            assert (b":path", b"/%d" % number) in world.heads(4 * number)[0]
            world.peer.send_headers(4 * number, [(b":status", b"200"), (b"server", b"x")])
            world.peer.send_data(4 * number, world.body(4 * number), end_stream=True)
        world.run()
        for number, sink in enumerate(sinks):
            assert sink.payload == b"%d" % number * 50_000
            assert sink.ended
        assert world.codec.is_idle

    def test_abort_and_reset(self, files: CertificateFiles) -> None:
        world = World(files, False)
        sinks = [Recorder(), Recorder()]
        streams = [world.codec.open(each) for each in sinks]
        for stream in streams:
            stream.send_head(request(b"POST"), False)
        world.run()
        streams[0].abort(None)
        world.theirs.reset_stream(4, CANCELLED)
        world.run()
        assert [(each.stream_id, each.error_code) for each in world.of(events.StreamReset)] == [
            (0, CANCELLED),
            (4, CANCELLED),
        ]
        assert isinstance(sinks[1].error, StreamResetError)
        assert world.codec.is_idle

    def test_the_connection_is_closed(self, files: CertificateFiles) -> None:
        world = World(files, False)
        sink = Recorder()
        world.codec.open(sink).send_head(request(), True)
        world.run()
        world.theirs.close(error_code=NO_ERROR, reason_phrase="bye")
        world.run()
        world.now += 10.0  # it tells when it has drained (RFC 9000 10.2)
        world.run()
        assert sink.aborts == 1
        assert world.shell.closed == [False]
