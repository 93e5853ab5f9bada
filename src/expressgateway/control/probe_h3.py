"""One exchange over HTTP/3 (RFC 9114), or a handshake alone, for probes.

`qh3`'s own client does the protocol, on a connected UDP socket, so that ICMP's "port unreachable" is heard at
once; who says nothing is found out by the probe's timeout. The certificate is judged by the same rules as on
the data path. The library is imported when the first such probe runs, so that nobody else pays for it.
"""

import asyncio
import socket
import ssl
import time
from typing import TYPE_CHECKING, Final

from expressgateway.control.probe_h2 import Answer, Headers
from expressgateway.control.probe_wire import ProbeError, Target
from expressgateway.net.tls import TlsConfigError, backend_server_name

if TYPE_CHECKING:
    from qh3.h3.connection import H3Connection
    from qh3.quic.connection import QuicConnection

    from expressgateway.net.quic.verify import Trust

ALPN: Final = "h3"
_MAX_DATAGRAM_BYTES: Final = 65_536
_MAX_BESIDE: Final = 262_144  # bytes of all datagrams beyond the body's own


class ProbeQuic:
    """How a probe speaks QUIC. What verifies is made at the first probe: no reload waits for it."""

    __slots__ = ("_target", "_trust", "server_name")

    def __init__(self, target: Target) -> None:
        self._target = target
        self._trust: Trust | None = None
        tls = target.settings.tls
        self.server_name = backend_server_name(
            target.settings.host, tls.hostname if tls is not None else None
        )

    def connection(self) -> "QuicConnection":
        from qh3.quic.configuration import QuicConfiguration
        from qh3.quic.connection import QuicConnection

        made = QuicConfiguration(
            is_client=True, alpn_protocols=[ALPN], server_name=self.server_name, verify_mode=ssl.CERT_NONE
        )
        tls = self._target.settings.tls
        if tls is not None and tls.cert_pem is not None and tls.key_pem is not None:
            try:
                made.load_cert_chain(tls.cert_pem, tls.key_pem)
            except Exception as error:  # whatever the library makes of an operator's files
                raise TlsConfigError(f"the client certificate: {error}") from error
        return QuicConnection(configuration=made)

    def check(self, connection: "QuicConnection") -> None:
        """Raises `ProbeError` for a certificate that the data path would not accept."""
        from expressgateway.net.quic.verify import Trust, UntrustedError

        tls = self._target.settings.tls
        if tls is None or not tls.verify_peer:
            return
        leaf = connection.get_peercert()
        if leaf is None:
            raise ProbeError("certificate not accepted: there is none")
        try:
            if self._trust is None:
                self._trust = Trust(tls.ca_pem, self.server_name)
            self._trust.check(leaf, connection.get_issuercerts())
        except UntrustedError as error:
            raise ProbeError(f"certificate not accepted: {error}") from None
        except ValueError as error:
            raise TlsConfigError(str(error)) from error


async def exchange(
    target: Target, quic: ProbeQuic, headers: list[tuple[str, str]], body: bytes, max_bytes: int
) -> Answer:
    """Ask, and read until the answer is complete or its body is longer than `max_bytes`. Without `headers`
    nothing is asked: the handshake is all, and the answer is empty.

    Raises `ProbeError`, `OSError` and `TlsConfigError`.
    """
    connection = quic.connection()
    address = target.address
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(address)
        connection.connect(address, now=time.monotonic())
        try:
            return await _converse(sock, target, connection, quic, headers, body, max_bytes)
        finally:
            connection.close(error_code=0x100)  # H3_NO_ERROR
            _flush(sock, connection)


def _flush(sock: socket.socket, connection: "QuicConnection") -> None:
    for data, _ in connection.datagrams_to_send(now=time.monotonic()):
        try:
            sock.send(data)
        except BlockingIOError:
            return  # as good as lost: it will be sent again


async def _converse(
    sock: socket.socket,
    target: Target,
    connection: "QuicConnection",
    quic: ProbeQuic,
    headers: list[tuple[str, str]],
    body: bytes,
    max_bytes: int,
) -> Answer:
    from qh3.h3.connection import H3Connection
    from qh3.quic import events

    http: H3Connection | None = None
    answer = Answer()
    received = 0
    while True:
        while (event := connection.next_event()) is not None:
            if isinstance(event, events.HandshakeCompleted):
                quic.check(connection)
                if not headers:
                    return answer
                http = H3Connection(connection)
                stream = connection.get_next_available_stream_id()
                encoded = [(name.encode(), value.encode()) for name, value in headers]
                http.send_headers(stream, encoded, end_stream=not body)
                if body:
                    http.send_data(stream, body, end_stream=True)
            elif isinstance(event, events.ConnectionTerminated):
                raise ProbeError(_ended(event))
            elif isinstance(event, events.StreamReset):
                raise ProbeError(f"reset the stream with error code {event.error_code:#x}")
            if http is not None:
                _take(http, event, answer)
        if answer.is_complete or len(answer.body) > max_bytes:
            return answer
        # There is an event of it only when nothing of that connection can come any more (RFC 9000 10.2):
        # three times as long as an answer may take, by what the machine has just been able to do.
        if (closed := connection._close_event) is not None:  # noqa: SLF001 - nothing public tells
            raise ProbeError(_ended(closed))
        _flush(sock, connection)
        timer = connection.get_timer()
        await _readable(sock, None if timer is None else max(0.0, timer - time.monotonic()))
        try:
            data = sock.recv(_MAX_DATAGRAM_BYTES)
        except BlockingIOError:
            connection.handle_timer(now=time.monotonic())
            continue
        received += len(data)
        if received > max_bytes + _MAX_BESIDE:
            raise ProbeError("garbage instead of an answer: more bytes than any answer has")
        connection.receive_datagram(data, target.address, now=time.monotonic())


async def _readable(sock: socket.socket, wait_s: float | None) -> None:
    """Until there is something to read, or for so long. Nothing is read here: what `sock_recv` has read when
    its time is over is lost, and the end of a connection is said once."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        async with asyncio.timeout(wait_s):
            await readable.wait()
    except TimeoutError:
        pass
    finally:
        loop.remove_reader(sock)


def _take(http: "H3Connection", event: object, answer: Answer) -> None:
    from qh3.h3.events import DataReceived, HeadersReceived

    for each in http.handle_event(event):  # type: ignore[arg-type]
        if isinstance(each, HeadersReceived):
            fields = _text(each.headers)
            if answer.status:
                answer.trailers = fields
            elif not fields.get(":status", "").startswith("1"):
                answer.headers = fields
            answer.is_complete |= each.stream_ended
        elif isinstance(each, DataReceived):
            answer.body += each.data
            answer.is_complete |= each.stream_ended


def _text(headers: list[tuple[bytes, bytes]]) -> Headers:
    return {bytes(name).decode("latin-1"): bytes(value).decode("latin-1") for name, value in headers}


def _ended(event: object) -> str:
    code = getattr(event, "error_code", 0)
    reason = getattr(event, "reason_phrase", "")
    if code == 0x100 + 120:
        return "does not agree to speak HTTP/3 (ALPN)"
    return f"closed the connection with error code {code:#x}" + (f": {reason}" if reason else "")


class QuicProbe:
    """The backend completes a handshake, with a certificate that the data path would accept."""

    __slots__ = ("_quic", "_target")

    def __init__(self, target: Target, settings: object) -> None:
        self._target = target
        self._quic = ProbeQuic(target)

    async def run(self) -> str:
        await exchange(self._target, self._quic, [], b"", 0)
        return "handshake done"
