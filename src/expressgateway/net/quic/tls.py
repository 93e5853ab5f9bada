"""The TLS half of QUIC as the library does it, with what it leaves open decided here.

Known only to `engine`. Transport parameters say what we grant, which is less than what the library's core is
told (see `credit`); 0-RTT is never offered and its keys are never installed (RFC 8470: no request may be
replayed); a failed ALPN is told as such (RFC 9001 8.1).
"""

import ssl
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from qh3 import tls
from qh3._hazmat import Buffer
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.packet import (
    QuicTransportParameters,
    QuicVersionInformation,
    push_quic_transport_parameters,
)
from qh3.quic.tls_bridge import QuicTlsBridge, QuicTlsBridgeError

from expressgateway.net.quic.cids import CID_BYTES
from expressgateway.net.quic.verify import BAD_CERTIFICATE, Trust, UntrustedError
from expressgateway.wire.quic import KNOWN_VERSIONS, VERSION_1

NO_APPLICATION_PROTOCOL: Final = 0x100 + tls.AlertDescription.no_application_protocol
UNEXPECTED_MESSAGE: Final = 0x100 + tls.AlertDescription.unexpected_message
DECODE_ERROR: Final = 0x100 + tls.AlertDescription.decode_error
PEER_CIDS: Final = 4  # that a peer may have issued and we have not retired
MAX_TICKETS: Final = 4096  # of one listener and worker; the oldest go first

_PARAMETER_BYTES: Final = 512
_ACK_DELAY_EXPONENT: Final = 3
_MAX_ACK_DELAY_MS: Final = 25


def read_sni(hello: bytes) -> tuple[str | None, bool]:
    """The server name in a ClientHello, and whether more of it is to come."""
    if len(hello) < 4:
        return None, True
    size = 4 + int.from_bytes(hello[1:4], "big")
    if len(hello) < size:
        return None, True
    try:
        return tls.pull_client_hello(Buffer(data=hello[:size])).server_name, False
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the handshake is about to say so
        return None, False


class TicketStore:
    """TLS sessions that clients may resume, once each; on the worker that made them."""

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: OrderedDict[bytes, tls.SessionTicket] = OrderedDict()

    def keep(self, ticket: tls.SessionTicket) -> None:
        if len(self._tickets) >= MAX_TICKETS:
            self._tickets.popitem(last=False)
        self._tickets[ticket.ticket] = ticket

    def take(self, label: bytes) -> tls.SessionTicket | None:
        return self._tickets.pop(label, None)


@dataclass(slots=True)
class Grants:
    """What a peer is told that it may do (RFC 9000 18.2)."""

    stream_bytes: int = 262_144
    connection_bytes: int = 1_048_576
    streams: int = 100
    """Bidirectional ones that it may have open at once."""
    unidirectional: int = 16
    datagram_bytes: int = 0
    """The largest DATAGRAM frame; 0: none are taken (RFC 9221)."""
    idle_timeout_s: float = 30.0
    udp_payload_bytes: int = 1472
    """The largest datagram that it may send."""
    first_bytes: int = 0
    """On a stream that it opens, before any of it was used; 0: as on every other."""


@dataclass(slots=True)
class TlsSettings:
    """One side's TLS for all its connections: certificates, ALPN, whom to trust."""

    configuration: QuicConfiguration
    grants: Grants = field(default_factory=Grants)
    tickets: TicketStore | None = None
    trust: Trust | None = None
    """A client's: what it demands of the server's certificate; ``None``: nothing."""


