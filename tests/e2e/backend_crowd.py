"""Many tiny real backends in one thread, and a client that asks them thousands of times through a gateway.

Introduces the *crowd*: backends by name, each on a port of its own for TCP (HTTP/1.1, keep-alive) and UDP.
Each answers every request with its name, and remembers it. One may be told to hold its answers, to take its
time, to say something else, or to be gone. ``ask`` is the other end: a few connections in one thread.

Both are as fast as they can be, so that bounds on shares can be narrow. Neither knows what a policy is.
"""

import asyncio
import re
import selectors
import socket
import threading
from collections import Counter, deque
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, Self, TypeVar, cast

import uvloop

from tests.e2e.harness import PATIENCE_S, eventually

T = TypeVar("T")

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked\r\n", re.IGNORECASE)


class Member:
    """One backend of a crowd."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0
        self.requests: list[tuple[bytes, bytes]] = []
        """Heads with their blank line, and bodies as they were meant (chunks put together)."""
        self.connections = 0
        """Accepted so far."""
        self.delay_s = 0.0
        """Before each answer."""
        self.is_held = False
        self.held: deque[_Talk] = deque()
        """Requests whose answers are held, the first one first."""
        self.says = b""
        """Said instead of the usual answer, byte for byte."""
        self.open: set[_Talk] = set()
        self.server: asyncio.AbstractServer | None = None
        self.datagrams: Counter[tuple[str, int]] = Counter()
        """By the address they came from."""
        self.udp: asyncio.DatagramTransport | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def toml(self, **keys: object) -> str:
        """Its table in a configuration."""
        more = "".join(f", {key} = {value}" for key, value in keys.items())
        return f"{{ address = '{self.address}', id = '{self.name}'{more} }}"

    def answer(self) -> bytes:
        if self.says:
            return self.says
        text = self.name.encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text)


class _Talk(asyncio.Protocol):
    """A connection to a member."""

    def __init__(self, member: Member, loop: asyncio.AbstractEventLoop) -> None:
        self._member = member
        self._loop = loop
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._member.connections += 1
        self._member.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._member.open.discard(self)
        if self in self._member.held:
            self._member.held.remove(self)

    def data_received(self, data: bytes) -> None:
        self._buffer = data if not self._buffer else self._buffer + data
        while (found := _message(self._buffer)) is not None:
            size, head, body = found
            self._buffer = self._buffer[size:]
            member = self._member
            member.requests.append((head, body))
            if member.is_held:
                member.held.append(self)
            elif member.delay_s:
                self._loop.call_later(member.delay_s, self.answer)
            else:
                self.answer()

    def answer(self) -> None:
        self._transport.write(self._member.answer())

    def abort(self) -> None:
        self._transport.abort()


def _message(buffer: bytes) -> tuple[int, bytes, bytes] | None:
    """The first whole request: its size, head and body; None if there is none yet."""
    end = buffer.find(b"\r\n\r\n") + 4
    if end < 4:
        return None
    head = buffer[:end]
    if length := _LENGTH.search(head):
        whole = end + int(length[1])
        return None if len(buffer) < whole else (whole, head, buffer[end:whole])
    if not _CHUNKED.search(head):
        return end, head, b""
    chunks: list[bytes] = []
    at = end
    while (line := buffer.find(b"\r\n", at)) >= 0:
        size = int(buffer[at:line], 16)
        at = line + 2 + size + 2
        if len(buffer) < at:
            return None
        if not size:  # and no trailers: nobody here sends any
            return at, head, b"".join(chunks)
        chunks.append(buffer[line + 2 : at - 2])
    return None


class _Echo(asyncio.DatagramProtocol):
    """A member's UDP side: tells its name."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def datagram_received(self, data: bytes, address: Any) -> None:
        member = self._member
        member.datagrams[address] += 1
        if member.udp is not None:
            member.udp.sendto(member.name.encode(), address)


