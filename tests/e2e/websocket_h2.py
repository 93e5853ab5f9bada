"""A client of WebSocket over HTTP/2 (RFC 8441): frames and flow control by ``h2``."""

import contextlib
import ssl
from collections.abc import Callable
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from h2.config import H2Configuration

from tests.e2e.harness import PATIENCE_S, Client
from tests.e2e.websocket_sessions import Link, Pairs, Session


class H2Link(Link):
    """One HTTP/2 connection."""

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        self.window = 65_535
        self.goaway = None
        self._client = Client(port, tls=tls)
        self.sock = self._client.sock
        self.h2 = h2.connection.H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(1 << 26)  # what stalls is a stream, never the connection
        self.sessions: dict[int, H2Session] = {}
        self.settings: dict[int, int] | None = None
        self.is_over = False
        self.flush()
        self.pump(lambda: self.settings is not None)

    def close(self) -> None:
        self.sock.close()

    @property
    def offers_connect(self) -> bool:
        return (self.settings or {}).get(0x8) == 1

    def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            self.sock.sendall(data)

    def pump(self, done: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        while not done():
            if self.is_over:
                raise ConnectionError("the gateway closed the connection")
            self.sock.settimeout(patience_s)
            try:
                data = self.sock.recv(65_536)
            except ConnectionError:
                data = b""
            if not data:
                self.is_over = True
                for session in self.sessions.values():
                    session.is_over = True
                continue
            for event in self.h2.receive_data(data):
                self._on_event(event)
            self.flush()

    def _on_event(self, event: Any) -> None:
        if isinstance(event, h2.events.RemoteSettingsChanged):
            known = {int(code): change.new_value for code, change in event.changed_settings.items()}
            self.settings = (self.settings or {}) | known
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
            # h2 reads nothing more then, although what is open may still be answered (RFC 9113 6.8).
            self.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN
        else:
            session = self.sessions.get(getattr(event, "stream_id", None) or 0)
            if session is not None:
                session.on_event(event)

    def begin(self, fields: Pairs) -> "H2Session":
        stream = self.h2.get_next_available_stream_id()
        session = self.sessions[stream] = H2Session(self, stream)
        self.h2.send_headers(stream, fields)
        self.flush()
        return session


class H2Session(Session):
    """One stream."""

    link: H2Link

    def __init__(self, link: H2Link, stream: int) -> None:
        super().__init__(link)
        self.stream = stream
        self._owed = 0

    def on_event(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            self.on_head([(str(name), str(value)) for name, value in event.headers])
        elif isinstance(event, h2.events.DataReceived):
            self._owed += event.flow_controlled_length or 0
            self.on_bytes(event.data)
        elif isinstance(event, h2.events.StreamEnded):
            self.on_end()
        elif isinstance(event, h2.events.StreamReset):
            self.on_reset(int(event.error_code))

    def give(self) -> None:
        owed, self._owed = self._owed, 0
        if owed:
            with contextlib.suppress(h2.exceptions.StreamClosedError):
                self.link.h2.acknowledge_received_data(owed, self.stream)
        self.link.flush()

    def send_raw(self, data: bytes, end: bool = False, patience_s: float = PATIENCE_S) -> int:
        link, at = self.link, 0
        while at < len(data):
            room = min(link.h2.local_flow_control_window(self.stream), link.h2.max_outbound_frame_size)
            if room <= 0:
                try:
                    link.pump(
                        lambda: self.is_over or link.h2.local_flow_control_window(self.stream) > 0, patience_s
                    )
                except TimeoutError:
                    return at
                if self.is_over:
                    return at
                continue
            link.h2.send_data(self.stream, data[at : at + room])
            link.flush()
            at += room
        if end:
            self.end()
        return len(data)

    def end(self) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.link.h2.end_stream(self.stream)
            self.link.flush()

    def cancel(self) -> None:
        self.link.h2.reset_stream(self.stream, h2.errors.ErrorCodes.CANCEL)
        self.link.flush()