class EngineTls(QuicTlsBridge):
    """One connection's handshake."""

    def __init__(self, settings: TlsSettings, **parameters: Any) -> None:  # noqa: ANN401 - the library's own
        self.grants = settings.grants
        self._sni: str | None = None
        self._first = b""  # of a client's first message, until it was read; bounded with the handshake
        self._is_first = True
        self._trust = settings.trust
        self._is_verified = False
        configuration = settings.configuration
        tickets = None if configuration.is_client else settings.tickets
        super().__init__(
            configuration,
            session_ticket_fetcher=tickets.take if tickets is not None else None,
            session_ticket_handler=tickets.keep if tickets is not None else None,
            **parameters,
        )
        if not configuration.is_client:
            self.tls._max_early_data = None  # noqa: SLF001 - tickets that offer it are made otherwise

    def serialize_transport_parameters(self) -> bytes:
        """Ours, as they travel in the handshake."""
        grants = self.grants
        parameters = QuicTransportParameters(
            ack_delay_exponent=_ACK_DELAY_EXPONENT,
            active_connection_id_limit=PEER_CIDS,
            max_idle_timeout=int(grants.idle_timeout_s * 1000),
            initial_max_data=grants.connection_bytes,
            initial_max_stream_data_bidi_local=grants.stream_bytes,
            initial_max_stream_data_bidi_remote=grants.first_bytes or grants.stream_bytes,
            initial_max_stream_data_uni=grants.first_bytes or grants.stream_bytes,
            initial_max_streams_bidi=grants.streams,
            initial_max_streams_uni=grants.unidirectional,
            initial_source_connection_id=self.local_initial_source_connection_id,
            max_ack_delay=_MAX_ACK_DELAY_MS,
            max_udp_payload_size=grants.udp_payload_bytes,
            max_datagram_frame_size=grants.datagram_bytes or None,
            stateless_reset_token=self.stateless_reset_token,
            version_information=QuicVersionInformation(
                chosen_version=self.version,
                available_versions=self.configuration.supported_versions,
            ),
        )
        if not self.configuration.is_client:
            parameters.original_destination_connection_id = self.original_destination_connection_id
            parameters.retry_source_connection_id = self.retry_source_connection_id
        buffer = Buffer(capacity=_PARAMETER_BYTES)
        push_quic_transport_parameters(buffer, parameters)
        return buffer.data

    def _on_traffic_secret(self, direction: Any, epoch: Any, *secret: Any) -> None:  # noqa: ANN401 - the library's
        if epoch == tls.Epoch.ZERO_RTT:
            # A client that asks for it with a ticket that does not allow it is told that it may not, too.
            self.tls.early_data_accepted = False
            return
        super()._on_traffic_secret(direction, epoch, *secret)

    @property
    def sni(self) -> str | None:
        """The server name that the client sent; known once its first message was read."""
        return self._sni

    def receive(self, epoch: int, data: bytes, offset: int, version: int) -> None:
        """CRYPTO data in order. Raises ``QuicTlsBridgeError``, whatever the peer sent."""
        if self._is_first and not self.configuration.is_client:
            # The library reads the name and does not keep it.
            self._first += data
            self._sni, self._is_first = read_sni(self._first)
        try:
            self.receive_crypto(tls.Epoch(epoch), data, offset, version=version)
        except QuicTlsBridgeError as error:
            if "No common ALPN protocols" in str(error):
                raise QuicTlsBridgeError(NO_APPLICATION_PROTOCOL, "no common ALPN protocol") from None
            raise
        except Exception as error:
            # The library's TLS reads with assertions and unchecked lengths: whatever it is, the peer sent it.
            raise QuicTlsBridgeError(DECODE_ERROR, f"a TLS message that cannot be read: {error!r}") from error
        if self.handshake_complete and not self._is_verified:
            self._is_verified = True
            if self.tls.alpn_negotiated not in (self.configuration.alpn_protocols or ()):
                # A server may say nothing (RFC 9001 8.1).
                raise QuicTlsBridgeError(NO_APPLICATION_PROTOCOL, "no application protocol was agreed on")
            if self._trust is not None:
                self._verify(self._trust)

    def _verify(self, trust: Trust) -> None:
        """The server has proved that it has the key of its certificate; whose it is, is for us to say."""
        leaf = self.peer_certificate
        if leaf is None:
            raise QuicTlsBridgeError(BAD_CERTIFICATE, "the server showed no certificate")
        try:
            trust.check(leaf, self.peer_certificate_chain)
        except UntrustedError as error:
            raise QuicTlsBridgeError(BAD_CERTIFICATE, str(error)) from None


class Settled:
    """What is left of a server's handshake when it is complete: a client has nothing more to say in it, and
    the rest is let go."""

    __slots__ = ("alpn", "is_resumed", "max_idle_timeout_ms", "sni")

    def __init__(self, done: EngineTls) -> None:
        parameters = done.remote_transport_parameters
        self.alpn = done.tls.alpn_negotiated or ""
        self.sni = done.sni
        self.is_resumed = bool(done.tls.session_resumed)
        self.max_idle_timeout_ms = parameters.max_idle_timeout if parameters is not None else None
        del done.tls  # they know each other


def server_tls(
    chain: bytes, key: bytes, alpn: list[str], grants: Grants, tickets: TicketStore
) -> TlsSettings:
    """For a listener; ``chain`` and ``key`` are PEM. Raises ``ValueError`` if they cannot be used."""
    configuration = QuicConfiguration(
        is_client=False,
        alpn_protocols=alpn,
        supported_versions=list(KNOWN_VERSIONS),
        connection_id_length=CID_BYTES,
    )
    try:
        configuration.load_cert_chain(chain, key)
    except Exception as error:
        raise ValueError(f"the certificate cannot be used for QUIC: {error}") from error
    return TlsSettings(configuration, grants, tickets)


def client_tls(
    alpn: list[str],
    grants: Grants,
    *,
    server_name: str,
    ca: bytes | None,
    verify: bool = True,
    chain: bytes | None = None,
    key: bytes | None = None,
) -> TlsSettings:
    """For connections to a backend. ``ca``: certificates (PEM) that are trusted, ``None``: the system's.
    Raises ``ValueError`` if a certificate cannot be used."""
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=alpn,
        server_name=server_name,
        supported_versions=[VERSION_1],
        connection_id_length=CID_BYTES,
        verify_mode=ssl.CERT_NONE,  # by the library; `Trust` does it
        verify_hostname=False,
    )
    if chain is not None and key is not None:
        try:
            configuration.load_cert_chain(chain, key)
        except Exception as error:
            raise ValueError(f"the client certificate cannot be used for QUIC: {error}") from error
    return TlsSettings(configuration, grants, trust=Trust(ca, server_name) if verify else None)
