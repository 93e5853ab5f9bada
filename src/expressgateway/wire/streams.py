"""Streams of a connection that has many: states, and what their roles do alike over HTTP/2 and HTTP/3.

States are those of RFC 9113 5.1 without the reserved ones, for nothing is ever pushed; over QUIC they are the
states of both directions taken together (RFC 9000 3). A closed stream is forgotten by its connection; calls
on it do nothing.

``ServerSide`` and ``ClientSide`` are mixed into a version's own stream, before it.
"""

from enum import IntEnum
from typing import Any, Final, Protocol

from expressgateway.wire.errors import (
    FramingError,
    MalformedError,
    NotOfferedError,
    UnprocessedError,
    WireError,
)
from expressgateway.wire.h2.fields import request_list, response_list
from expressgateway.wire.h2.hpack import Triple
from expressgateway.wire.head import RequestHead, ResponseHead
from expressgateway.wire.sinks import RequestSink, ResponseSink


class State(IntEnum):
    IDLE = 0
    OPEN = 1
    HALF_LOCAL = 2
    """We have ended our side."""
    HALF_REMOTE = 3
    """The peer has ended its side."""
    CLOSED = 4


IDLE, OPEN, HALF_LOCAL, HALF_REMOTE, CLOSED = (
    State.IDLE,
    State.OPEN,
    State.HALF_LOCAL,
    State.HALF_REMOTE,
    State.CLOSED,
)

# What an end makes of a state. Where it cannot happen, nothing changes.
ON_SENT_END: Final = (IDLE, HALF_LOCAL, HALF_LOCAL, CLOSED, CLOSED)
ON_RECEIVED_END: Final = (IDLE, HALF_REMOTE, CLOSED, HALF_REMOTE, CLOSED)
CAN_RECEIVE: Final = (False, True, True, False, False)

UNDECLARED: Final = -1
PARTING_S: Final = 5.0
MAX_INFORMATIONAL: Final = 32  # interim responses to one request; more is an attack or a loop


class Connection(Protocol):
    """What a stream needs of the connection it is on."""

    now: float

    def send_block(self, stream_id: int, fields: list[Triple], end: bool) -> bytes: ...


class ServerConnection(Connection, Protocol):
    def send_response(self, stream_id: int, head: ResponseHead, end: bool) -> None: ...


class ClientConnection(Connection, Protocol):
    has_settings: bool
    offers_connect: bool
    flushed: int

    def begin_stream(self, stream: Any) -> bool:  # noqa: ANN401 - the version's own kind
        """Give a stream its number. False: it is too late for that."""

    def forget_opening(self, stream: Any) -> None:  # noqa: ANN401 - likewise
        """A stream ends before it has begun."""


class Stream:
    """One request and its answer on a connection, seen from our side."""

    __slots__ = (
        # The roles', too: of several bases only one may have slots.
        "_flushed",
        "_handshake",
        "_informational",
        "_is_blocked",
        "_is_complete",
        "_is_paused",
        "_is_unprocessed",
        "_withheld",
        "connection",
        "expected",
        "has_answered",
        "id",
        "is_head",
        "is_reused",
        "is_sending",
        "is_tunnel",
        "left",
        "parting_at",
        "sink",
        "state",
    )

    connection: Connection
    sink: RequestSink | ResponseSink | None

    def __init__(self, connection: Connection, stream_id: int, state: State) -> None:
        # Wiring
        self.connection = connection
        self.id = stream_id
        # Exchange
        self.state = state
        self.is_tunnel = False
        self.parting_at = 0.0  # seconds: a tunnel that we closed waits so long for its peer's end
        # Sending
        self.is_sending = False  # the head is sent, the end was not given yet
        self.left = UNDECLARED  # bytes of the declared length that were not given yet
        self._is_blocked = False  # the exchange was told
        # Receiving
        self.expected = UNDECLARED  # bytes of the declared length that are still to come
        self._is_paused = False
        self._withheld = 0  # consumed while paused: credit that is not granted again yet

    # -- the roles: what their sinks are told ----------------------------------------------------------

    def on_body(self, chunk: bytes, end: bool) -> None:
        raise NotImplementedError

    def on_reset(self, code: int) -> None:
        """The peer has reset it."""
        raise NotImplementedError

    def on_lost(self, error: WireError) -> None:
        """It ends without the peer's word."""
        raise NotImplementedError

    def blocked(self) -> None:
        raise NotImplementedError

    def drained(self) -> None:
        raise NotImplementedError

    def contradicted(self) -> None:
        """What there is to send is not what the head declared."""
        raise NotImplementedError

    # -- the versions ----------------------------------------------------------------------------------

    def send_data(self, chunk: bytes, end: bool) -> None:
        """Part of the body. More or less than was declared is never sent as if it were right."""
        raise NotImplementedError

    def sent_end(self) -> None:
        """Our side is complete."""
        raise NotImplementedError

    def malformed(self, cause: WireError) -> Exception:
        """The version's stream error for a message that is none."""
        raise NotImplementedError

    def pause(self) -> None:
        self._is_paused = True

    def part(self) -> None:
        """Close a tunnel: end our side behind what was sent, read no more, wait a little for its peer."""
        if self.state is not CLOSED:
            self.pause()
            self.parting_at = self.connection.now + PARTING_S
            self.send_data(b"", True)


