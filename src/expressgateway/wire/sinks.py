"""Who calls whom: the contracts between codecs and the exchange.

There is one exchange and there are as many codecs as protocols and sides. A *server stream* is one request
on a connection from a client; a *client stream* is one request on a connection to a backend. A codec calls
its sink; the exchange, which is the sink of both sides, calls the streams. The names say the side, so that
one object can be both sinks.

Backpressure: a stream whose outgoing buffer has passed its high mark calls ``on_*_blocked`` once, and
``on_*_drained`` when it is below the low mark again; the exchange answers by ``pause()`` and ``resume()`` on
the other stream, which stop and restart the bytes *from* that stream's peer.
"""

from typing import Protocol

from expressgateway.wire.errors import WireError
from expressgateway.wire.head import Fields, RequestHead, ResponseHead


class RequestSink(Protocol):
    """What a server codec tells of one request. ``end`` is true on the last call of the message."""

    def on_request(self, head: RequestHead, end: bool) -> None: ...
    def on_request_data(self, chunk: bytes, end: bool) -> None: ...
    def on_request_trailers(self, fields: Fields) -> None:
        """The last call of a message that has trailers; implies the end."""

    def on_request_abort(self, error: WireError) -> None:
        """The request will never be complete. At most once, and never after the end of the exchange."""

    def on_front_blocked(self) -> None: ...
    def on_front_drained(self) -> None: ...


class ResponseSink(Protocol):
    """What a client codec tells of one response."""

    def on_informational(self, head: ResponseHead) -> None: ...
    def on_response(self, head: ResponseHead, end: bool) -> None: ...
    def on_response_data(self, chunk: bytes, end: bool) -> None: ...
    def on_response_trailers(self, fields: Fields) -> None: ...
    def on_response_abort(self, error: WireError) -> None: ...
    def on_back_blocked(self) -> None: ...
    def on_back_drained(self) -> None: ...


class ServerStream(Protocol):
    """The exchange's view of one request's client."""

    def send_informational(self, head: ResponseHead) -> None: ...
    def send_head(self, head: ResponseHead, end: bool) -> None: ...
    def send_data(self, chunk: bytes, end: bool) -> None: ...
    def send_trailers(self, fields: Fields) -> None: ...
    def abort(self, error: WireError | None) -> None:
        """End the response so that it can never look complete. Idempotent."""

    def close(self) -> None:
        """End a tunnel after what was sent so far; what its peer still sends is not read."""

    def unsent(self) -> int:
        """Bytes given to this stream that its peer's kernel has not taken yet."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class ClientStream(Protocol):
    """The exchange's view of one request's backend connection."""

    is_reused: bool
    """Whether an earlier exchange used this connection: a failure before any byte may be a stale one."""
    version: bytes
    """Of the backend's protocol, as heads name it."""

    def send_head(self, head: RequestHead, end: bool) -> None: ...
    def send_data(self, chunk: bytes, end: bool) -> None: ...
    def send_trailers(self, fields: Fields) -> None: ...
    def abort(self, error: WireError | None) -> None:
        """Give the exchange up: the backend never sees a complete request. Idempotent; no call follows."""

    def close(self) -> None:
        """As on the client's side."""

    def was_delivered(self) -> bool:
        """Whether any byte of this request can have reached the backend's program."""

    def unsent(self) -> int: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
