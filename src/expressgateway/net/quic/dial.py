"""QUIC connections to backends: one connected UDP socket each, so that the kernel sorts the answers and
passes ICMP errors on.
"""

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from expressgateway.net.batches import BatchSocket
from expressgateway.net.datagram import Control
from expressgateway.net.quic.cids import CID_BYTES
from expressgateway.net.quic.connection import NOBODY, QuicConnection, Session, without_zone
from expressgateway.net.quic.engine import Engine
from expressgateway.net.quic.events import Address, Ended
from expressgateway.net.quic.timers import Timers
from expressgateway.net.quic.tls import NO_APPLICATION_PROTOCOL, Grants, TlsSettings, client_tls
from expressgateway.net.quic.verify import BAD_CERTIFICATE
from expressgateway.net.reactor import IN, OUT, Reactor
from expressgateway.net.tls import backend_server_name
from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.backend import TlsSettings as BackendTls
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.quic import VERSION_1

ORIGINAL_CID_BYTES: Final = 16  # of the ID that a first packet goes to: random, at least 8 (RFC 9000 7.2)
RECEIVE_BUFFER_BYTES: Final = 2**20
_CRYPTO_ERRORS: Final = range(0x100, 0x200)
_CERTIFICATE_ERRORS: Final = range(0x100 + 42, 0x100 + 50)  # alerts about certificates (RFC 8446 6.2)

_GONE: Final = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EACCES}
)


class QuicDialler:
    """Opens QUIC connections to backends. TLS settings are shared by backends with equal ones."""

    __slots__ = ("_alpn", "_grants", "connect_timeout_s", "contexts", "reactor", "timers")

    def __init__(
        self, reactor: Reactor, timers: Timers, connect_timeout_s: float, alpn: Sequence[str], grants: Grants
    ) -> None:
        """``connect_timeout_s``: for the whole handshake."""
        self.reactor = reactor
        self.timers = timers
        self.connect_timeout_s = connect_timeout_s
        self._alpn = list(alpn)
        self._grants = grants
        self.contexts: dict[tuple[BackendTls, str], TlsSettings] = {}  # one per distinct setting and name

    def take_over(self, other: "QuicDialler") -> None:
        """Use the settings of ``other`` from now on: whoever holds this dialler dials by them."""
        self.connect_timeout_s = other.connect_timeout_s
        self.contexts = other.contexts

    def adopt(self, settings: BackendSettings, other: "QuicDialler") -> None:
        """Have what a backend needs, from ``other`` if that has it. Raises ``ValueError``."""
        given = settings.tls
        if given is not None:
            key = given, backend_server_name(settings.host, given.hostname)
            if key in other.contexts:
                self.contexts[key] = other.contexts[key]
                return
        self.context_for(settings)

    def context_for(self, settings: BackendSettings) -> TlsSettings:
        """Raises ``ValueError``; built when the configuration is applied, not at the first dial."""
        given = settings.tls
        if given is None:
            raise ValueError("QUIC is always secured")
        name = backend_server_name(settings.host, given.hostname)
        context = self.contexts.get((given, name))
        if context is None:
            context = self.contexts[given, name] = client_tls(
                self._alpn,
                self._grants,
                server_name=name,
                ca=given.ca_pem,
                verify=given.verify_peer,
                chain=given.cert_pem,
                key=given.key_pem,
            )
        return context

    def dial(self, backend: Backend, open_session: Callable[[QuicConnection], Session]) -> QuicConnection:
        """Begin a connection. Raises ``OSError`` when there is no socket to be had, or no way there."""
        address = backend.address
        sock = socket.socket(
            socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
            socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
        )
        try:
            sock.connect(address)
            way = BackWay(self.reactor, self.timers, sock)
        except OSError:
            sock.close()
            raise
        connection = way.connection
        connection.engine = Engine(
            NOBODY,
            connection,
            self.context_for(backend.settings),
            without_zone(address),
            os.urandom(CID_BYTES),
            self.reactor.now,
            version=VERSION_1,
            original_cid=os.urandom(ORIGINAL_CID_BYTES),
        )
        connection.session = open_session(connection)
        connection.engine.connect()
        connection.wake()
        return connection

    @staticmethod
    def explain(ended: Ended) -> UpstreamError:
        """Why a connection ended before it was open."""
        code = ended.code
        if ended.errno:
            if ended.errno == errno.ECONNREFUSED:
                return UpstreamError(Fault.REFUSED, "the backend refused the connection (ICMP)")
            return UpstreamError(Fault.UNREACHABLE, ended.reason)
        if code == NO_APPLICATION_PROTOCOL:
            return UpstreamError(
                Fault.PROTOCOL, "the backend did not agree to the application protocol (ALPN)"
            )
        if code == BAD_CERTIFICATE or (ended.is_ours and code in _CERTIFICATE_ERRORS):
            return UpstreamError(Fault.CERTIFICATE, ended.reason)
        if code in _CRYPTO_ERRORS:
            return UpstreamError(Fault.TLS, str(ended))
        return UpstreamError(Fault.PROTOCOL, str(ended))


class BackWay:
    """The socket of one connection to a backend. Implements ``Way`` and ``DatagramSink``."""

    __slots__ = ("_batch", "_is_closed", "connection", "reactor", "timers")

    def __init__(self, reactor: Reactor, timers: Timers, sock: socket.socket) -> None:
        """``sock``: connected. It is this object's from here on."""
        self.reactor = reactor
        self.timers = timers
        self._batch = BatchSocket(sock)
        self._batch.set_receive_buffer(RECEIVE_BUFFER_BYTES)
        self._is_closed = False
        self.connection = QuicConnection(self)
        reactor.add(sock.fileno(), IN, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & OUT:
            self.reactor.modify(self._batch.fileno(), IN)
            self.connection.writable()
        try:
            self._batch.receive(self)
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """The network's word on an earlier datagram."""
        if error.errno in _GONE:
            self.connection.lose(error)

    def on_datagrams(
        self, data: bytes, segment_bytes: int, address: Address, control: list[Control], ecn: int
    ) -> None:
        if data:
            connection = self.connection
            connection.receive(data, segment_bytes, connection.engine.address, (), self.reactor.now)

    def send(self, datagrams: list[bytes], address: Address, control: Sequence[Control]) -> int:
        try:
            taken = self._batch.send(datagrams, None)
        except OSError as error:
            # It is an earlier datagram that was refused, or one that can never be sent: lost, either way.
            self._lose(error)
            return len(datagrams)
        if taken < len(datagrams) and not self._is_closed:
            self.reactor.modify(self._batch.fileno(), IN | OUT)
        return taken

    def blocked(self, connection: QuicConnection) -> None:
        """The socket is watched already."""

    def opened(self, connection: QuicConnection) -> None:
        """Its session knows."""

    def ended(self, connection: QuicConnection, ended: Ended) -> None:
        """As above."""

    def forget(self, connection: QuicConnection) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.reactor.remove(self._batch.fileno())
            self._batch.close()

    def on_cid_issued(self, connection: QuicConnection, cid: bytes) -> None:
        """All datagrams of the socket are the connection's."""

    def on_cid_retired(self, connection: QuicConnection, cid: bytes) -> None:
        """As above."""

    def reset(self) -> None:
        """The safety net's call."""
        self.connection.reset()
