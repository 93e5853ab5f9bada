"""Talks: one end of one exchange, a client's or a backend's, behind one face for every version of HTTP.

A test that uses talks alone says the same thing to every version. HTTP/2 is spoken by the Python package
``h2``, which shares no code with the gateway; HTTP/1.1 by hand. A talk gives credit for what it has read and
for nothing else, so that one that does not read stalls its peer.
"""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from tests.e2e.harness import PATIENCE_S

Fields = list[tuple[str, str]]


class CutError(Exception):
    """The exchange ended before its message was complete."""


class Talk(Protocol):
    """One end of one exchange. What is received has lower-case names, ``:method`` and its like included.

    Whatever is asked of an exchange that was lost raises ``CutError``.
    """

    connection: int
    """A backend's: which of its connections this is on."""
    headers: dict[str, str]
    trailers: Fields

    def send_head(self, fields: Fields, *, end: bool = False) -> None: ...
    def send(self, data: bytes, *, end: bool = False) -> None:
        """Waits for as long as the peer takes nothing. ``end``: nothing follows."""

    def offer(self, total: int, quiet_s: float = 0.5) -> int:
        """Send up to so many zeroes; stops when none is taken for ``quiet_s``. Give what was taken."""

    def finish(self, trailers: Fields | None = None) -> None: ...
    def read_head(self) -> dict[str, str]: ...
    def read(self) -> bytes:
        """Something of the body; nothing at its end."""

    def until_lost(self) -> None:
        """Wait until the peer gives the exchange up."""

    def cut(self) -> None:
        """Give the exchange up."""


def rest(talk: Talk) -> bytes:
    """The body to its end."""
    return b"".join(iter(talk.read, b""))


def answer(talk: Talk, body: bytes = b"", *more: tuple[str, str]) -> None:
    """A response of known length."""
    talk.send_head([(":status", "200"), ("content-length", str(len(body))), *more], end=not body)
    if body:
        talk.send(body, end=True)


# -- HTTP/1.1 ------------------------------------------------------------------------------------------


