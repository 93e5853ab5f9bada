"""What the tests of QUIC share: two ends in memory, a scripted link between them, a clock turned by hand.

One end is our engine, the other one `aioquic`, which we did not write. Nothing waits: `Link.run` goes from
one moment at which something happens to the next: a test says in seconds of its own clock what a loss costs.
"""

from __future__ import annotations

import datetime
import functools
import heapq
import itertools
import os
import random
import ssl
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import pull_quic_header
from aioquic.tls import SessionTicket
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from expressgateway.demo.certificate import CertificatePem, make_certificate
from expressgateway.net.quic.cids import CID_BYTES
from expressgateway.net.quic.credit import varint
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import Address, Ended
from expressgateway.net.quic.tls import Grants, TicketStore, TlsSettings, client_tls, server_tls
from expressgateway.wire import quic
from expressgateway.wire.quic import VERSION_1, read_long

ALPN: Final = "hq-interop"
CLIENT: Final[Address] = ("10.0.0.1", 4001)
SERVER: Final[Address] = ("10.0.0.2", 443)
ONE_WAY_S: Final = 0.02
ROUND_TRIP_S: Final = 2 * ONE_WAY_S
TICK_S: Final = 0.0001
SECRET: Final = b"the listener's secret"


@functools.cache
def certificate() -> CertificatePem:
    return make_certificate()


def pem(one: x509.Certificate) -> bytes:
    return one.public_bytes(serialization.Encoding.PEM)


class Authority:
    """A certification authority of the test's own."""

    def __init__(self, name: str = "An authority") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key.public_key(), 30, None, is_authority=True)
        self.pem = pem(self.certificate)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        days: float,
        names: x509.SubjectAlternativeName | None,
        *,
        is_authority: bool = False,
        extra_bytes: int = 0,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        if extra_bytes:
            oid = x509.ObjectIdentifier("1.3.6.1.4.1.55555.1")
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, os.urandom(extra_bytes)), False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, *names: x509.GeneralName, days: float = 10, extra_bytes: int = 0) -> CertificatePem:
        """A leaf; ``extra_bytes`` make it as large as one likes."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a leaf")]),
            key.public_key(),
            days,
            x509.SubjectAlternativeName(names) if names else None,
            extra_bytes=extra_bytes,
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return CertificatePem(pem(leaf), private)


@functools.cache
def authority() -> Authority:
    return Authority()


@functools.cache
def large_certificate() -> CertificatePem:
    """More than three datagrams: an unvalidated address is owed no more than that (RFC 9000 8.1)."""
    return authority().issue(x509.DNSName("localhost"), extra_bytes=6000)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# -- ends ----------------------------------------------------------------------------------------------


class End(Protocol):
    """Who is at one end of a link."""

    address: Address

    def receive(self, data: bytes, address: Address, now: float) -> None: ...
    def transmit(self, now: float) -> list[tuple[bytes, Address]]: ...
    def timer(self) -> float | None: ...
    def on_timer(self, now: float) -> None: ...


class Ear:
    """An engine's sink that remembers, uses what comes unless told to hold it, and may echo."""

    def __init__(self, *, echoes: bool = False, holds: bool = False) -> None:
        self.engine: Engine
        self.echoes = echoes
        self.holds = holds
        self.is_open = False
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.held: dict[int, int] = defaultdict(int)
        self.finished: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.datagrams: list[bytes] = []
        self.ended: Ended | None = None
        self.endings = 0
        self.allowed = 0

    def on_open(self) -> None:
        self.is_open = True

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        assert self.ended is None, "data after the end"
        self.data[stream_id] += data
        if self.holds:
            self.held[stream_id] += len(data)
        else:
            self.engine.consumed(stream_id, len(data))
        if end:
            self.finished.add(stream_id)
        if self.echoes:
            self.engine.send(stream_id, data, end)

    def use(self, stream_id: int, size: int | None = None) -> None:
        """Consume what is held of a stream, all of it by default."""
        amount = self.held[stream_id] if size is None else size
        self.held[stream_id] -= amount
        self.engine.consumed(stream_id, amount)

    def on_stream_reset(self, stream_id: int, code: int) -> None:
        self.resets[stream_id] = code

    def on_stream_stop(self, stream_id: int, code: int) -> None:
        self.stops[stream_id] = code

    def on_streams_allowed(self) -> None:
        self.allowed += 1

    def on_datagram(self, data: bytes) -> None:
        self.datagrams.append(data)

    def on_ended(self, ended: Ended) -> None:
        self.ended = ended
        self.endings += 1


