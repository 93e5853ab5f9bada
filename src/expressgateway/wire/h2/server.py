"""The server role of HTTP/2: one client's connection, as many exchanges as it has streams.

A request that is malformed is reset and nobody hears of it (RFC 9113 8.1.1); one that is sound and not
served - too large, no authority, CONNECT - is given to the shell, which answers it. Clients repeat
themselves: a header block that neither changes the table nor differs from one before is not decoded again.

A response that is complete before its request ends with RST_STREAM and NO_ERROR (8.1). A tunnel
(RFC 8441) is one in which each side ends by itself; one that we close waits a little for the client's end.
"""

from typing import Final

from expressgateway.wire.errors import (
    ContradictionError,
    HeadTooLargeError,
    MalformedError,
    StreamResetError,
    WireError,
)
from expressgateway.wire.h2 import frames as f
from expressgateway.wire.h2.connection import DEPENDS_ON_ITSELF, H2Connection, contradiction
from expressgateway.wire.h2.core import KNOWN_BYTES, MAX_KNOWN
from expressgateway.wire.h2.fields import Request, response_list
from expressgateway.wire.h2.frames import PREFACE, H2ConnectionError, H2StreamError
from expressgateway.wire.h2.hpack import Triple, changes_table
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.streams import H2Stream
from expressgateway.wire.head import Fields, ResponseHead, SharedFields
from expressgateway.wire.resets import reset_code
from expressgateway.wire.shells import ServerShell
from expressgateway.wire.sinks import RequestSink
from expressgateway.wire.streams import CLOSED, HALF_REMOTE, ON_RECEIVED_END, OPEN, ServerSide

MAX_SKIPPED: Final = 8  # ranges of ids that the client left out


class H2ServerStream(ServerSide, H2Stream):
    """One request's client. Implements ``ServerStream``."""

    __slots__ = ()

    sink: RequestSink | None
    connection: "H2Server"

    # -- the connection's calls ------------------------------------------------------------------------

    def on_block(self, flags: int, block: bytes) -> None:
        """Trailers (RFC 9113 8.1)."""
        connection = self.connection
        fields = connection.decode(block)
        if self.state is HALF_REMOTE:
            raise H2StreamError(
                self.id, f.STREAM_CLOSED, MalformedError("HEADERS behind the end of a stream")
            )
        trailers = connection.trailers_of(self, flags, fields)
        self.state = ON_RECEIVED_END[self.state]
        closes = self.state is CLOSED
        if self.sink is not None:
            self.sink.on_request_trailers(trailers)
        if closes:
            connection.close_stream(self)

    def on_reset(self, code: int) -> None:
        self.on_lost(StreamResetError(code, f"the client reset the stream with code {code:#x}"))
        connection = self.connection
        connection.guards.on_client_reset(connection.now, self.has_answered)

    def contradicted(self) -> None:
        sink = self.sink
        self.connection.reset_stream(self, f.INTERNAL_ERROR)
        if sink is not None:
            sink.on_request_abort(ContradictionError("a response that contradicts its declared length"))

    # -- ServerStream ----------------------------------------------------------------------------------

    def abort(self, error: WireError | None) -> None:
        """End the response so that it can never look complete. Idempotent."""
        if self.state is not CLOSED:
            # RFC 8441 5: of a tunnel, it is what a reset is to TCP.
            default = f.CANCEL if self.is_tunnel else f.INTERNAL_ERROR
            self.connection.reset_stream(self, reset_code(error, default))


