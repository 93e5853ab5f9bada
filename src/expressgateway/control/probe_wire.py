"""A probe's connection to a backend: made as the data path makes its own, with bounded bytes coming in.

A *target* is what is probed: a backend's settings and one of its addresses. The connection begins with a
PROXY header of the gateway's own where the backend expects one, and speaks TLS as the backend's settings say.
What goes wrong is a `ProbeError`, or an `OSError` that `phrase` has words for. What is spoken over it is
none of its business.
"""

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, cast
from weakref import WeakValueDictionary

from expressgateway.net.tls import CertificatePair, backend_server_name, client_context
from expressgateway.upstream.backend import BackendSettings, SocketAddress, TlsSettings
from expressgateway.wire.proxy_protocol import V1_UNKNOWN, V2_LOCAL

_HIGH_BYTES: Final = 65536  # received and not taken; then reading pauses

_HEADERS: Final = {"v1": V1_UNKNOWN, "v2": V2_LOCAL}

LOCAL_FAULTS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
)
"""Want of something on this machine: says nothing about the backend."""


class ProbeError(Exception):
    """The backend did not pass. The text is a short phrase, without the backend's name."""


@dataclass(frozen=True, slots=True)
class Target:
    settings: BackendSettings
    address: SocketAddress

    @property
    def authority(self) -> str:
        """As the data path would name it: the configured host, with the port unless it is the scheme's."""
        settings = self.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        default = 443 if settings.tls is not None else 80
        return host if settings.port == default else f"{host}:{settings.port}"


def phrase(error: OSError) -> str:
    """A cause in few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).lower().replace("_", " ")
        return f"TLS failed: {reason}"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    if isinstance(error, ConnectionError):  # asyncio makes some without a number
        return "connection reset"
    return str(error) or type(error).__name__


# Shared by probes with equal settings, gone with the last of them. The name is not in the key: it is given to
# each handshake, and a context with the system's roots costs 40 ms and 0.8 MiB.
_ContextKey = tuple[bool, bytes | None, bytes | None, bytes | None, tuple[str, ...]]
_contexts: WeakValueDictionary[_ContextKey, ssl.SSLContext] = WeakValueDictionary()


class ProbeTls:
    """How a probe speaks TLS. The context is made at the first probe: no reload waits for it."""

    __slots__ = ("_alpn", "_context", "_settings", "server_name")

    def __init__(self, host: str, settings: TlsSettings, alpn: tuple[str, ...] = ()) -> None:
        self._settings = settings
        self._alpn = alpn
        self._context: ssl.SSLContext | None = None
        self.server_name = backend_server_name(host, settings.hostname)

    def context(self) -> ssl.SSLContext:
        """Raises `TlsConfigError`."""
        if self._context is None:
            its = self._settings
            key = (its.verify_peer, its.ca_pem, its.cert_pem, its.key_pem, self._alpn)
            known = _contexts.get(key)
            if known is None:
                pair = None
                if its.cert_pem is not None and its.key_pem is not None:
                    pair = CertificatePair(its.cert_pem, its.key_pem, "the client certificate")
                known = client_context(
                    verify_peer=its.verify_peer, ca_pem=its.ca_pem, certificate=pair, alpn=self._alpn
                )
                _contexts[key] = known
            self._context = known
        return self._context


async def connect(target: Target) -> socket.socket:
    """A connected socket, the caller's to close. Raises `OSError`."""
    address = target.address
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
        if sock.getsockname() == address:
            # Nobody listens there: on loopback, the kernel has chosen the very port we dialled for ourselves,
            # and the two ends met (simultaneous open, RFC 9293 3.5). It would keep the backend's port taken.
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except BaseException:
        sock.close()
        raise
    return sock


def preamble(target: Target) -> bytes:
    """The PROXY header, if the backend expects one: the gateway speaks for itself in it."""
    version = target.settings.send_proxy
    return _HEADERS[version] if version is not None else b""


@asynccontextmanager
async def opened(target: Target, tls: ProbeTls | None) -> AsyncIterator["Wire"]:
    """A connection, its handshake done, closed at the end whatever happens.

    Raises `OSError` (`ssl.SSLError` is one) and `TlsConfigError`.
    """
    context = tls.context() if tls is not None else None
    sock = await connect(target)
    loop = asyncio.get_running_loop()
    try:
        transport, wire = await loop.create_connection(Wire, sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        header = preamble(target)
        if header:
            transport.write(header)
        if tls is not None and context is not None:
            upgraded = await loop.start_tls(transport, wire, context, server_hostname=tls.server_name)
            if upgraded is None:  # lost between the handshake and its report
                raise ConnectionResetError
            wire.transport = upgraded
        yield wire
        wire.transport.close()  # over TLS this sends close_notify; its answer is not waited for
    finally:
        transport.abort()


class Wire(asyncio.Protocol):
    """One probe's connection."""

    __slots__ = ("_error", "_held", "_is_ended", "_is_paused", "_waiter", "transport")

    transport: asyncio.Transport
    """The one to write to; over TLS, not the socket's."""

    def __init__(self) -> None:
        self._held = bytearray()  # about _HIGH_BYTES and one read
        self._is_ended = False
        self._is_paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def alpn(self) -> str | None:
        """The protocol that was agreed on in the TLS handshake."""
        tls = self.transport.get_extra_info("ssl_object")
        return tls.selected_alpn_protocol() if isinstance(tls, ssl.SSLObject) else None

    def send(self, data: bytes) -> None:
        if data:
            self.transport.write(data)

    async def receive(self) -> bytes:
        """What has come, at least one byte; nothing at the end. Raises `OSError`."""
        while not self._held:
            if self._is_ended:
                if isinstance(self._error, OSError):
                    raise self._error
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = bytes(self._held)
        self._held.clear()
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()
        return data

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > _HIGH_BYTES and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._is_ended = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_ended = True
        self._error = exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
