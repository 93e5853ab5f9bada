"""The client role of HTTP/1 (RFC 9112): one connection to a backend, one exchange at a time.

A backend is a peer like any other: its heads, interim responses and framing are bounded and checked as
strictly as a client's. A byte that arrives while no exchange is open, or after the end of a response, is
the start of a response that nobody asked for; the connection is then ``broken`` and never used again.
"""

from enum import IntEnum
from typing import Final, Protocol

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    MalformedError,
    PeerClosedError,
    TruncatedError,
    WireError,
)
from expressgateway.wire.h1.body import BodyReader, ChunkReader, CloseReader, LengthReader, last_chunk
from expressgateway.wire.h1.fields import FieldReader, Section, lines_of
from expressgateway.wire.h1.start import read_status_line
from expressgateway.wire.head import WEBSOCKET, Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ResponseSink

MAX_INFORMATIONAL: Final = 32  # interim responses to one request; more is an attack or a loop
_BODILESS: Final = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE"})


class Reading(IntEnum):
    IDLE = 0
    HEAD = 1
    BODY = 2
    DONE = 3
    """The response is complete; the request is not."""
    TUNNEL = 4
    BROKEN = 5


class Writing(IntEnum):
    IDLE = 0
    LENGTH = 1
    CHUNKED = 2
    TUNNEL = 3
    DONE = 4


IDLE, HEAD, BODY, READ_DONE, TUNNEL, BROKEN = (
    Reading.IDLE,
    Reading.HEAD,
    Reading.BODY,
    Reading.DONE,
    Reading.TUNNEL,
    Reading.BROKEN,
)
LENGTH, CHUNKED, WRITE_TUNNEL, WRITTEN = (
    Writing.LENGTH,
    Writing.CHUNKED,
    Writing.TUNNEL,
    Writing.DONE,
)


