"""Talks over HTTP/3, in either role, on ``aioquic``, which shares no code with the gateway.

``aioquic`` takes any amount to be sent; a talk gives it no more than its peer allows.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from aioquic._buffer import Buffer
from aioquic.h3.connection import ErrorCode
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.h3.exceptions import InvalidStreamTypeError, NoAvailablePushIDError
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionTerminated,
    HandshakeCompleted,
    QuicEvent,
    StopSendingReceived,
    StreamReset,
)
from aioquic.quic.packet import QuicPacketType, pull_quic_header
from cryptography import x509

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.aioquic_h3 import Credit, Http3, configuration
from tests.e2e.harness import PATIENCE_S
from tests.e2e.talks import Answerer, CutError, Fields

QUEUED_BYTES = 262_144  # of one stream, that are not sent yet: the congestion window decides when
FRAME_HEADER_BYTES = 16
SOCKET_BUFFER_BYTES = 4_194_304

Address = tuple[str, int]


class H3Talk:
    """See ``Talk``. One stream of an ``H3End``."""

    def __init__(self, end: "H3End", stream: int) -> None:
        self.connection = end.number
        self.headers: dict[str, str] = {}
        self.fields: Fields = []
        """The head as it came."""
        self.trailers: Fields = []
        self.informational: list[Fields] = []
        self.stream = stream
        self.pieces: list[bytes] = []
        self.received = 0
        self.is_ended = False  # by the peer
        self.is_stopped = False  # the peer wants no more of this side's message, which it has answered
        self.is_lost = False
        self.lost_code: int | None = None
        """The error code that the peer gave the exchange up with."""
        self._end = end

    def _wait(self, check: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
        """With the lock held. Raises ``CutError`` when the exchange is lost."""
        found = self._end.changed.wait_for(lambda: bool(check()) or self.is_lost, seconds)
        if self.is_lost and not check():
            raise CutError
        return found

    def send_head(self, fields: Fields, *, end: bool = False) -> None:
        with self._end.speaking(self) as h3:
            h3.send_headers(self.stream, _bytes(fields), end_stream=end)

    def _room(self) -> int:
        if self.is_lost or self.is_stopped:
            return 0
        return self._end.room(self.stream)

    def _send_some(self, data: bytes, seconds: float, *, end: bool = False) -> int:
        """``end``: the data are the last, if all can be sent."""
        with self._end.changed:
            self._wait(lambda: self._room() or self.is_stopped, seconds)
        with self._end.speaking(self) as h3:
            if self.is_stopped:
                raise CutError
            size = min(self._room(), len(data))
            if size:
                h3.send_data(self.stream, data[:size], end_stream=end and size == len(data))
            return size

    def send(self, data: bytes, *, end: bool = False) -> None:
        at = 0
        while at < len(data):
            is_last = end and at + 65_536 >= len(data)
            taken = self._send_some(data[at : at + 65_536], PATIENCE_S, end=is_last)
            if not taken:
                raise AssertionError("the peer gives no credit")
            at += taken

    def offer(self, total: int, quiet_s: float = 0.5) -> int:
        taken = 0
        while taken < total and (more := self._send_some(bytes(min(65_536, total - taken)), quiet_s)):
            taken += more
        return taken

    def finish(self, trailers: Fields | None = None) -> None:
        with self._end.speaking(self) as h3:
            if trailers:
                h3.send_headers(self.stream, _bytes(trailers), end_stream=True)
            else:
                h3.send_data(self.stream, b"", end_stream=True)

    def read_head(self) -> dict[str, str]:
        with self._end.changed:
            if not self._wait(lambda: self.headers):
                raise AssertionError("no head came")
        return self.headers

    def read(self) -> bytes:
        with self._end.changed:
            if not self._wait(lambda: self.pieces or self.is_ended):
                raise AssertionError("no body came")
            if not self.pieces:
                return b""
            data = b"".join(self.pieces)
            self.pieces.clear()
            self._end.used(self.stream, len(data))
        return data

    def until_lost(self) -> None:
        """Wait until the peer gives the exchange up."""
        with self._end.changed:
            if not self._end.changed.wait_for(lambda: self.is_lost, PATIENCE_S):
                raise AssertionError("the peer did not give the exchange up")

    def cut(self, code: int = ErrorCode.H3_REQUEST_CANCELLED) -> None:
        with contextlib.suppress(CutError), self._end.speaking(self):
            quic = self._end.quic
            with contextlib.suppress(ValueError):
                quic.reset_stream(self.stream, code)
            if not self.is_ended:
                with contextlib.suppress(ValueError):
                    quic.stop_stream(self.stream, code)
            self.is_lost = True


def _bytes(fields: Fields) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]


def _text(headers: list[tuple[bytes, bytes]]) -> Fields:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


class H3End:
    """One connection in either role. Its loop sends for it and tells it what has come."""

    def __init__(
        self,
        loop: "UdpLoop",
        quic: QuicConnection,
        address: Address,
        answerer: Answerer | None = None,
        number: int = 0,
    ) -> None:
        """``answerer``: a server's."""
        self.number = number
        self.changed = threading.Condition(threading.RLock())
        """Its lock guards all; whoever waits is told of everything that comes."""
        self.quic = quic
        self.h3: Http3 | None = None
        """There once the handshake is over."""
        self.terminated: ConnectionTerminated | None = None
        self.is_reset = False
        """Ended by a stateless reset."""
        self._address = address
        self._answerer = answerer
        self._loop = loop
        self._talks: dict[int, H3Talk] = {}

    @property
    def goaway(self) -> list[int]:
        """What the peer's GOAWAYs said, in order."""
        return self.h3.goaway if self.h3 is not None else []

    def until(self, check: Callable[[], object]) -> None:
        """Wait until something has come."""
        with self.changed:
            if not self.changed.wait_for(check, PATIENCE_S):
                raise AssertionError("it did not come")

    @contextlib.contextmanager
    def speaking(self, talk: H3Talk) -> Iterator[Http3]:
        """The connection, to be told something about a talk that is not lost."""
        with self.changed:
            if talk.is_lost or self.terminated is not None or self.h3 is None:
                raise CutError
            try:
                yield self.h3
            except (AssertionError, ValueError, InvalidStreamTypeError, NoAvailablePushIDError) as error:
                raise CutError from error  # the stream was reset
            self.flush()

    def room(self, stream_id: int) -> int:
        """How much of a body its stream takes now."""
        quic = self.quic
        stream = quic._streams.get(stream_id)
        if stream is None or stream.is_blocked:
            return 0
        written = stream.sender._buffer_stop
        credit = stream.max_stream_data_remote - written
        connection = quic._remote_max_data - quic._remote_max_data_used
        queued = written - stream.sender.highest_offset
        return max(0, min(credit, connection - queued, QUEUED_BYTES - queued) - FRAME_HEADER_BYTES)

    def used(self, stream_id: int, size: int) -> None:
        """With the lock held."""
        if isinstance(self.quic, Credit):
            used = self.quic.used
            used[stream_id] = used.get(stream_id, 0) + size
        self.flush()

    def flush(self) -> None:
        """With the lock held."""
        for data, address in self.quic.datagrams_to_send(time.monotonic()):
            self._loop.send(data, address)
        self._loop.wake()

    def receive(self, data: bytes, address: Address) -> None:
        with self.changed:
            if len(data) >= 21 and data[-16:] == self.quic._peer_cid.stateless_reset_token:
                self._on_reset()
                return
            self.quic.receive_datagram(data, address, time.monotonic())
            self._settle()

    def _on_reset(self) -> None:
        """RFC 9000 10.3: the peer knows nothing of the connection. The library does not look for that."""
        self.is_reset = True
        for talk in self._talks.values():
            talk.is_lost = True
        self.changed.notify_all()

    def on_time(self, now: float) -> None:
        with self.changed:
            timer = self.quic.get_timer()
            if timer is not None and timer <= now:
                self.quic.handle_timer(now)
                self._settle()

    def timer(self) -> float | None:
        with self.changed:
            return self.quic.get_timer()

    def _settle(self) -> None:
        while (event := self.quic.next_event()) is not None:
            self._take(event)
        if self.terminated is None:
            self.flush()
        self.changed.notify_all()

    def _take(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.h3 = self._loop.speaks(self.quic)
        elif isinstance(event, ConnectionIdIssued):
            self._loop.ends[event.connection_id] = self
        elif isinstance(event, ConnectionIdRetired):
            self._loop.ends.pop(event.connection_id, None)
        elif isinstance(event, ConnectionTerminated):
            self.terminated = event
            for talk in self._talks.values():
                talk.is_lost = True
            self._loop.forget(self)
        elif isinstance(event, StreamReset):
            self._lose(event.stream_id, event.error_code)
        elif isinstance(event, StopSendingReceived):
            found = self._talks.get(event.stream_id)
            if found is not None and self._answerer is None and event.error_code == ErrorCode.H3_NO_ERROR:
                found.is_stopped = True
            else:
                self._lose(event.stream_id, event.error_code)
        if self.h3 is not None:
            for each in self.h3.handle_event(event):
                self._hear(each)

    def _lose(self, stream_id: int, code: int) -> None:
        talk = self._talks.get(stream_id)
        if talk is not None and not talk.is_lost:
            talk.is_lost = True
            talk.lost_code = code

    def _hear(self, event: H3Event) -> None:
        talk: H3Talk | None = self._talks.get(getattr(event, "stream_id", -1))
        if isinstance(event, HeadersReceived):
            fields = _text(event.headers)
            if talk is None:
                if self._answerer is None:
                    return
                talk = self._talks[event.stream_id] = H3Talk(self, event.stream_id)
                talk.headers, talk.fields = dict(fields), fields
                threading.Thread(target=self._answer, args=(talk,), daemon=True).start()
            elif talk.headers:
                talk.trailers = fields
            elif dict(fields)[":status"].startswith("1"):
                talk.informational.append(fields)
            else:
                talk.headers, talk.fields = dict(fields), fields
            talk.is_ended |= event.stream_ended
        elif isinstance(event, DataReceived):
            if talk is None or talk.is_lost:
                self.used(event.stream_id, len(event.data))
                return
            if event.data:
                talk.pieces.append(event.data)
            talk.is_ended |= event.stream_ended

    def _answer(self, talk: H3Talk) -> None:
        if self._answerer is not None:
            with contextlib.suppress(CutError):
                self._answerer(talk)

    # -- a client's ------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Raises ``CutError`` if there is no connection."""
        with self.changed:
            self.quic.connect(self._address, time.monotonic())
            self._loop.add(self)
            self.flush()
            found = self.changed.wait_for(lambda: self.h3 or self.terminated, PATIENCE_S)
            if not found or self.h3 is None:
                raise CutError(f"no connection: {self.terminated}")

    def call(self, fields: Fields, *, end: bool) -> H3Talk:
        with self.changed:
            talk = H3Talk(self, self.quic.get_next_available_stream_id())
            self._talks[talk.stream] = talk
            if self.h3 is not None and (":method", "HEAD") in fields:
                self.h3.heads.add(talk.stream)
            talk.send_head(fields, end=end)
        return talk

    def close(self, code: int = ErrorCode.H3_NO_ERROR) -> None:
        with self.changed:
            self.quic.close(code)
            self.flush()
        if self._answerer is None:
            self._loop.close()

    def until_closed(self) -> ConnectionTerminated:
        """Wait for the connection's end, whoever made it."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.terminated, PATIENCE_S):
                raise AssertionError("the connection is still there")
            assert self.terminated is not None
            return self.terminated

    def move(self) -> None:
        """Go on from another port, as behind a NAT that forgot. The peer learns of it from what comes from
        there, so that something does.
        """
        self._loop.move()
        with self.changed:
            self.quic.send_ping(0)
            self.flush()


class UdpLoop:
    """One socket, one thread, and the connections on it."""

    speaks: type[Http3] = Http3

    def __init__(self, sock: socket.socket) -> None:
        self.ends: dict[bytes, H3End] = {}
        """By their connection IDs."""
        self.only: H3End | None = None
        """A client's: everything that comes is for it."""
        self.sock = sock
        self._everyone: set[H3End] = set()
        self._is_open = True
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self.tune(sock)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @staticmethod
    def tune(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)

    def start(self) -> None:
        self._thread.start()

    def add(self, end: H3End) -> None:
        self._everyone.add(end)

    def forget(self, end: H3End) -> None:
        self._everyone.discard(end)
        for cid in [cid for cid, owner in self.ends.items() if owner is end]:
            del self.ends[cid]

    def send(self, data: bytes, address: Address) -> None:
        with contextlib.suppress(OSError):
            if self.only is not None:
                self.sock.send(data)
            else:
                self.sock.sendto(data, address)

    def wake(self) -> None:
        if threading.current_thread() is not self._thread:
            with contextlib.suppress(OSError):
                self._waker.send(b"!")

    def move(self) -> None:
        """Another socket; the old one's datagrams are lost."""
        other = socket.socket(self.sock.family, socket.SOCK_DGRAM)
        self.tune(other)
        other.connect(self.sock.getpeername())
        before, self.sock = self.sock, other
        self.wake()
        before.close()

    def close(self) -> None:
        self._is_open = False
        self.wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE_S)
        for each in (self.sock, self._waker, self._woken):
            each.close()

    def _run(self) -> None:
        while self._is_open:
            sock = self.sock
            timers = [timer for end in list(self._everyone) if (timer := end.timer()) is not None]
            wait_s = max(0.0, min(timers, default=time.monotonic() + 1) - time.monotonic())
            poll = select.poll()
            poll.register(self._woken, select.POLLIN)
            if sock.fileno() >= 0:
                poll.register(sock, select.POLLIN)
            poll.poll(min(wait_s, 1) * 1000)
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            self._receive(sock)
            now = time.monotonic()
            for end in list(self._everyone):
                end.on_time(now)

    def _receive(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                data, address = sock.recvfrom(65_536, socket.MSG_DONTWAIT)
            except OSError:  # nothing more, or the port of the peer is gone, or the socket
                return
            self.on_datagram(data, address)

    def on_datagram(self, data: bytes, address: Address) -> None:
        if self.only is not None:
            self.only.receive(data, address)


class H3Backend(UdpLoop):
    """A backend that speaks HTTP/3; has what the tests ask of ``harness.Backend``."""

    def __init__(
        self,
        answerer: Answerer,
        name: str,
        files: CertificateFiles,
        *,
        port: int = 0,
        alpn: str = "h3",
        settings: QuicConfiguration | None = None,
    ) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", port))
        super().__init__(sock)
        self.name = name
        self.connections = 0
        self.port: int = sock.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.is_mute = False
        """Whether what comes is lost."""
        self.everyone: list[H3End] = []
        self.configuration = settings or configuration(files, is_client=False, alpn=alpn)
        self._answerer = answerer

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self.close()

    def accept(self, **ids: Any) -> QuicConnection:
        return Credit(configuration=self.configuration, **ids)

    def on_datagram(self, data: bytes, address: Address) -> None:
        if self.is_mute:
            return
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=8)
        except ValueError:
            return
        end = self.ends.get(header.destination_cid)
        if end is None:
            if header.packet_type != QuicPacketType.INITIAL or len(data) < 1200:
                return
            quic = self.accept(original_destination_connection_id=header.destination_cid)
            self.connections += 1
            end = H3End(self, quic, address, self._answerer, self.connections)
            self.everyone.append(end)
            self.add(end)
            self.ends[header.destination_cid] = self.ends[quic.host_cid] = end
        end.receive(data, address)


def dial_h3(
    files: CertificateFiles, port: int, settings: QuicConfiguration | None = None, source: str = "127.0.0.1"
) -> H3End:
    """A client's connection. Raises ``CutError`` if there is none."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", port))
    loop = UdpLoop(sock)
    quic = Credit(configuration=settings or configuration(files, is_client=True))
    loop.only = end = H3End(loop, quic, ("127.0.0.1", port))
    loop.start()
    try:
        end.connect()
    except CutError:
        loop.close()
        raise
    assert settings is not None or quic.tls._peer_certificate == _certificate(files), "another certificate"
    return end


def _certificate(files: CertificateFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.certificate.read_bytes())
