"""The server role of HTTP/1 (RFC 9112): one connection from a client, one exchange at a time.

Theory. Reading and writing advance independently: a response may begin, and finish, before its request has.
``reading`` and ``writing`` say how far each side of the current exchange is. When both are done the
connection is idle again, or closes. Pipelined requests wait, unread beyond one buffer, until the response
before them is complete: the shell is told to stop reading. After an error ``reading`` is ``DISCARD``:
whatever still arrives goes nowhere, by construction.

The shell owns the socket; it calls ``receive_data`` and ``receive_eof``, takes ``out`` and writes it.
"""

from enum import IntEnum
from typing import Protocol

from expressgateway.wire.errors import (
    AuthorityError,
    ContradictionError,
    FramingError,
    HeadTooLargeError,
    MalformedError,
    PeerClosedError,
    TargetTooLongError,
    TruncatedError,
    WireError,
)
from expressgateway.wire.h1.body import BodyReader, ChunkReader, LengthReader, last_chunk
from expressgateway.wire.h1.fields import FieldReader, Section, check_authority, lines_of
from expressgateway.wire.h1.start import read_request_line, status_line
from expressgateway.wire.head import WEBSOCKET, Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import RequestSink, ServerStream


class Reading(IntEnum):
    HEAD = 0
    """Between messages, or inside a head."""
    BODY = 1
    DONE = 2
    """The request is complete; its response is not."""
    TUNNEL = 3
    """After 101: bytes, not messages."""
    DISCARD = 4


class Writing(IntEnum):
    IDLE = 0
    """No exchange, or no final head sent yet."""
    LENGTH = 1
    CHUNKED = 2
    CLOSE = 3
    """A body that ends with the connection (HTTP/1.0 clients)."""
    NONE = 4
    """The head was sent; the body is not to be sent (HEAD)."""
    DONE = 5


HEAD, BODY, READ_DONE, TUNNEL, DISCARD = (
    Reading.HEAD,
    Reading.BODY,
    Reading.DONE,
    Reading.TUNNEL,
    Reading.DISCARD,
)
IDLE, LENGTH, CHUNKED, CLOSE, NONE, DONE = (
    Writing.IDLE,
    Writing.LENGTH,
    Writing.CHUNKED,
    Writing.CLOSE,
    Writing.NONE,
    Writing.DONE,
)


class Limits:
    """What one request's head may cost. Shared by a listener's connections."""

    __slots__ = ("fields", "max_head_bytes", "max_target_bytes", "websocket")

    def __init__(
        self, fields: FieldReader, max_head_bytes: int, max_target_bytes: int, websocket: bool
    ) -> None:
        self.fields = fields
        self.max_head_bytes = max_head_bytes
        self.max_target_bytes = max_target_bytes
        self.websocket = websocket


