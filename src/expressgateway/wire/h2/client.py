"""The client role of HTTP/2: one connection to a backend, as many exchanges as it allows.

A backend is a peer like any other: the same frames are refused, the same guards count, interim responses and
header lists are bounded. One exchange's failure is its stream's alone.

What a stream is told when it fails says whether it may be sent again: ``UnprocessedError`` when the backend
has said that it did not look at it (REFUSED_STREAM, or above the last stream of its GOAWAY).
"""

from typing import Final

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    MalformedError,
    PeerClosedError,
    StreamResetError,
    TruncatedError,
    UnprocessedError,
    WireError,
)
from expressgateway.wire.h2 import frames as f
from expressgateway.wire.h2.connection import DEPENDS_ON_ITSELF, H2Connection, contradiction
from expressgateway.wire.h2.core import MAX_KNOWN
from expressgateway.wire.h2.frames import H2ConnectionError, H2StreamError
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.streams import BEFORE_HEAD, H2Stream
from expressgateway.wire.head import ResponseHead
from expressgateway.wire.resets import reset_code
from expressgateway.wire.shells import ClientShell
from expressgateway.wire.sinks import ResponseSink
from expressgateway.wire.streams import CLOSED, IDLE, ON_RECEIVED_END, UNDECLARED, ClientSide

UNTOLD_STREAMS: Final = 100  # opened before the backend has said how many it allows


class H2ClientStream(ClientSide, H2Stream):
    """One request's backend. Implements ``ClientStream``."""

    __slots__ = ("_has_response",)

    connection: "H2Client"
    sink: ResponseSink | None
    version = b"2"

    def __init__(self, connection: "H2Client", sink: ResponseSink, is_reused: bool) -> None:
        super().__init__(connection, 0, sink, is_reused)
        self.expected = BEFORE_HEAD
        self._has_response = False  # its final head

    # -- ClientStream ----------------------------------------------------------------------------------

    def abort(self, error: WireError | None) -> None:
        """Give the exchange up: the backend never sees a complete request. Idempotent."""
        self.sink = None
        if self.state is IDLE:
            self.state = CLOSED
            self.connection.forget_opening(self)
        elif self.state is not CLOSED:
            self.connection.reset_stream(self, reset_code(error, f.CANCEL))

    def was_delivered(self) -> bool:
        """Whether any byte of this request can have reached the backend's program."""
        return not self._is_unprocessed and 0 <= self._flushed < self.connection.flushed

    # -- the connection's calls ------------------------------------------------------------------------

    def on_block(self, flags: int, block: bytes) -> None:
        connection = self.connection
        if self._has_response:
            self._on_trailers(flags, block)
            return
        head = connection.read_head(self.id, block)
        if flags & DEPENDS_ON_ITSELF:
            cause = MalformedError("a stream that depends on itself")
            raise H2StreamError(self.id, f.PROTOCOL_ERROR, cause)
        end = flags & f.END_STREAM != 0
        status = head.status
        if status < 200:
            self.on_informational(head, end)
            return
        self._has_response = True
        self.expected = UNDECLARED
        if self.is_tunnel:
            if status < 300 and not end:
                if self.sink is not None:
                    # RFC 8441 5: to the exchange it is the answer that it knows from HTTP/1.1.
                    self.sink.on_informational(ResponseHead(101, head.headers, None, b"2"))
                return
            # Declined: this was a request without a body.
            self.is_tunnel = False
        length = head.content_length
        if self.is_head or status == 204 or status == 304:
            self.expected = 0
        elif length is not None:
            if end and length:
                raise contradiction(self.id)
            self.expected = length
        if end:
            self._is_complete = True
            self.state = ON_RECEIVED_END[self.state]
        closes = self.state is CLOSED
        if self.sink is not None:
            self.sink.on_response(head, end)
        if closes:
            connection.close_stream(self)

    def _on_trailers(self, flags: int, block: bytes) -> None:
        connection = self.connection
        fields = connection.decode(block)
        trailers = connection.trailers_of(self, flags, fields)
        self._is_complete = True
        self.state = ON_RECEIVED_END[self.state]
        closes = self.state is CLOSED
        if self.sink is not None:
            self.sink.on_response_trailers(trailers)
        if closes:
            connection.close_stream(self)

    def on_reset(self, code: int) -> None:
        if code == f.REFUSED_STREAM:
            self._is_unprocessed = True
            self._abort(UnprocessedError("the backend refused the stream"))
        elif self._is_complete and not self.is_tunnel:
            self.sink = None  # RFC 9113 8.1: it needs no more of the request
        else:
            self._abort(StreamResetError(code, f"the backend reset the stream with code {code:#x}"))

    def on_lost(self, error: WireError) -> None:
        if isinstance(error, UnprocessedError):
            self._is_unprocessed = True
        elif isinstance(error, PeerClosedError) and self._has_response:
            error = TruncatedError(f"inside a response: {error.detail}")
        self._abort(error)

    def contradicted(self) -> None:
        self.connection.reset_stream(
            self, f.CANCEL, FramingError("a request body that contradicts its declared length")
        )


