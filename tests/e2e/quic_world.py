"""QUIC peers that we did not write: aioquic's servers in a thread of their own, and its clients.

A server answers on each bidirectional stream: ``who`` with its name, ``put`` and bytes with their SHA-256,
``get N`` with N bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
import threading
from typing import TYPE_CHECKING, Any, Self

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from expressgateway.demo.certificate import CertificateFiles

PATIENCE_S = 60.0
ALPN = "passthrough-test"


def bytes_of(size: int) -> bytes:
    """Bytes that repeat themselves only after a prime number of them."""
    block = bytes((at * 7 + at // 251) % 256 for at in range(65_521))
    return (block * (size // len(block) + 1))[:size]


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ServerProtocol(QuicConnectionProtocol):
    """One connection of a server."""


class Server:
    """One backend. ``make`` gives the protocol, which has the last word on connection IDs."""

    def __init__(
        self,
        world: World,
        name: str,
        port: int = 0,
        *,
        retry: bool = False,
        versions: list[int] | None = None,
        cid_bytes: int = 8,
        make_server: Callable[..., QuicServer] = QuicServer,
        make_connection: Callable[[QuicConnectionProtocol], None] | None = None,
    ) -> None:
        self.name = name
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.connections = 0
        self.peers: list[Any] = []
        """Addresses that connections were made from: those of the gateway's sockets."""
        self._make_connection = make_connection
        configuration = QuicConfiguration(is_client=False, alpn_protocols=[ALPN])
        configuration.connection_id_length = cid_bytes
        if versions is not None:
            configuration.supported_versions = versions
        configuration.load_cert_chain(str(world.files.certificate), str(world.files.key))
        self._configuration = configuration
        self._retry = retry
        self._make_server = make_server
        self._server: QuicServer | None = None
        self._world = world

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        _, self._server = await loop.create_datagram_endpoint(
            lambda: self._make_server(
                configuration=self._configuration,
                create_protocol=self._protocol,
                stream_handler=self._on_stream,
                retry=self._retry,
            ),
            local_addr=("127.0.0.1", self.port),
        )

    def _protocol(self, quic: QuicConnection, **more: Any) -> QuicConnectionProtocol:
        self.connections += 1
        protocol = ServerProtocol(quic, **more)
        if self._make_connection is not None:
            self._make_connection(protocol)
        return protocol

    def _on_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer), name="stream")
        self._world.tasks.add(task)
        task.add_done_callback(self._world.tasks.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            data = await reader.read()
            command, _, rest = data.partition(b"\n")
            if command == b"who":
                writer.write(self.name.encode())
            elif command == b"put":
                writer.write(digest_of(rest).encode())
            else:
                writer.write(bytes_of(int(command.split()[1])))
            writer.write_eof()

    def stop(self) -> None:
        """Its port is closed: ICMP says so."""
        if self._server is not None:
            transport = self._server._transport
            assert transport is not None
            transport.abort()
            self._server = None


class World:
    """A loop in a thread, with the servers."""

    def __init__(self, files: CertificateFiles) -> None:
        self.files = files
        self.tasks: set[asyncio.Task[None]] = set()
        self._servers: list[Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    async def _end(self) -> None:
        for server in self._servers:
            server.stop()
        for task in list(self.tasks):
            task.cancel()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def server(self, name: str = "a", port: int = 0, **more: Any) -> Server:
        server = Server(self, name, port, **more)
        self.run(server.start())
        self._servers.append(server)
        return server

    def stop(self, server: Server) -> None:
        async def stop() -> None:
            server.stop()

        self.run(stop())

    def restart(self, server: Server) -> None:
        self.run(server.start())

    def configuration(self, **more: Any) -> QuicConfiguration:
        configuration = QuicConfiguration(is_client=True, alpn_protocols=[ALPN], **more)
        configuration.verify_mode = ssl.CERT_NONE  # its wildcard is one that aioquic's verifier does not take
        configuration.server_name = "localhost"
        return configuration


class Client:
    """A connection through the gateway."""

    def __init__(self, protocol: QuicConnectionProtocol, port: int) -> None:
        self.protocol = protocol
        self.port = port

    @property
    def quic(self) -> QuicConnection:
        return self.protocol._quic

    async def ask(self, data: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await self.protocol.create_stream()
            writer.write(data)
            writer.write_eof()
            return await reader.read()

    async def who(self) -> str:
        return (await self.ask(b"who\n")).decode()

    @property
    def address(self) -> tuple[str, int]:
        transport = self.protocol._transport
        assert transport is not None
        address: tuple[str, int] = transport.get_extra_info("sockname")
        return address

    async def rebind(self, host: str = "127.0.0.1") -> None:
        """As when a NAT forgets: the same connection from another port, which nobody is told of."""
        old = self.protocol._transport
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self.protocol, local_addr=(host, 0))
        assert old is not None
        old.abort()

    def change_cid(self) -> bytes:
        """Use another connection ID of the server's from now on; gives it."""
        before = self.quic._peer_cid.cid
        self.protocol.change_connection_id()
        after: bytes = self.quic._peer_cid.cid
        assert after != before
        return after


@contextlib.asynccontextmanager
async def client(
    port: int, configuration: QuicConfiguration, *, wait: bool = True, host: str = "127.0.0.1"
) -> AsyncIterator[Client]:
    protocol = QuicConnectionProtocol(QuicConnection(configuration=configuration))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: protocol, local_addr=(host, 0))
    protocol.connect(("127.0.0.1", port))
    one = Client(protocol, port)
    try:
        if wait:
            async with asyncio.timeout(PATIENCE_S):
                await protocol.wait_connected()
        yield one
    finally:
        protocol.close()
        transport = protocol._transport
        if protocol._timer is not None:
            protocol._timer.cancel()
        assert transport is not None
        transport.abort()