class Shell(Protocol):
    """The connection around the codec."""

    def wake(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def unsent(self) -> int: ...
    def half_close(self) -> None: ...
    def exchange_done(self, is_reusable: bool) -> None:
        """The response is complete. Not reusable: close the connection."""

    def reset(self) -> None:
        """The exchange was given up: close the connection so that nothing looks complete."""

    def was_delivered(self) -> bool: ...


class H1Client:
    """One backend connection's codec, and the client stream of its current exchange."""

    __slots__ = (
        "_body",
        "_has_begun",
        "_held",
        "_informational",
        "_is_head",
        "_is_last",
        "_left",
        "_searched",
        "_sink",
        "_wants_upgrade",
        "fields",
        "is_reused",
        "keep_alive_hint",
        "max_head_bytes",
        "out",
        "reading",
        "shell",
        "writing",
    )

    version = b"1.1"

    def __init__(self, shell: Shell, fields: FieldReader, max_head_bytes: int) -> None:
        # Wiring
        self.shell = shell
        self.fields = fields
        self.max_head_bytes = max_head_bytes
        # Connection
        self.out: list[bytes] = []  # bounded by the exchange: it stops its client at the high mark
        self.is_reused = False
        self.keep_alive_hint = b""  # the last Keep-Alive value the backend sent
        self._is_last = False  # no exchange follows the current one
        # Exchange
        self.reading = IDLE
        self.writing = Writing.IDLE
        self._sink: ResponseSink | None = None
        self._held = bytearray()  # an incomplete head, at most max_head_bytes
        self._searched = 0
        self._body: BodyReader | None = None
        self._left = 0  # of the declared request body
        self._is_head = False
        self._wants_upgrade = False
        self._informational = 0
        self._has_begun = False  # a byte of an answer has come

    # -- writing: the client stream --------------------------------------------------------------------

    def open(self, sink: ResponseSink) -> None:
        """Begin an exchange on an idle connection."""
        self._sink = sink
        self.reading = HEAD
        self.writing = Writing.IDLE
        self._informational = 0
        self._has_begun = False

    def send_head(self, head: RequestHead, end: bool) -> None:
        """The request's head. A body without a declared length is sent in chunks."""
        method = head.method
        self._is_head = method == b"HEAD"
        length = head.content_length
        shared = head.shared
        lines = [
            method,
            b" ",
            head.path,
            b" HTTP/1.1\r\nhost: ",
            head.authority,
            b"\r\n",
            shared.h1 or lines_of(shared),
        ]
        for name, value in head.headers:
            lines.append(name + b": " + value + b"\r\n")
        if end and length:
            self._fail(FramingError("a request without the body that it declares"))
            return
        self._wants_upgrade = head.protocol is not None
        if head.protocol is not None:
            lines.append(b"connection: upgrade\r\nupgrade: " + head.protocol + b"\r\n\r\n")
            self.writing = WRITE_TUNNEL
        elif length is not None:
            lines.append(b"content-length: %d\r\n\r\n" % length)
            self.writing = LENGTH
            self._left = length
        elif end:
            # RFC 9110 8.6: methods that anticipate content say that there is none.
            lines.append(b"\r\n" if method in _BODILESS else b"content-length: 0\r\n\r\n")
            self.writing = LENGTH
            self._left = 0
        else:
            lines.append(b"transfer-encoding: chunked\r\n\r\n")
            self.writing = CHUNKED
        self._write(b"".join(lines))
        if end:
            self.writing = WRITTEN

    def send_data(self, chunk: bytes, end: bool) -> None:
        writing = self.writing
        if chunk:
            if writing is CHUNKED:
                out = self.out
                if not out:
                    self.shell.wake()
                out += (b"%x\r\n" % len(chunk), chunk, b"\r\n")
            elif writing is LENGTH:
                left = self._left - len(chunk)
                if left < 0:
                    self._fail(FramingError("a request body longer than was declared"))
                    return
                self._left = left
                self._write(chunk)
            elif writing is WRITE_TUNNEL:
                self._write(chunk)
        if end:
            if writing is CHUNKED:
                self._write(b"0\r\n\r\n")
            elif writing is WRITE_TUNNEL:
                self.shell.half_close()
            elif self._left:
                self._fail(FramingError("a request body shorter than was declared"))
                return
            self._request_done()

    def send_trailers(self, fields: Fields) -> None:
        if self.writing is CHUNKED:
            self._write(last_chunk(fields))
        elif self._left:
            self._fail(FramingError("a request body shorter than was declared"))
            return
        self._request_done()

    def _request_done(self) -> None:
        self.writing = WRITTEN
        if self.reading is READ_DONE:
            self._exchange_done()

    def abort(self, error: WireError | None) -> None:
        """Give the exchange up. The connection cannot be used again."""
        if self._sink is None:
            return
        self._sink = None
        self.reading = BROKEN
        self.shell.reset()

    def close(self) -> None:
        """End a tunnel: flush, then close gracefully."""
        if self._sink is not None:
            self._sink = None
            self.reading = BROKEN
            self.shell.exchange_done(False)

    def was_delivered(self) -> bool:
        return self.shell.was_delivered()

    def unsent(self) -> int:
        return self.shell.unsent()

    def pause(self) -> None:
        self.shell.pause_reading()

    def resume(self) -> None:
        self.shell.resume_reading()

    def _write(self, data: bytes) -> None:
        if not self.out:
            self.shell.wake()
        self.out.append(data)

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def is_tunnel(self) -> bool:
        """The connection was turned into a tunnel."""
        return self.writing is WRITE_TUNNEL or self.reading is TUNNEL

    @property
    def is_open(self) -> bool:
        """An exchange is under way."""
        return self._sink is not None

    def receive_data(self, data: bytes) -> None:
        """Take what the backend sent. Never raises."""
        try:
            self._receive(data)
        except WireError as error:
            self._fail(error)

    def _receive(self, data: bytes) -> None:
        while data:
            self._has_begun = True
            reading = self.reading
            if reading is HEAD:
                rest = self._receive_head(data)
            elif reading is BODY and self._body is not None:
                rest = self._body.feed(data)
            elif reading is TUNNEL:
                self._on_data(data, False)
                return
            else:
                # Nobody asked for this: request tunnelling, or a backend that lost its framing.
                self.reading = BROKEN
                return
            if rest is None:
                return
            data = rest

    def _receive_head(self, data: bytes) -> bytes | None:
        held = self._held
        if held:
            held += data
            end = held.find(b"\r\n\r\n", max(0, self._searched - 3))
            if end < 0:
                self._searched = len(held)
                if len(held) > self.max_head_bytes:
                    raise HeadTooLargeError("a response head over the limit")
                return None
            data = bytes(held)
            held.clear()
            self._searched = 0
        else:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                held += data
                if len(held) > self.max_head_bytes:
                    raise HeadTooLargeError("a response head over the limit")
                return None
        if end > self.max_head_bytes:
            raise HeadTooLargeError("a response head over the limit")
        line_end = data.find(b"\r\n", 0, end)
        if line_end < 0:
            line_end = end
        status, version = read_status_line(data[:line_end])
        return self._on_head(status, version, data, line_end + 2, end)

    def _on_head(self, status: int, version: bytes, data: bytes, start: int, end: int) -> bytes:
        """Take the head whose fields stand in ``data[start:end]``; give what follows it."""
        section = self.fields.read(data[start:end])
        at = end + 4
        head = ResponseHead(status, section.headers, section.content_length, version)
        sink = self._sink
        if sink is None:  # given up inside this very read
            self.reading = BROKEN
            return b""
        if status < 200:
            self._on_informational(head, section, sink)
            return data[at:]
        if self._wants_upgrade:
            # Declined: this was a request without a body. The connection is not used again all the same,
            # for it was offered for something else.
            self.writing = WRITTEN
            self._is_last = True
        if section.keep_alive_hint:
            self.keep_alive_hint = section.keep_alive_hint
        if section.close or (version == b"1.0" and not section.keep_alive):
            self._is_last = True
        if section.chunked and version == b"1.0":
            raise FramingError("Transfer-Encoding from an HTTP/1.0 backend")
        if self._is_head or status == 204 or status == 304 or section.content_length == 0:
            self._end_reading()
            sink.on_response(head, True)
            self._after_response()
            return data[at:]
        if section.content_length is not None and len(data) - at == section.content_length:
            # fast path: the whole body came with the head
            self.reading = BODY
            sink.on_response(head, False)
            self._on_data(data[at:], True)
            return b""
        if section.chunked:
            self._body = ChunkReader(self._on_data, self._on_trailers, self.fields)
        elif section.content_length is not None:
            self._body = LengthReader(section.content_length, self._on_data)
        else:
            self._body = CloseReader(self._on_data)
        self.reading = BODY
        sink.on_response(head, False)
        return data[at:]

    def _on_informational(self, head: ResponseHead, section: Section, sink: ResponseSink) -> None:
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            raise MalformedError(f"more than {MAX_INFORMATIONAL} interim responses")
        if section.content_length is not None or section.chunked:
            raise FramingError("an interim response with a body")
        if head.status == 101:
            # RFC 9110 7.8: only to a client that asked, and only to what it asked for.
            if not self._wants_upgrade or section.upgrade != WEBSOCKET:
                raise MalformedError("an upgrade that was not asked for")
            self.reading = TUNNEL
            self._is_last = True
        sink.on_informational(head)

    def _on_data(self, chunk: bytes, end: bool) -> None:
        sink = self._sink
        if sink is None:
            return
        if end:
            self._end_reading()
            sink.on_response_data(chunk, True)
            self._after_response()
        else:
            sink.on_response_data(chunk, False)

    def _on_trailers(self, fields: Fields) -> None:
        sink = self._sink
        if sink is not None:
            self._end_reading()
            sink.on_response_trailers(fields)
            self._after_response()

    def _end_reading(self) -> None:
        self.reading = READ_DONE
        self._body = None

    def _after_response(self) -> None:
        if self._sink is not None and self.writing is WRITTEN:
            self._exchange_done()

    def _exchange_done(self) -> None:
        self._sink = None
        is_reusable = not self._is_last
        self.reading = IDLE if is_reusable else BROKEN
        self.is_reused = True
        self.shell.exchange_done(is_reusable)

    def receive_eof(self) -> None:
        """The backend ended its side. Never raises."""
        if self.reading is TUNNEL:
            self._on_data(b"", True)
        elif self.reading is BODY and isinstance(self._body, CloseReader):
            self._is_last = True
            self._on_data(b"", True)
        elif self.reading is HEAD and not self._has_begun:
            self._fail(PeerClosedError("the backend closed the connection before it answered"))
        else:
            self._fail(TruncatedError("the backend closed the connection inside its response"))

    def receive_reset(self, detail: str = "") -> None:
        """The connection is gone; ``detail``: what was heard of the cause. Never raises."""
        detail = f": {detail}" if detail else ""
        if self._has_begun:
            self._fail(TruncatedError(f"the backend reset the connection inside its response{detail}"))
        else:
            self._fail(PeerClosedError(f"the backend reset the connection{detail}"))

    def _fail(self, error: WireError) -> None:
        self.reading = BROKEN
        self._body = None
        self._held.clear()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.on_response_abort(error)
            self.shell.reset()

    def __repr__(self) -> str:
        return f"<H1Client {self.reading.name}/{self.writing.name} reused={self.is_reused}>"
