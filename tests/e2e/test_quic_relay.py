"""Mode B through a running gateway: QUIC relayed between peers that we did not write."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aioquic.quic.packet import QuicErrorCode

from expressgateway.demo.certificate import make_certificate, write_certificate
from tests.e2e.harness import Gateway, certificate
from tests.e2e.http_world import rss_bytes
from tests.ports import free_port
from tests.quic_peers import QuicBackend, QuicPeer, is_stalled, quic_backend, quic_client, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from expressgateway.demo.certificate import CertificateFiles

NAME = "app.internal"
BULK_BYTES = 5_000_000
SERVER_WINDOW = 100_000
EXAMPLE = Path(__file__).parents[2] / "config" / "examples" / "quic-mode-b.toml"


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


class World:
    """A gateway, its backends and its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.front = certificate(directory, stem="front")
        self.back = write_certificate(directory, make_certificate(NAME, local=False), "back")
        self.stack = contextlib.AsyncExitStack()
        self.gateway: Gateway

    def config(self, *ports: int, keys: str = "") -> str:
        backends = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
        return f"""
[[listeners]]
name = "raw"
address = "127.0.0.1:{self.port}"
protocol = "quic"

[listeners.quic]
cert_path = "{self.front.certificate}"
key_path = "{self.front.key}"
retry_secret_path = "{self.directory}/retry.secret"

[listeners.quic.raw_proxy]
backends = [{backends}]
sni = "{NAME}"
backend_ca_path = "{self.back.certificate}"
alpn = ["first", "second"]
{keys}
"""

    async def start(self, *ports: int, keys: str = "", **more: Any) -> Gateway:
        self.gateway = Gateway(self.directory, self.config(*ports, keys=keys), **more)
        await asyncio.to_thread(self.gateway.__enter__)
        return self.gateway

    async def backend(
        self, alpn: tuple[str, ...] = ("second", "first"), files: CertificateFiles | None = None, **more: Any
    ) -> QuicBackend:
        files = files or self.back
        return await self.stack.enter_async_context(
            quic_backend(files.certificate, files.key, list(alpn), **more)
        )

    async def client(self, *alpn: str, **more: Any) -> QuicPeer:
        return await self.stack.enter_async_context(quic_client(self.port, list(alpn or ("first",)), **more))

    async def wait_metric(self, name: str, at_least: float = 1, **labels: str) -> None:
        await asyncio.to_thread(self.gateway.wait_metric, name, at_least, **labels)

    async def metric(self, name: str, **labels: str) -> float:
        return await asyncio.to_thread(self.gateway.metric, name, **labels)


@contextlib.asynccontextmanager
async def world(directory: Path) -> AsyncIterator[World]:
    it = World(directory)
    kind: type[BaseException] | None = None
    try:
        yield it
    except BaseException as error:
        kind = type(error)
        raise
    finally:
        await it.stack.aclose()
        await asyncio.to_thread(it.gateway.__exit__, kind)


def test_streams_of_every_kind_and_five_megabytes_each_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend()
            await it.start(backend.port)
            client = await it.client("second")
            server = await backend.peer()
            assert client.alpn == server.alpn == "second"
            sent: dict[tuple[str, int], bytes] = {}
            for name, sender in (("client", client), ("server", server)):
                for unidirectional in (False, True):
                    stream = sender.open(unidirectional=unidirectional)
                    sent[name, stream] = os.urandom(BULK_BYTES)
                    sender.send(stream, sent[name, stream], end=True)
            await until(lambda: {0, 2} <= server.ends and {1, 3} <= client.ends)
            for (name, stream), data in sent.items():
                receiver, sender = (server, client) if name == "client" else (client, server)
                assert digest(receiver.data[stream]) == digest(data), (name, stream)
                if not stream & 2:
                    receiver.send(stream, data[::-1], end=True)
            await until(lambda: 0 in client.ends and 1 in server.ends)
            assert digest(client.data[0]) == digest(sent["client", 0][::-1])
            assert digest(server.data[1]) == digest(sent["server", 1][::-1])
            client.send_datagram(b"there")
            await until(lambda: server.datagrams == [b"there"])
            server.send_datagram(b"back")
            await until(lambda: client.datagrams == [b"back"])
            await it.wait_metric("quic_relayed_streams_total", 2, direction="from_client")
            await it.wait_metric("quic_relayed_streams_total", 2, direction="from_backend")
            await it.wait_metric("quic_datagrams_total", 1, direction="from_client")
            await it.wait_metric("relay_bytes_total", 3 * BULK_BYTES, direction="from_backend")
            assert await it.metric("quic_relayed_streams_open") == 0

    run(main)


