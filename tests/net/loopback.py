"""What the tests of the rooms with sockets share: a loop with its reactor, raw peers, owners that remember.

Everything runs on one uvloop in this process; the far end of a connection is a plain socket that the test
itself reads and writes, so what it sees is what a stranger would see.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

import uvloop

from expressgateway.net.reactor import Reactor
from expressgateway.net.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

PATIENCE_S: Final = 30.0
RST: Final = struct.pack("ii", 1, 0)


class World:
    """A running loop's reactor, with its batches counted."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.reactor = Reactor(self.loop)
        self.batches = 0
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        poll = self.reactor._poll

        def counted(timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
            self.batches += 1
            return poll(timeout, maxevents)

        self.reactor._poll = counted

    async def turns(self, count: int = 5) -> None:
        """Let the loop poll so many times: what loopback has delivered is seen by then."""
        for _ in range(count):
            await asyncio.sleep(0.001)

    async def until(self, condition: Callable[[], object], what: str = "") -> None:
        ends = self.loop.time() + PATIENCE_S
        while not condition():
            if self.loop.time() > ends:
                raise AssertionError(f"never: {what or condition}")
            await asyncio.sleep(0.0005)

    async def batches_in(self, seconds: float = 0.05) -> int:
        """How many batches come while nothing should be happening."""
        before = self.batches
        await asyncio.sleep(seconds)
        return self.batches - before


def run(
    test: Callable[[World], Coroutine[Any, Any, None]], *, timeout_s: float = 60.0, faults: int = 0
) -> None:
    """Run it on a loop of its own. No fault of the safety net, no error of the loop, no descriptor left."""

    async def main() -> None:
        world = World()
        try:
            async with asyncio.timeout(timeout_s):
                await test(world)
        finally:
            seen = world.reactor.faults
            left = dict(world.reactor._handlers)
            world.reactor.close()
        assert world.errors == []
        assert seen == faults, "the safety net was needed"
        assert left == {}, "descriptors left in the reactor"

    _warm_up()
    gc.collect()
    before = descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    gc.collect()
    assert descriptors() <= before, "descriptors leaked"


@functools.cache
def _warm_up() -> None:
    """The first loop of a process keeps descriptors for good."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))
    gc.collect()
    gc.freeze()  # the collections around every test look at what the test made, not at all that was imported


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Owner:
    """A stream's owner that remembers: ``calls`` in order, runs of bytes as one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.error = ""
        self.stream: Stream | None = None
        self.was_delivered: bool | None = None
        self.mark = 0

    def on_open(self) -> None:
        self.calls.append("open")

    def on_bytes(self, data: bytes) -> None:
        if not self.calls or self.calls[-1] != "bytes":
            self.calls.append("bytes")
        self.data += data

    def on_eof(self) -> None:
        self.calls.append("eof")

    def on_closed(self, error: str) -> None:
        self.calls.append("closed")
        self.error = error
        if self.stream is not None:
            self.was_delivered = self.stream.was_delivered(self.mark)

    def on_released(self) -> None:
        self.calls.append("released")

    def on_congested(self) -> None:
        self.calls.append("congested")

    def on_drained(self) -> None:
        self.calls.append("drained")

    def has_ended(self) -> bool:
        """Released, once, and nothing was heard afterwards."""
        return self.calls.count("released") == 1 and self.calls[-1] == "released"


class Peer:
    """The far end: a non-blocking socket, read and written by the test."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.got = bytearray()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self, size: int = 65536) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(self.sock, size)

    async def read_until(self, end: bytes) -> bytes:
        while end not in self.got:
            data = await self.read()
            if not data:
                raise AssertionError(f"the connection ended after {bytes(self.got)!r}")
            self.got += data
        at = self.got.index(end) + len(end)
        found = bytes(self.got[:at])
        del self.got[:at]
        return found

    async def read_exactly(self, size: int) -> bytes:
        while len(self.got) < size:
            data = await self.read(262144)
            if not data:
                raise AssertionError(f"the connection ended after {len(self.got)} of {size} bytes")
            self.got += data
        found = bytes(self.got[:size])
        del self.got[:size]
        return found

    async def read_all(self) -> bytes:
        while data := await self.read(262144):
            self.got += data
        found = bytes(self.got)
        self.got.clear()
        return found

    def write_eof(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


async def is_reset(peer: Peer) -> bool:
    """Whether the far end sent RST, whatever came before."""
    try:
        await peer.read_all()
    except OSError as error:
        return error.errno == errno.ECONNRESET
    return False


def connection() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname(), timeout=PATIENCE_S)
        near, _ = server.accept()
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
    return near, far


def narrow(near: socket.socket, far: socket.socket) -> None:
    """Small buffers: a few hundred KiB fill the connection."""
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)


def stream_and_peer(world: World, *, is_narrow: bool = False) -> tuple[Stream, Owner, Peer]:
    near, far = connection()
    if is_narrow:
        narrow(near, far)
    owner = Owner()
    stream = Stream(world.reactor, near, owner)
    owner.stream = stream
    stream.start()
    return stream, owner, Peer(far)


class Backend:
    """A listening socket whose connections the test answers by hand."""

    def __init__(self, backlog: int = 64) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.sock.setblocking(False)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.sock.getsockname()
        return host, port

    async def accept(self) -> Peer:
        async with asyncio.timeout(PATIENCE_S):
            sock, _ = await asyncio.get_running_loop().sock_accept(self.sock)
        return Peer(sock)

    def close(self) -> None:
        self.sock.close()


def refused_address() -> tuple[str, int]:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
    return host, port
