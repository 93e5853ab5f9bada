"""What an idle client connection costs in memory: thousands of them, each after one answered request.

A fresh instance of the proxy is measured, since one that has worked holds freed memory that would hide the
growth. What the kernel keeps for the sockets is not counted: it is the same for every proxy.
"""

import contextlib
import select
import socket
from dataclasses import dataclass

from bench.handshakes import client_context
from bench.measure import settled_memory_bytes
from bench.peers import Program

REQUEST = b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n"
WARM_UP_CONNECTIONS = 20


class IdleError(Exception):
    """The connections could not be made, or did not stay open."""


@dataclass(frozen=True)
class IdleFigures:
    """Memory before and after."""

    connections: int
    base_bytes: int
    full_bytes: int

    @property
    def per_connection_bytes(self) -> float:
        return (self.full_bytes - self.base_bytes) / self.connections


def _ask(connection: socket.socket) -> None:
    connection.sendall(REQUEST)
    answer = b""
    while not answer.endswith((b"a small body", b"0\r\n\r\n")):
        if not (more := connection.recv(4096)):
            raise IdleError("a connection was closed in the middle of its answer")
        answer += more
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise IdleError(f"answered {answer[:40]!r}")


def _open(port: int, count: int, *, tls: bool, keep: contextlib.ExitStack) -> list[socket.socket]:
    context = client_context() if tls else None
    opened: list[socket.socket] = []
    for _ in range(count):
        connection = keep.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        if context is not None:
            connection = keep.enter_context(context.wrap_socket(connection, server_hostname="localhost"))
        _ask(connection)
        opened.append(connection)
    return opened


def closed_by_peer(connections: list[socket.socket]) -> int:
    """How many of them the other side has shut down."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLRDHUP)
    return len(poll.poll(0))


def measure_idle(program: Program, *, connections: int, tls: bool) -> IdleFigures:
    """Opens them one after another, asks once on each, and reads the memory while all are open."""
    port = program.ports.https if tls else program.ports.http
    if port is None:
        raise IdleError("there is no such listener")
    root = program.process.pid
    try:
        with contextlib.ExitStack() as warm_up:
            _open(port, WARM_UP_CONNECTIONS, tls=tls, keep=warm_up)
        base = settled_memory_bytes(root)
        with contextlib.ExitStack() as keep:
            opened = _open(port, connections, tls=tls, keep=keep)
            full = settled_memory_bytes(root)
            if gone := closed_by_peer(opened):
                raise IdleError(f"{gone} of {connections} connections did not stay open")
    except OSError as error:
        raise IdleError(f"{type(error).__name__}: {error}") from error
    return IdleFigures(connections, base, full)