class Cids:
    """A `CidBook` that remembers."""

    def __init__(self) -> None:
        self.issued: list[bytes] = []
        self.retired: list[bytes] = []

    def wake(self) -> None:
        """The link asks every engine in each turn."""

    def on_cid_issued(self, cid: bytes) -> None:
        self.issued.append(cid)

    def on_cid_retired(self, cid: bytes) -> None:
        self.retired.append(cid)


class OurEnd:
    """An engine at a link."""

    def __init__(self, settings: TlsSettings, ear: Ear, address: Address) -> None:
        self.settings = settings
        self.ear = ear
        self.address = address
        self.cids = Cids()
        self.engine: Engine

    def _adopt(self, engine: Engine) -> None:
        self.engine = self.ear.engine = engine

    def receive(self, data: bytes, address: Address, now: float) -> None:
        self.engine.receive(data, len(data), address, now)

    def transmit(self, now: float) -> list[tuple[bytes, Address]]:
        out = []
        while some := self.engine.transmit(now, 64):
            out += some
        return out

    def timer(self) -> float | None:
        return self.engine.timer()

    def on_timer(self, now: float) -> None:
        self.engine.handle_timer(now)


class OurServer(OurEnd):
    """Begins with the first Initial, as the endpoint's door does it."""

    def __init__(
        self,
        ear: Ear | None = None,
        *,
        chain: CertificatePem | None = None,
        grants: Grants | None = None,
        tickets: TicketStore | None = None,
        alpn: str = ALPN,
        retries: bool = False,
    ) -> None:
        chain = chain or certificate()
        settings = server_tls(
            chain.certificate, chain.key, [alpn], grants or Grants(), tickets or TicketStore()
        )
        super().__init__(settings, ear or Ear(echoes=True), SERVER)
        self.retries = retries
        self._answers: list[tuple[bytes, Address]] = []
        self._original: bytes | None = None

    @property
    def has_begun(self) -> bool:
        return hasattr(self, "engine")

    def receive(self, data: bytes, address: Address, now: float) -> None:
        if not self.has_begun and not self._begin(data, address, now):
            return
        super().receive(data, address, now)

    def _begin(self, data: bytes, address: Address, now: float) -> bool:
        header = read_long(data)
        if header is None or header.type != quic.INITIAL or len(data) < quic.MIN_INITIAL_BYTES:
            return False
        token = quic.token_of(data, header)
        if self.retries and not token:
            self._original = header.destination
            self._answers.append((quic.retry(header, os.urandom(CID_BYTES), b"a token"), address))
            return False
        self._adopt(
            Engine(
                self.ear,
                self.cids,
                self.settings,
                address,
                os.urandom(CID_BYTES),
                now,
                version=header.version,
                original_cid=self._original or header.destination,
                is_unnamed=not header.source,
                destination_cid=header.destination,
                retry_cid=header.destination if self._original else None,
                reset_token=bytes(16),
            )
        )
        return True

    def transmit(self, now: float) -> list[tuple[bytes, Address]]:
        out, self._answers = self._answers, []
        return out + super().transmit(now) if self.has_begun else out

    def timer(self) -> float | None:
        return super().timer() if self.has_begun else None


class OurClient(OurEnd):
    def __init__(
        self,
        ear: Ear | None = None,
        *,
        settings: TlsSettings | None = None,
        grants: Grants | None = None,
        now: float = 0.0,
    ) -> None:
        given = settings or client_tls(
            [ALPN], grants or Grants(), server_name="localhost", ca=certificate().certificate
        )
        super().__init__(given, ear or Ear(), CLIENT)
        self._adopt(
            Engine(
                self.ear,
                self.cids,
                given,
                SERVER,
                os.urandom(CID_BYTES),
                now,
                version=VERSION_1,
                original_cid=os.urandom(16),
            )
        )
        self.engine.connect()


