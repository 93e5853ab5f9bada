"""Making connections to backends: socket, PROXY header, TLS, and the words for what went wrong."""

import errno
import socket
import ssl
from typing import Final

from expressgateway.net.reactor import Reactor
from expressgateway.net.stream import Stream, StreamOwner
from expressgateway.net.tls import CertificatePair, backend_server_name, client_context
from expressgateway.net.tls_stream import TlsStream
from expressgateway.upstream.backend import Addresses, Backend, TlsSettings
from expressgateway.upstream.errors import Fault, UpstreamError
from expressgateway.wire.proxy_protocol import V1_UNKNOWN, V2_LOCAL, encode_v1, encode_v2

_KEEPALIVE_IDLE_S: Final = 60
_KEEPALIVE_INTERVAL_S: Final = 15
_KEEPALIVE_PROBES: Final = 4


def tune(sock: socket.socket) -> None:
    """What every TCP socket of the data path gets: no delay, and dead peers found within two minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


class Dialler:
    """Opens streams to backends. TLS contexts are shared by backends with equal settings."""

    __slots__ = ("_alpn", "_is_framed", "connect_timeout_s", "contexts", "reactor")

    def __init__(
        self, reactor: Reactor, connect_timeout_s: float, alpn: tuple[str, ...], *, is_framed: bool = True
    ) -> None:
        """``connect_timeout_s``: for the connection and its TLS handshake together. ``is_framed``: what is
        spoken knows its own ends, so that FIN without close_notify is a truncation (RFC 8446 6.1).
        """
        self._is_framed = is_framed
        self.reactor = reactor
        self.connect_timeout_s = connect_timeout_s
        self._alpn = alpn
        self.contexts: dict[TlsSettings, ssl.SSLContext] = {}  # one per distinct setting in the config

    def take_over(self, other: "Dialler") -> None:
        """Use the settings of ``other`` from now on: whoever holds this dialler dials by them."""
        self.connect_timeout_s = other.connect_timeout_s
        self.contexts = other.contexts

    def adopt(self, settings: TlsSettings, other: "Dialler") -> None:
        """Have a context, from ``other`` if that has it. Raises ``TlsConfigError``."""
        known = other.contexts.get(settings)
        if known is not None:
            self.contexts[settings] = known
        else:
            self.context_for(settings)

    def context_for(self, settings: TlsSettings) -> ssl.SSLContext:
        """Raises ``TlsConfigError``; built when the configuration is applied, not at the first dial."""
        context = self.contexts.get(settings)
        if context is None:
            pair = None
            if settings.cert_pem is not None and settings.key_pem is not None:
                pair = CertificatePair(settings.cert_pem, settings.key_pem, "the client certificate")
            context = client_context(
                verify_peer=settings.verify_peer,
                ca_pem=settings.ca_pem,
                certificate=pair,
                alpn=self._alpn,
            )
            if not self._is_framed:
                context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
            self.contexts[settings] = context
        return context

    def dial(self, backend: Backend, owner: StreamOwner, addresses: Addresses | None) -> Stream:
        """Begin a connection. Raises ``OSError`` when there is no socket to be had."""
        address = backend.address
        sock = socket.socket(
            socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
            socket.SOCK_STREAM | socket.SOCK_NONBLOCK,
        )
        tune(sock)
        settings = backend.settings
        stream: Stream
        if settings.tls is not None:
            stream = TlsStream(
                self.reactor,
                sock,
                owner,
                self.context_for(settings.tls),
                server_hostname=backend_server_name(settings.host, settings.tls.hostname),
            )
        else:
            stream = Stream(self.reactor, sock, owner)
        if settings.send_proxy is not None:
            stream.preamble = _proxy_header(settings.send_proxy, addresses)
        stream.connect(address)
        return stream

    @staticmethod
    def explain(stream: Stream, error: str) -> UpstreamError:
        """Why a stream failed before it was open."""
        if isinstance(stream, TlsStream) and stream.tls is not None:
            fault = Fault.CERTIFICATE if stream.is_certificate_refused else Fault.TLS
            return UpstreamError(fault, error)
        if stream.error_code == errno.ECONNREFUSED:
            return UpstreamError(Fault.REFUSED, "the backend refused the connection")
        if stream.error_code == errno.ETIMEDOUT:
            return UpstreamError(Fault.CONNECT_TIMEOUT, "the backend did not answer in time")
        if isinstance(stream, TlsStream) and stream.error_code == 0:
            return UpstreamError(Fault.TLS, error)
        return UpstreamError(Fault.UNREACHABLE, error)


def _proxy_header(version: str, addresses: Addresses | None) -> bytes:
    if addresses is None:
        return V1_UNKNOWN if version == "v1" else V2_LOCAL
    return encode_v1(*addresses) if version == "v1" else encode_v2(*addresses)
