"""Backends of WebSocket over HTTP/2 (RFC 8441), of parts that we did not write; ``websocket_h3`` has another.

``Asgi`` is ``hypercorn`` in a thread. ``H2Sockets`` is a server of ``h2`` and the sans-IO half of
``websockets`` that does by path what a test needs of it: ``/echo``, ``/closes``, ``/forbidden``, ``/floods``,
``/deaf`` (reads nothing), ``/resets`` and ``/ends`` (its side, at the first message), ``/says`` (and ends).
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self

import h2.connection
import h2.errors
import h2.events
import h2.settings
from h2.config import H2Configuration
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.harness import PATIENCE_S, eventually
from tests.ports import free_port

FLOOD = b"x" * 50_000
FLOODS = 400


class Asgi:
    """An ASGI application under ``hypercorn``: HTTP/1.1 and HTTP/2 by prior knowledge on one port; with a
    certificate HTTP/3, and the others over TLS.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], files: CertificateFiles | None = None) -> None:
        self._files = files
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        from hypercorn.asyncio import serve
        from hypercorn.config import Config

        config = Config()
        config.bind = [self.address]
        if self._files is not None:
            config.quic_bind = [self.address]
            config.certfile = str(self._files.certificate)
            config.keyfile = str(self._files.key)
        config.accesslog = config.errorlog = None
        config.websocket_max_message_size = 1 << 26
        config.graceful_timeout = 0.1
        asyncio.set_event_loop(self._loop)
        open_socket = self._loop.create_datagram_endpoint
        left_open: list[asyncio.DatagramTransport] = []

        async def noted(*args: Any, **options: Any) -> Any:
            transport, protocol = await open_socket(*args, **options)
            left_open.append(transport)
            return transport, protocol

        self._loop.create_datagram_endpoint = noted  # type: ignore[method-assign]  # hypercorn closes none
        serving = serve(self._app, config, shutdown_trigger=self._stop.wait)
        self._loop.run_until_complete(serving)
        for transport in left_open:
            transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))  # so that they are closed
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(self._is_up, "hypercorn accepts")
        return self

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)


class Stream:
    """One extended CONNECT as this backend sees it."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self.fields = fields
        self.headers = dict(fields)
        self.path = self.headers[":path"]
        self.protocol = ServerProtocol(state=State.OPEN, max_size=None)
        self.queue = bytearray()
        """What the window does not allow yet."""
        self.is_ending = self.is_ended = False
        self.received = 0
        self.sent = 0
        self.has_ended = False
        """The gateway has ended its side."""
        self.reset: int | None = None
        self.message: list[Frame] = []

    @property
    def close_code(self) -> int | None:
        return self.protocol.close_code

    def hear(self, frame: Frame) -> bytes:
        """Do what the path says about a frame of a message. Gives what is to be sent."""
        if self.path == "/ends":
            self.is_ending = True
        elif self.path == "/closes":
            self.protocol.send_close(4001, "had enough")
        elif self.path != "/says":
            self.message.append(frame)
            if frame.fin:
                parts, self.message = self.message, []
                whole = b"".join(bytes(part.data) for part in parts)
                return Frame(parts[0].opcode, whole).serialize(mask=False)
        return b""


class H2Sockets:
    """See the module's text. ``offers``: whether extended CONNECT is offered at all."""

    window = 65_535

    def __init__(self, *, offers: bool = True) -> None:
        self._offers = offers
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.streams: list[Stream] = []
        self.plain: list[dict[str, str]] = []
        """Requests that were no handshakes."""
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._server, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._server.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.add(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        conn = h2.connection.H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        codes = h2.settings.SettingCodes
        conn.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.INITIAL_WINDOW_SIZE: self.window,
                codes.ENABLE_CONNECT_PROTOCOL: int(self._offers),
            },
        )
        conn.initiate_connection()
        conn.increment_flow_control_window(1 << 26)  # what stalls is a stream, never the connection
        streams: dict[int, Stream] = {}
        with sock, contextlib.suppress(OSError):
            sock.sendall(conn.data_to_send())
            while data := sock.recv(65_536):
                for event in conn.receive_data(data):
                    self._on_event(conn, streams, event)
                for stream_id, stream in streams.items():
                    self._write(conn, stream_id, stream)
                sock.sendall(conn.data_to_send())
        self._open.discard(sock)

    def _on_event(self, conn: Any, streams: dict[int, Stream], event: Any) -> None:
        stream = streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.RequestReceived):
            fields = [(str(name), str(value)) for name, value in event.headers]
            if dict(fields)[":method"] != "CONNECT":
                self.plain.append(dict(fields))
                conn.send_headers(event.stream_id, [(":status", "200")])
                conn.send_data(event.stream_id, b"backend", end_stream=True)
                return
            stream = streams[event.stream_id] = Stream(fields)
            self.streams.append(stream)
            self._begin(conn, event.stream_id, stream)
        elif stream is None:
            return
        elif isinstance(event, h2.events.DataReceived):
            stream.received += len(event.data)
            if stream.path != "/deaf":
                conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                stream.protocol.receive_data(event.data)
                self._read(conn, event.stream_id, stream)
        elif isinstance(event, h2.events.StreamEnded):
            stream.has_ended = True
            stream.protocol.receive_eof()
            self._read(conn, event.stream_id, stream)
        elif isinstance(event, h2.events.StreamReset):
            stream.reset = int(event.error_code)
            stream.queue.clear()
            stream.is_ended = True

    def _begin(self, conn: Any, stream_id: int, stream: Stream) -> None:
        if stream.path == "/forbidden":
            conn.send_headers(stream_id, [(":status", "403"), ("content-length", "8")])
            conn.send_data(stream_id, b"not you\n", end_stream=True)
            return
        fields = [(":status", "200"), ("x-backend", "h2"), ("set-cookie", "c=d")]
        offered = [each.strip() for each in stream.headers.get("sec-websocket-protocol", "").split(",")]
        if "chat.v1" in offered:
            fields.append(("sec-websocket-protocol", "chat.v1"))
        conn.send_headers(stream_id, fields)
        if stream.path == "/floods":
            for _ in range(FLOODS):
                stream.queue += Frame(Opcode.BINARY, FLOOD).serialize(mask=False)
        elif stream.path == "/says":
            stream.queue += Frame(Opcode.TEXT, b"that is all").serialize(mask=False)
            stream.is_ending = True

    def _read(self, conn: Any, stream_id: int, stream: Stream) -> None:
        for frame in stream.protocol.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                continue
            if stream.path == "/resets":
                conn.reset_stream(stream_id, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
                return
            stream.queue += stream.hear(frame)
        for data in stream.protocol.data_to_send():
            stream.queue += data
            if not data:
                stream.is_ending = True

    def _write(self, conn: Any, stream_id: int, stream: Stream) -> None:
        while stream.queue:
            room = min(conn.local_flow_control_window(stream_id), conn.max_outbound_frame_size)
            if room <= 0:
                return
            conn.send_data(stream_id, bytes(stream.queue[:room]))
            stream.sent += min(room, len(stream.queue))
            del stream.queue[:room]
        if stream.is_ending and not stream.is_ended:
            stream.is_ended = True
            conn.end_stream(stream_id)
