"""A client's WebSocket on a stream of HTTP/2 or HTTP/3, of parts that we did not write.

A ``Link`` is a connection, a ``Session`` one extended CONNECT on it: messages by the sans-IO half of
``websockets``, whose own handshake is left out. What a version adds is in ``websocket_h2`` and
``websocket_h3``.
"""

from collections.abc import Callable
from typing import Self

from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.e2e.harness import PATIENCE_S

Pairs = list[tuple[str, str]]
OFFER = "permessage-deflate; client_max_window_bits"


class Refused(Exception):  # noqa: N818 - named as what it is: an answer
    """The handshake was answered, and not with success."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(f"status {status}: {body!r} {headers}")
        self.status = status
        self.headers = headers
        self.body = body


class Link:
    """One connection."""

    goaway: int | None
    """What the last GOAWAY said; ``None``: there was none."""
    window: int
    """What a stream's peer may send before more is granted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    @property
    def offers_connect(self) -> bool:
        raise NotImplementedError

    def pump(self, done: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        """Read until it is true; ``TimeoutError`` after so long without anything."""
        raise NotImplementedError

    def begin(self, fields: Pairs) -> "Session":
        """Send a request's head."""
        raise NotImplementedError

    def ask(
        self, path: str = "/echo", *more: tuple[str, str], protocol: str | None = "websocket"
    ) -> "Session":
        """Begin a handshake; nothing is waited for."""
        return self.begin(
            [
                (":method", "CONNECT"),
                *([(":protocol", protocol)] if protocol else []),
                (":scheme", "https"),
                (":path", path),
                (":authority", "localhost"),
                ("sec-websocket-version", "13"),
                *more,
            ]
        )

    def open(self, path: str = "/echo", *more: tuple[str, str]) -> "Session":
        """An open tunnel, whose bytes nobody looks at. Raises ``Refused``."""
        session = self.ask(path, *more)
        self.pump(lambda: session.status or session.is_over)
        if not 200 <= session.status < 300:
            self.pump(lambda: session.has_ended or session.is_over)
            raise Refused(session.status, session.headers, bytes(session.raw))
        return session

    def connect(self, path: str = "/echo", *more: tuple[str, str]) -> "Session":
        """A session. Raises ``Refused``."""
        session = self.open(path, *more)
        session.begin()
        return session


class Session:
    """One stream. Until ``begin`` what comes is a response's body, in ``raw``."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pairs: Pairs = []
        self.raw = bytearray()
        """What came, whole or raw."""
        self.reset: int | None = None
        self.has_ended = False
        """The gateway has ended its side."""
        self.is_over = False
        self.is_reading = True
        """Off: no credit is given back."""
        self.protocol: ClientProtocol | None = None
        self._frames: list[Frame] = []
        self.pongs: list[bytes] = []

    # -- a version's -----------------------------------------------------------------------------------

    def give(self) -> None:
        """Give back the credit for what has come."""
        raise NotImplementedError

    def send_raw(self, data: bytes, end: bool = False, patience_s: float = PATIENCE_S) -> int:
        """Send as the windows allow. Gives how much was: less if for so long nothing more was allowed."""
        raise NotImplementedError

    def end(self) -> None:
        """End our side, if it is open still."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Give the stream up."""
        raise NotImplementedError

    # -- what comes ------------------------------------------------------------------------------------

    def on_head(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.headers = dict(pairs)
        self.status = int(self.headers[":status"])

    def on_bytes(self, data: bytes) -> None:
        self.raw += data
        if self.is_reading:
            self.give()
        if self.protocol is not None:
            self._feed(data)

    def on_end(self) -> None:
        self.has_ended = True
        if self.protocol is not None:
            self.protocol.receive_eof()
            self._collect()

    def on_reset(self, code: int | None) -> None:
        self.reset = code
        self.is_over = True

    def until(self, check: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        self.link.pump(lambda: check() or self.is_over, patience_s)
        assert check(), f"ended first: {self!r}"

    # -- messages --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The tunnel is open: from now on it is WebSocket."""
        self.protocol = ClientProtocol(parse_uri("wss://localhost/"), state=State.OPEN, max_size=None)
        chosen = self.headers.get("sec-websocket-extensions", "")
        if chosen:
            _, *rest = [part.strip() for part in chosen.split(";")]
            params = [(name, value or None) for name, _, value in (part.partition("=") for part in rest)]
            factory = ClientPerMessageDeflateFactory(client_max_window_bits=True)
            self.protocol.extensions = [factory.process_response_params(params, [])]
        if self.raw:
            self._feed(bytes(self.raw))
        if self.has_ended:
            self.protocol.receive_eof()

    @property
    def subprotocol(self) -> str | None:
        return self.headers.get("sec-websocket-protocol")

    def _feed(self, data: bytes) -> None:
        assert self.protocol is not None
        self.protocol.receive_data(data)
        self._collect()

    def _collect(self) -> None:
        assert self.protocol is not None
        for event in self.protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode is Opcode.PONG:
                self.pongs.append(bytes(event.data))
            elif event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._frames.append(event)
        self._send()

    def _send(self) -> None:
        assert self.protocol is not None
        for data in self.protocol.data_to_send():
            if self.is_over:
                return
            if data:
                self.send_raw(data)
            else:
                self.end()

    def send(self, message: str | bytes) -> None:
        assert self.protocol is not None
        if isinstance(message, str):
            self.protocol.send_text(message.encode())
        else:
            self.protocol.send_binary(message)
        self._send()

    def ping(self, payload: bytes = b"") -> None:
        assert self.protocol is not None
        self.protocol.send_ping(payload)
        self._send()

    def recv(self, timeout: float = PATIENCE_S) -> str | bytes:
        """The next message, as ``websockets`` gives them and with its exceptions."""
        self.link.pump(lambda: self._is_message_there() or self.is_over or self.has_ended, timeout)
        if not self._is_message_there():
            assert self.protocol is not None
            self.protocol.receive_eof()
            error = self.protocol.close_exc
            assert isinstance(error, ConnectionClosedError | ConnectionClosedOK)
            raise error
        parts = []
        while True:
            part = self._frames.pop(0)
            parts.append(part)
            if part.fin:
                break
        whole = b"".join(part.data for part in parts)
        return whole.decode() if parts[0].opcode is Opcode.TEXT else whole

    def _is_message_there(self) -> bool:
        return any(frame.fin for frame in self._frames)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """The closing handshake, and the gateway's end of the stream behind it."""
        assert self.protocol is not None
        self.protocol.send_close(code, reason)
        self._send()
        self.link.pump(lambda: self.has_ended or self.is_over)

    @property
    def close_code(self) -> int | None:
        return self.protocol.close_code if self.protocol is not None else None

    @property
    def close_reason(self) -> str | None:
        return self.protocol.close_reason if self.protocol is not None else None

    def __repr__(self) -> str:
        return (
            f"<Session {self.status} ended={self.has_ended} over={self.is_over} reset={self.reset} "
            f"{len(self.raw)} bytes>"
        )
