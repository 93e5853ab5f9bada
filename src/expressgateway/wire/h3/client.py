"""The client role of HTTP/3: one connection to a backend, as many exchanges as it allows.

A backend is a peer like any other: the same frames are refused, the same guards count, interim responses
and header lists are bounded. One exchange's failure is its stream's alone.

What a stream is told when it fails says whether it may be sent again: ``UnprocessedError`` when the
backend has said that it did not look at it (H3_REQUEST_REJECTED, or not below the identifier of its
GOAWAY).

How many streams there may be is the transport's knowledge: a stream's id is taken before it is needed, and
one that was not used is kept for the next.
"""

from typing import Final

from expressgateway.wire.errors import (
    FramingError,
    HeadTooLargeError,
    PeerClosedError,
    StreamResetError,
    TruncatedError,
    UnprocessedError,
    WireError,
)
from expressgateway.wire.h2.hpack import OversizedError, Triple
from expressgateway.wire.h3 import frames as f
from expressgateway.wire.h3.connection import H3Connection
from expressgateway.wire.h3.core import MAX_KNOWN
from expressgateway.wire.h3.frames import H3ConnectionError, contradiction, malformed
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.streams import BODY, HEAD, H3Stream
from expressgateway.wire.h3.transport import Transport
from expressgateway.wire.head import Fields, ResponseHead
from expressgateway.wire.resets import reset_code
from expressgateway.wire.shells import ClientShell
from expressgateway.wire.sinks import ResponseSink
from expressgateway.wire.streams import CLOSED, IDLE, UNDECLARED, ClientSide

UNOPENED: Final = -1


class H3ClientStream(ClientSide, H3Stream):
    """One request's backend. Implements ``ClientStream``."""

    __slots__ = ()

    connection: "H3Client"
    sink: ResponseSink | None
    version = b"3"

    def __init__(self, connection: "H3Client", sink: ResponseSink, is_reused: bool) -> None:
        super().__init__(connection, UNOPENED, sink, is_reused)

    # -- ClientStream ----------------------------------------------------------------------------------

    def abort(self, error: WireError | None) -> None:
        """Give the exchange up: the backend never sees a complete request. Idempotent."""
        self.sink = None
        if self.state is IDLE:
            self.state = CLOSED
            self.connection.forget_opening(self)
        else:
            self.connection.reset_stream(self, reset_code(error, f.REQUEST_CANCELLED, to_h3=True))

    def was_delivered(self) -> bool:
        """Whether any byte of this request can have reached the backend's program."""
        if self._is_unprocessed or self._flushed < 0:
            return False
        return self._flushed < self.connection.flushed or not self.connection.holds_head(self)

    # -- the connection's calls ------------------------------------------------------------------------

    def on_block(self, block: bytes, end: bool) -> None:
        connection = self.connection
        if self.phase is HEAD:
            # fast path: a block that was read before
            known = connection.known.get(block)
            if known is not None:
                connection.decoder.acknowledge(self.id, block)
                head = ResponseHead(known.status, known.headers, known.content_length, b"3")
                self._on_head(head, end)
                return
        self.on_fields(connection.decode(self, block), block, end)

    def on_fields(self, fields: list[Triple] | OversizedError, block: bytes, end: bool) -> None:
        connection = self.connection
        if self.phase is not HEAD:
            connection.read_trailers(self, fields, end)
        elif isinstance(fields, OversizedError):
            raise malformed(self.id, HeadTooLargeError("a response's header list over the limit"))
        else:
            self._on_head(connection.read_response(self.id, fields, block), end)

    def _on_head(self, head: ResponseHead, end: bool) -> None:
        status = head.status
        if status < 200:
            self.on_informational(head, end)
            return
        self.phase = BODY
        if self.is_tunnel:
            if status < 300 and not end:
                if self.sink is not None:
                    # RFC 9220 3: to the exchange it is the answer that it knows from HTTP/1.1.
                    self.sink.on_informational(ResponseHead(101, head.headers, None, b"3"))
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
        else:
            self.expected = UNDECLARED
        if end:
            self._is_complete = True
            self.take_end()
        if self.sink is not None:
            self.sink.on_response(head, end)
        if end:
            self.connection.finish(self)

    def on_trailers(self, fields: Fields) -> None:
        self._is_complete = True
        if self.sink is not None:
            self.sink.on_response_trailers(fields)

    def on_headless(self) -> None:
        raise malformed(self.id, TruncatedError("a stream that ends before its final response"))

    def on_reset(self, code: int) -> None:
        connection = self.connection
        if self._is_complete and not self.is_tunnel:
            return
        connection.reset_stream(self, f.REQUEST_CANCELLED, self._error_of(code))
        connection.guards.on_client_reset(connection.now, False)

    def on_stop(self, code: int) -> None:
        """The backend reads no more of the request. Its response may be complete all the same (4.1)."""
        connection = self.connection
        if not self.is_tunnel and (code == f.NO_ERROR or self.phase is not HEAD):
            if self.state is not CLOSED:
                connection.stop_sending(self, code)
            return
        connection.reset_stream(self, f.REQUEST_CANCELLED, self._error_of(code))
        connection.guards.on_client_reset(connection.now, False)

    def _error_of(self, code: int) -> WireError:
        if code == f.REQUEST_REJECTED:
            return UnprocessedError("the backend rejected the request")
        return StreamResetError(code, f"the backend reset the stream with code {code:#x}")

    def on_lost(self, error: WireError) -> None:
        if isinstance(error, UnprocessedError):
            self._is_unprocessed = True
        elif isinstance(error, PeerClosedError) and self.phase is not HEAD:
            error = TruncatedError(f"inside a response: {error.detail}")
        self._abort(error)

    def contradicted(self) -> None:
        cause = FramingError("a request body that contradicts its declared length")
        self.connection.reset_stream(self, f.REQUEST_CANCELLED, cause)


