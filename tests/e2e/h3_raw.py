"""A client of HTTP/3 made of aioquic's transport and bytes written by hand: it says what no client should.

Blocking, one socket, one connection. Frames and transport parameters that aioquic would not send are put into
the packets that it does send.
"""

import collections
import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, StreamDataReceived, StreamReset
from aioquic.quic.packet import QuicPacketType
from pylsqpack import Decoder, Encoder

from expressgateway.net.quic.credit import varint
from tests.e2e.harness import PATIENCE_S

DATA: Final = 0x0
HEADERS: Final = 0x1
CANCEL_PUSH: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
GOAWAY: Final = 0x7
MAX_PUSH_ID: Final = 0xD

INITIAL: Final = tls.Epoch.INITIAL
HANDSHAKE: Final = tls.Epoch.HANDSHAKE
ONE_RTT: Final = tls.Epoch.ONE_RTT

CONTROL: Final = b"\x00"
ENCODER: Final = b"\x02"
DECODER: Final = b"\x03"

GET: Final = (
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"localhost"),
    (b":path", b"/"),
)


def frame(kind: int, payload: bytes = b"") -> bytes:
    """RFC 9114 7.1."""
    return varint(kind) + varint(len(payload)) + payload


def head(*fields: tuple[bytes, bytes]) -> bytes:
    """A HEADERS frame, encoded without a dynamic table."""
    return frame(HEADERS, Encoder().encode(0, list(fields))[1])


