"""The server role of HTTP/3: one client's connection, as many exchanges as it has request streams.

A request that is malformed is reset and nobody hears of it (RFC 9114 4.1.2); one that is sound and not
served - too large, an authority that is none, CONNECT - is given to the shell, which answers it. Clients
repeat themselves: a header block that came before, while the table is the same, is not decoded again.

A response that is complete before its request ends with STOP_SENDING and H3_NO_ERROR (4.1). A tunnel (RFC
9220) is one in which each side ends by itself; one that we close waits a little for the client's end.
"""

from expressgateway.wire.errors import (
    ContradictionError,
    HeadTooLargeError,
    MalformedError,
    SlowHeadError,
    StreamResetError,
    WireError,
)
from expressgateway.wire.h2.fields import Request, response_list
from expressgateway.wire.h2.hpack import OversizedError, Triple
from expressgateway.wire.h3 import frames as f
from expressgateway.wire.h3.connection import H3Connection
from expressgateway.wire.h3.core import KNOWN_BYTES, MAX_KNOWN
from expressgateway.wire.h3.frames import (
    H3ConnectionError,
    H3StreamError,
    contradiction,
    frame_header,
    malformed,
)
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.streams import BODY, HEAD, H3Stream
from expressgateway.wire.h3.transport import Transport
from expressgateway.wire.head import Fields, ResponseHead, SharedFields
from expressgateway.wire.resets import reset_code
from expressgateway.wire.shells import ServerShell
from expressgateway.wire.sinks import RequestSink
from expressgateway.wire.streams import CAN_RECEIVE, CLOSED, OPEN, ServerSide


class H3ServerStream(ServerSide, H3Stream):
    """One request's client. Implements ``ServerStream``."""

    __slots__ = ()

    sink: RequestSink | None
    connection: "H3Server"

    def __init__(self, connection: "H3Server", stream_id: int) -> None:
        super().__init__(connection, stream_id, OPEN)

    # -- the connection's calls ------------------------------------------------------------------------

    def on_block(self, block: bytes, end: bool) -> None:
        connection = self.connection
        if self.phase is HEAD:
            # fast path: a block that was read before
            request = connection.known.get(block)
            if request is not None:
                connection.decoder.acknowledge(self.id, block)
                self.open(request, end)
                return
        self.on_fields(connection.decode(self, block), block, end)

    def on_fields(self, fields: list[Triple] | OversizedError, block: bytes, end: bool) -> None:
        connection = self.connection
        if self.phase is not HEAD:
            connection.read_trailers(self, fields, end)
        elif isinstance(fields, OversizedError):
            if end:
                self.take_end()
            connection.refuse_oversized(self, fields.fields)
        else:
            self.open(connection.read_request(self.id, fields, block), end)

    def open(self, request: Request, end: bool) -> None:
        """The request's head is read: judge the rest of it, and open its exchange."""
        connection = self.connection
        length = request.content_length
        if end and length:
            raise contradiction(self.id)
        self.phase = BODY
        head = request.head(connection.scheme, b"3")
        refusal = request.refusal
        if refusal is not None:
            if request.is_nameless:
                raise malformed(self.id, refusal)  # RFC 9114 4.3.1: that is worse than a bad one
            if end:
                self.take_end()
            self.is_head = request.method == b"HEAD"
            connection.shell.refuse(self, refusal, head)
            return
        if length is not None:
            self.expected = length
        if request.protocol is not None:
            if not connection.limits.websocket:
                raise malformed(self.id, MalformedError(":protocol, which was not offered"))
            self.is_tunnel = True
        elif request.method == b"HEAD":
            self.is_head = True
        if end:
            self.take_end()
        sink = self.sink = connection.shell.open_exchange(self)
        sink.on_request(head, end)

    def on_trailers(self, fields: Fields) -> None:
        if self.sink is not None:
            self.sink.on_request_trailers(fields)

    def on_headless(self) -> None:
        raise H3StreamError(
            self.id, f.REQUEST_INCOMPLETE, MalformedError("a request that ends before its head")
        )

    def on_reset(self, code: int) -> None:
        self._reset_by_client(code, f"the client reset the stream with code {code:#x}")

    def on_stop(self, code: int) -> None:
        self._reset_by_client(code, f"the client does not want the response: code {code:#x}")

    def _reset_by_client(self, code: int, detail: str) -> None:
        connection = self.connection
        was_answered = self.has_answered
        connection.reset_stream(self, f.REQUEST_CANCELLED, StreamResetError(code, detail))
        connection.guards.on_client_reset(connection.now, was_answered)

    def contradicted(self) -> None:
        cause = ContradictionError("a response that contradicts its declared length")
        self.connection.reset_stream(self, f.INTERNAL_ERROR, cause)

    # -- ServerStream ----------------------------------------------------------------------------------

    def abort(self, error: WireError | None) -> None:
        """End the response so that it can never look complete. Idempotent."""
        if self.state is not CLOSED:
            # RFC 9220 3: of a tunnel, it is what a reset is to TCP.
            default = f.REQUEST_CANCELLED if self.is_tunnel else f.INTERNAL_ERROR
            self.connection.reset_stream(self, reset_code(error, default, to_h3=True))


