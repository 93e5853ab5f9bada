"""QUIC peers that we did not write: `aioquic` as client and as server, which note down what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import Limit, QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    DatagramFrameReceived,
    HandshakeCompleted,
    QuicEvent,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

PATIENCE_S: Final = 60.0
DATAGRAM_BYTES: Final = 65_535


async def until(claim: Callable[..., object], *arguments: object) -> None:
    """Turn the loop until the claim is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not claim(*arguments):  # noqa: ASYNC110 - the claims are about peers, which wake nobody
            await asyncio.sleep(0.001)


class QuicPeer(QuicConnectionProtocol):
    """One connection of either kind."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.ends: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.datagrams: list[bytes] = []
        self.alpn: str | None = None
        self.closed: ConnectionTerminated | None = None
        self.is_echo = False
        """Whether what comes on a bidirectional stream goes back."""
        self.tap: Callable[[QuicEvent], None] | None = None
        """Hears everything first."""

    @property
    def quic(self) -> QuicConnection:
        return self._quic

    def quic_event_received(self, event: QuicEvent) -> None:
        if self.tap is not None:
            self.tap(event)
        match event:
            case HandshakeCompleted():
                self.alpn = event.alpn_protocol
            case StreamDataReceived():
                self.data[event.stream_id] += event.data
                if event.end_stream:
                    self.ends.add(event.stream_id)
                if self.is_echo and not event.stream_id & 2:
                    self.send(event.stream_id, event.data, end=event.end_stream)
            case StreamReset():
                self.resets[event.stream_id] = event.error_code
            case StopSendingReceived():
                self.stops[event.stream_id] = event.error_code
            case DatagramFrameReceived():
                self.datagrams.append(event.data)
            case ConnectionTerminated():
                self.closed = event

    @property
    def received(self) -> int:
        return sum(len(data) for data in self.data.values())

    def open(self, *, unidirectional: bool = False) -> int:
        return self._quic.get_next_available_stream_id(is_unidirectional=unidirectional)

    def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()

    def reset(self, stream_id: int, code: int) -> None:
        self._quic.reset_stream(stream_id, code)
        self.transmit()

    def stop(self, stream_id: int, code: int) -> None:
        self._quic.stop_stream(stream_id, code)
        self.transmit()

    def send_datagram(self, data: bytes) -> None:
        self._quic.send_datagram_frame(data)
        self.transmit()

    def leave(self, code: int, reason: str = "") -> None:
        self.close(error_code=code, reason_phrase=reason)

    def vanish(self) -> None:
        """Without a word, and with its port."""
        assert self._transport is not None
        self._transport.abort()

    def sent_and_accepted(self, stream_id: int) -> int:
        """Bytes of a stream that its receiver's windows have let out."""
        sender = self._quic._streams[stream_id].sender
        return int(sender._buffer_start) + len(sender._buffer) - self.unsent(stream_id)

    def unsent(self, stream_id: int) -> int:
        """Bytes of a stream that have never left."""
        sender = self._quic._streams[stream_id].sender
        return int(sender._buffer_stop) - int(sender.highest_offset)

    def read_nothing(self) -> None:
        """Grant no more from now on, as an application that does not read."""
        quic: Any = self._quic
        quic._write_stream_limits = lambda *_, **__: None
        quic._write_connection_limits = lambda *_, **__: None

    def read_again(self) -> None:
        quic: Any = self._quic
        del quic._write_stream_limits, quic._write_connection_limits


def is_stalled(sender: QuicPeer, stream: int) -> bool:
    """Everything that the windows let out is out."""
    seen = sender.sent_and_accepted(stream)
    return bool(sender.quic._streams[stream].max_stream_data_remote == seen)


def configuration_of(
    alpn: list[str], *, is_client: bool, datagrams: bool = True, idle_timeout_s: float = 30.0, **more: Any
) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=alpn,
        max_datagram_frame_size=DATAGRAM_BYTES if datagrams else None,
        idle_timeout=idle_timeout_s,
        **more,
    )


class Pinned(Limit):
    """So many streams and no more, until more are allowed: `aioquic` itself raises the limit as streams
    end."""

    def __init__(self, like: Limit, value: int) -> None:
        super().__init__(like.frame_type, like.name, value)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "value" or "value" not in self.__dict__:
            super().__setattr__(name, value)

    def allow(self, more: int) -> None:
        self.__dict__["value"] += more


def allow_streams(number: int) -> Callable[[QuicConnection], None]:
    """For ``prepare``: a server that allows so many bidirectional streams."""

    def prepare(quic: QuicConnection) -> None:
        quic._local_max_streams_bidi = Pinned(quic._local_max_streams_bidi, number)

    return prepare


class QuicBackend:
    """A server. ``peers`` are its connections, the oldest first."""

    def __init__(self, address: Any, server: QuicServer, peers: list[QuicPeer]) -> None:
        self.address = address
        self.server = server
        self.peers = peers

    @property
    def port(self) -> int:
        return int(self.address[1])

    async def peer(self, number: int = 0) -> QuicPeer:
        """Its connection of that number, once there is one with a complete handshake."""
        await until(lambda: len(self.peers) > number and self.peers[number].alpn is not None)
        return self.peers[number]


@contextlib.asynccontextmanager
async def quic_backend(
    chain: Path,
    key: Path,
    alpn: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    is_echo: bool = False,
    prepare: Callable[[QuicConnection], None] | None = None,
    **more: Any,
) -> AsyncIterator[QuicBackend]:
    """``prepare``: what is done with each connection before its handshake."""
    configuration = configuration_of(alpn, is_client=False, **more)
    configuration.load_cert_chain(chain, key)
    peers: list[QuicPeer] = []

    def create(quic: QuicConnection, **arguments: Any) -> QuicPeer:
        if prepare is not None:
            prepare(quic)
        peer = QuicPeer(quic, **arguments)
        peer.is_echo = is_echo
        peers.append(peer)
        return peer

    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration, create_protocol=create), local_addr=(host, port)
    )
    try:
        yield QuicBackend(transport.get_extra_info("sockname"), server, peers)
    finally:
        server.close()
        transport.abort()  # as below


@contextlib.asynccontextmanager
async def quic_client(
    port: int,
    alpn: list[str],
    *,
    host: str = "127.0.0.1",
    server_name: str = "localhost",
    is_waiting: bool = True,
    **more: Any,
) -> AsyncIterator[QuicPeer]:
    """A client's connection, its handshake complete if ``is_waiting``."""
    configuration = configuration_of(alpn, is_client=True, **more)
    configuration.verify_mode = ssl.CERT_NONE
    configuration.server_name = server_name
    peer = QuicPeer(QuicConnection(configuration=configuration))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: peer, local_addr=(host, 0)
    )
    try:
        peer.connect((host, port))
        if is_waiting:
            await until(lambda: peer.alpn is not None or peer.closed is not None)
        yield peer
    finally:
        peer.close()
        transport.abort()  # close() would wait for what cannot be sent