class Shell(Protocol):
    """The connection around the codec."""

    def wake(self) -> None:
        """``out`` is no longer empty: flush soon."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def unsent(self) -> int: ...
    def open_exchange(self, stream: ServerStream) -> RequestSink: ...
    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        """Nothing was forwarded: answer with ``error.status`` and close."""

    def exchange_done(self, is_reusable: bool) -> None:
        """The exchange is complete and in ``out``. Not reusable: flush, then close gracefully."""

    def half_close(self) -> None:
        """Flush ``out``, then end the sending side only."""

    def reset(self) -> None:
        """Close so that what was sent cannot be taken for complete."""


class H1Server:
    """One client connection's codec, and the server stream of its current exchange."""

    __slots__ = (
        "_block",
        "_body",
        "_held",
        "_left",
        "_length",
        "_searched",
        "_section",
        "_sink",
        "close_after",
        "is_head",
        "limits",
        "out",
        "reading",
        "scheme",
        "shell",
        "trailers_allowed",
        "version",
        "writing",
    )

    def __init__(self, shell: Shell, limits: Limits, scheme: bytes) -> None:
        # Wiring
        self.shell = shell
        self.limits = limits
        self.scheme = scheme
        # Connection
        self.out: list[bytes] = []  # bounded by the exchange: it stops its backend at the high mark
        self.reading = HEAD
        self.close_after = False  # the current exchange is the last one
        self._held = bytearray()  # an incomplete head, at most max_head_bytes, or one read of pipelined bytes
        self._searched = 0  # how far _held was searched for the end of a head
        self._block: bytes | None = None  # the last header section, as bytes ...
        self._section: Section | None = None  # ... and as read: clients repeat themselves
        # Exchange
        self.writing = IDLE
        self._sink: RequestSink | None = None
        self._body: BodyReader | None = None
        self._length: int | None = None  # declared by the response
        self._left = 0  # of it
        self.is_head = False
        self.version = b"1.1"
        self.trailers_allowed = False

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def is_mid_head(self) -> bool:
        """Part of a request's head has arrived, and not its end. A stray CRLF is none (RFC 9112 2.2)."""
        return self.reading is HEAD and len(self._held) > 0 and self._held != b"\r\n"

    @property
    def is_idle(self) -> bool:
        """No exchange under way and nothing of a next one received."""
        return self.reading is HEAD and self.writing is IDLE and not self.is_mid_head

    def receive_data(self, data: bytes) -> None:
        """Take what the client sent. Never raises."""
        try:
            self._receive(data)
        except WireError as error:
            self._fail(error)

    def _receive(self, data: bytes) -> None:
        while data:
            reading = self.reading
            if reading is HEAD:
                rest = self._receive_head(data)
            elif reading is BODY or reading is TUNNEL:
                if self._body is None:
                    self._on_data(data, False)
                    return
                rest = self._body.feed(data)
            elif reading is READ_DONE:
                # A pipelined request: hold this read, and read no more until its turn.
                self._held += data
                self.shell.pause_reading()
                return
            else:
                return
            if rest is None:
                return
            data = rest

    def _receive_head(self, data: bytes) -> bytes | None:
        limits = self.limits
        held = self._held
        if held:
            held += data
            end = held.find(b"\r\n\r\n", max(0, self._searched - 3))
            if end < 0:
                self._searched = len(held)
                self._check_partial(held)
                return None
            data = bytes(held)
            held.clear()
            self._searched = 0
        else:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._held += data
                self._check_partial(self._held)
                return None
        if end > limits.max_head_bytes:
            raise self._too_large(data)
        start = 0
        if data.startswith(b"\r\n"):
            start = 2
            if end == 0:  # RFC 9112 2.2 lets a server ignore one blank line, not a stream of them
                raise MalformedError("blank lines instead of a request")
        line_end = data.find(b"\r\n", start, end)
        if line_end < 0:
            line_end = end
        self._on_head(data[start:line_end], data[line_end + 2 : end])
        return data[end + 4 :]

    def _check_partial(self, held: bytearray) -> None:
        """Judge an incomplete head early: its size, and whether its first line can become a request."""
        limits = self.limits
        if len(held) > limits.max_head_bytes + 3:  # the end may lack its last byte only
            raise self._too_large(bytes(held))
        first = held[0]
        if first <= 0x20 and first != 0x0D:
            raise MalformedError("a request that does not begin with a method")
        if b"\n" in held and held.find(b"\n") != held.find(b"\r\n") + 1:
            raise MalformedError("a bare LF in the head")

    def _too_large(self, head: bytes) -> WireError:
        """Which part of a head is too large: the target (414), or the fields (431)?"""
        limits = self.limits
        eol = head.find(b"\r\n", 0, limits.max_target_bytes + 64)
        if eol < 0:
            return TargetTooLongError(f"a request line of more than {limits.max_target_bytes} bytes")
        return HeadTooLargeError(f"a head of more than {limits.max_head_bytes} bytes")

    def _on_head(self, line: bytes, block: bytes) -> None:
        limits = self.limits
        method, path, version, target_authority = read_request_line(line, limits.max_target_bytes)
        self.version = version
        # fast path: the same header section as last time on this connection
        section = self._section
        if section is None or block != self._block:
            section = limits.fields.read(block)
            self._section = section
            self._block = block
        authority = self._authority(section, version, target_authority)
        if section.chunked:
            if version == b"1.0":
                raise FramingError("Transfer-Encoding from an HTTP/1.0 client")
            body: BodyReader | None = ChunkReader(self._on_data, self._on_trailers, limits.fields)
        elif section.content_length:
            body = LengthReader(section.content_length, self._on_data)
        else:
            body = None
        self.is_head = method == b"HEAD"
        self.trailers_allowed = section.accepts_trailers and version == b"1.1"
        self.close_after = section.close or (version == b"1.0" and not section.keep_alive)
        head = RequestHead(
            method,
            self.scheme,
            authority,
            path,
            section.headers,
            None,
            section.content_length,
            version,
            section.accepts_trailers,
            section.expects_continue,
        )
        if section.wants_upgrade and self._is_websocket(section, method, version, body):
            head.protocol = WEBSOCKET
        sink = self.shell.open_exchange(self)
        self._sink = sink
        self._body = body
        self.writing = IDLE
        if body is None:
            # What comes after a handshake is held back like a pipelined request: it may be one, if the
            # backend declines, and must not reach it unseen.
            self.reading = READ_DONE
            sink.on_request(head, head.protocol is None)
        else:
            self.reading = BODY
            sink.on_request(head, False)

    def _is_websocket(self, section: Section, method: bytes, version: bytes, body: BodyReader | None) -> bool:
        """RFC 6455 4.1. Any other Upgrade is dropped like every hop-by-hop field, h2c first of all."""
        return (
            self.limits.websocket
            and section.upgrade == WEBSOCKET
            and method == b"GET"
            and version == b"1.1"
            and body is None
        )

    @staticmethod
    def _authority(section: Section, version: bytes, target_authority: bytes | None) -> bytes:
        authority = section.authority
        if authority is not None and target_authority is None:
            return authority  # fast path: judged before
        hosts = section.hosts
        if len(hosts) > 1:
            raise AuthorityError("Host more than once")
        if not hosts:
            if version == b"1.1":
                raise AuthorityError("an HTTP/1.1 request without Host")
            return target_authority or b""
        authority = check_authority(hosts[0])
        section.authority = authority
        if target_authority is not None and target_authority != authority:
            raise AuthorityError("Host and the request target disagree")
        return authority

    def _on_data(self, chunk: bytes, end: bool) -> None:
        if self.reading is DISCARD:
            return
        sink = self._sink
        if end:
            self.reading = READ_DONE
            self._body = None
        if sink is not None:
            sink.on_request_data(chunk, end)
        if end and self.writing is DONE:
            self._exchange_done()

    def _on_trailers(self, fields: Fields) -> None:
        if self.reading is DISCARD:
            return
        self.reading = READ_DONE
        self._body = None
        if self._sink is not None:
            self._sink.on_request_trailers(fields)
        if self.writing is DONE:
            self._exchange_done()

    def receive_eof(self) -> None:
        """The client closed its sending side. Never raises.

        While it waits for an answer this is a cancellation: a program that gives up closes its socket, and
        its kernel cannot say more than FIN. (Clients that half-close after a request are not served.)
        """
        if self.reading is BODY:
            self._fail(TruncatedError("the client ended in the middle of a request"))
        elif self.reading is TUNNEL:
            self._on_data(b"", True)
        elif self.reading is READ_DONE:
            self.receive_reset()
        else:
            self._held.clear()
            self.reading = DISCARD

    def receive_reset(self) -> None:
        """The connection is gone. Never raises."""
        sink, self._sink = self._sink, None
        self.reading = DISCARD
        self.writing = DONE
        if sink is not None:
            sink.on_request_abort(PeerClosedError("the client closed the connection"))

    def fail(self, error: WireError) -> None:
        """A limit of the shell ended the request (a deadline). Never raises."""
        self._fail(error)

    def _fail(self, error: WireError) -> None:
        """Nothing after this can be trusted: stop reading for good, end what is under way, and close."""
        had_exchange = self.reading is not HEAD
        self.reading = DISCARD
        self._held.clear()
        self._body = None
        self.close_after = True
        sink = self._sink
        if sink is not None and had_exchange:
            # The exchange answers if it still can, and tells its backend in any case.
            sink.on_request_abort(error)
        elif self.writing is IDLE:
            self.shell.refuse(self, error, None)

    # -- writing: the server stream --------------------------------------------------------------------

    def send_informational(self, head: ResponseHead) -> None:
        """1xx, and 101 which turns the connection into a tunnel."""
        if self.version == b"1.0" or self.writing is not IDLE:
            return  # RFC 9110 15.2: none to an HTTP/1.0 client
        lines = [status_line(head.status), lines_of(head.shared)]
        if head.status == 101:
            lines.append(b"connection: upgrade\r\nupgrade: websocket\r\n")
            self.writing = CLOSE
            self.close_after = True
        for name, value in head.headers:
            lines.append(name + b": " + value + b"\r\n")
        lines.append(b"\r\n")
        self._write(b"".join(lines))
        if head.status == 101 and self.reading is READ_DONE:
            self.reading = TUNNEL
            early = self.take_pipelined()
            if early:
                self._on_data(early, False)
            self.shell.resume_reading()

    def send_head(self, head: ResponseHead, end: bool) -> None:
        """The final head. Framing follows from the request, the status and the declared length."""
        status = head.status
        length = head.content_length
        if self.reading is BODY and status >= 400:
            # A refusal in the middle of the upload: the rest will not be read, and the client is told so
            # (RFC 9112 9.6). An early success may be the begin of a conversation.
            self.close_after = True
        lines = [status_line(status), head.shared.h1 or lines_of(head.shared)]
        for name, value in head.headers:
            lines.append(name + b": " + value + b"\r\n")
        if status == 204 or status == 304 or self.is_head:
            # RFC 9110 8.6: a length may describe what would have been sent; 204 must not have one.
            self.writing = NONE
            if length is not None and status != 204:
                lines.append(b"content-length: %d\r\n" % length)
        elif length is not None:
            self.writing = LENGTH
            self._length = self._left = length
            lines.append(b"content-length: %d\r\n" % length)
        elif end:
            self.writing = LENGTH
            self._left = 0
            lines.append(b"content-length: 0\r\n")
        elif self.version == b"1.1":
            self.writing = CHUNKED
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self.writing = CLOSE
            self.close_after = True
        if self.close_after:
            lines.append(b"connection: close\r\n\r\n")
        elif self.version == b"1.0":
            lines.append(b"connection: keep-alive\r\n\r\n")
        else:
            lines.append(b"\r\n")
        self._write(b"".join(lines))
        if end:
            self._end()

    def send_data(self, chunk: bytes, end: bool) -> None:
        """Part of the body. More or less than was declared never looks complete to the client."""
        writing = self.writing
        if chunk:
            if writing is LENGTH:
                left = self._left - len(chunk)
                if left < 0:
                    self._contradicted()
                    return
                self._left = left
                self._write(chunk)
            elif writing is CHUNKED:
                out = self.out
                if not out:
                    self.shell.wake()
                out += (b"%x\r\n" % len(chunk), chunk, b"\r\n")
            elif writing is CLOSE:
                self._write(chunk)
        if end:
            self._end()

    def send_trailers(self, fields: Fields) -> None:
        """The trailer section, if there can be one, and the end."""
        if self.writing is CHUNKED and fields and self.trailers_allowed:
            self._write(last_chunk(fields))
            self.writing = NONE  # the end is written already
        self._end()

    def _end(self) -> None:
        writing = self.writing
        if writing is CHUNKED:
            self._write(b"0\r\n\r\n")
        elif writing is LENGTH and self._left:
            self._contradicted()
            return
        elif writing is DONE:
            return
        self.writing = DONE
        if self.reading is READ_DONE or self.reading is DISCARD:
            self._exchange_done()
        elif self.reading is TUNNEL:
            self.shell.half_close()  # the other direction goes on
        else:
            # RFC 9112 9.3: the rest of the request will not be read; the connection cannot be used again.
            self.close_after = True
            self._sink = None
            self.reading = DISCARD
            self.shell.exchange_done(False)

    def _contradicted(self) -> None:
        """What there is to send is not what the head declared: it must not look complete."""
        sink = self._sink
        self.abort(None)
        if sink is not None:
            sink.on_request_abort(ContradictionError("a response that contradicts its declared length"))

    def _exchange_done(self) -> None:
        self._sink = None
        is_reusable = not self.close_after and self.reading is READ_DONE
        if not is_reusable:
            self.reading = DISCARD
            self.shell.exchange_done(False)
            return
        self.reading = HEAD
        self.writing = IDLE
        self.is_head = False
        self.shell.exchange_done(True)

    @property
    def has_pipelined(self) -> bool:
        """Bytes of a next request came early."""
        return len(self._held) > 0

    def take_pipelined(self) -> bytes:
        """Bytes of a next request that came early. The shell feeds them once the connection is idle."""
        held = bytes(self._held)
        self._held.clear()
        self._searched = 0
        return held

    def abort(self, error: WireError | None) -> None:
        """End the response so that it cannot look complete: no last chunk, fewer bytes, then close."""
        if self._sink is None:
            return
        self.writing = DONE
        self.reading = DISCARD
        self.close_after = True
        self._sink = None
        self.shell.reset()

    def close(self) -> None:
        """End a tunnel: flush, then close gracefully."""
        if self._sink is not None:
            self.writing = DONE
            self.reading = DISCARD
            self._sink = None
            self.shell.exchange_done(False)

    def unsent(self) -> int:
        return self.shell.unsent()

    def pause(self) -> None:
        self.shell.pause_reading()

    def resume(self) -> None:
        if self.reading is not READ_DONE or not self._held:
            self.shell.resume_reading()

    def _write(self, data: bytes) -> None:
        if not self.out:
            self.shell.wake()
        self.out.append(data)

    def __repr__(self) -> str:
        return f"<H1Server {self.reading.name}/{self.writing.name} held={len(self._held)}>"