class H3Server(H3Connection):
    """One client connection's codec."""

    __slots__ = ("_accepts_below", "_encoded", "_max_push_id", "known", "last_id", "scheme")

    shell: ServerShell[H3Stream]

    def __init__(
        self, shell: ServerShell[H3Stream], transport: Transport, limits: H3Limits, scheme: bytes = b"https"
    ) -> None:
        super().__init__(shell, transport, limits)
        # Wiring
        self.scheme = scheme
        # Connection
        self.last_id = -4  # the highest request stream that has come; below zero: none
        self._accepts_below = f.MAX_INTEGER  # what our GOAWAY has said
        self._max_push_id = -1
        self.known: dict[bytes, Request] = {}  # at most MAX_KNOWN
        self._encoded: dict[tuple[int, int | None, SharedFields, Fields], bytes] = {}  # likewise

    # -- the shell's calls -----------------------------------------------------------------------------

    def own_settings(self) -> list[tuple[int, int]]:
        return [(f.ENABLE_CONNECT_PROTOCOL, 1)] if self.limits.websocket else []

    def go_away(self) -> None:
        if not self.is_leaving:
            self._accepts_below = self.goaway_id()
        super().go_away()

    def fail_slow_heads(self, begun_before: float) -> int:
        """Reset the streams whose head began before then and is not complete. Give how many there were."""
        slow = [each for each in self.streams.values() if each.is_mid_head and each.began_at < begun_before]
        try:
            for stream in slow:
                cause = SlowHeadError("a header block was not completed in time")
                self.fail_stream(H3StreamError(stream.id, f.REQUEST_INCOMPLETE, cause))
        except H3ConnectionError as fault:
            self.fail(fault)
        return len(slow)

    # -- what the connection asks of its role ----------------------------------------------------------

    def goaway_id(self) -> int:
        return self.last_id + 4

    def forget_blocks(self) -> None:
        self.known.clear()

    def fail_stream(self, fault: H3StreamError) -> None:
        stream = self.streams.get(fault.stream_id)
        if stream is None or stream.sink is None:
            self.shell.rejected(fault.cause)
        super().fail_stream(fault)

    def check_goaway(self, identifier: int) -> None:
        """A client need not be left: it closes when it is done. Its number is a push's (RFC 9114 5.2)."""

    def on_max_push_id(self, identifier: int) -> None:
        if identifier < self._max_push_id:
            raise H3ConnectionError(f.ID_ERROR, "MAX_PUSH_ID that takes back the one before")
        self._max_push_id = identifier

    def on_push_stream(self) -> None:
        raise H3ConnectionError(f.STREAM_CREATION_ERROR, "a push stream from a client")

    # -- requests --------------------------------------------------------------------------------------

    def receive_request(self, stream_id: int, data: bytes, end: bool) -> None:
        if stream_id & 1:  # of ours there are none
            raise H3ConnectionError(f.STREAM_CREATION_ERROR, "a stream that nobody opened")
        if stream_id > self.last_id:
            self.last_id = stream_id
        if stream_id >= self._accepts_below or len(self.streams) >= self.limits.max_concurrent_streams:
            self._reject(stream_id, len(data), end)
            return
        self.note_stream()
        stream = self.streams[stream_id] = H3ServerStream(self, stream_id)
        stream.receive(data, end)

    def _reject(self, stream_id: int, size: int, end: bool) -> None:
        """RFC 9114 4.1.1: not looked at, so it may be sent again."""
        if size:
            self.transport.consumed(stream_id, size)
        self.refuse_id(stream_id, f.REQUEST_REJECTED, end)
        if stream_id < self._accepts_below:
            self.shell.security_event("stream_hoarding", "more streams than may be open at once")
        self.guards.on_idle(self.now, "stream_flood")

    def reset_request(self, stream_id: int, code: int) -> None:
        """A request was reset before any of it came."""
        if stream_id > self.last_id:
            self.last_id = stream_id
        self.guards.streams += 1
        self.refuse_id(stream_id, f.REQUEST_CANCELLED, True)
        self.tell_decoded()
        self.guards.on_client_reset(self.now, False)

    def read_request(self, stream_id: int, fields: list[Triple], block: bytes) -> Request:
        try:
            request = self.limits.fields.read_request(fields)
        except WireError as error:
            raise malformed(stream_id, error) from None
        if self.is_familiar(block, fields):
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[block] = request
        return request

    def refuse_oversized(self, stream: H3ServerStream, start: list[Triple]) -> None:
        """Answered (RFC 6585 5), in the terms of what it began as; what may still come of it is not read."""
        stream.phase = BODY
        head = None
        try:
            request = self.limits.fields.read_request(start)
        except WireError:
            pass  # it matters no more
        else:
            head = request.head(self.scheme, b"3")
            stream.is_head = request.method == b"HEAD"
        limit = self.limits.max_header_list_size
        self.shell.refuse(stream, HeadTooLargeError(f"a header list of more than {limit} bytes"), head)

    # -- responses -------------------------------------------------------------------------------------

    def send_response(self, stream_id: int, head: ResponseHead, end: bool) -> None:
        """Send a final head."""
        status = head.status
        key = (status, head.content_length, head.shared, head.headers)
        # fast path: equal heads are equal frames, as long as they refer to no table
        frame = self._encoded.get(key)
        if frame is not None:
            self.write(stream_id, frame, end)
            return
        block = self.send_block(stream_id, response_list(head, status != 204), end)
        if block and len(block) <= KNOWN_BYTES:
            if len(self._encoded) >= MAX_KNOWN:
                self._encoded.clear()
            self._encoded[key] = frame_header(f.HEADERS, len(block)) + block

    def on_half_local(self, stream: H3Stream) -> None:
        """The response is complete, the request is not."""
        if not stream.is_tunnel and CAN_RECEIVE[stream.state]:
            self.stop_stream(stream, f.NO_ERROR)
            stream.state = CLOSED
