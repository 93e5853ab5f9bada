"""One request over HTTP/3: ``python -m expressgateway.demo.http3 URL CERTIFICATE``.

curl speaks HTTP/3 in few distributions, and a demo of it needs a client. The library's own does everything;
nothing of the gateway is used. The server must show the certificate in the file, and no other.
"""

import asyncio
import hashlib
import ssl
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from qh3.asyncio.client import connect
from qh3.asyncio.protocol import QuicConnectionProtocol
from qh3.h3.connection import H3Connection
from qh3.h3.events import DataReceived, H3Event, HeadersReceived
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import ConnectionTerminated, QuicEvent

PATIENCE_S: Final = 10.0


class Client(QuicConnectionProtocol):
    """Prints the answer as curl -i does."""

    _http: H3Connection | None = None
    _over: asyncio.Event | None = None

    async def get(self, host: str, path: str) -> None:
        self._http, self._over = H3Connection(self._quic), asyncio.Event()
        stream = self._quic.get_next_available_stream_id()
        fields = {":method": "GET", ":scheme": "https", ":authority": host, ":path": path}
        lines = [(name.encode(), value.encode()) for name, value in fields.items()]
        self._http.send_headers(stream, lines, end_stream=True)
        self.transmit()
        await self._over.wait()

    def quic_event_received(self, event: QuicEvent) -> None:
        if self._http is None or self._over is None or self._over.is_set():
            return
        if isinstance(event, ConnectionTerminated):
            sys.stdout.write(f"closed: {event.error_code:#x} {event.reason_phrase}\n")
            self._over.set()
        for each in self._http.handle_event(event):
            self._show(each)
            if getattr(each, "stream_ended", False):
                self._over.set()

    def _show(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            (_, status), *fields = (map(bytes.decode, line) for line in event.headers)
            lines = [f"HTTP/3 {status}", *(f"{name}: {value}" for name, value in fields), "", ""]
            sys.stdout.write("\n".join(lines))
        elif isinstance(event, DataReceived):
            sys.stdout.write(event.data.decode(errors="replace"))


async def main(url: str, certificate: str) -> None:
    """Ask for `url`. `certificate`: of the server, as PEM."""
    parts = urlsplit(url)
    host, port = parts.hostname or "localhost", parts.port or 443
    shown = ssl.PEM_cert_to_DER_cert(certificate)
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=["h3"],
        server_name=host,
        verify_mode=ssl.CERT_NONE,  # it is its own authority: the fingerprint says that it is the one
        assert_fingerprint=hashlib.sha256(shown).hexdigest(),
    )
    async with (
        asyncio.timeout(PATIENCE_S),
        connect("127.0.0.1", port, configuration=configuration, create_protocol=Client) as client,
    ):
        await client.get(parts.netloc, parts.path or "/")  # type: ignore[attr-defined]  # it is a Client


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_text()))