class H2Server(H2Connection):
    """One client connection's codec."""

    __slots__ = ("_accepts_to", "_encoded", "_known", "_preface_left", "_skipped", "last_id", "scheme")

    shell: ServerShell[H2Stream]

    def __init__(self, shell: ServerShell[H2Stream], limits: H2Limits, scheme: bytes) -> None:
        super().__init__(shell, limits)
        # Wiring
        self.scheme = scheme
        # Connection
        self.last_id = 0  # the highest stream that the client has opened
        self._accepts_to = f.MAX_ID  # what our GOAWAY has said
        self._preface_left = PREFACE
        self._skipped: list[tuple[int, int]] = []  # the last MAX_SKIPPED
        self._known: dict[bytes, Request] = {}  # at most MAX_KNOWN
        self._encoded: dict[tuple[int, int | None, SharedFields, Fields], bytes] = {}  # likewise

    # -- the shell's calls -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the server's preface (RFC 9113 3.4)."""
        more = ((f.ENABLE_CONNECT_PROTOCOL, 1),) if self.limits.websocket else ()
        self._begin((f.MAX_CONCURRENT_STREAMS, self.limits.max_concurrent_streams), *more)

    def read(self, data: bytes) -> None:
        left = self._preface_left
        if left:
            begin = data[: len(left)]
            if not left.startswith(begin):
                raise H2ConnectionError(f.PROTOCOL_ERROR, "a connection that does not begin with the preface")
            self._preface_left = left[len(begin) :]
            data = data[len(begin) :]
        if data:
            super().read(data)

    def go_away(self, code: int = f.NO_ERROR, detail: str = "") -> None:
        if not self.is_leaving:
            self._accepts_to = self.last_id
        super().go_away(code, detail)

    # -- what the connection asks of its role ----------------------------------------------------------

    def is_idle_id(self, stream_id: int) -> bool:
        return stream_id > self.last_id or not stream_id & 1

    def is_ignored(self, stream_id: int) -> bool:
        return stream_id > self._accepts_to

    def last_processed(self) -> int:
        return min(self.last_id, self._accepts_to)

    @property
    def is_mid_head(self) -> bool:
        """The preface is part of the first head."""
        return 0 < len(self._preface_left) < len(PREFACE) or super().is_mid_head

    def fail_stream(self, fault: H2StreamError) -> None:
        if fault.stream_id not in self.streams:
            self.shell.rejected(fault.cause)
        super().fail_stream(fault)

    def _die(self) -> None:
        self.shell.security_event("dead_peer", "the client does not answer a PING")
        super()._die()

    def check_id(self, stream_id: int) -> None:
        if not stream_id & 1:  # RFC 9113 5.1.1; zero among them
            raise H2ConnectionError(f.PROTOCOL_ERROR, "HEADERS on a stream that is no client's")

    def forget_blocks(self) -> None:
        self._known.clear()

    def forget_encoded(self) -> None:
        self._encoded.clear()

    # -- requests --------------------------------------------------------------------------------------

    def on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        if stream_id <= self.last_id:
            stream = self.streams.get(stream_id)
            if stream is None:
                self.decode(block)
                self._on_stray_block(stream_id)
            else:
                stream.on_block(flags, block)
            return
        last_id = self.last_id
        if stream_id > last_id + 2:
            self._skipped = [*self._skipped[1 - MAX_SKIPPED :], (last_id + 2, stream_id - 2)]
        self.last_id = stream_id
        # fast path: a block that was read before
        request = self._known.get(block)
        if request is None:
            fields, is_whole = self.decode_within(block)
            if not is_whole:
                if not self._is_unwelcome(stream_id):
                    self._refuse_oversized(stream_id, flags, fields)
                return
            try:
                request = self.limits.fields.read_request(fields)
            except WireError as error:
                if self.is_ignored(stream_id) and self._is_unwelcome(stream_id):
                    return
                raise H2StreamError(stream_id, f.PROTOCOL_ERROR, error) from None
            if self.is_familiar(block, fields):
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[block] = request
        if self._is_unwelcome(stream_id):
            return
        if flags & DEPENDS_ON_ITSELF:
            cause = MalformedError("a stream that depends on itself")
            raise H2StreamError(stream_id, f.PROTOCOL_ERROR, cause)
        self._open(stream_id, flags & f.END_STREAM != 0, request)

    def _is_unwelcome(self, stream_id: int) -> bool:
        """Whether this stream is not to be opened. Its header block is read all the same."""
        if self.is_ignored(stream_id):
            self.guards.on_idle(self.now, "stream_flood")
            return True
        if len(self.streams) >= self.limits.max_concurrent_streams:
            self.refuse_id(stream_id, f.REFUSED_STREAM)
            self.shell.security_event("stream_hoarding", "more streams than may be open at once")
            self.guards.on_idle(self.now, "stream_flood")
            return True
        return False

    def _open(self, stream_id: int, end: bool, request: Request) -> None:
        length = request.content_length
        if end and length:
            raise contradiction(stream_id)
        self.note_stream()
        stream = H2ServerStream(self, stream_id, HALF_REMOTE if end else OPEN)
        self.streams[stream_id] = stream
        head = request.head(self.scheme)
        if request.refusal is not None:
            stream.is_head = request.method == b"HEAD"
            self.shell.refuse(stream, request.refusal, head)
            return
        if not end and length is not None:
            stream.expected = length
        if request.protocol is not None:
            if not self.limits.websocket:
                cause = MalformedError(":protocol, which was not offered")
                raise H2StreamError(stream_id, f.PROTOCOL_ERROR, cause)
            stream.is_tunnel = True
        elif request.method == b"HEAD":
            stream.is_head = True
        sink = stream.sink = self.shell.open_exchange(stream)
        sink.on_request(head, end)

    def _refuse_oversized(self, stream_id: int, flags: int, beginning: list[Triple]) -> None:
        self.note_stream()
        stream = H2ServerStream(self, stream_id, HALF_REMOTE if flags & f.END_STREAM else OPEN)
        self.streams[stream_id] = stream
        head = None
        try:
            request = self.limits.fields.read_request(beginning)
        except WireError:
            pass  # it matters no more
        else:
            head = request.head(self.scheme)
            stream.is_head = request.method == b"HEAD"
        limit = self.limits.max_header_list_size
        self.shell.refuse(stream, HeadTooLargeError(f"a header list of more than {limit} bytes"), head)

    def _on_stray_block(self, stream_id: int) -> None:
        """RFC 9113 5.1 and 5.1.1: what a header block on a closed stream is, depends on how it was closed."""
        was_ours = self.was_reset_by_us(stream_id)
        if was_ours or self.is_ignored(stream_id):
            self.guards.on_idle(self.now, "closed_stream_flood")
            return
        cause = "HEADERS on a stream that is closed"
        if was_ours is not None:
            raise H2StreamError(stream_id, f.STREAM_CLOSED, MalformedError(cause))
        if any(first <= stream_id <= last for first, last in self._skipped):
            raise H2ConnectionError(f.PROTOCOL_ERROR, "a stream below one that was opened before")
        raise H2ConnectionError(f.STREAM_CLOSED, cause)

    # -- responses -------------------------------------------------------------------------------------

    def send_response(self, stream_id: int, head: ResponseHead, end: bool) -> None:
        """Send a final head."""
        status = head.status
        key = (status, head.content_length, head.shared, head.headers)
        # fast path: equal heads, while neither changed the table, are equal blocks
        block = self._encoded.get(key)
        if block is None:
            block = self.encoder.encode(response_list(head, status != 204))
            if changes_table(block):
                self._encoded.clear()
            elif len(block) <= KNOWN_BYTES:
                if len(self._encoded) >= MAX_KNOWN:
                    self._encoded.clear()
                self._encoded[key] = block
        self.write(f.header_frames(stream_id, block, end, self.frame_bytes))

    def on_half_local(self, stream: H2Stream) -> None:
        """The response is complete, the request is not."""
        if not stream.is_tunnel:
            self.reset_stream(stream, f.NO_ERROR)
