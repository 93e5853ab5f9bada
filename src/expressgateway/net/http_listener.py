"""Listeners that speak HTTP: ``h1`` in clear text and ``h1s`` over TLS.

Over TLS the client and the listener agree on a version (ALPN); in clear text a client may begin with HTTP/2
at once, where the listener offers that (``h2c``).
"""

import socket
from typing import Final

from expressgateway.net.h1_front import H1FrontConnection
from expressgateway.net.h2_front import H2cGreeting, H2FrontConnection
from expressgateway.net.listener import Caller, Census, Connection, Door, Listener, limited
from expressgateway.net.reactor import Reactor
from expressgateway.net.stream import Stream
from expressgateway.net.tls import ServerTls, sni_of
from expressgateway.net.tls_stream import TlsStream
from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.forwarding import Peer
from expressgateway.proxy.service import HttpService
from expressgateway.wire.h1.server import Limits
from expressgateway.wire.h2.limits import H2Limits

_TURNED_AWAY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)


class HttpListener(Listener):
    """Swapping ``service`` (and ``h1_limits``) is all a reload does: exchanges keep what they began with."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        door: Door,
        census: Census,
        counters: ListenerCounters,
        service: HttpService,
        h1_limits: Limits,
        h2_limits: H2Limits,
        tls: ServerTls | None,
        *,
        offers_h2c: bool = False,
    ) -> None:
        super().__init__(reactor, sock, door, census, counters)
        self.service = service
        self.h1_limits = h1_limits
        self.h2_limits = h2_limits
        self.offers_h2c = offers_h2c
        self.tls = tls
        self._greeted: set[Connection] = set()  # TLS connections whose handshake is over

    @property
    def handshake_timeout_s(self) -> float:
        return self.door.handshake_timeout_s

    def admit(self, sock: socket.socket, caller: Caller) -> Connection:
        peer = Peer(
            caller.ip,
            caller.is_trusted,
            b"http" if self.tls is None else b"https",
            addresses=((caller.ip, caller.port), caller.local),
            began=self.reactor.now,
        )
        if self.tls is None and self.offers_h2c:
            greeting = H2cGreeting(self, peer)
            greeting.stream = Stream(self.reactor, sock, greeting)
            return greeting
        connection = H1FrontConnection(self, peer)
        if self.tls is None:
            connection.stream = Stream(self.reactor, sock, connection)
        else:
            connection.stream = TlsStream(self.reactor, sock, connection, self.tls.context)
        return connection

    def speak_h1(self, greeting: H2cGreeting, data: bytes) -> None:
        """The client began with ``data``, which is not HTTP/2."""
        stream = greeting.stream
        if stream is not None:
            connection = H1FrontConnection(self, greeting.peer)
            connection.stream = stream
            stream.owner = connection
            self.succeed(greeting, connection)
            connection.on_open()
            if self._is_draining:
                connection.drain()
            connection.on_bytes(data)

    def speak_h2(self, greeting: H2cGreeting | H1FrontConnection, data: bytes) -> None:
        """The client speaks HTTP/2, and began with ``data``."""
        stream = greeting.stream
        if stream is not None:
            connection = H2FrontConnection(self, greeting.peer, stream)
            self.succeed(greeting, connection)
            connection.begin()
            if data:
                connection.on_bytes(data)
            if self._is_draining:
                connection.drain()

    def turn_away(self, sock: socket.socket) -> None:
        if self.tls is None:
            try:
                sock.send(_TURNED_AWAY)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def on_open(self, connection: H1FrontConnection) -> None:
        stream = connection.stream
        if isinstance(stream, TlsStream) and stream.tls is not None:
            connection.peer.sni = sni_of(stream.tls)
            self.counters.handshake(stream.tls.version() or "", bool(stream.tls.session_reused), "ok")
            if stream.tls.selected_alpn_protocol() == "h2":
                self.speak_h2(connection, b"")
            else:
                self._greeted.add(connection)

    def is_counted(self, connection: Connection) -> bool:
        return connection in self._greeted

    def handshake_failed(self, connection: H1FrontConnection, error: str) -> None:
        result = "timeout" if error == "timeout" else "failed"
        self._greeted.add(connection)
        self.counters.handshake("", False, result)
        if result == "timeout":
            self.counters.security.add("slow_handshake")
        limited.warning(f"tls_{result}", connection.peer.ip.decode("ascii"), f"TLS handshake failed: {error}")

    def forget(self, connection: Connection) -> None:
        self._greeted.discard(connection)
        super().forget(connection)
