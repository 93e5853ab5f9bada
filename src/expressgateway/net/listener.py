"""Accepting connections: the door that every TCP listener has, whatever is spoken behind it.

The order is fixed: accept, draining, caps (before any byte is read), PROXY header, then ``admit``, which a
subclass fills in and where TLS begins. Every refusal is counted by its reason. Running out of descriptors
pauses accepting with back-off and never ends the listener.
"""

import asyncio
import errno
import ipaddress
import logging
import random
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from expressgateway.net.dial import tune
from expressgateway.net.facts import Facts, State, Told
from expressgateway.net.no_syn import drop_new
from expressgateway.net.reactor import IN, Reactor
from expressgateway.observe.counters import ListenerCounters
from expressgateway.observe.logs import Limited
from expressgateway.proxy.forwarding import TrustedProxies
from expressgateway.wire.proxy_protocol import MAX_V2_BYTES, ProxyProtocolError, parse

log = logging.getLogger(__name__)
limited: Final = Limited(log)

_ACCEPTS: Final = 64  # per event: other connections want their turn, too
_LAST_ACCEPTS: Final = 256  # batches before the socket is closed: more than the longest queue
_BACKOFF_S: Final = 0.01
_MAX_BACKOFF_S: Final = 1.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Census(Protocol):
    """Counts over all workers. ``enter`` gives the reason of a refusal, or counts the connection in."""

    def enter(self, ip: str) -> str | None: ...
    def leave(self, ip: str) -> None: ...


class Connection(Protocol):
    """What a listener keeps track of."""

    def begin(self) -> None:
        """The listener has the connection in its book: start."""

    def sweep(self, now: float) -> None: ...
    def drain(self) -> None: ...
    def go_away(self) -> None: ...
    def facts(self) -> Facts: ...


@dataclass(frozen=True, slots=True)
class Door:
    """What is checked before anything is spoken."""

    trusted: TrustedProxies
    proxy_protocol: bool
    handshake_timeout_s: float


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the door."""

    ip: str
    port: int
    local: tuple[str, int]
    is_trusted: bool


class Listener:
    """One listening socket of one worker."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        door: Door,
        census: Census,
        counters: ListenerCounters,
    ) -> None:
        self.reactor = reactor
        self.door = door
        self.counters = counters
        self._sock = sock
        self._census = census
        self._connections: dict[Connection, str] = {}  # and the address each was counted under
        self._is_accepting = False
        self._is_draining = False
        self._backoff_s = _BACKOFF_S

    # -- for subclasses --------------------------------------------------------------------------------

    def admit(self, sock: socket.socket, caller: Caller) -> Connection:
        """What is spoken here. The connection calls ``forget`` when its descriptor is closed."""
        raise NotImplementedError

    def turn_away(self, sock: socket.socket) -> None:
        """Tell a refused client, where that is cheap. The socket is closed afterwards."""

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to accept."""
        self._is_accepting = True
        tune(self._sock)  # accepted sockets inherit it
        self.reactor.add(self._sock.fileno(), IN, self._on_ready)

    def stop(self, *, hands_over: bool = False) -> None:
        """Accept what is in the queue already, then close. Established connections go on.

        The supervisor holds a copy of the descriptor: only ``shutdown`` makes the kernel refuse what comes
        later, instead of queueing it for nobody. ``hands_over``: another worker accepts at the same socket,
        and what is in the queue is left to it.
        """
        if self._is_accepting and hands_over:
            self._is_accepting = False
            self.reactor.remove(self._sock.fileno())
        elif self._is_accepting:
            self._is_accepting = False
            self._is_draining = False
            drop_new(self._sock)
            for _ in range(_LAST_ACCEPTS):
                if self._accept():
                    break
            self.reactor.remove(self._sock.fileno())
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._sock.close()

    def drain(self, jitter_s: float = 0.0) -> None:
        """Ask every connection to end soon, each at a moment of its own within ``jitter_s``.

        So that not every client of every instance comes back at once.
        """
        self._is_draining = True
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            if jitter_s:
                loop.call_later(random.uniform(0, jitter_s), self._drain_one, connection)
            else:
                connection.drain()

    def _drain_one(self, connection: Connection) -> None:
        if connection in self._connections:
            connection.drain()

    def go_away(self) -> int:
        """End what is left now; gives how many connections that were."""
        left = list(self._connections)
        for connection in left:
            connection.go_away()
        return len(left)

    def sweep(self, now: float) -> None:
        for connection in list(self._connections):
            try:
                connection.sweep(now)
            except Exception:  # noqa: BLE001 - the safety net, as in the reactor
                self.reactor.fault(connection.sweep)

    @property
    def open(self) -> int:
        return len(self._connections)

    def connections(self) -> Iterable[Connection]:
        return self._connections.keys()

    def told(self) -> Iterable[Told]:
        return self._connections

    # -- accepting -------------------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        self._accept()

    def _accept(self) -> bool:
        """Take some connections in; True: there are no more, or no room for them."""
        accept = self._sock.accept
        for _ in range(_ACCEPTS):
            try:
                sock, address = accept()
            except BlockingIOError:
                return True
            except OSError as error:
                kind = errno.errorcode.get(error.errno or 0, "other")
                self.counters.accept_errors.add(kind)
                if error.errno in _EXHAUSTED:
                    self._pause_accepting(kind)
                    return True
                continue
            self._backoff_s = _BACKOFF_S
            sock.setblocking(False)
            self._enter(sock, address)
        return False

    def _pause_accepting(self, kind: str) -> None:
        if not self._is_accepting:
            return
        limited.warning(
            f"accept_{kind}",
            self.counters.name,
            f"accepting is paused: {kind}; raise the limit of open files",
        )
        self.reactor.remove(self._sock.fileno())
        delay_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._backoff_s = min(self._backoff_s * 2, _MAX_BACKOFF_S)
        asyncio.get_running_loop().call_later(delay_s, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._is_accepting:
            self.reactor.add(self._sock.fileno(), IN, self._on_ready)

    def _enter(self, sock: socket.socket, address: tuple[str, int]) -> None:
        ip = plain_ip(address[0])
        reason = "draining" if self._is_draining else self._census.enter(ip)
        if reason is not None:
            self._refuse(sock, ip, reason)
            return
        try:
            local = sock.getsockname()
        except OSError:  # it is gone already
            self._census.leave(ip)
            sock.close()
            return
        self.counters.connections += 1
        self.counters.inflight += 1
        caller = Caller(ip, address[1], (plain_ip(local[0]), local[1]), ip in self.door.trusted)
        if self.door.proxy_protocol and caller.is_trusted:
            self._take(_Introduction(self, sock, caller), ip)
        else:
            self._take(self.admit(sock, caller), ip)

    def _take(self, connection: Connection, ip: str) -> None:
        self._connections[connection] = ip
        try:
            connection.begin()
            if self._is_draining:  # it was introduced after the others had been asked
                connection.drain()
        except Exception:  # noqa: BLE001 - the safety net, as in the reactor: this connection only
            self.reactor.fault(connection.begin)

    def _refuse(self, sock: socket.socket, ip: str, reason: str) -> None:
        self.counters.rejects.add(reason)
        if reason != "draining":
            self.counters.security.add("connection_flood")
            limited.warning("connection_flood", ip, f"a connection was refused: {reason}")
        self.turn_away(sock)
        sock.close()

    def introduce(self, introduction: "_Introduction", sock: socket.socket, caller: Caller) -> None:
        """A PROXY header told who the client is: count it under that address from here on."""
        self._census.leave(self._connections.pop(introduction))
        reason = self._census.enter(caller.ip)
        if reason is not None:
            self.counters.inflight -= 1
            self._refuse(sock, caller.ip, reason)
            return
        self._take(self.admit(sock, caller), caller.ip)

    def succeed(self, connection: Connection, other: Connection) -> None:
        """From now on ``other`` is what this connection is: another protocol on the same descriptor."""
        self._connections[other] = self._connections.pop(connection)

    def forget(self, connection: Connection) -> None:
        """The connection's descriptor is closed."""
        ip = self._connections.pop(connection, None)
        if ip is not None:
            self.counters.inflight -= 1
            self._census.leave(ip)


