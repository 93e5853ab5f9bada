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
    bound: list[Bound] = []
    try:
        for listener in listeners:
            bound.append(_bind(listener, workers))  # noqa: PERF401 - what is bound must be closed on failure
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
    info = _resolve(title, address, socket.SOCK_STREAM)
    sock = _bind_one(title, address, info, reuse_port=False)
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


_Info = tuple[socket.AddressFamily, tuple[str, int]]


def _bind(listener: Listener, workers: int) -> Bound:
    title = f"the listener {listener.name!r}"
    kind = socket.SOCK_DGRAM if listener.is_datagram else socket.SOCK_STREAM
    configured = listener.address
    info = _resolve(title, configured, kind)
    if configured.port:
        # SO_REUSEPORT would let us join the group of another process of the same user; a socket without it
        # is refused if anybody holds the port.
        _bind_one(title, configured, info, reuse_port=False, kind=kind).close()
    one = Bound(listener.name, listener.is_datagram, Address(info[1][0], configured.port))
    try:
        for _ in range(workers):
            member = _bind_one(title, configured, info, reuse_port=True, kind=kind)
            one.members.append(member)
            if not info[1][1]:
                info = (info[0], member.getsockname()[:2])
    except BaseException:
        one.close()
        raise
    one.address = Address(*info[1])
    return one


def _resolve(title: str, address: Address, kind: socket.SocketKind) -> _Info:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StartError(
            f"{title} cannot be bound: the host name {address.host!r} does not resolve ({reason}); "
            "write the address as a number"
        ) from None
    family, *_, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(where[0]), int(where[1]))


def _bind_one(
    title: str,
    address: Address,
    info: _Info,
    *,
    reuse_port: bool,
    kind: socket.SocketKind = socket.SOCK_STREAM,
) -> socket.socket:
    family, where = info
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise StartError(f"{title} cannot be bound: {_cause(address, error, 'tcp')}") from None
    try:
        if kind == socket.SOCK_STREAM:
            # Connections of a previous run in TIME_WAIT do not keep the port. Not on UDP, where the same
            # option lets a second process steal datagrams.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
    except OSError as error:
        sock.close()
        transport = "udp" if kind == socket.SOCK_DGRAM else "tcp"
        raise StartError(f"{title} cannot be bound: {_cause(address, error, transport)}") from None
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
                f"{address} is already in use by another process, or by a listener that covers it; stop "
                f"that one or choose another port (ss -lnp --{transport} 'sport = :{address.port}' "
                "shows who has it)"
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