@pytest.mark.parametrize("by_client", [False, True])
def test_codes_end_to_end(tmp_path: Path, by_client: bool) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend()
            await it.start(backend.port)
            client = await it.client()
            server = await backend.peer()
            one, other = (client, server) if by_client else (server, client)
            reset, stopped = one.open(), one.open() + 4
            one.send(reset, b"x")
            one.send(stopped, b"y")
            await until(lambda: other.data[reset] and other.data[stopped])
            one.reset(reset, 0x1001)
            other.stop(stopped, 0x2002)
            await until(lambda: other.resets.get(reset) == 0x1001)
            await until(lambda: one.stops.get(stopped) == 0x2002)
            one.leave(0x3003, "that was all")
            await until(lambda: other.closed is not None)
            closed = other.closed
            assert closed is not None
            assert (closed.error_code, closed.frame_type, closed.reason_phrase) == (
                0x3003,
                None,
                "that was all",
            )
            assert await it.metric("relay_errors_total") == 0

    run(main)


def test_a_wrong_certificate_is_refused_and_a_dead_backend_passed_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            wrong = write_certificate(tmp_path, make_certificate("somebody.else", local=False), "wrong")
            impostor = await it.backend(files=wrong)
            honest = await it.backend(is_echo=True)
            outlier = "[listeners.outlier]\nconsecutive_failures = 1\nmax_ejection_percent = 100\n"
            await it.start(impostor.port, free_port(), honest.port, keys=outlier)
            for _ in range(3):
                client = await it.client()
                client.send(client.open(), b"hello", end=True)
                await until(lambda client: client.data[0] == b"hello", client)
            assert len(honest.peers) == 3
            assert await it.metric("relay_errors_total") == 0
            name = f"127.0.0.1:{impostor.port}"
            await it.wait_metric("backend_connect_failures_total", 1, backend=name)
            await it.wait_metric("backend_ejections_total", 1, backend=name)
            assert "a backend could not be connected to: " in it.gateway.log()

    run(main)