class _Introduction:
    """Waits for a PROXY header in front of anything else. Reads not one byte beyond it."""

    __slots__ = ("_began", "_caller", "_due", "_listener", "_sock")

    def __init__(self, listener: Listener, sock: socket.socket, caller: Caller) -> None:
        self._listener = listener
        self._sock = sock
        self._caller = caller
        self._began = listener.reactor.now
        self._due = self._began + listener.door.handshake_timeout_s

    def begin(self) -> None:
        self._listener.reactor.add(self._sock.fileno(), IN, self._on_ready)

    def _on_ready(self, events: int) -> None:
        sock = self._sock
        try:
            seen = sock.recv(MAX_V2_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            self._refuse("proxy_header_missing")
            return
        if not seen:
            self._refuse("proxy_header_missing")
            return
        try:
            parsed = parse(seen)
        except ProxyProtocolError as error:
            self._refuse("proxy_header_bad", str(error))
            return
        if parsed is None and events & ~select.EPOLLIN:
            # The rest cannot come any more, and the kernel would report that again and again.
            self._refuse("proxy_header_missing")
            return
        if parsed is None:
            # Not readable again before there is more than we have seen.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)
            return
        header, size = parsed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        sock.recv(size)
        caller = self._caller
        if header.source is not None and header.destination is not None and not header.is_local:
            ip, port = header.source
            # What the proxy says of the client is believed; the client itself is not the proxy.
            caller = Caller(ip, port, header.destination, ip in self._listener.door.trusted)
        self._listener.reactor.remove(sock.fileno())
        self._listener.introduce(self, sock, caller)

    def _refuse(self, reason: str, detail: str = "") -> None:
        listener = self._listener
        listener.counters.rejects.add(reason)
        limited.warning(reason, self._caller.ip, f"a connection was refused: {detail or reason}")
        self.go_away()

    def sweep(self, now: float) -> None:
        if now >= self._due:
            self._refuse("proxy_header_timeout")

    def facts(self) -> Facts:
        """The proxy's: who it speaks for is to come."""
        return Facts("tcp", self._caller.ip, self._caller.port, self._began, None, State.OPENING)

    def drain(self) -> None:
        """It has until the header is due. Whoever comes then is asked to leave."""

    def go_away(self) -> None:
        self._listener.reactor.remove(self._sock.fileno())
        self._sock.close()
        self._listener.forget(self)

    reset = go_away


def plain_ip(ip: str) -> str:
    """An IPv4 address that came through an IPv6 socket, as what it is."""
    if ip.startswith("::ffff:") and "." in ip:
        return ip[7:]
    if "%" in ip:
        return ip.partition("%")[0]
    return ip


def address_of(host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """A socket address for a literal IP address."""
    if ipaddress.ip_address(host).version == 6:
        return host, port, 0, 0
    return host, port
