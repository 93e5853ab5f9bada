"""What attacks over HTTP/3 share: a site, a good client of it, and one that says what no client should.

The attacker is ``aioquic``; frames that it would not send are put into packets of its own.
"""

import collections
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from aioquic.quic.events import HandshakeCompleted, QuicEvent, StopSendingReceived, StreamReset
from aioquic.quic.packet_builder import QuicPacketBuilder
from pylsqpack import Encoder

from expressgateway.demo.certificate import CertificateFiles
from expressgateway.net.quic.credit import varint
from tests.e2e.aioquic_h3 import Credit, configuration
from tests.e2e.h3_site import quic_listener, request
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Gateway,
    certificate,
    eventually,
    resident_kib,
)
from tests.e2e.talks import CutError, Fields, rest
from tests.e2e.talks_h3 import H3End, H3Talk, UdpLoop, dial_h3
from tests.ports import free_port

# Frames of HTTP/3 (RFC 9114 7.2)
DATA: Final = 0x0
HEADERS: Final = 0x1
SETTINGS: Final = 0x4
GOAWAY: Final = 0x7
MAX_PUSH_ID: Final = 0xD

# Codes (RFC 9114 8.1)
NO_ERROR: Final = 0x100
INTERNAL_ERROR: Final = 0x102
FRAME_UNEXPECTED: Final = 0x105
EXCESSIVE_LOAD: Final = 0x107
REQUEST_CANCELLED: Final = 0x10C
REQUEST_INCOMPLETE: Final = 0x10D
MESSAGE_ERROR: Final = 0x10E
QPACK_DECOMPRESSION_FAILED: Final = 0x200

ROOM_KIB: Final = 16_384  # that a worker may grow by: buffers of a burst, and noise

GET: Final = request("/late")
POST: Final = request("/late", method="POST")


def frame(kind: int, payload: bytes = b"") -> bytes:
    return varint(kind) + varint(len(payload)) + payload


def block(fields: Fields) -> bytes:
    """A header block that refers to no dynamic table."""
    encoded: bytes = Encoder().encode(0, [(name.encode(), value.encode()) for name, value in fields])[1]
    return encoded


def head(fields: Fields) -> bytes:
    return frame(HEADERS, block(fields))


# -- the site ------------------------------------------------------------------------------------------------


def serve(connection: BackendConnection) -> None:
    """/good is answered at once, /half not completely, /late never, /big with much."""
    while True:
        path = connection.until(b"\r\n\r\n").split(b" ")[1]
        if path == b"/good":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend")
        elif path == b"/half":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf.")
        elif path == b"/big":
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
            while True:
                connection.sock.send(b"x" * 262_144)


class Site:
    """A gateway of one worker with one ``quic`` listener, named ``quic``."""

    def __init__(self, gateway: Gateway, port: int, files: CertificateFiles) -> None:
        self.gateway = gateway
        self.port = port
        self.files = files
        (self.pid,) = gateway.worker_pids()
        self._sources = (f"127.0.{third}.{last}" for third, last in itertools.product((1, 2), range(1, 250)))

    @property
    def secret(self) -> bytes:
        return self.files.certificate.with_name("retry.secret").read_bytes()

    def attacker(self, **more: Any) -> "Attacker":
        """Each comes from an address of its own, so that each has its line in the log."""
        return Attacker.dial(self.files, self.port, more.pop("source", None) or next(self._sources), **more)

    def good(self, source: str = "127.0.0.1") -> H3End:
        return dial_h3(self.files, self.port, source=source)

    def events(self, kind: str) -> float:
        return self.gateway.metric("security_events_total", listener="quic", kind=kind)

    def dropped(self, reason: str) -> float:
        return self.gateway.metric("udp_dropped_total", listener="quic", reason=reason)

    @property
    def inflight(self) -> float:
        return self.gateway.metric("connections_inflight", listener="quic")

    @contextlib.contextmanager
    def unharmed(self, room_kib: int = ROOM_KIB) -> Iterator["Steady3"]:
        """A good client is served before, meanwhile and afterwards; the worker is the same, and no larger."""
        with Steady3(self) as steady:
            before = resident_kib(self.pid)
            served = steady.served
            yield steady
            eventually(lambda: steady.served > served + 3, "the good client goes on")
            assert is_served(self)
        assert self.gateway.worker_pids() == [self.pid]
        assert resident_kib(self.pid) - before < room_kib
        assert self.gateway.metric("worker_faults_total") == 0