class H3Client(H3Connection):
    """One backend connection's codec."""

    __slots__ = ("_opening", "_spare", "is_reused", "known", "offers_connect", "opened")

    shell: ClientShell[H3Stream]

    def __init__(self, shell: ClientShell[H3Stream], transport: Transport, limits: H3Limits) -> None:
        super().__init__(shell, transport, limits)
        # Connection
        self.is_reused = False
        self.opened = 0  # exchanges so far
        self.offers_connect = False  # the backend speaks RFC 9220
        self._spare: list[int] = []  # ids taken and not used: never more than one and what was given back
        self._opening: set[H3ClientStream] = set()  # leased, without a head yet; counted as open
        self.known: dict[bytes, ResponseHead] = {}  # at most MAX_KNOWN

    # -- the shell's calls -----------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """Whether ``open`` may be called now. Asks the transport for a stream, which is kept."""
        if (
            self.is_leaving
            or self.is_closed
            or len(self.streams) + len(self._opening) >= self.limits.max_concurrent_streams
        ):
            return False
        while len(self._spare) <= len(self._opening):
            stream_id = self.transport.open_stream(False)
            if stream_id is None:
                return False
            self._spare.append(stream_id)
        return True

    def open(self, sink: ResponseSink) -> H3ClientStream:
        """Begin an exchange."""
        stream = H3ClientStream(self, sink, self.opened > 0)
        self.opened += 1
        self._opening.add(stream)
        return stream

    @property
    def is_idle(self) -> bool:
        return not self.streams and not self._opening

    # -- the streams' calls ----------------------------------------------------------------------------

    def begin_stream(self, stream: H3ClientStream) -> bool:
        """Give a stream its number. False: it is too late for that."""
        self._opening.discard(stream)
        if self.is_leaving or self.is_closed:
            return False
        stream_id = self._spare.pop(0) if self._spare else self.transport.open_stream(False)
        if stream_id is None:
            return False
        stream.id = stream_id
        stream.began_at = self.now
        self.streams[stream_id] = stream
        self.note_stream()
        return True

    def forget_opening(self, stream: H3ClientStream) -> None:
        """A stream ends before it has begun."""
        self._opening.discard(stream)
        self.shell.stream_done(stream)

    def holds_head(self, stream: H3ClientStream) -> bool:
        """Whether the transport cannot have sent anything of a stream."""
        return not self.is_closed and self.transport.queued(stream.id) > 0

    def stop_sending(self, stream: H3ClientStream, code: int) -> None:
        """The backend wants no more of a request: end it, so that it cannot look complete."""
        if stream.is_sending or stream.queued:
            self.wake()
            self.transport.reset(stream.id, code)
        if stream.is_sending:
            stream.drop()
            stream.sent_end()
            if stream.state is CLOSED:
                self.finish(stream)

    def read_response(self, stream_id: int, fields: list[Triple], block: bytes) -> ResponseHead:
        """Judge a response's header list. Gives a head of its own for each."""
        try:
            head = self.limits.fields.read_response(fields, b"3")
        except WireError as error:
            raise malformed(stream_id, error) from None
        if self.is_familiar(block, fields):
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[block] = ResponseHead(head.status, head.headers, head.content_length, b"3")
        return head

    # -- what the connection asks of its role ----------------------------------------------------------

    def goaway_id(self) -> int:
        return 0  # of a push: none was ever promised

    def first_goaway_id(self) -> int:
        return f.MAX_INTEGER

    def forget_blocks(self) -> None:
        self.known.clear()

    def receive_request(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id & 1:
            raise H3ConnectionError(f.STREAM_CREATION_ERROR, "a bidirectional stream from a server")
        if data:
            self.transport.consumed(stream_id, len(data))

    def reset_request(self, stream_id: int, code: int) -> None:
        if stream_id & 1:
            raise H3ConnectionError(f.STREAM_CREATION_ERROR, "a bidirectional stream from a server")

    def on_push_promise(self) -> None:
        raise H3ConnectionError(f.ID_ERROR, "PUSH_PROMISE, which was not allowed")

    def on_push_stream(self) -> None:
        raise H3ConnectionError(f.ID_ERROR, "a push, which was not allowed")

    def on_max_push_id(self, identifier: int) -> None:
        raise H3ConnectionError(f.FRAME_UNEXPECTED, "MAX_PUSH_ID from a server")

    def on_setting(self, number: int, value: int) -> None:
        if number == f.ENABLE_CONNECT_PROTOCOL:
            self.offers_connect = value == 1

    def on_settings_done(self) -> None:
        for stream in list(self._opening):
            stream.on_offers_known()
        self.shell.limits_changed()

    def check_goaway(self, identifier: int) -> None:
        """RFC 9114 5.2: what is not below it was not looked at, and may go elsewhere."""
        if identifier & 3:
            raise H3ConnectionError(f.ID_ERROR, "GOAWAY with what is no request's id")
        if not self.is_leaving:
            self.is_leaving = True
            self.shell.unavailable()
        error = UnprocessedError("the backend goes away, before this stream")
        for stream in [each for each in self.streams.values() if each.id >= identifier]:
            self.reset_stream(stream, f.REQUEST_CANCELLED, error)
        self.leave_if_done()

    def on_half_local(self, stream: H3Stream) -> None:
        """The request is complete."""

    def _lose_all(self, error: WireError) -> None:
        super()._lose_all(error)
        self._lose_handshakes(error)

    def leave_if_done(self) -> None:
        self._lose_handshakes(UnprocessedError("the connection is left"))
        super().leave_if_done()

    def _lose_handshakes(self, error: WireError) -> None:
        for stream in list(self._opening):
            stream.lose_handshake(error)
