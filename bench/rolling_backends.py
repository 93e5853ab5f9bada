"""The backends of `bench.rolling` that nginx cannot be: ``python -m bench.rolling_backends``.

They send back what they are sent: a TCP and a UDP service, a WebSocket server, a gRPC method with a stream in
both directions. The last one is an HTTP/1.1 server that answers after a second.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import grpc  # type: ignore[import-untyped]  # it has no types
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets

METHOD = "/bench.Echo/Talk"
SLOW_S = 1.0
SLOW_BODY = b"slow"


async def echo_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


class EchoUdp(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self._transport.sendto(data, address)


async def echo_websocket(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def slow_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(SLOW_S)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(SLOW_BODY), SLOW_BODY))
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


class EchoGrpc(grpc.GenericRpcHandler):  # type: ignore[misc]  # as above
    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if handler_call_details.method != METHOD:
            return None

        async def talk(requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            async for message in requests:  # type: ignore[attr-defined]  # grpc.aio gives an iterator
                await context.write(message)

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(talk)
        return handler


async def serve(arguments: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    here = "127.0.0.1"
    rpc = grpc.aio.server()
    rpc.add_generic_rpc_handlers((EchoGrpc(),))
    rpc.add_insecure_port(f"{here}:{arguments.grpc}")
    await rpc.start()
    await loop.create_datagram_endpoint(EchoUdp, (here, arguments.udp))
    async with (
        await asyncio.start_server(echo_tcp, here, arguments.tcp),
        await asyncio.start_server(slow_http, here, arguments.slow),
        serve_websockets(echo_websocket, here, arguments.websocket, ping_interval=None, compression=None),
    ):
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.rolling_backends")
    for name in ("tcp", "udp", "websocket", "grpc", "slow"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
