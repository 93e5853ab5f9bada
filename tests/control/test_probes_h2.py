"""Probes over HTTP/2, against servers of the `h2` library and against what is no HTTP/2 at all."""

import asyncio

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded

from expressgateway.control.probe_grpc import serving_status
from expressgateway.control.probe_wire import ProbeError
from expressgateway.control.probes import Result
from tests.control.test_probes import OK, ask, hang, server_context, tls, wanted


class H2Server:
    """A small server of `h2`: answers each request with what it was given."""

    def __init__(
        self, headers: list[tuple[str, str]], data: bytes = b"", trailers: list[tuple[str, str]] | None = None
    ) -> None:
        self.answer = headers, data, trailers
        self.requests: list[dict[str, str]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        headers, data, trailers = self.answer
        body = b""
        while True:
            writer.write(connection.data_to_send())
            received = await reader.read(65536)
            if not received:
                return
            for event in connection.receive_data(received):
                if isinstance(event, RequestReceived):
                    self.requests.append({str(name): str(value) for name, value in event.headers or ()})
                elif isinstance(event, DataReceived):
                    body += event.data or b""
                elif isinstance(event, StreamEnded):
                    self.bodies.append(body)
                    connection.send_headers(1, headers, end_stream=not data and not trailers)
                    if data:
                        connection.send_data(1, data, end_stream=not trailers)
                    if trailers:
                        connection.send_headers(1, trailers, end_stream=True)


GRPC = [(":status", "200"), ("content-type", "application/grpc")]
TRAILERS = [("grpc-status", "0")]


def message(payload: bytes) -> bytes:
    return bytes([0, *len(payload).to_bytes(4, "big")]) + payload


class TestGrpc:
    def test_serving(self) -> None:
        server = H2Server(GRPC, message(b"\x08\x01"), TRAILERS)
        assert ask(wanted("grpc"), server) == Result(True, "SERVING")
        (request,) = server.requests
        assert request[":method"] == "POST"
        assert request[":path"] == "/grpc.health.v1.Health/Check"
        assert request[":authority"] == "localhost:8080"
        assert request["te"] == "trailers"
        assert request["content-type"] == "application/grpc"
        assert request["grpc-timeout"] == "30000m"
        assert server.bodies == [bytes(5)]

    @pytest.mark.parametrize(
        ("server", "detail"),
        [
            (H2Server(GRPC, message(b"\x08\x02"), TRAILERS), "answers NOT_SERVING"),
            (H2Server(GRPC, message(b""), TRAILERS), "answers UNKNOWN"),
            (H2Server(GRPC, message(b"\x08\x63"), TRAILERS), "answers 99"),
            (
                H2Server([*GRPC, ("grpc-status", "12"), ("grpc-message", "no%20such%0aservice")]),
                "gRPC status UNIMPLEMENTED: no such?service",
            ),
            (H2Server(GRPC, b"", [("grpc-status", "14")]), "gRPC status UNAVAILABLE"),
            (H2Server(GRPC, message(b"\x08\x01"), [("grpc-status", "x")]), "gRPC status x"),
            (H2Server([(":status", "404")]), "status 404"),
            (
                H2Server([(":status", "200"), ("content-type", "text/html")], b"<html>"),
                "garbage instead of an answer: it is not gRPC",
            ),
            (H2Server(GRPC, message(b"\x08\x01")), "garbage instead of an answer: no grpc-status"),
            (
                H2Server(GRPC, b"\0\0\0\0\x05\x08", TRAILERS),
                "garbage instead of an answer: no single uncompressed message",
            ),
            (
                H2Server(GRPC, bytes(10_000), TRAILERS),
                "garbage instead of an answer: more than 4096 bytes",
            ),
        ],
    )
    def test_anything_else(self, server: H2Server, detail: str) -> None:
        assert ask(wanted("grpc"), server) == Result(False, detail)

    @pytest.mark.parametrize("answer", [OK, bytes(200), b"\xff" * 200, b"PRI * HTTP/2.0\r\n\r\n"])
    def test_no_http2(self, answer: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(answer)
            await asyncio.Event().wait()

        result = ask(wanted("grpc"), talk)
        assert result is not None
        assert not result.ok
        assert result.detail.startswith("garbage instead of an answer")

    def test_frames_without_end(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            while True:
                writer.write((b"\0\x40\0\xee\0\0\0\0\0" + bytes(16384)) * 4)  # of a type that nobody knows
                await writer.drain()

        result = ask(wanted("grpc"), talk)
        assert result == Result(False, "garbage instead of an answer: more bytes than any answer has")

    def test_tls(self) -> None:
        server = H2Server(GRPC, message(b"\x08\x01"), TRAILERS)
        context = server_context("localhost", alpn=("h2",))
        assert ask(wanted("grpc"), server, server=context, tls=tls()) == Result(True, "SERVING")
        assert server.requests[0][":scheme"] == "https"

    def test_tls_without_alpn(self) -> None:
        result = ask(wanted("grpc"), hang, server=server_context("localhost"), tls=tls())
        assert result == Result(False, "does not offer HTTP/2 in its TLS handshake")

    def test_hanging(self) -> None:
        assert ask(wanted("grpc", timeout_s=0.1), hang) == Result(False, "timed out after 100 ms")

    def test_ends(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1000)
            writer.write_eof()
            await reader.read()

        result = ask(wanted("grpc"), talk)
        assert result == Result(False, "closed the connection before it answered")

    @pytest.mark.parametrize(
        ("payload", "status"),
        [
            (b"", 0),
            (b"\x08\x01", 1),
            (b"\x08\x02\x08\x01", 1),  # the last one counts
            (b"\x12\x03abc\x08\x01", 1),  # fields that we do not know
            (b"\x11" + bytes(8) + b"\x1d" + bytes(4) + b"\x08\x02", 2),
            (b"\x08\x81\x00", 1),
        ],
    )
    def test_messages(self, payload: bytes, status: int) -> None:
        assert serving_status(message(payload)) == status

    @pytest.mark.parametrize("payload", [b"\x08", b"\x08\x80", b"\x0b", b"\x12\x09a", b"\x08" + b"\xff" * 20])
    def test_no_messages(self, payload: bytes) -> None:
        with pytest.raises(ProbeError, match="garbage"):
            serving_status(message(payload))


class TestHttp2:
    def test_status_and_body(self) -> None:
        server = H2Server([(":status", "200")], b"all is ok")
        settings = wanted("http", expect_body=b"is ok")
        assert ask(settings, server, protocol="h2") == Result(True, "status 200")
        assert server.requests[0][":path"] == "/healthz"
        settings = wanted("http", expect_body=b"fine")
        assert ask(settings, server, protocol="h2") == Result(False, "the body does not contain 'fine'")

    def test_wrong_status(self) -> None:
        server = H2Server([(":status", "503")])
        assert ask(wanted("http"), server, protocol="h2") == Result(False, "status 503")