def test_no_backend_that_can_be_trusted(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            wrong = write_certificate(tmp_path, make_certificate("somebody.else", local=False), "wrong")
            impostor = await it.backend(files=wrong)
            await it.start(impostor.port)
            client = await it.client()
            await until(lambda: client.closed is not None)
            assert client.closed is not None
            assert client.closed.error_code == QuicErrorCode.CONNECTION_REFUSED
            await it.wait_metric("relay_errors_total", 1, reason="backend_certificate")

    run(main)


def test_a_slow_reader_stalls_the_sender_and_memory_is_flat(tmp_path: Path) -> None:
    """Ten clients offer 8 MB each to a backend that reads nothing."""

    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend(max_stream_data=SERVER_WINDOW)
            gateway = await it.start(backend.port)
            pid = gateway.worker_pids()[0]
            pairs = []
            for number in range(10):
                client = await it.client()
                server = await backend.peer(number)
                server.read_nothing()
                pairs.append((client, server))
            before = rss_bytes(pid)
            for client, _ in pairs:
                client.send(client.open(), bytes(8_000_000))
            for client, server in pairs:
                await until(
                    lambda client, server: server.received == SERVER_WINDOW and is_stalled(client, 0),
                    client,
                    server,
                )
                accepted = client.sent_and_accepted(0)
                assert SERVER_WINDOW < accepted <= SERVER_WINDOW + 262_144
            grown = rss_bytes(pid) - before
            assert grown < 10 * 2 * 262_144 + 8_000_000, grown  # a window each; 80 MB were offered

    run(main)


def test_stream_credit_is_withheld(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend()
            await it.start(backend.port, keys="max_relay_streams = 3")
            client = await it.client()
            server = await backend.peer()
            streams = []
            for number in range(9):
                streams.append(client.open())
                client.send(streams[-1], b"%d" % number, end=True)
            await until(lambda: len(server.ends) == 3)
            await it.wait_metric("quic_relayed_streams_open", 3)
            assert client.quic._remote_max_streams_bidi == 3
            for stream in streams:
                await until(lambda stream: stream in server.ends, stream)
                assert await it.metric("quic_relayed_streams_open") <= 3
                server.send(stream, bytes(server.data[stream]), end=True)
            await until(lambda: client.ends == set(streams))
            for number, stream in enumerate(streams):
                assert client.data[stream] == b"%d" % number

    run(main)


def test_a_drain_lets_relays_go_on_and_ends_them_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend(is_echo=True)
            gateway = await it.start(backend.port, runtime="drain_timeout_ms = 6000")
            client = await it.client()
            client.send(client.open(), b"before")
            await until(lambda: client.data[0] == b"before")
            gateway.process.send_signal(signal.SIGTERM)
            refused = None
            while refused is None:  # until the worker has heard of it
                refused = (await it.client()).closed
            assert refused.error_code == QuicErrorCode.CONNECTION_REFUSED
            client.send(0, b" and after")
            await until(lambda: client.data[0] == b"before and after")
            await until(lambda: client.closed is not None)
            assert client.closed is not None
            assert client.closed.error_code == QuicErrorCode.NO_ERROR
            await asyncio.to_thread(gateway.process.wait, 60)

    run(main)


def test_a_certificate_is_renewed_and_relays_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend(is_echo=True)
            gateway = await it.start(backend.port)
            old = await it.client()
            old.send(old.open(), b"before")
            await until(lambda: old.data[0] == b"before")
            certificate(tmp_path, "renewed.example", stem="front")
            assert await asyncio.to_thread(gateway.reload, it.config(backend.port))
            new = await it.client()
            new.send(new.open(), b"hello", end=True)
            await until(lambda: new.data[0] == b"hello")
            shown = [str(peer.quic.tls._peer_certificate.subject) for peer in (old, new)]  # type: ignore[union-attr]
            assert "renewed.example" not in shown[0]
            assert "renewed.example" in shown[1]
            old.send(0, b" and after", end=True)
            await until(lambda: old.data[0] == b"before and after")
            assert old.closed is None

    run(main)


def test_the_example_starts_as_it_is(tmp_path: Path) -> None:
    """But for its ports and certificates."""

    async def main() -> None:
        async with world(tmp_path) as it:
            backend = await it.backend(alpn=("moq-00",), is_echo=True)
            text = EXAMPLE.read_text()
            text = re.sub(r"\[observability\][^[]*", "", text)
            for old, new in (
                ("127.0.0.1:8443", f"127.0.0.1:{it.port}"),
                ("127.0.0.1:4433", f"127.0.0.1:{backend.port}"),
                ("127.0.0.1:4434", f"127.0.0.1:{free_port()}"),
                ("certs/server.pem", str(it.front.certificate)),
                ("certs/server.key", str(it.front.key)),
                ("certs/ca.pem", str(it.back.certificate)),
            ):
                assert old in text
                text = text.replace(old, new)
            it.gateway = Gateway(tmp_path, text)
            await asyncio.to_thread(it.gateway.__enter__)
            assert (tmp_path / "retry.secret").stat().st_mode & 0o777 == 0o600
            client = await it.client("moq-00")
            client.send(client.open(), b"hello", end=True)
            await until(lambda: client.data[0] == b"hello")

    run(main)