class Stranger:
    """An end made of aioquic."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.quic: QuicConnection
        self.is_open = False
        self.events: list[events.QuicEvent] = []
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.finished: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.datagrams: list[bytes] = []
        self.ended: events.ConnectionTerminated | None = None
        self.tickets: list[SessionTicket] = []
        self.echoes = False
        self.alpn = ""
        self.is_resumed = False

    def receive(self, data: bytes, address: Address, now: float) -> None:
        self.quic.receive_datagram(data, address, now)
        self.hear()

    def hear(self) -> None:
        while (event := self.quic.next_event()) is not None:
            self.events.append(event)
            match event:
                case events.HandshakeCompleted():
                    self.is_open = True
                    self.alpn = event.alpn_protocol or ""
                    self.is_resumed = event.session_resumed
                case events.StreamDataReceived():
                    self.data[event.stream_id] += event.data
                    if event.end_stream:
                        self.finished.add(event.stream_id)
                    if self.echoes:
                        self.quic.send_stream_data(event.stream_id, event.data, event.end_stream)
                case events.StreamReset():
                    self.resets[event.stream_id] = event.error_code
                case events.StopSendingReceived():
                    self.stops[event.stream_id] = event.error_code
                case events.DatagramFrameReceived():
                    self.datagrams.append(event.data)
                case events.ConnectionTerminated():
                    self.ended = event

    def transmit(self, now: float) -> list[tuple[bytes, Address]]:
        return list(self.quic.datagrams_to_send(now))

    def timer(self) -> float | None:
        timer: float | None = self.quic.get_timer()
        # Its arithmetic needs a clock that has moved a little when the moment is there.
        return None if timer is None else timer + TICK_S

    def on_timer(self, now: float) -> None:
        self.quic.handle_timer(now)
        self.hear()

    @property
    def is_closed(self) -> bool:
        return self.quic._state in (
            QuicConnectionState.CLOSING,
            QuicConnectionState.DRAINING,
            QuicConnectionState.TERMINATED,
        )

    def send(self, data: bytes, *, end: bool = True, stream_id: int | None = None) -> int:
        stream = self.quic.get_next_available_stream_id() if stream_id is None else stream_id
        self.quic.send_stream_data(stream, data, end)
        return stream


class AioClient(Stranger):
    def __init__(
        self,
        *,
        now: float = 0.0,
        ticket: SessionTicket | None = None,
        kind: type[QuicConnection] = QuicConnection,
        **options: Any,
    ) -> None:
        super().__init__(CLIENT)
        options.setdefault("alpn_protocols", [ALPN])
        options.setdefault("server_name", "localhost")
        configuration = QuicConfiguration(is_client=True, verify_mode=ssl.CERT_NONE, **options)
        configuration.session_ticket = ticket
        self.quic = kind(configuration=configuration, session_ticket_handler=self.tickets.append)
        self.quic.connect(SERVER, now)


class Nameless(AioClient):
    """A client whose connection ID is empty, as browsers' are."""

    def __init__(self, *, now: float = 0.0, **options: Any) -> None:
        connect = QuicConnection.connect
        try:
            QuicConnection.connect = lambda *arguments: None  # type: ignore[method-assign]
            super().__init__(now=now, **options)
        finally:
            QuicConnection.connect = connect  # type: ignore[method-assign]
        ends = self.quic
        ends.configuration.connection_id_length = 0
        ends._host_cids[0].cid = ends.host_cid = ends._local_initial_source_connection_id = b""
        ends._replenish_connection_ids = lambda: None  # type: ignore[method-assign]
        ends.connect(SERVER, now)


