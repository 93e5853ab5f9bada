"""Listening sockets: all of them bound before anything serves, and held until the supervisor ends.

A *member* is one socket of an SO_REUSEPORT group. Each listener has one member for each worker, and the
kernel spreads new connections (or flows) over them. The supervisor keeps every member open, so a connection
that arrives while a worker is being replaced waits in that member's queue and is never refused.

Bind addresses (docs/decisions/0013): an IPv6 address is IPv6 only, so ``[::]`` and ``0.0.0.0`` may stand side
by side; a host name is resolved once, and its first IPv4 address is taken, else its first IPv6 one.

This module knows nothing of what is spoken on the sockets.
"""

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from expressgateway.config.listeners import Listener
from expressgateway.config.values import Address
from expressgateway.control.failures import StartError

MAX_BACKLOG: Final = 4096


@dataclass(slots=True)
class Bound:
    """A listener with its sockets."""

    name: str
    is_datagram: bool
    address: Address
    """Where it is bound: numbers, and the port the kernel chose for port 0."""
    members: list[socket.socket] = field(default_factory=list)
    """One for each worker, by the worker's index."""

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.members.clear()


def bind_listeners(listeners: Sequence[Listener], workers: int) -> list[Bound]:
    """Bind every listener, `workers` members each. Raises `StartError`; then nothing stays bound."""
    places = [_Place.of(listener) for listener in listeners]
    for place in places:
        if place.where[1]:
            # SO_REUSEPORT would let us join the group of another process of the same user; a socket without
            # it is refused if anybody holds the port. All are tried before the first is bound, so that our
            # own listeners may overlap: of 0.0.0.0:80 and 192.0.2.1:80 the kernel takes the closer one.
            place.bind(reuse_port=False).close()
    bound: list[Bound] = []
    try:
        for place in places:
            bound.append(place.bind_members(workers))  # noqa: PERF401 - closed if a later one fails
        # Listening comes last: nothing is accepted, even into a queue, unless all of it can be had.
        backlog = listen_backlog()
        for one in bound:
            if not one.is_datagram:
                for member in one.members:
                    _listen(one, member, backlog)
    except BaseException:
        for one in bound:
            one.close()
        raise
    return bound


def bind_admin(address: Address) -> socket.socket:
    """The admin listener's socket, listening. Raises `StartError`."""
    title = f"the admin listener (observability.metrics_bind = {address})"
    place = _Place("", title, address, socket.SOCK_STREAM)
    sock = place.bind(reuse_port=False)
    try:
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise StartError(f"{title} cannot listen: {_cause(address, error, 'tcp')}") from None
    return sock


def listen_backlog() -> int:
    """What the kernel allows, at most `MAX_BACKLOG`."""
    try:
        return min(int(Path("/proc/sys/net/core/somaxconn").read_text()), MAX_BACKLOG)
    except (OSError, ValueError):
        return socket.SOMAXCONN


class _Place:
    """Where a socket is to be bound, the host name resolved. Raises `StartError`."""

    __slots__ = ("address", "family", "kind", "name", "title", "where")

    def __init__(self, name: str, title: str, address: Address, kind: socket.SocketKind) -> None:
        self.name = name
        self.title = title
        self.address = address
        """As configured."""
        self.kind = kind
        try:
            found = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise StartError(
                f"{title} cannot be bound: the host name {address.host!r} does not resolve ({reason}); "
                "write the address as a number"
            ) from None
        family, *_, where = min(found, key=lambda one: one[0] != socket.AF_INET)
        self.family = family
        self.where = (str(where[0]), int(where[1]))

    @classmethod
    def of(cls, listener: Listener) -> "_Place":
        kind = socket.SOCK_DGRAM if listener.is_datagram else socket.SOCK_STREAM
        return cls(listener.name, f"the listener {listener.name!r}", listener.address, kind)

    def bind_members(self, workers: int) -> Bound:
        one = Bound(self.name, self.kind == socket.SOCK_DGRAM, self.address)
        try:
            for _ in range(workers):
                member = self.bind(reuse_port=True)
                one.members.append(member)
                if not self.where[1]:
                    self.where = member.getsockname()[:2]
        except BaseException:
            one.close()
            raise
        one.address = Address(*self.where)
        return one

    def bind(self, *, reuse_port: bool) -> socket.socket:
        is_datagram = self.kind == socket.SOCK_DGRAM
        sock: socket.socket | None = None
        try:
            sock = socket.socket(self.family, self.kind | socket.SOCK_NONBLOCK)
            if not is_datagram:
                # Connections of a previous run in TIME_WAIT do not keep the port. Not on UDP, where the same
                # option lets a second process steal datagrams.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if self.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(self.where)
        except OSError as error:
            if sock is not None:
                sock.close()
            transport = "udp" if is_datagram else "tcp"
            raise StartError(
                f"{self.title} cannot be bound: {_cause(self.address, error, transport)}"
            ) from None
        return sock


def _listen(one: Bound, member: socket.socket, backlog: int) -> None:
    try:
        member.listen(backlog)
    except OSError as error:
        raise StartError(
            f"the listener {one.name!r} cannot listen: {_cause(one.address, error, 'tcp')}"
        ) from None


def _cause(address: Address, error: OSError, transport: str) -> str:
    """What happened at the address, and what to do about it."""
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"{address} is already in use; stop who has it or choose another port "
                f"(ss -lnp --{transport} 'sport = :{address.port}' shows who that is)"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"permission denied for {address}; ports below {_first_free_port()} need root or the "
                "capability CAP_NET_BIND_SERVICE: start as root with runtime.user set, or choose a higher "
                "port"
            )
        case errno.EADDRNOTAVAIL:
            return f"no interface of this machine has the address of {address}; `ip address` lists them"
        case errno.EAFNOSUPPORT:
            return f"this machine has no IPv6 for {address}; write an IPv4 address"
        case errno.EMFILE | errno.ENFILE:
            return f"too many open files at {address}; raise the limit (ulimit -n, LimitNOFILE)"
        case _:
            return f"{address}: {error.strerror}"


def _first_free_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024
