"""One exchange over HTTP/2 (RFC 9113) for probes: prior knowledge in clear text, ALPN over TLS.

`h2` does the protocol; it is imported when the first such probe runs, so that nobody else pays for it. It
costs too much for a data path, and here it is another reader's opinion of the backend.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from expressgateway.control.probe_wire import ProbeError, ProbeTls, Target, Wire, opened

if TYPE_CHECKING:
    from h2.connection import H2Connection
    from h2.events import Event

ALPN: Final = ("h2",)
_STREAM: Final = 1
_FRAME_HEADER: Final = 9
_SETTINGS: Final = 4
_MAX_FRAME_BYTES: Final = 16384
_MAX_BESIDE: Final = 262144  # bytes of all frames beyond the body's own: `h2` buffers what is incomplete

Headers = dict[str, str]


@dataclass(slots=True)
class Answer:
    """What came, as far as it was wanted. Names in lower case; of a repeated field the last."""

    headers: Headers = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    trailers: Headers = field(default_factory=dict)
    is_complete: bool = False

    @property
    def status(self) -> int:
        """0 while there is none."""
        status = self.headers.get(":status", "")
        return int(status) if status.isascii() and status.isdigit() and len(status) == 3 else 0


async def exchange(
    target: Target, tls: ProbeTls | None, headers: list[tuple[str, str]], body: bytes, max_bytes: int
) -> Answer:
    """Ask, and read until the answer is complete or its body is longer than `max_bytes`.

    Raises `ProbeError`, `OSError` and `TlsConfigError`.
    """
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.exceptions import H2Error

    async with opened(target, tls) as wire:
        if tls is not None and wire.alpn != ALPN[0]:
            raise ProbeError("does not offer HTTP/2 in its TLS handshake")
        connection = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        connection.initiate_connection()
        connection.send_headers(_STREAM, headers, end_stream=not body)
        if body:
            connection.send_data(_STREAM, body, end_stream=True)
        try:
            return await _answer(wire, connection, max_bytes)
        except H2Error as error:
            raise ProbeError(f"garbage instead of an answer: {error}") from None


async def _answer(wire: Wire, connection: "H2Connection", max_bytes: int) -> Answer:
    answer = Answer()
    start = b""
    received = 0
    while not answer.is_complete and len(answer.body) <= max_bytes:
        wire.send(connection.data_to_send())
        data = await wire.receive()
        if not data:
            raise ProbeError("closed the connection before it answered")
        received += len(data)
        if received > max_bytes + _MAX_BESIDE:
            raise ProbeError("garbage instead of an answer: more bytes than any answer has")
        if len(start) < _FRAME_HEADER:
            start = (start + data[:_FRAME_HEADER])[:_FRAME_HEADER]
            if not _may_be_settings(start):
                raise ProbeError("garbage instead of an answer: it is not HTTP/2")
        for event in connection.receive_data(data):
            _take(event, answer, connection)
    connection.close_connection()
    wire.send(connection.data_to_send())
    return answer


def _may_be_settings(start: bytes) -> bool:
    """RFC 9113 3.4: the server's first frame is SETTINGS. What has another length would be waited for."""
    length = int.from_bytes(start[:3], "big") if len(start) >= 3 else 0
    return (
        length <= _MAX_FRAME_BYTES
        and length % 6 == 0
        and start[3:4] in (b"", bytes([_SETTINGS]))
        and not any(start[5:9])
    )


def _take(event: "Event", answer: Answer, connection: "H2Connection") -> None:
    from h2 import events

    if isinstance(event, events.ResponseReceived):
        answer.headers = _text(event.headers)
    elif isinstance(event, events.DataReceived):
        answer.body += event.data
        connection.acknowledge_received_data(event.flow_controlled_length, _STREAM)
    elif isinstance(event, events.TrailersReceived):
        answer.trailers = _text(event.headers)
    elif isinstance(event, events.StreamEnded):
        answer.is_complete = True
    elif isinstance(event, events.StreamReset):
        raise ProbeError(f"reset the stream with error code {int(event.error_code)}")
    elif isinstance(event, events.ConnectionTerminated) and not answer.is_complete:
        code = int(event.error_code or 0)
        raise ProbeError(f"closed the connection with GOAWAY, error code {code}")


def _text(headers: object) -> Headers:
    if not isinstance(headers, list | tuple):
        return {}
    return {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in headers}