class H1Talk:
    """See ``Talk``. At most one at a time on its connection."""

    def __init__(self, sock: socket.socket, connection: int = 0) -> None:
        self.connection = connection
        self.headers: dict[str, str] = {}
        self.trailers: Fields = []
        self.sock = sock
        self._held = b""
        self._left = 0  # of the body, or of its chunk
        self._is_chunked = False  # what is received, and what is sent
        self._sends_chunks = False
        self._is_read = True

    @property
    def is_read(self) -> bool:
        return self._is_read and not self._held

    def send_head(self, fields: Fields, *, end: bool = False) -> None:
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        if ":status" in pseudo:
            lines = [f"HTTP/1.1 {pseudo[':status']} Said"]
        else:
            lines = [f"{pseudo[':method']} {pseudo[':path']} HTTP/1.1", f"host: {pseudo[':authority']}"]
        lines += [f"{name}: {value}" for name, value in fields if not name.startswith(":")]
        names = {name for name, _ in fields}
        if "te" in names:
            lines.append("connection: te")
        self._sends_chunks = not end and "content-length" not in names
        if self._sends_chunks:
            lines.append("transfer-encoding: chunked")
        self._write("\r\n".join([*lines, "", ""]).encode())

    def _write(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise CutError from error

    def send(self, data: bytes, *, end: bool = False) -> None:
        self._write(b"%x\r\n%s\r\n" % (len(data), data) if self._sends_chunks else data)
        if end:
            self.finish()

    def offer(self, total: int, quiet_s: float = 0.5) -> int:
        zeroes = memoryview(bytes(65_536))
        taken = 0
        self.sock.settimeout(quiet_s)
        with contextlib.suppress(TimeoutError):
            while taken < total:
                taken += self.sock.send(zeroes[: total - taken])
        self.sock.settimeout(PATIENCE_S)
        return taken

    def finish(self, trailers: Fields | None = None) -> None:
        if self._sends_chunks:
            lines = [f"{name}: {value}\r\n" for name, value in trailers or []]
            self._write(f"0\r\n{''.join(lines)}\r\n".encode())

    def _more(self) -> None:
        try:
            data = self.sock.recv(262_144)
        except OSError as error:
            raise CutError from error
        if not data:
            raise CutError
        self._held += data

    def _line(self) -> str:
        while b"\r\n" not in self._held:
            self._more()
        line, _, self._held = self._held.partition(b"\r\n")
        return line.decode("latin-1")

    def _lines(self) -> Fields:
        found: Fields = []
        while line := self._line():
            name, _, value = line.partition(":")
            found.append((name.lower(), value.strip()))
        return found

    def read_head(self) -> dict[str, str]:
        first = self._line().split(" ")
        self.headers = dict(self._lines())
        if first[0].startswith("HTTP/"):
            if first[1].startswith("1"):
                return self.read_head()
            self.headers[":status"] = first[1]
        else:
            self.headers |= {":method": first[0], ":path": first[1]}
        self._is_chunked = self.headers.get("transfer-encoding") == "chunked"
        self._left = int(self.headers.get("content-length", "0"))
        self._is_read = not self._is_chunked and not self._left
        return self.headers

    def read(self) -> bytes:
        if self._is_read:
            return b""
        if self._is_chunked and not self._left:
            self._left = int(self._line(), 16)
            if not self._left:
                self.trailers = self._lines()
                self._is_read = True
                return b""
        if not self._held:
            self._more()
        data, self._held = self._held[: self._left], self._held[self._left :]
        self._left -= len(data)
        if self._is_chunked and not self._left:
            self._line()
        self._is_read = not self._is_chunked and not self._left
        return data

    def until_lost(self) -> None:
        """Wait until the peer gives the exchange up."""
        with contextlib.suppress(CutError):
            while True:
                self._more()

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class H1Caller:
    """One connection of a client."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def call(self, fields: Fields, *, end: bool) -> H1Talk:
        talk = H1Talk(self._sock)
        talk.send_head(fields, end=end)
        return talk

    def close(self) -> None:
        self._sock.close()


# -- HTTP/2 --------------------------------------------------------------------------------------------


class H2Talk:
    """See ``Talk``. One stream of an ``H2End``."""

    def __init__(self, end: "H2End", stream: int) -> None:
        self.connection = end.number
        self.headers: dict[str, str] = {}
        self.trailers: Fields = []
        self.stream = stream
        self.pieces: list[tuple[bytes, int]] = []  # with the credit that they cost
        self.is_ended = False  # by the peer
        self.is_lost = False
        self._end = end

    def _wait(self, check: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
        """With the lock held. Raises ``CutError`` when the exchange is lost."""
        found = self._end.changed.wait_for(lambda: bool(check()) or self.is_lost, seconds)
        if self.is_lost and not check():
            raise CutError
        return found

    def send_head(self, fields: Fields, *, end: bool = False) -> None:
        with self._end.speaking(self) as connection:
            connection.send_headers(self.stream, fields, end_stream=end)

    def _room(self) -> int:
        connection = self._end.h2
        if self.is_lost:
            return 0
        return min(connection.local_flow_control_window(self.stream), connection.max_outbound_frame_size)

    def _send_some(self, data: bytes, seconds: float, *, end: bool = False) -> int:
        """``end``: the data are the last, if all can be sent."""
        with self._end.changed:
            self._wait(self._room, seconds)
        with self._end.speaking(self) as connection:
            size = min(self._room(), len(data))
            if size:
                connection.send_data(self.stream, data[:size], end_stream=end and size == len(data))
            return size

    def send(self, data: bytes, *, end: bool = False) -> None:
        at = 0
        while at < len(data):
            is_last = end and at + 65_536 >= len(data)
            taken = self._send_some(data[at : at + 65_536], PATIENCE_S, end=is_last)
            if not taken:
                raise AssertionError("the peer gives no credit")
            at += taken

    def offer(self, total: int, quiet_s: float = 0.5) -> int:
        taken = 0
        while taken < total and (more := self._send_some(bytes(min(65_536, total - taken)), quiet_s)):
            taken += more
        return taken

    def finish(self, trailers: Fields | None = None) -> None:
        with self._end.speaking(self) as connection:
            if trailers:
                connection.send_headers(self.stream, trailers, end_stream=True)
            else:
                connection.end_stream(self.stream)

    def read_head(self) -> dict[str, str]:
        with self._end.changed:
            if not self._wait(lambda: self.headers):
                raise AssertionError("no head came")
        return self.headers

    def read(self) -> bytes:
        with self._end.changed:
            if not self._wait(lambda: self.pieces or self.is_ended):
                raise AssertionError("no body came")
            if not self.pieces:
                return b""
            data = b"".join(piece for piece, _ in self.pieces)
            credit = sum(cost for _, cost in self.pieces)
            self.pieces.clear()
            if credit and not self.is_lost:
                with contextlib.suppress(h2.exceptions.ProtocolError):  # its stream may be over
                    self._end.h2.acknowledge_received_data(credit, self.stream)
            self._end.flush()
        return data

    def until_lost(self) -> None:
        """Wait until the peer gives the exchange up."""
        with self._end.changed:
            if not self._end.changed.wait_for(lambda: self.is_lost, PATIENCE_S):
                raise AssertionError("the peer did not give the exchange up")

    def cut(self) -> None:
        with contextlib.suppress(CutError), self._end.speaking(self) as connection:
            connection.reset_stream(self.stream, h2.errors.ErrorCodes.CANCEL)
            self.is_lost = True


def _text(fields: Iterable[tuple[str | bytes, str | bytes]]) -> Fields:
    """The package's types allow for bytes, which ``header_encoding`` rules out."""
    return [(str(name), str(value)) for name, value in fields]


Answerer = Callable[[Talk], None]


class H2End:
    """One connection in either role; ``pump`` is its loop, for a thread."""

    def __init__(self, sock: socket.socket, answerer: Answerer | None = None, number: int = 0) -> None:
        """``answerer``: a server's."""
        self.number = number
        self.changed = threading.Condition(threading.RLock())
        """Its lock guards all; whoever waits is told of every frame."""
        config = h2.config.H2Configuration(client_side=answerer is None, header_encoding="latin-1")
        self.h2 = h2.connection.H2Connection(config)
        self._answerer = answerer
        self._sock = sock
        self._talks: dict[int, H2Talk] = {}
        self._out = b""
        self._is_open = True
        self._waker, self._woken = socket.socketpair()
        self._sock.setblocking(False)
        self._woken.setblocking(False)
        if answerer is not None:
            streams: dict[h2.settings.SettingCodes | int, int] = {
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1000
            }
            self.h2.local_settings.update(streams)
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(2**24)  # one talk that does not read must not stop the others
        self.flush()

    @contextlib.contextmanager
    def speaking(self, talk: H2Talk) -> Iterator[h2.connection.H2Connection]:
        """The connection, to be told something about a talk that is not lost."""
        with self.changed:
            if talk.is_lost or not self._is_open:
                raise CutError
            try:
                yield self.h2
            except h2.exceptions.ProtocolError as error:
                raise CutError from error
            self.flush()

    def flush(self) -> None:
        """With the lock held."""
        self._out += self.h2.data_to_send()
        try:
            while self._out:
                self._out = self._out[self._sock.send(self._out) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._waker.send(b"!")
        except OSError:
            self._lose()

    def _lose(self) -> None:
        self._is_open = False
        self._out = b""
        for talk in self._talks.values():
            talk.is_lost = True

    def pump(self) -> None:
        """Until the connection ends."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        while self._is_open:
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._out else 0))
            poll.poll(1000)
            with self.changed, contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            with self.changed:
                self._receive()
                if self._is_open:
                    self.flush()
                self.changed.notify_all()
        with self.changed:
            for each in (self._sock, self._waker, self._woken):
                each.close()

    def _receive(self) -> None:
        try:
            while self._is_open:
                data = self._sock.recv(262_144)
                if not data:
                    self._lose()
                    return
                for event in self.h2.receive_data(data):
                    self._take(event)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, h2.exceptions.ProtocolError):
            self._lose()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            talk = self._talks[event.stream_id] = H2Talk(self, event.stream_id)
            talk.headers = dict(_text(event.headers))
            threading.Thread(target=self._answer, args=(talk,), daemon=True).start()
            return
        found = self._talks.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.DataReceived):
            if found is None:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                found.pieces.append((event.data, event.flow_controlled_length))
        elif found is None:
            return
        elif isinstance(event, h2.events.ResponseReceived):
            found.headers = dict(_text(event.headers))
        elif isinstance(event, h2.events.TrailersReceived):
            found.trailers = _text(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            found.is_ended = True
        elif isinstance(event, h2.events.StreamReset):
            found.is_lost = True

    def _answer(self, talk: H2Talk) -> None:
        if self._answerer is not None:
            with contextlib.suppress(CutError):
                self._answerer(talk)

    # -- a client's ------------------------------------------------------------------------------------

    def call(self, fields: Fields, *, end: bool) -> H2Talk:
        with self.changed:
            talk = H2Talk(self, self.h2.get_next_available_stream_id())
            self._talks[talk.stream] = talk
            talk.send_head(fields, end=end)
        return talk

    def close(self) -> None:
        with self.changed, contextlib.suppress(OSError):  # it may be closed already
            self._lose()
            self._waker.send(b"!")


def begin_h2(sock: socket.socket) -> H2End:
    end = H2End(sock)
    threading.Thread(target=end.pump, daemon=True).start()
    return end