@contextlib.contextmanager
def attacked(
    directory: Path, *, retry: str = "adaptive", runtime: str = "", http: str = ""
) -> Iterator[Site]:
    """``runtime``: lines of that block; ``http``: of the listener's."""
    files = certificate(directory)
    port = free_port()
    always = "max_requests_per_h3_connection = 0\n"
    with Backend(serve) as backend:
        config = quic_listener(files, port, backend.address, http=http)
        config = config.replace("[listeners.quic]", f'[listeners.quic]\nretry = "{retry}"')
        with Gateway(directory, config, runtime=always + runtime) as gateway:
            yield Site(gateway, port, files)


def ask_good(end: H3End) -> None:
    talk = end.call(request("/good"), end=True)
    assert talk.read_head()[":status"] == "200"
    assert rest(talk) == b"backend"


def is_served(site: Site) -> bool:
    """A client that comes now."""
    end = site.good()
    try:
        ask_good(end)
    finally:
        end.close()
    return True


class Steady3:
    """A well-behaved client in a thread of its own: request after request on one connection."""

    def __init__(self, site: Site) -> None:
        self._end = site.good("127.0.0.9")
        self._stop = threading.Event()
        self._failure = ""
        self.served = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._ask()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        if kind is None:
            assert not self._failure, self._failure
            self._ask()
        self._end.close()

    def _ask(self) -> None:
        ask_good(self._end)
        self.served += 1

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.005):
                self._ask()
        except (OSError, AssertionError, CutError) as error:
            self._failure = f"the good client, after {self.served} answers: {error!r}"


# -- the attacker --------------------------------------------------------------------------------------------


