"""``aioquic`` as the tests need it: credit by what was used, and what it skips of HTTP/3.

It raises a stream's limit as soon as it has *received* half of it. A talk gives credit for what it has read
and for nothing else, so that one that does not read stalls its peer.
"""

import contextlib
import ssl
from typing import Any

from aioquic._buffer import Buffer, BufferReadError
from aioquic.h3.connection import FrameType, H3Connection, H3Stream, encode_frame
from aioquic.h3.events import H3Event
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent, StreamDataReceived
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream

from expressgateway.demo.certificate import CertificateFiles

STREAM_WINDOW = 1_048_576
CONNECTION_WINDOW = 2**40  # one talk that does not read must not stop the others


class Credit(QuicConnection):
    """Raises the limit of a stream when what has come of it was used."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.used: dict[int, int] = {}
        """Bytes of each stream's bodies."""

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        receiver = stream.receiver
        unused = receiver.starting_offset() - self.used.get(stream.stream_id or 0, 0)
        granted = receiver.starting_offset() + STREAM_WINDOW - max(unused, 0)
        limit = stream.max_stream_data_local
        if limit and granted - limit >= STREAM_WINDOW // 4:
            stream.max_stream_data_local = granted
        highest, receiver.highest_offset = receiver.highest_offset, 0  # the library's own rule never holds
        try:
            super()._write_stream_limits(builder, space, stream)
        finally:
            receiver.highest_offset = highest


class Http3(H3Connection):
    """Knows that a response to HEAD has no body, whatever its length, and keeps what GOAWAY says."""

    def __init__(self, quic: QuicConnection) -> None:
        super().__init__(quic)
        self.heads: set[int] = set()
        """Streams with such requests."""
        self.goaway: list[int] = []
        self._control: dict[int, bytes | None] = {}

    def _check_content_length(self, stream: H3Stream) -> None:
        if stream.stream_id not in self.heads:
            super()._check_content_length(stream)

    def handle_event(self, event: QuicEvent) -> list[H3Event]:
        if isinstance(event, StreamDataReceived) and event.stream_id & 2:
            self._read_control(event.stream_id, event.data)
        return super().handle_event(event)

    def _read_control(self, stream_id: int, data: bytes) -> None:
        """The library skips GOAWAY."""
        if stream_id not in self._control:
            if data[:1] != b"\0":
                self._control[stream_id] = None  # not the control stream
                return
            self._control[stream_id], data = b"", data[1:]
        held = self._control[stream_id]
        if held is None:
            return
        held += data
        buffer = Buffer(data=held)
        at = 0
        with contextlib.suppress(BufferReadError):
            while True:
                kind, payload = buffer.pull_uint_var(), buffer.pull_bytes(buffer.pull_uint_var())
                at = buffer.tell()
                if kind == FrameType.GOAWAY:
                    self.goaway.append(Buffer(data=payload).pull_uint_var())
        self._control[stream_id] = held[at:]

    def go_away(self, identifier: int) -> None:
        """Tell the peer which requests are still served."""
        buffer = Buffer(capacity=8)
        buffer.push_uint_var(identifier)
        frame = encode_frame(FrameType.GOAWAY, buffer.data)
        assert self._local_control_stream_id is not None
        self._quic.send_stream_data(self._local_control_stream_id, frame)


def configuration(files: CertificateFiles, *, is_client: bool, alpn: str = "h3") -> QuicConfiguration:
    made = QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[alpn],
        max_data=CONNECTION_WINDOW,
        max_stream_data=STREAM_WINDOW,
        idle_timeout=60.0,
    )
    if is_client:
        made.server_name = "localhost"
        # Its reader refuses our certificate's name with a wildcard: `dial_h3` compares certificates.
        made.verify_mode = ssl.CERT_NONE
    else:
        made.load_cert_chain(files.certificate, files.key)
    return made