class RawH3:
    """See the module's text. A context manager; ``prepare`` gets the connection before its first packet."""

    def __init__(
        self,
        port: int,
        *,
        alpn: tuple[str, ...] = ("h3",),
        prepare: Callable[["RawH3"], object] | None = None,
        kind: type[QuicConnection] = QuicConnection,
        **options: Any,
    ) -> None:
        self.address = ("127.0.0.1", port)
        self._alpn = alpn
        self._prepare = prepare
        configuration = QuicConfiguration(
            is_client=True,
            alpn_protocols=list(alpn),
            verify_mode=ssl.CERT_NONE,
            server_name="localhost",
            **options,
        )
        self.tickets: list[Any] = []
        self.quic = kind(configuration=configuration, session_ticket_handler=self.tickets.append)
        self.is_open = False
        self.is_resumed = False
        self.is_early = False
        self.closed: ConnectionTerminated | None = None
        self.data: dict[int, bytearray] = collections.defaultdict(bytearray)
        self.ends: set[int] = set()
        self.resets: dict[int, int] = {}
        self._waiting: dict[tls.Epoch, list[tuple[int, bytes]]] = {}  # to be injected
        self.sock = self._socket()

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self.address)
        return sock

    def __enter__(self) -> Self:
        if self._prepare is not None:
            self._prepare(self)
        self.quic.connect(self.address, time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self.quic.close()
        with contextlib.suppress(OSError):
            for data, _ in self.quic.datagrams_to_send(time.monotonic()):
                self.sock.send(data)
        self.sock.close()

    def move(self) -> None:
        """Go on from another port."""
        self.sock.close()
        self.sock = self._socket()

    # -- the network -----------------------------------------------------------------------------------

    def flush(self) -> None:
        for data, _ in self.quic.datagrams_to_send(time.monotonic()):
            with contextlib.suppress(ConnectionError):
                self.sock.send(data)

    def _hear(self) -> None:
        while (event := self.quic.next_event()) is not None:
            match event:
                case HandshakeCompleted():
                    self.is_open = True
                    self.is_resumed = event.session_resumed
                    self.is_early = event.early_data_accepted
                case StreamDataReceived():
                    self.data[event.stream_id] += event.data
                    if event.end_stream:
                        self.ends.add(event.stream_id)
                case StreamReset():
                    self.resets[event.stream_id] = event.error_code
                case ConnectionTerminated():
                    self.closed = event

    def until(self, claim: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
        """Send and receive until it is so."""
        ends = time.monotonic() + patience_s
        while True:
            self.flush()
            self._hear()
            if claim():
                return
            now = time.monotonic()
            if now > ends:
                raise AssertionError(f"not within {patience_s} s: {what}; {self.closed}")
            timer = self.quic.get_timer()
            wait = min(ends, timer if timer is not None else ends) - now
            if select.select([self.sock], [], [], max(0.0, min(wait, 0.1)))[0]:
                with contextlib.suppress(ConnectionError):
                    self.quic.receive_datagram(self.sock.recv(65_535), self.address, time.monotonic())
            timer = self.quic.get_timer()
            if timer is not None and timer <= time.monotonic():
                # Its arithmetic needs a clock that has moved a little when the moment is there.
                self.quic.handle_timer(time.monotonic() + 0.0001)

    def opened(self) -> Self:
        """Wait for the handshake's end, and for the server's word that it is confirmed."""
        self.until(lambda: self.is_open and self.quic._handshake_confirmed, "the handshake is confirmed")
        return self

    def begun(self) -> Self:
        """The same, and our control stream is there."""
        self.opened()
        self.quic.send_stream_data(self.unidirectional(), CONTROL + frame(SETTINGS), False)
        return self

    def closing(self, patience_s: float = PATIENCE_S) -> ConnectionTerminated:
        """Wait until the server closes; its error."""

        def is_closed() -> bool:
            return self.closed is not None or self.quic._close_event is not None

        self.until(is_closed, "the server closes", patience_s)
        closed = self.closed or self.quic._close_event
        assert closed is not None
        return closed

    # -- streams ---------------------------------------------------------------------------------------

    def unidirectional(self) -> int:
        return self.quic.get_next_available_stream_id(is_unidirectional=True)

    def send(self, data: bytes, end: bool = False, stream_id: int | None = None) -> int:
        """On a stream for a request, a new one if it has no number."""
        number = self.quic.get_next_available_stream_id() if stream_id is None else stream_id
        self.quic.send_stream_data(number, data, end)
        return number

    def get(
        self, *more: tuple[bytes, bytes], body: bytes | None = None, patience_s: float = PATIENCE_S
    ) -> tuple[dict[bytes, bytes], bytes]:
        """One exchange: the response's head and body. There is a control stream already."""
        fields = [(b":method", b"POST"), *GET[1:]] if body is not None else [*GET]
        stream_id = self.send(head(*fields, *more), body is None)
        if body is not None:
            self.send(frame(DATA, body), True, stream_id)
        return self.answer(stream_id, patience_s)

    def answer(self, stream_id: int, patience_s: float = PATIENCE_S) -> tuple[dict[bytes, bytes], bytes]:
        self.until(lambda: stream_id in self.ends or self.closed is not None, "an answer", patience_s)
        assert stream_id in self.ends, self.closed
        fields: dict[bytes, bytes] = {}
        body = bytearray()
        for kind, payload in frames(bytes(self.data[stream_id])):
            if kind == HEADERS and not fields:
                fields = dict(Decoder(0, 0).feed_header(stream_id, payload)[1])
            elif kind == DATA:
                body += payload
        return fields, bytes(body)

    # -- what aioquic would not send -------------------------------------------------------------------

    def inject(self, kind: int, body: bytes = b"", epoch: tls.Epoch = ONE_RTT) -> None:
        """A frame of QUIC, in a packet of its own in front of the next ones of this kind; in order."""
        waiting = self._waiting.get(epoch)
        if waiting is not None:
            waiting.append((kind, body))
            return
        waiting = self._waiting[epoch] = [(kind, body)]
        quic: Any = self.quic
        name = "_write_application" if epoch == ONE_RTT else "_write_handshake"
        write = getattr(quic, name)

        def written(builder: Any, *arguments: Any, **more: Any) -> None:
            crypto = quic._cryptos[epoch]
            if waiting and (epoch == ONE_RTT or arguments[0] == epoch) and crypto.send.is_valid():
                for one, payload in waiting:
                    builder.start_packet(PACKETS[epoch], crypto)
                    builder.start_frame(one, capacity=1 + len(payload)).push_bytes(payload)
                waiting.clear()
            write(builder, *arguments, **more)

        setattr(quic, name, written)

    def reserve(self, bits: int, epoch: tls.Epoch = ONE_RTT) -> None:
        """Set bits in the first byte of every packet of this kind, under its protection."""
        pair = self.quic._cryptos[epoch]
        encrypt = pair.encrypt_packet

        def encrypted(plain_header: bytes, plain_payload: bytes, packet_number: int) -> bytes:
            first = bytes((plain_header[0] | bits,))
            return encrypt(first + plain_header[1:], plain_payload, packet_number)

        pair.encrypt_packet = encrypted  # type: ignore[method-assign]

    def say(self, change: Callable[[bytes], bytes]) -> None:
        """Other transport parameters."""
        quic: Any = self.quic
        serialize = quic._serialize_transport_parameters
        quic._serialize_transport_parameters = lambda: change(serialize())


PACKETS: Final = {
    INITIAL: QuicPacketType.INITIAL,
    HANDSHAKE: QuicPacketType.HANDSHAKE,
    ONE_RTT: QuicPacketType.ONE_RTT,
}


def integer(data: bytes, at: int) -> tuple[int, int]:
    """RFC 9000 16."""
    size = 1 << (data[at] >> 6)
    return int.from_bytes(data[at : at + size], "big") & ((1 << (8 * size - 2)) - 1), at + size


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The frames of a stream."""
    at = 0
    while at < len(data):
        kind, at = integer(data, at)
        size, at = integer(data, at)
        yield kind, data[at : at + size]
        at += size


def parameter(number: int, value: bytes) -> bytes:
    """One transport parameter (RFC 9000 18)."""
    return varint(number) + varint(len(value)) + value


def without(parameters: bytes, number: int) -> bytes:
    """Transport parameters but this."""
    out = b""
    at = 0
    while at < len(parameters):
        begin = at
        found, at = integer(parameters, at)
        size, at = integer(parameters, at)
        at += size
        if found != number:
            out += parameters[begin:at]
    return out