class H2Client(H2Connection):
    """One backend connection's codec."""

    __slots__ = (
        "_known",
        "_next_id",
        "_opening",
        "_peer_streams",
        "has_settings",
        "is_reused",
        "offers_connect",
        "opened",
    )

    shell: ClientShell[H2Stream]

    def __init__(self, shell: ClientShell[H2Stream], limits: H2Limits) -> None:
        super().__init__(shell, limits)
        # Connection
        self.is_reused = False
        self.opened = 0  # exchanges so far
        self.has_settings = False  # the backend's have come
        self.offers_connect = False  # the backend speaks RFC 8441
        self._next_id = 1
        self._peer_streams = UNTOLD_STREAMS  # open at once, as the backend allows
        self._opening: set[H2ClientStream] = set()  # leased, without a head yet; counted as open
        self._known: dict[bytes, ResponseHead] = {}  # at most MAX_KNOWN

    # -- the shell's calls -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the client's preface (RFC 9113 3.4)."""
        self.write(f.PREFACE)
        self._begin((f.ENABLE_PUSH, 0))

    @property
    def can_open(self) -> bool:
        """Whether ``open`` may be called now."""
        return (
            not self.is_leaving
            and not self.is_closed
            and self._next_id <= f.MAX_ID
            and len(self.streams) + len(self._opening)
            < min(self._peer_streams, self.limits.max_concurrent_streams)
        )

    def open(self, sink: ResponseSink) -> H2ClientStream:
        """Begin an exchange."""
        stream = H2ClientStream(self, sink, self.opened > 0)
        self.opened += 1
        self._opening.add(stream)
        return stream

    @property
    def is_idle(self) -> bool:
        return not self.streams and not self._opening

    # -- the streams' calls ----------------------------------------------------------------------------

    def begin_stream(self, stream: H2ClientStream) -> bool:
        """Give a stream its number. False: it is too late for that."""
        self._opening.discard(stream)
        if self.is_leaving or self.is_closed or self._next_id > f.MAX_ID:
            return False
        stream.id = self._next_id
        stream.window = self.initial_window
        self._next_id += 2
        self.streams[stream.id] = stream
        self.note_stream()
        if self._next_id > f.MAX_ID:
            self.shell.unavailable()
        return True

    def forget_opening(self, stream: H2ClientStream) -> None:
        """A stream ends before it has begun."""
        self._opening.discard(stream)
        self.shell.stream_done(stream)

    def read_head(self, stream_id: int, block: bytes) -> ResponseHead:
        """Read a response's header block. Gives a head of its own for each."""
        known = self._known.get(block)
        if known is not None:
            # fast path: a block that was read before
            return ResponseHead(known.status, known.headers, known.content_length, b"2")
        fields = self.decode(block)
        if fields is None:
            cause = HeadTooLargeError("a response's header list over the limit")
            raise H2StreamError(stream_id, f.PROTOCOL_ERROR, cause)
        try:
            head = self.limits.fields.read_response(fields)
        except WireError as error:
            raise H2StreamError(stream_id, f.PROTOCOL_ERROR, error) from None
        if self.is_familiar(block, fields):
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[block] = ResponseHead(head.status, head.headers, head.content_length, b"2")
        return head

    # -- what the connection asks of its role ----------------------------------------------------------

    def is_idle_id(self, stream_id: int) -> bool:
        return stream_id >= self._next_id or not stream_id & 1

    def last_processed(self) -> int:
        return 0  # nothing is ever pushed

    def check_id(self, stream_id: int) -> None:
        if self.is_idle_id(stream_id):  # RFC 9113 5.1.1; zero among them
            raise H2ConnectionError(f.PROTOCOL_ERROR, "HEADERS on a stream that was never opened")

    def on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None and stream.state is not CLOSED:
            stream.on_block(flags, block)
            return
        self.decode(block)
        was_ours = self.was_reset_by_us(stream_id)
        if was_ours:
            return
        cause = "HEADERS on a stream that is closed"
        if was_ours is not None:
            raise H2StreamError(stream_id, f.STREAM_CLOSED, MalformedError(cause))
        raise H2ConnectionError(f.STREAM_CLOSED, cause)

    def on_setting(self, number: int, value: int) -> None:
        if number == f.MAX_CONCURRENT_STREAMS:
            self._peer_streams = value
        elif number == f.ENABLE_PUSH and value:
            raise H2ConnectionError(f.PROTOCOL_ERROR, "ENABLE_PUSH from a server")
        elif number == f.ENABLE_CONNECT_PROTOCOL:
            if value > 1 or (self.offers_connect and not value):  # RFC 8441 3
                raise H2ConnectionError(f.PROTOCOL_ERROR, "ENABLE_CONNECT_PROTOCOL that may not be")
            self.offers_connect = value == 1

    def on_settings_done(self) -> None:
        if not self.has_settings:
            self.has_settings = True
            for stream in list(self._opening):
                stream.on_offers_known()
        self.shell.limits_changed()

    def _lose_all(self, error: WireError) -> None:
        super()._lose_all(error)
        self._lose_handshakes(error)

    def _leave_if_done(self) -> None:
        self._lose_handshakes(UnprocessedError("the connection is left"))
        super()._leave_if_done()

    def _lose_handshakes(self, error: WireError) -> None:
        for stream in list(self._opening):
            stream.lose_handshake(error)

    def forget_blocks(self) -> None:
        self._known.clear()

    def on_peer_leaving(self, last_id: int, code: int) -> None:
        """RFC 9113 6.8: what is above the last stream was not looked at, and may go elsewhere."""
        if not self.is_leaving:
            self.is_leaving = True
            self.shell.unavailable()
        error = UnprocessedError(f"the backend goes away with code {code:#x}, before this stream")
        for stream in [each for each in self.streams.values() if each.id > last_id]:
            stream.state = CLOSED
            stream.on_lost(error)
            self.close_stream(stream)
        self._leave_if_done()
