"""A backend for HTTP/3 made of aioquic: it gives back what it is sent, and has a body of its own, of which it
gives as many bytes as the field ``x-wanted`` says.
"""

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent


class _Session(QuicConnectionProtocol):
    body = b""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._http: H3Connection | None = None
        self._asked: dict[int, dict[bytes, bytes]] = {}
        self._received: dict[int, bytearray] = defaultdict(bytearray)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self._http = H3Connection(self._quic)
        if self._http is None:
            return
        for found in self._http.handle_event(event):
            if isinstance(found, HeadersReceived):
                self._asked.setdefault(found.stream_id, dict(found.headers))
            elif isinstance(found, DataReceived):
                self._received[found.stream_id] += found.data
            if isinstance(found, HeadersReceived | DataReceived) and found.stream_ended:
                self._answer(self._http, found.stream_id)

    def _answer(self, http: H3Connection, stream_id: int) -> None:
        received = bytes(self._received.pop(stream_id, b""))
        asked = self._asked.pop(stream_id)
        body = received if asked[b":method"] == b"POST" else self.body[: int(asked[b"x-wanted"])]
        http.send_headers(stream_id, [(b":status", b"200"), (b"content-length", b"%d" % len(body))])
        http.send_data(stream_id, body, True)
        self.transmit()


@contextlib.contextmanager
def h3_backend(certificate: Path, key: Path, body: bytes, port: int) -> Iterator[None]:
    """It runs in a thread of its own until the block ends."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
    configuration.load_cert_chain(certificate, key)
    session = type("Session", (_Session,), {"body": body})
    loop = asyncio.new_event_loop()

    async def start() -> QuicServer:
        _, server = await loop.create_datagram_endpoint(
            lambda: QuicServer(configuration=configuration, create_protocol=session),
            local_addr=("127.0.0.1", port),
        )
        return server

    async def stop() -> None:
        transport = server._transport
        assert transport is not None
        server.close()
        transport.abort()  # close() would wait for what cannot be sent
        await asyncio.sleep(0)  # so that it is closed

    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