class Rude(Credit):
    """Sends frames that were written by hand, each payload in a packet of its own; they are not repeated."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.extra: collections.deque[bytes] = collections.deque()
        self.is_mute = False
        """It acknowledges nothing."""
        self.is_stingy = False
        """It never lets the peer send more than at the beginning."""

    def _write_ping_frame(self, builder: QuicPacketBuilder, uids: Any = (), comment: str = "") -> None:
        if not self.extra:
            super()._write_ping_frame(builder, uids, comment)
            return
        payload = self.extra[0]
        builder.start_frame(payload[0], capacity=len(payload)).push_bytes(payload[1:])
        self.extra.popleft()

    def _write_ack_frame(self, *arguments: Any, **more: Any) -> None:
        if not self.is_mute:
            super()._write_ack_frame(*arguments, **more)

    def _write_connection_limits(self, *arguments: Any, **more: Any) -> None:
        if not self.is_stingy:
            super()._write_connection_limits(*arguments, **more)

    def _write_stream_limits(self, *arguments: Any, **more: Any) -> None:
        if not self.is_stingy:
            super()._write_stream_limits(*arguments, **more)

    def datagrams_to_send(self, now: float) -> Any:
        out = super().datagrams_to_send(now)
        while self.extra and self._close_event is None:
            left = len(self.extra)
            self.send_ping(0)
            out += super().datagrams_to_send(now)
            if len(self.extra) == left:
                break  # the congestion window is full
        return out


class Plain:
    """In the place of aioquic's QPACK encoder: it leaves the table to the test, and hears nothing of it."""

    def encode(self, stream: int, fields: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        encoded: tuple[bytes, bytes] = Encoder().encode(stream, fields)
        return encoded

    def apply_settings(self, **settings: int) -> bytes:
        return b""

    def feed_decoder(self, data: bytes) -> None: ...


class Attacker(H3End):
    """See the module's text. A context manager."""

    quic: Rude

    def __init__(self, loop: UdpLoop, quic: Rude, address: tuple[str, int]) -> None:
        super().__init__(loop, quic, address)
        self.resets: dict[int, int] = {}
        """Codes, by stream."""
        self.stops: dict[int, int] = {}
        self.heard_bytes = 0
        self.held: list[H3Talk] = []
        """What a test keeps open."""

    @classmethod
    def dial(
        cls, files: CertificateFiles, port: int, source: str, *, is_stingy: bool = False, **options: Any
    ) -> Self:
        """``options``: of aioquic's configuration. Raises ``CutError`` if there is no connection."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        loop = UdpLoop(sock)
        settings = configuration(files, is_client=True)
        for name, value in options.items():
            setattr(settings, name, value)
        quic = Rude(configuration=settings)
        quic.is_stingy = is_stingy
        loop.only = end = cls(loop, quic, ("127.0.0.1", port))
        loop.start()
        try:
            end.connect()
            end.wait_for(lambda: quic._handshake_confirmed, "the handshake is confirmed")
        except BaseException:
            loop.close()
            raise
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def source(self) -> str:
        return str(self._loop.sock.getsockname()[0])

    def receive(self, data: bytes, address: tuple[str, int]) -> None:
        self.heard_bytes += len(data)
        super().receive(data, address)

    def _take(self, event: QuicEvent) -> None:
        if isinstance(event, StreamReset):
            self.resets[event.stream_id] = event.error_code
        elif isinstance(event, StopSendingReceived):
            self.stops[event.stream_id] = event.error_code
        super()._take(event)
        if isinstance(event, HandshakeCompleted) and self.h3 is not None:
            self.h3._encoder = Plain()  # type: ignore[assignment]  # all that is asked of one

    def wait_for(self, check: Callable[[], object], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(check, PATIENCE_S):
                raise AssertionError(f"not within {PATIENCE_S} s: {what}; {self.quic._close_event}")

    @property
    def is_closed(self) -> bool:
        """By the gateway."""
        return self.quic._close_event is not None

    def verdict(self) -> int:
        """The code that the gateway closes the connection with."""
        self.wait_for(lambda: self.is_closed, "the gateway closes the connection")
        event = self.quic._close_event
        assert event is not None
        return int(event.error_code)

    # -- what it says ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saying(self) -> Iterator[Rude]:
        """All at once, when the block is left."""
        with self.changed:
            yield self.quic
            self.flush()

    def open(self, data: bytes, *, end: bool = False) -> H3Talk:
        """A stream for a request that begins with these bytes."""
        with self.saying() as quic:
            talk = H3Talk(self, quic.get_next_available_stream_id())
            self._talks[talk.stream] = talk
            quic.send_stream_data(talk.stream, data, end)
        return talk

    def say(self, stream: int, data: bytes, *, end: bool = False) -> None:
        with self.saying() as quic:
            quic.send_stream_data(stream, data, end)

    @property
    def control(self) -> int:
        assert self.h3 is not None
        assert self.h3._local_control_stream_id is not None
        return self.h3._local_control_stream_id

    @property
    def encoder(self) -> int:
        assert self.h3 is not None
        assert self.h3._local_encoder_stream_id is not None
        return self.h3._local_encoder_stream_id

    def inject(self, *payloads: bytes) -> None:
        """Frames of QUIC: as many in one payload as a packet holds."""
        with self.saying() as quic:
            quic.extra.extend(payloads)

    def spent(self) -> None:
        """Wait until all that was injected is under way, or nothing can be any more."""
        self.wait_for(lambda: not self.quic.extra or self.is_closed, "it is sent")

    def is_served(self) -> bool:
        ask_good(self)
        return True
