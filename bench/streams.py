"""What an open HTTP/2 stream costs in memory: thousands of requests that wait for their answers.

The backend accepts and never answers, so every stream holds all that an exchange holds, its connection to the
backend included. The client is frames by hand: it needs no library, and weighs nothing itself. What the
kernel keeps for the sockets is not counted.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.handshakes import client_context
from bench.idle import closed_by_peer
from bench.measure import settled_memory_bytes
from bench.peers import Program

PATIENCE_S: Final = 30.0
WARM_UP_STREAMS: Final = 20
HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7
ENDS: Final = 0x5
ACK: Final = 0x1
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# GET, https and / stand in the static table (RFC 7541, appendix A); the authority is a literal.
BLOCK: Final = b"\x82\x87\x84\x01\x09localhost"


class StreamsError(Exception):
    """The streams could not be opened, or did not stay open."""


@dataclass(frozen=True)
class StreamFigures:
    """Memory before and after."""

    connections: int
    streams: int
    base_bytes: int
    full_bytes: int

    @property
    def per_stream_bytes(self) -> float:
        return (self.full_bytes - self.base_bytes) / self.streams


class SilentBackend:
    """Accepts connections and reads nothing."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._held.append(self._listener.accept()[0])

    def waiting(self) -> int:
        """The connections that are open."""
        held = list(self._held)
        return len(held) - closed_by_peer(held)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._held:
            each.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _frames(connection: socket.socket) -> Iterator[tuple[int, int]]:
    """Kind and flags of each frame that comes."""
    held = b""
    while True:
        while len(held) < 9 or len(held) < 9 + int.from_bytes(held[:3], "big"):
            if not (more := connection.recv(65536)):
                raise StreamsError("a connection was closed")
            held += more
        yield held[3], held[4]
        held = held[9 + int.from_bytes(held[:3], "big") :]


def _open(context: ssl.SSLContext, port: int, streams: int, keep: contextlib.ExitStack) -> ssl.SSLSocket:
    """A connection with that many requests, all of which the proxy has read."""
    plain = keep.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
    connection = keep.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
    if connection.selected_alpn_protocol() != "h2":
        raise StreamsError("the proxy did not agree to speak h2 (ALPN)")
    connection.sendall(PREFACE + _frame(SETTINGS, 0, 0))
    frames = _frames(connection)
    while next(frames) != (SETTINGS, 0):
        pass
    requests = (_frame(HEADERS, ENDS, 1 + 2 * each, BLOCK) for each in range(streams))
    connection.sendall(_frame(SETTINGS, ACK, 0) + b"".join(requests) + _frame(PING, 0, 0, bytes(8)))
    for kind, flags in frames:
        if kind in (HEADERS, RST_STREAM, GOAWAY):
            raise StreamsError(f"a request was answered by a frame of type {kind}")
        if (kind, flags) == (PING, ACK):
            return connection
    raise StreamsError("a connection was closed")


def _wait(backend: SilentBackend, count: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while (waiting := backend.waiting()) != count:
        if time.monotonic() > ends:
            raise StreamsError(f"{waiting} of {count} requests wait at the backend")
        time.sleep(0.05)


def measure_streams(program: Program, backend_port: int, *, connections: int, streams: int) -> StreamFigures:
    """Opens them all and reads the memory while they wait. Raises StreamsError."""
    port = program.ports.held
    if port is None:
        raise StreamsError("there is no such listener")
    context = client_context()
    context.set_alpn_protocols(["h2"])
    root = program.process.pid
    backend = SilentBackend(backend_port)
    try:
        with contextlib.ExitStack() as warm_up:
            _open(context, port, WARM_UP_STREAMS, warm_up)
            _wait(backend, WARM_UP_STREAMS)
        _wait(backend, 0)
        base = settled_memory_bytes(root)
        with contextlib.ExitStack() as keep:
            opened = [_open(context, port, streams, keep) for _ in range(connections)]
            _wait(backend, connections * streams)
            full = settled_memory_bytes(root)
            if gone := closed_by_peer(list(opened)):
                raise StreamsError(f"{gone} of {connections} connections did not stay open")
    except OSError as error:
        raise StreamsError(f"{type(error).__name__}: {error}") from error
    finally:
        backend.close()
    return StreamFigures(connections, connections * streams, base, full)
