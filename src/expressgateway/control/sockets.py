"""Listening sockets: how they are bound.

A *member* is one socket of an SO_REUSEPORT group. Each listener has one member for each *slot*, a worker's
place, and the kernel spreads new connections (or flows) over them. The supervisor keeps every member open, so
a connection that arrives while a worker is being replaced waits in that member's queue and is never refused.
Which listeners have which sockets, and what a reload makes of them, is the business of `socket_book`.

Bind addresses (docs/decisions/0013): an IPv6 address is IPv6 only, so ``[::]`` and ``0.0.0.0`` may stand side
by side; a host name is resolved once, and its first IPv4 address is taken, else its first IPv6 one.

This module knows nothing of what is spoken on the sockets.
"""

import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from expressgateway.config.schema import PASSTHROUGH, Config
from expressgateway.config.values import Address
from expressgateway.control.failures import StartError

MAX_BACKLOG: Final = 4096


@dataclass(slots=True, eq=False)
class Bound:
    """A listener with its sockets."""

    name: str
    is_datagram: bool
    address: Address
    """Where it is bound: numbers, and the port the kernel chose for port 0."""
    members: list[socket.socket] = field(default_factory=list)
    """One for each slot."""
    number: int = 0
    """By which workers know it. Never given twice."""
    kind: str = ""
    """What is spoken there; with another kind a listener is another one."""
    wanted: Address | None = None
    """As configured."""
    is_spread: bool = False
    """Whether a program chooses among the members, and not the kernel's hash."""
    lasting: int = 0
    """So many of the first members are others' too - systemd's, or other workers' of ours - and must go on
    when we are done with them: they are never shut down."""

    @property
    def is_shared(self) -> bool:
        """Whether members are copies of each other: one queue for all workers."""
        return len({os.fstat(member.fileno()).st_ino for member in self.members}) < len(self.members)

    @property
    def is_steered(self) -> bool:
        """Whether datagrams carry connection IDs of ours."""
        return self.kind.startswith("quic")

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.members.clear()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A listener of a configuration, as far as its socket goes."""

    name: str
    kind: str
    is_datagram: bool
    address: Address

    @property
    def title(self) -> str:
        return (
            f"passthrough (bind_addr = {self.address})"
            if self.kind == PASSTHROUGH
            else f"the listener {self.name!r}"
        )


def wanted_by(config: Config) -> list[Wanted]:
    """In the order of the file; Mode A comes last."""
    found = [
        Wanted(
            listener.name,
            f"{listener.protocol}{' raw' if listener.raw_proxy is not None else ''}",
            listener.is_datagram,
            listener.address,
        )
        for listener in config.listeners
    ]
    if config.passthrough is not None:
        found.append(Wanted(PASSTHROUGH, PASSTHROUGH, True, config.passthrough.bind_addr))
    return found


def bind_all(wanted: Sequence[Wanted], slots: int, own: Sequence[Bound] = ()) -> list[Bound]:
    """Bind listeners, `slots` members each. Raises `StartError`; then nothing stays bound.

    `own`: what this process has bound already, and may overlap with.
    """
    places = [(one, _Place(one.title, one.address, _kind(one.is_datagram))) for one in wanted]
    ours = {(bound.is_datagram, bound.address.port) for bound in own}
    for one, place in places:
        if place.where[1] and (one.is_datagram, place.where[1]) not in ours:
            # SO_REUSEPORT would let us join the group of another process of the same user; a socket without
            # it is refused if anybody holds the port. All are tried before the first is bound, so that our
            # own listeners may overlap: of 0.0.0.0:80 and 192.0.2.1:80 the kernel takes the closer one.
            place.bind(reuse_port=False).close()
    bound: list[Bound] = []
    try:
        for one, place in places:
            bound.append(Bound(one.name, one.is_datagram, one.address, kind=one.kind, wanted=one.address))
            place.bind_members(bound[-1], slots)
        # Listening comes last: nothing is accepted, even into a queue, unless all of it can be had.
        for each in bound:
            listen(each)
    except BaseException:
        for each in bound:
            each.close()
        raise
    return bound


def add_members(bound: Bound, slots: int) -> None:
    """Bind so many members in all. Raises `StartError`; then it has those that it had."""
    before = len(bound.members)
    place = _Place(f"the listener {bound.name!r}", bound.address, _kind(bound.is_datagram))
    try:
        place.bind_members(bound, slots - before)
        listen(bound, before)
    except BaseException:
        for member in bound.members[before:]:
            member.close()
        del bound.members[before:]
        raise


def resolved(one: Wanted) -> tuple[str, int]:
    """Where it is to be bound. Raises `StartError`."""
    return _Place(one.title, one.address, _kind(one.is_datagram)).where


def _kind(is_datagram: bool) -> socket.SocketKind:
    return socket.SOCK_DGRAM if is_datagram else socket.SOCK_STREAM


def bind_admin(address: Address) -> socket.socket:
    """The admin listener's socket, listening. Raises `StartError`."""
    title = f"the admin listener (observability.metrics_bind = {address})"
    place = _Place(title, address, socket.SOCK_STREAM)
    sock = place.bind(reuse_port=False)
    try:
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise StartError(f"{title} cannot listen: {_cause(address, error, 'tcp')}") from None
    return sock


def is_bound_to(sock: socket.socket, address: Address) -> bool:
    """Whether a stream socket is where the address leads."""
    try:
        return bool(sock.getsockname()[:2] == _Place("", address, socket.SOCK_STREAM).where)
    except (OSError, StartError):
        return False


def listen_backlog() -> int:
    """What the kernel allows, at most `MAX_BACKLOG`."""
    try:
        return min(int(Path("/proc/sys/net/core/somaxconn").read_text()), MAX_BACKLOG)
    except (OSError, ValueError):
        return socket.SOMAXCONN


class _Place:
    """Where a socket is to be bound, the host name resolved. Raises `StartError`."""

    __slots__ = ("address", "family", "kind", "title", "where")

    def __init__(self, title: str, address: Address, kind: socket.SocketKind) -> None:
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

    def bind_members(self, bound: Bound, count: int) -> None:
        """Add so many members. What was added stays in `bound` if it fails."""
        for _ in range(count):
            member = self.bind(reuse_port=True)
            bound.members.append(member)
            if not self.where[1]:
                self.where = member.getsockname()[:2]
        bound.address = Address(*self.where)

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


def listen(bound: Bound, first: int = 0) -> None:
    """Have the members from `first` on listen. Raises `StartError`."""
    if bound.is_datagram:
        return
    backlog = listen_backlog()
    for member in bound.members[first:]:
        try:
            member.listen(backlog)
        except OSError as error:
            raise StartError(
                f"the listener {bound.name!r} cannot listen: {_cause(bound.address, error, 'tcp')}"
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