class Crowd:
    """See the module's text."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._members = {name: Member(name) for name in names}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __enter__(self) -> Self:
        self._thread.start()
        for name in self.names:
            self.start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.stop(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    # -- what becomes of a member ----------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Listen, on the port it had before if it had one."""
        self._do(self._start(self[name]))

    async def _start(self, member: Member) -> None:
        for _ in range(20):  # the port must be free for both
            sock = socket.create_server(("127.0.0.1", member.port), backlog=512)
            port = sock.getsockname()[1]
            try:
                udp, _ = await self._loop.create_datagram_endpoint(
                    lambda: _Echo(member), local_addr=("127.0.0.1", port)
                )
                member.udp = cast("asyncio.DatagramTransport", udp)
            except OSError:
                sock.close()
                continue
            member.server = await self._loop.create_server(lambda: _Talk(member, self._loop), sock=sock)
            member.port = port
            return
        raise AssertionError("no port is free for TCP and UDP")

    def stop(self, name: str) -> None:
        """Be gone: refuse connections, and reset those that are open."""
        self._do(self._stop(self[name]))

    async def _stop(self, member: Member) -> None:
        server, member.server = member.server, None
        if server is not None:
            server.close()
            for talk in list(member.open):
                talk.abort()
            await server.wait_closed()
        if member.udp is not None:
            member.udp.abort()  # close() would wait for what cannot be sent
            member.udp = None

    def hold(self, *names: str) -> None:
        """Take requests and do not answer, until ``release``."""
        for name in names:
            self[name].is_held = True

    def release(self, name: str, number: int | None = None) -> None:
        """Answer the first so many requests that are held; None: all of them, and those to come."""
        self._do(self._release(self[name], number))

    async def _release(self, member: Member, number: int | None) -> None:
        if number is None:
            member.is_held = False
            number = len(member.held)
        for _ in range(number):
            member.held.popleft().answer()

    def wait_held(self, name: str, number: int) -> None:
        eventually(lambda: len(self[name].held) >= number, f"{name} holds {number} requests")

    def calm(self) -> None:
        """Everybody is there, answers at once, and remembers nothing."""
        for member in self:
            if member.server is None:
                self.start(member.name)
            member.delay_s = 0.0
            member.says = b""
            self.release(member.name)
            member.requests.clear()
            member.datagrams.clear()

    # -- what they have seen ---------------------------------------------------------------------------

    def counts(self) -> Counter[str]:
        """Requests, by name; those that had none are not in it."""
        return +Counter({member.name: len(member.requests) for member in self})


class Answer(NamedTuple):
    status: int
    head: bytes
    """With its blank line."""
    body: bytes

    @property
    def name(self) -> str:
        """Of the backend that answered."""
        return self.body.decode()

    def header(self, name: str) -> str:
        """The field's value, of several the first; empty if there is none."""
        match = re.search(rb"\r\n%s: *([^\r]*)\r\n" % re.escape(name.encode()), self.head, re.IGNORECASE)
        return match[1].decode() if match else ""


def get(host: str = "a.example", path: str = "/", **headers: str) -> bytes:
    """A request; the underscores of ``headers`` are hyphens."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode()


class _Lane:
    """One connection of ``ask``."""

    def __init__(self, port: int, source: str) -> None:
        local = (source, 0) if source else None
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE_S, local)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked: deque[int] = deque()
        self._buffer = b""

    def read(self) -> list[Answer]:
        data = self.sock.recv(262_144)
        if not data:
            raise AssertionError(f"the connection ended with {len(self.asked)} answers to come")
        buffer = self._buffer + data
        answers = []
        at = 0
        while (end := buffer.find(b"\r\n\r\n", at) + 4) >= 4:
            head = buffer[at:end]
            length = _LENGTH.search(head)
            if length is None:
                raise AssertionError(f"an answer without a length: {head!r}")
            whole = end + int(length[1])
            if len(buffer) < whole:
                break
            answers.append(Answer(int(head[9:12]), head, buffer[end:whole]))
            at = whole
        self._buffer = buffer[at:]
        return answers


def ask(
    port: int, requests: Iterable[bytes], *, lanes: int = 4, window: int = 16, source: str = ""
) -> list[Answer]:
    """The answers, in the order of the requests.

    ``lanes`` connections take from the requests whenever they have been answered, up to ``window`` at a time.
    One lane, or a window of 1, keeps the gateway's view simple.
    """
    wanted: Sequence[bytes] = list(requests)
    answers: list[Answer | None] = [None] * len(wanted)
    left = deque(range(len(wanted)))
    open_ = [_Lane(port, source) for _ in range(min(lanes, len(wanted)))]
    try:
        with selectors.DefaultSelector() as selector:
            for lane in open_:
                selector.register(lane.sock, selectors.EVENT_READ, lane)
                _feed(lane, left, wanted, window)
            while any(lane.asked for lane in open_):
                ready = selector.select(PATIENCE_S)
                if not ready:
                    raise AssertionError(f"no answer within {PATIENCE_S} s")
                for key, _ in ready:
                    lane = key.data
                    for answer in lane.read():
                        answers[lane.asked.popleft()] = answer
                    if not lane.asked:
                        _feed(lane, left, wanted, window)
    finally:
        for lane in open_:
            lane.sock.close()
    return cast("list[Answer]", answers)


def _feed(lane: _Lane, left: deque[int], wanted: Sequence[bytes], window: int) -> None:
    for _ in range(min(window, len(left))):
        lane.asked.append(left.popleft())
    if lane.asked:
        lane.sock.sendall(b"".join([wanted[at] for at in lane.asked]))


def shares(answers: Iterable[Answer]) -> Counter[str]:
    """How many answers each backend gave. Fails on any other answer."""
    found: Counter[str] = Counter()
    for answer in answers:
        assert answer.status == 200, answer
        found[answer.name] += 1
    return found