class ServerSide(Stream):
    """A request's client. Implements ``ServerStream`` but for ``abort``, whose codes are the version's."""

    __slots__ = ()

    connection: ServerConnection
    sink: RequestSink | None

    def __init__(self, connection: ServerConnection, stream_id: int, state: State) -> None:
        super().__init__(connection, stream_id, state)
        self.sink = None
        self.is_head = False  # the request is HEAD
        self.has_answered = False

    def on_body(self, chunk: bytes, end: bool) -> None:
        if self.sink is not None:
            self.sink.on_request_data(chunk, end)

    def on_lost(self, error: WireError) -> None:
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.on_request_abort(error)

    def blocked(self) -> None:
        if self.sink is not None:
            self.sink.on_front_blocked()

    def drained(self) -> None:
        if self.sink is not None:
            self.sink.on_front_drained()

    def send_informational(self, head: ResponseHead) -> None:
        """1xx. 101 opens the tunnel that the client asked for: here that is 200 (RFC 8441 5, RFC 9220 3)."""
        if self.state is CLOSED or self.has_answered:
            return
        if head.status == 101:
            shared = head.shared
            head = ResponseHead(200, head.headers)
            head.shared = shared
            self.has_answered = self.is_sending = True
        self.connection.send_block(self.id, response_list(head, False), False)

    def send_head(self, head: ResponseHead, end: bool) -> None:
        """The final head. Without a body to come (HEAD, 204, 304) it is the end as well."""
        if self.state is CLOSED or self.has_answered:
            return
        self.has_answered = True
        self.is_tunnel = False
        status = head.status
        length = head.content_length
        if status == 204 or status == 304 or self.is_head:
            # RFC 9110 8.6: a length may describe what would have been sent; 204 must not have one.
            end = True
        elif end and length:
            self.contradicted()
            return
        elif length is not None:
            self.left = length
        self.connection.send_response(self.id, head, end)
        if end:
            self.sent_end()
        else:
            self.is_sending = True

    def close(self) -> None:
        """End a tunnel after what was sent so far; what its client still sends is not read."""
        self.sink = None
        self.part()


class ClientSide(Stream):
    """A request's backend. Implements ``ClientStream`` but for ``abort`` and ``was_delivered``."""

    __slots__ = ()

    connection: ClientConnection
    sink: ResponseSink | None
    version: bytes

    def __init__(
        self, connection: ClientConnection, stream_id: int, sink: ResponseSink, is_reused: bool
    ) -> None:
        super().__init__(connection, stream_id, IDLE)
        self.sink = sink
        self.is_reused = is_reused
        self.is_head = False  # the request is HEAD
        self._flushed = -1  # how often the connection was flushed before the request's head
        self._handshake: RequestHead | None = None  # waits until it is known what the backend offers
        self._informational = 0
        self._is_complete = False  # the response
        self._is_unprocessed = False  # the backend has said so

    def send_head(self, head: RequestHead, end: bool) -> None:
        """The request's head. Only now does the stream get its number: they go out in order."""
        if self.state is not IDLE or self.sink is None:
            return
        connection = self.connection
        length = head.content_length
        if end and length:
            self._refuse(FramingError("a request without the body that it declares"))
            return
        if head.protocol is not None:
            if not connection.has_settings:
                self._handshake = head  # RFC 8441 3: nothing is offered before the backend's SETTINGS
                return
            if not connection.offers_connect:
                self._refuse(NotOfferedError("the backend does not offer extended CONNECT"))
                return
            self.is_tunnel = True
            length = None
        if not connection.begin_stream(self):
            self._refuse(UnprocessedError("the connection takes no more streams"))
            return
        self.is_head = head.method == b"HEAD"
        self._flushed = connection.flushed
        self.state = OPEN
        if length is not None:
            self.left = length
        connection.send_block(self.id, request_list(head), end)
        if end:
            self.sent_end()
        else:
            self.is_sending = True

    def on_offers_known(self) -> None:
        """The backend's SETTINGS have come: a handshake need not wait."""
        head, self._handshake = self._handshake, None
        if head is not None:
            self.send_head(head, False)

    def lose_handshake(self, error: WireError) -> None:
        """The connection goes while a handshake waits."""
        if self._handshake is not None:
            self._refuse(error)

    def _refuse(self, error: WireError) -> None:
        """Nothing was sent."""
        self.state = CLOSED
        self.connection.forget_opening(self)
        self._abort(error)

    def close(self) -> None:
        """End a tunnel after what was sent so far; what its backend still sends is not read."""
        self.sink = None
        self.part()

    def on_informational(self, head: ResponseHead, end: bool) -> None:
        """A head with a status below 200. Raises the version's stream error."""
        self._informational += 1
        if end:
            cause = MalformedError("an interim response that ends its stream")
        elif head.status == 101:  # RFC 9113 8.6, RFC 9114 4.5
            cause = MalformedError(f"an upgrade on an HTTP/{self.version.decode('ascii')} stream")
        elif head.content_length is not None:
            cause = MalformedError("an interim response with a body")
        elif self._informational > MAX_INFORMATIONAL:
            cause = MalformedError(f"more than {MAX_INFORMATIONAL} interim responses")
        else:
            if self.sink is not None:
                self.sink.on_informational(head)
            return
        raise self.malformed(cause)

    def on_body(self, chunk: bytes, end: bool) -> None:
        if end:
            self._is_complete = True
        if self.sink is not None:
            self.sink.on_response_data(chunk, end)

    def _abort(self, error: WireError) -> None:
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.on_response_abort(error)

    def blocked(self) -> None:
        if self.sink is not None:
            self.sink.on_back_blocked()

    def drained(self) -> None:
        if self.sink is not None:
            self.sink.on_back_drained()
