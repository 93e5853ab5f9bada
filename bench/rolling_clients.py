"""HTTP clients that know when to leave, for `bench.rolling`: one loop for each version.

One that is told to leave (``Connection: close``, GOAWAY) opens another connection for what it asks next. What
was asked and never answered, or answered by anything but success, is a failure. HTTP/2 and HTTP/3 are spoken
by h2 and aioquic.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

from aioquic.asyncio.client import connect as connect_quic
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import FrameType, H3Connection
from aioquic.h3.events import DataReceived as H3Data
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamReset
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated as H2Leaves
from h2.events import DataReceived, ResponseReceived, StreamEnded
from h2.events import StreamReset as H2Reset

HERE: Final = "127.0.0.1"
PAUSE_S: Final = 0.005
ANSWER_S: Final = 20.0
"""A request that is not answered by then never is."""
MAX_REQUESTS: Final = 500
"""On one HTTP/1.1 connection: behind a TCP listener nobody tells a client to leave."""
MAX_TOLD: Final = 8
H3_REQUEST_REJECTED: Final = 0x10B
H2_REFUSED_STREAM: Final = 7


@dataclass
class Tally:
    """What one load has seen."""

    name: str
    requests: int = 0
    connections: int = 0
    failures: int = 0
    told: list[str] = field(default_factory=list)
    """The first failures."""
    gap_s: float = 0.0
    """The longest time without an answer."""
    _last: float = 0.0

    def done(self, count: int = 1) -> None:
        now = time.monotonic()
        if self._last:
            self.gap_s = max(self.gap_s, now - self._last)
        self._last = now
        self.requests += count

    def fail(self, what: str) -> None:
        self.failures += 1
        if len(self.told) < MAX_TOLD:
            self.told.append(f"{time.strftime('%H:%M:%S')} {what}"[:300])

    def report(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "requests": self.requests,
            "connections": self.connections,
            "failures": self.failures,
            "gap_s": round(self.gap_s, 3),
            "told": self.told,
        }


class Stage:
    """What all loads share."""

    def __init__(self) -> None:
        self.stops = asyncio.Event()
        """Ask no more."""
        self.is_draining = False
        """The gateway is about to end."""
        self.streams_end = asyncio.Event()


class GoneError(Exception):
    """The gateway has ended, as it was to."""


class LeavingError(Exception):
    """What was asked was not looked at, and the peer said so: it may be asked again elsewhere."""


@contextlib.asynccontextmanager
async def stream_of(
    port: int, stage: Stage, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        reader, writer = await asyncio.open_connection(
            HERE, port, ssl=tls, server_hostname="localhost" if tls else None
        )
    except ConnectionRefusedError:
        if stage.is_draining:
            raise GoneError from None
        raise
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


# -- HTTP/1.1


async def h1(
    tally: Tally, stage: Stage, port: int, path: str, pause_s: float, *, is_relayed: bool = False
) -> None:
    """Keep-alive, one request at a time. ``is_relayed``: at times by a listener that knows no requests, so
    nobody asks us to leave."""
    while not (stage.stops.is_set() or (is_relayed and stage.is_draining)):
        async with stream_of(port, stage) as (reader, writer):
            tally.connections += 1
            for _ in range(MAX_REQUESTS):
                if stage.stops.is_set() or (is_relayed and stage.is_draining):
                    return
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                async with asyncio.timeout(ANSWER_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    fields = head.lower()
                    length = int(fields.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    await reader.readexactly(length)
                if not head.startswith(b"HTTP/1.1 200"):
                    tally.fail(repr(head[:60]))
                tally.done()
                if b"connection: close" in fields:
                    break
                await asyncio.sleep(pause_s)


# -- HTTP/2


async def h2(tally: Tally, stage: Stage, port: int, tls: ssl.SSLContext) -> None:
    """Three requests at a time on one connection."""
    while not stage.stops.is_set():
        async with stream_of(port, stage, tls) as (reader, writer):
            tally.connections += 1
            await H2Loop(tally, stage, reader, writer).run()


class H2Loop:
    """One connection."""

    def __init__(
        self, tally: Tally, stage: Stage, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._tally = tally
        self._stage = stage
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(header_encoding="ascii"))
        self._open: dict[int, str] = {}
        self._is_leaving = False
        self._raw = b""

    async def run(self) -> None:
        self._h2.initiate_connection()
        while self._open or not (self._is_leaving or self._stage.stops.is_set()):
            while len(self._open) < 3 and not self._is_leaving and not self._stage.stops.is_set():
                stream = self._h2.get_next_available_stream_id()
                fields = [(":method", "GET"), (":scheme", "https"), (":authority", "localhost")]
                self._h2.send_headers(stream, [*fields, (":path", "/small")], end_stream=True)
                self._open[stream] = ""
            self._writer.write(self._h2.data_to_send())
            async with asyncio.timeout(ANSWER_S):
                data = await self._reader.read(65_536)
            if not data:
                if self._open:
                    raise ConnectionError(f"closed with {len(self._open)} requests open")
                if not self._is_leaving:
                    self._tally.fail("closed without GOAWAY")
                return
            self._receive(data)
            await asyncio.sleep(PAUSE_S)

    def _receive(self, data: bytes) -> None:
        # GOAWAY by hand: the library takes it for the end at once.
        self._raw += data
        while len(self._raw) >= 9 and len(self._raw) >= (size := 9 + int.from_bytes(self._raw[:3], "big")):
            frame, self._raw = self._raw[:size], self._raw[size:]
            if frame[3] == 7:
                self._is_leaving = True
                last = int.from_bytes(frame[9:13], "big") & 0x7FFF_FFFF
                for stream in [each for each in self._open if each > last]:
                    del self._open[stream]  # it was not looked at: asked again on the next connection
                continue
            for event in self._h2.receive_data(frame):
                match event:
                    case ResponseReceived():
                        self._open[event.stream_id] = str(dict(event.headers)[":status"])  # type: ignore[index]  # text, as asked for
                    case DataReceived():
                        self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case StreamEnded():
                        status = self._open.pop(event.stream_id, "")
                        if status != "200":
                            self._tally.fail(f"status {status!r}")
                        self._tally.done()
                    case H2Reset():
                        if event.error_code == H2_REFUSED_STREAM and self._is_leaving:
                            self._open.pop(event.stream_id, None)
                        elif self._open.pop(event.stream_id, None) is not None:
                            self._tally.fail(f"reset with {event.error_code}")
                    case H2Leaves():
                        raise ConnectionError("ended")


# -- HTTP/3


class H3Leaving(H3Connection):
    """Notes GOAWAY, which the library skips."""

    is_leaving = False

    def _check_control_frame_type(self, frame_type: int) -> None:
        if frame_type == FrameType.GOAWAY:
            self.is_leaving = True
        super()._check_control_frame_type(frame_type)


class H3Client(QuicConnectionProtocol):
    def __init__(self, *arguments: Any, **more: Any) -> None:  # noqa: ANN401 - aioquic's own
        super().__init__(*arguments, **more)
        self.h3 = H3Leaving(self._quic)
        self._answers: dict[int, asyncio.Future[str]] = {}
        self._statuses: dict[int, str] = {}
        self.ended = ""

    @property
    def is_leaving(self) -> bool:
        return self.h3.is_leaving or bool(self.ended)

    async def get(self, path: str) -> str:
        """The status. Raises ConnectionError, or `LeavingError`."""
        if self.ended:
            raise LeavingError(self.ended)
        stream = self._quic.get_next_available_stream_id()
        fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost")]
        self.h3.send_headers(stream, [*fields, (b":path", path.encode())], end_stream=True)
        answer = self._answers[stream] = asyncio.get_running_loop().create_future()
        self.transmit()
        async with asyncio.timeout(ANSWER_S):
            status: str = await answer
            return status

    def quic_event_received(self, event: QuicEvent) -> None:
        match event:
            case StreamReset():
                rejected = event.error_code == H3_REQUEST_REJECTED
                error = LeavingError() if rejected else ConnectionError(f"reset with {event.error_code:#x}")
                self._give(event.stream_id, error)
            case ConnectionTerminated():
                self.ended = f"closed with {event.error_code:#x} {event.reason_phrase}"
                for stream in list(self._answers):
                    self._give(stream, ConnectionError(self.ended))
        for each in self.h3.handle_event(event):
            if isinstance(each, HeadersReceived):
                self._statuses[each.stream_id] = dict(each.headers)[b":status"].decode()
            if isinstance(each, HeadersReceived | H3Data) and each.stream_ended:
                self._give(each.stream_id, self._statuses.pop(each.stream_id, ""))

    def _give(self, stream: int, what: str | Exception) -> None:
        answer = self._answers.pop(stream, None)
        if answer is None or answer.done():
            return
        if isinstance(what, str):
            answer.set_result(what)
        else:
            answer.set_exception(what)


async def h3(tally: Tally, stage: Stage, port: int, path: str = "/small", pause_s: float = PAUSE_S) -> None:
    """One request at a time."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["h3"], verify_mode=ssl.CERT_NONE, server_name="localhost"
    )
    configuration.idle_timeout = 60.0
    while not stage.stops.is_set():
        async with connect_quic(HERE, port, configuration=configuration, create_protocol=H3Client) as made:
            it = cast("H3Client", made)
            tally.connections += 1
            while not stage.stops.is_set() and not it.is_leaving:
                with contextlib.suppress(LeavingError):
                    status = await it.get(path)
                    if status != "200":
                        tally.fail(f"status {status!r}")
                    tally.done()
                await asyncio.sleep(pause_s)
        if stage.is_draining:
            raise GoneError  # UDP refuses nobody: a client that came back would wait