class AioServer(Stranger):
    def __init__(
        self,
        *,
        chain: CertificatePem | None = None,
        echoes: bool = True,
        retries: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(SERVER)
        options.setdefault("alpn_protocols", [ALPN])
        chain = chain or certificate()
        self.configuration = QuicConfiguration(is_client=False, **options)
        leaf, *rest = x509.load_pem_x509_certificates(chain.certificate)
        self.configuration.certificate = leaf
        self.configuration.certificate_chain = rest
        self.configuration.private_key = serialization.load_pem_private_key(chain.key, None)
        self.echoes = echoes
        self.retries = retries
        self.initials: list[bytes] = []  # the CRYPTO of first flights is compared by tests
        self._answers: list[tuple[bytes, Address]] = []
        self._original = b""

    def receive(self, data: bytes, address: Address, now: float) -> None:
        if not hasattr(self, "quic"):
            header = pull_quic_header(Buffer(data=data), host_cid_length=8)
            self.initials.append(data)
            if self.retries and not header.token:
                long = read_long(data)
                assert long is not None
                if not self._original:
                    self._original = header.destination_cid
                    self._answers.append((quic.retry(long, b"retry-id", b"a token of theirs"), address))
                return
            self.quic = QuicConnection(
                configuration=self.configuration,
                original_destination_connection_id=self._original or header.destination_cid,
                retry_source_connection_id=header.destination_cid if self._original else None,
            )
        elif data[0] & 0xF0 == 0xC0:
            self.initials.append(data)
        super().receive(data, address, now)

    def transmit(self, now: float) -> list[tuple[bytes, Address]]:
        out, self._answers = self._answers, []
        return out + super().transmit(now) if hasattr(self, "quic") else out

    def timer(self) -> float | None:
        return super().timer() if hasattr(self, "quic") else None


# -- the link ------------------------------------------------------------------------------------------

Fate = Callable[[End, bytes, int], Iterable[tuple[float, bytes]]]
"""What becomes of a datagram: the sender, its bytes, its number; gives delays and bytes."""


def faithful(sender: End, data: bytes, number: int) -> Iterable[tuple[float, bytes]]:
    return ((ONE_WAY_S, data),)


class Weather:
    """A link that drops, duplicates, reorders, corrupts and truncates: the same for the same seed."""

    def __init__(
        self,
        seed: int,
        *,
        drop: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        corrupt: float = 0.0,
        truncate: float = 0.0,
    ) -> None:
        self._random = random.Random(seed)
        self._chances = (drop, duplicate, reorder, corrupt, truncate)

    def __call__(self, sender: End, data: bytes, number: int) -> Iterable[tuple[float, bytes]]:
        chance = self._random.random
        drop, duplicate, reorder, corrupt, truncate = self._chances
        if chance() < drop:
            return
        if chance() < corrupt:
            at = self._random.randrange(len(data))
            data = data[:at] + bytes((data[at] ^ 1 << self._random.randrange(8),)) + data[at + 1 :]
        if chance() < truncate:
            data = data[: self._random.randrange(1, len(data) + 1)]
        yield ONE_WAY_S * (4 * chance() if chance() < reorder else 1), data
        if chance() < duplicate:
            yield ONE_WAY_S * (1 + 3 * chance()), data


class Link:
    """Two ends, datagrams under way, and the time."""

    def __init__(self, client: End, server: End, fate: Fate = faithful) -> None:
        self.client = client
        self.server = server
        self.fate = fate
        self.now = 0.0
        self.count = {client: 0, server: 0}
        self.sent_bytes = {client: 0, server: 0}
        self.sizes: dict[End, list[int]] = {client: [], server: []}
        self.log: list[tuple[End, bytes, Address]] = []
        self.keeps_log = False
        self._flying: list[tuple[float, int, End, bytes, Address]] = []
        self._order = itertools.count()
        self._number = 0

    def flush(self, *ends: End) -> None:
        """Let the ends send what they have."""
        for end in ends or (self.client, self.server):
            for data, address in end.transmit(self.now):
                other = self.server if end is self.client else self.client
                self.count[end] += 1
                self.sent_bytes[end] += len(data)
                self.sizes[end].append(len(data))
                if self.keeps_log:
                    self.log.append((end, data, address))
                self._number += 1
                if address != other.address:
                    continue  # nobody is there
                for delay, bytes_ in self.fate(end, data, self._number):
                    self.throw(other, bytes_, end.address, delay)

    def throw(self, to: End, data: bytes, address: Address, delay: float = 0.0) -> None:
        heapq.heappush(self._flying, (self.now + delay, next(self._order), to, data, address))

    def step(self, until: float) -> bool:
        """Go to the next moment. False: nothing happens before ``until``."""
        moments = [self._flying[0][0]] if self._flying else []
        for end in (self.client, self.server):
            timer = end.timer()
            if timer is not None:
                moments.append(timer)
        at = max(self.now, min(moments, default=until + 1))
        if at > until:
            self.now = max(self.now, until)
            return False
        self.now = at
        touched: list[End] = []
        while self._flying and self._flying[0][0] <= at:
            _, _, to, data, address = heapq.heappop(self._flying)
            to.receive(data, address, at)
            if to not in touched:
                touched.append(to)
        if touched:
            self.flush(*touched)
            return True
        for end in (self.client, self.server):
            timer = end.timer()
            if timer is not None and timer <= at:
                end.on_timer(at)
                self.flush(end)
        return True

    def run(
        self, until: Callable[[], object] | None = None, seconds: float = 60.0, steps: int = 200_000
    ) -> float:
        """Let things happen until something is so, or for some seconds; gives the time that it took."""
        began = self.now
        ends = began + seconds
        self.flush()
        for _ in range(steps):
            if until is not None and until():
                return self.now - began
            if not self.step(ends):
                break
        else:
            raise AssertionError("a timer that never comes to rest")
        if until is not None and not until():
            raise AssertionError(f"not in {seconds} s: {self!r}")
        return self.now - began

    def __repr__(self) -> str:
        return f"<Link at {self.now:.3f}: {self.count[self.client]} and {self.count[self.server]} datagrams>"


def both_open(link: Link) -> None:
    """Run until the handshake is complete on both ends."""

    def is_open(end: End) -> bool:
        return end.ear.is_open if isinstance(end, OurEnd) else end.is_open  # type: ignore[attr-defined]

    link.run(lambda: is_open(link.client) and is_open(link.server))


# -- looking into packets ------------------------------------------------------------------------------


def open_initial(datagram: bytes) -> tuple[int, bytes]:
    """The packet number and the CRYPTO data of a client's Initial: its keys are no secret (RFC 9001 5.2)."""
    buffer = Buffer(data=datagram)
    header = pull_quic_header(buffer, host_cid_length=8)
    assert header.version is not None
    pair = CryptoPair()
    pair.setup_initial(header.destination_cid, is_client=False, version=header.version)
    _, plain, number = pair.decrypt_packet(datagram[: header.packet_length], buffer.tell(), 0)
    frames = Buffer(data=plain)
    pieces: dict[int, bytes] = {}
    while not frames.eof():
        if frames.pull_uint_var() == 0x6:
            offset = frames.pull_uint_var()
            pieces[offset] = frames.pull_bytes(frames.pull_uint_var())
    return number, b"".join(piece for _, piece in sorted(pieces.items()))


class Forger:
    """Writes Initial packets of a client that is none: their keys are no secret."""

    def __init__(
        self, version: int = VERSION_1, original: bytes = b"original", cid: bytes = b"forger"
    ) -> None:
        self.version = version
        self.original = original
        self.cid = cid
        self.number = 0
        self._pair = CryptoPair()
        self._pair.setup_initial(original, is_client=True, version=version)

    def initial(self, frames: bytes, *, size: int = 1200, token: bytes = b"") -> bytes:
        """A datagram with these frames and padding behind them."""
        head = b"".join(
            (
                self.version.to_bytes(4, "big"),
                bytes((len(self.original),)),
                self.original,
                bytes((len(self.cid),)),
                self.cid,
                varint(len(token)),
                token,
            )
        )
        plain = frames.ljust(size - 1 - len(head) - 2 - 4 - 16, b"\0")
        length = (0x4000 | len(plain) + 4 + 16).to_bytes(2, "big")
        first = 0xD3 if self.version == quic.VERSION_2 else 0xC3
        header = bytes((first,)) + head + length + self.number.to_bytes(4, "big")
        sealed: bytes = self._pair.encrypt_packet(header, plain, self.number)
        self.number += 1
        return sealed

    def crypto(self, data: bytes, offset: int = 0) -> bytes:
        return self.initial(b"\x06" + varint(offset) + varint(len(data)) + data)


def add_frame(client: Stranger, kind: int, body: bytes) -> None:
    """Have an aioquic client send a frame that it would not send."""
    ends = client.quic
    write = ends._write_ping_frame

    def written(builder: Any, uids: Any = (), comment: str = "") -> None:
        buffer = builder.start_frame(kind, capacity=1 + len(body))
        buffer.push_bytes(body)
        ends._write_ping_frame = write  # type: ignore[method-assign]

    ends._write_ping_frame = written  # type: ignore[method-assign]
    ends.send_ping(99)
