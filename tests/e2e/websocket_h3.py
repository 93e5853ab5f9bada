"""WebSocket over HTTP/3 (RFC 9220) on ``aioquic``: a client, and a server that does by path what a test asks.

The server's paths are those of ``websocket_h2_peers.H2Sockets``.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Self

from aioquic.h3.connection import ErrorCode, Setting
from websockets.frames import Frame, Opcode

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.aioquic_h3 import STREAM_WINDOW, Http3
from tests.e2e.harness import PATIENCE_S
from tests.e2e.talks import CutError, Fields, Talk
from tests.e2e.talks_h3 import H3Backend, H3Talk, dial_h3
from tests.e2e.websocket_h2_peers import FLOOD, FLOODS, Stream
from tests.e2e.websocket_sessions import Link, Pairs, Session


class H3Link(Link):
    """One HTTP/3 connection."""

    def __init__(self, port: int, files: CertificateFiles) -> None:
        self.window = STREAM_WINDOW
        self.sessions: list[H3Session] = []
        self.end = dial_h3(files, port)
        self.pump(lambda: self.end.h3 is not None and self.end.h3.received_settings is not None)

    def close(self) -> None:
        self.end.close()

    @property
    def offers_connect(self) -> bool:
        assert self.end.h3 is not None
        return (self.end.h3.received_settings or {}).get(Setting.ENABLE_CONNECT_PROTOCOL) == 1

    @property
    def goaway(self) -> int | None:  # type: ignore[override]  # it is read only
        return self.end.goaway[-1] if self.end.goaway else None

    def pump(self, done: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        changed = self.end.changed
        with changed:
            until = time.monotonic() + patience_s
            while True:
                if sum(session.take() for session in self.sessions):
                    until = time.monotonic() + patience_s
                if done():
                    return
                if self.end.terminated is not None:
                    raise ConnectionError("the gateway closed the connection")
                left_s = until - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                changed.wait(left_s)

    def begin(self, fields: Pairs) -> "H3Session":
        with self.end.changed:
            session = H3Session(self, self.end.call(fields, end=False))
            self.sessions.append(session)
        return session


class H3Session(Session):
    """One stream."""

    link: H3Link

    def __init__(self, link: H3Link, talk: H3Talk) -> None:
        super().__init__(link)
        self.talk = talk
        self._owed = 0

    def take(self) -> bool:
        """What has come since, with the lock held. Gives whether there was anything."""
        talk = self.talk
        if self.is_over:
            return False
        found = False
        if talk.headers and not self.status:
            found = True
            self.on_head(talk.fields)
        pieces = talk.pieces[:]
        talk.pieces.clear()
        for piece in pieces:
            found = True
            self._owed += len(piece)
            self.on_bytes(piece)
        if talk.is_ended and not self.has_ended and not talk.pieces:
            found = True
            self.on_end()
        if talk.is_lost and not self.is_over:
            found = True
            self.on_reset(talk.lost_code)
        return found

    def give(self) -> None:
        owed, self._owed = self._owed, 0
        if owed:
            self.link.end.used(self.talk.stream, owed)

    def _room(self) -> int:
        talk = self.talk
        return 0 if talk.is_lost else self.link.end.room(talk.stream)

    def send_raw(self, data: bytes, end: bool = False, patience_s: float = PATIENCE_S) -> int:
        at = 0
        with self.link.end.changed:
            while at < len(data):
                size = min(self._room(), len(data) - at, 65_536)
                if not size:
                    try:
                        self.link.pump(lambda: self.is_over or self._room(), patience_s)
                    except TimeoutError:
                        return at
                    if self.is_over:
                        return at
                    continue
                try:
                    with self.link.end.speaking(self.talk) as h3:
                        h3.send_data(self.talk.stream, data[at : at + size], end_stream=False)
                except CutError:
                    return at
                at += size
            if end:
                self.end()
        return len(data)

    def end(self) -> None:
        with contextlib.suppress(CutError):
            self.talk.finish()

    def cancel(self) -> None:
        self.talk.cut()
        self.is_over = True


class _Silent(Http3):
    """Does not offer extended CONNECT, which the library always does."""

    def _get_local_settings(self) -> dict[int, int]:
        settings = super()._get_local_settings()
        del settings[Setting.ENABLE_CONNECT_PROTOCOL]
        return settings


class H3Sockets:
    """A backend. ``offers``: whether extended CONNECT is offered at all."""

    window = STREAM_WINDOW

    def __init__(self, files: CertificateFiles, *, offers: bool = True) -> None:
        self._backend = H3Backend(self._answer, "h3", files)
        if not offers:
            self._backend.speaks = _Silent
        self.address = self._backend.address
        self.streams: list[Stream] = []
        self.plain: list[dict[str, str]] = []
        """Requests that were no handshakes."""

    def __enter__(self) -> Self:
        self._backend.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.__exit__()

    def _answer(self, talk: Talk) -> None:
        assert isinstance(talk, H3Talk)
        if talk.headers[":method"] != "CONNECT":
            self.plain.append(talk.headers)
            talk.send_head([(":status", "200")])
            talk.send(b"backend", end=True)
            return
        stream = Stream(talk.fields)
        self.streams.append(stream)
        try:
            self._serve(talk, stream)
        except CutError:
            stream.reset = talk.lost_code

    def _serve(self, talk: H3Talk, stream: Stream) -> None:
        if stream.path == "/forbidden":
            talk.send_head([(":status", "403"), ("content-length", "8")])
            talk.send(b"not you\n", end=True)
            return
        fields: Fields = [(":status", "200"), ("x-backend", "h3"), ("set-cookie", "c=d")]
        offered = [each.strip() for each in stream.headers.get("sec-websocket-protocol", "").split(",")]
        if "chat.v1" in offered:
            fields.append(("sec-websocket-protocol", "chat.v1"))
        talk.send_head(fields)
        if stream.path == "/deaf":
            self._count(talk, stream)
        if stream.path == "/floods":
            for _ in range(FLOODS):
                self._say(talk, stream, Frame(Opcode.BINARY, FLOOD).serialize(mask=False))
        elif stream.path == "/says":
            self._say(talk, stream, Frame(Opcode.TEXT, b"that is all").serialize(mask=False))
            talk.finish()
            stream.is_ended = True
        while data := self._hear(talk):
            stream.received += len(data)
            stream.protocol.receive_data(data)
            self._read(talk, stream)
        stream.has_ended = True
        stream.protocol.receive_eof()
        self._read(talk, stream)

    @staticmethod
    def _count(talk: H3Talk, stream: Stream) -> None:
        """What comes is not read, and gives no credit."""
        changed = talk._end.changed
        with changed:
            while not talk.is_lost:
                stream.received = sum(map(len, talk.pieces))
                changed.wait()
        raise CutError

    @staticmethod
    def _hear(talk: H3Talk) -> bytes:
        """As ``read``, however long it takes."""
        with talk._end.changed:
            talk._end.changed.wait_for(lambda: talk.pieces or talk.is_ended or talk.is_lost)
        return talk.read()

    @staticmethod
    def _say(talk: H3Talk, stream: Stream, data: bytes) -> None:
        for at in range(0, len(data), 65_536):
            talk.send(data[at : at + 65_536])
            stream.sent += len(data[at : at + 65_536])

    def _read(self, talk: H3Talk, stream: Stream) -> None:
        for frame in stream.protocol.events_received():
            assert isinstance(frame, Frame)
            if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                continue
            if stream.path == "/resets":
                talk.cut(ErrorCode.H3_EXCESSIVE_LOAD)
                return
            self._say(talk, stream, stream.hear(frame))
        for data in stream.protocol.data_to_send():
            if data and not stream.is_ended:
                self._say(talk, stream, data)
            elif not data:
                stream.is_ending = True
        if stream.is_ending and not stream.is_ended:
            stream.is_ended = True
            talk.finish()
