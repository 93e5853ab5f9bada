"""The load of `bench.rolling`: ``python -m bench.rolling_loads`` with the ports; ends when its input ends.

Each load asks and checks what comes back, again and again: `bench.rolling_clients` are those of requests, and
here are those of streams, which fail if one ends before its client ends it. WebSocket and gRPC are spoken by
websockets and grpcio.

A line ``drain`` on the input says that the gateway is about to end: from then on a connection that is refused
is the end of a load, and streams are ended by their clients first. Prints one line of JSON for each load.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import grpc  # type: ignore[import-untyped]  # it has no types
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

from bench.handshakes import client_context
from bench.rolling_backends import METHOD
from bench.rolling_clients import ANSWER_S, HERE, PAUSE_S, GoneError, Stage, Tally, h1, h2, h3, stream_of

LIFE_S: Final = 120.0
"""Of a stream: its client then ends it and begins another one, within the gateway's time to drain."""


async def websocket(tally: Tally, stage: Stage, port: int) -> None:
    async with connect_websocket(f"ws://{HERE}:{port}/", compression=None, ping_interval=None) as it:
        tally.connections += 1
        ends = time.monotonic() + LIFE_S
        number = 0
        while not stage.streams_end.is_set() and time.monotonic() < ends:
            number += 1
            message = f"message {number}"
            await it.send(message)
            async with asyncio.timeout(ANSWER_S):
                if await it.recv() != message:
                    tally.fail(f"message {number} is another one")
            tally.done()
            await asyncio.sleep(0.01)


async def grpc_stream(tally: Tally, stage: Stage, port: int, roots: Path) -> None:
    credentials = grpc.ssl_channel_credentials(await asyncio.to_thread(roots.read_bytes))
    async with grpc.aio.secure_channel(f"{HERE}:{port}", credentials) as channel:
        call = channel.stream_stream(METHOD)()
        tally.connections += 1
        ends = time.monotonic() + LIFE_S
        number = 0
        while not stage.streams_end.is_set() and time.monotonic() < ends:
            number += 1
            message = b"message %d" % number
            await call.write(message)
            async with asyncio.timeout(ANSWER_S):
                if await call.read() != message:
                    raise ConnectionError(f"message {number} is another one: {await call.code()}")
            tally.done()
            await asyncio.sleep(0.01)
        await call.done_writing()
        async with asyncio.timeout(ANSWER_S):
            if await call.read() is not grpc.aio.EOF or await call.code() != grpc.StatusCode.OK:
                tally.fail(f"ended with {await call.code()}")


async def tcp_stream(tally: Tally, stage: Stage, port: int) -> None:
    async with stream_of(port, stage) as (reader, writer):
        tally.connections += 1
        ends = time.monotonic() + LIFE_S
        while not stage.streams_end.is_set() and time.monotonic() < ends:
            message = os.urandom(1000)
            writer.write(message)
            async with asyncio.timeout(ANSWER_S):
                if await reader.readexactly(len(message)) != message:
                    tally.fail("other bytes came back")
            tally.done()
            await asyncio.sleep(0.01)


class UdpClient(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.came: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.came.put_nowait(data)


async def udp(tally: Tally, stage: Stage, port: int) -> None:
    """One datagram at a time, sent again after a second as every such client does; lost if three are."""
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_datagram_endpoint(UdpClient, remote_addr=(HERE, port))
    tally.connections += 1
    number = 0
    try:
        while not stage.streams_end.is_set():
            number += 1
            message = b"datagram %d" % number
            for _ in range(3):
                transport.sendto(message)
                try:
                    async with asyncio.timeout(1.0):
                        while await client.came.get() != message:
                            pass
                    break
                except TimeoutError:
                    pass
            else:
                tally.fail(f"datagram {number} is never answered")
            tally.done()
            await asyncio.sleep(0.01)
    finally:
        transport.close()


# -- all of them


async def again_and_again(
    tally: Tally, stage: Stage, until: asyncio.Event, load: Callable[[], Awaitable[None]]
) -> None:
    """Whatever ends a load before it is to end is a failure; it then begins anew."""
    while not until.is_set():
        try:
            await load()
        except GoneError:
            return
        except (
            OSError,
            TimeoutError,
            EOFError,
            ValueError,
            ConnectionClosed,
            grpc.RpcError,
            asyncio.CancelledError,
        ) as error:
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            tally.fail(repr(error))
            await asyncio.sleep(0.1)


async def run(arguments: argparse.Namespace) -> None:
    stage = Stage()
    ports: dict[str, int] = json.loads(arguments.ports)
    tls = client_context()
    tls.set_alpn_protocols(["h2"])
    roots = Path(arguments.roots)
    loads: list[tuple[str, asyncio.Event, Callable[[Tally], Awaitable[None]]]] = [
        ("HTTP/1.1, slow answers", stage.stops, lambda t: h1(t, stage, ports["web"], "/slow", 0.0)),
        (
            "HTTP/1.1, the listener that turns",
            stage.streams_end,
            lambda t: h1(t, stage, ports["turning"], "/", PAUSE_S, is_relayed=True),
        ),
        ("HTTP/2", stage.stops, lambda t: h2(t, stage, ports["secure"], tls)),
        ("HTTP/3", stage.stops, lambda t: h3(t, stage, ports["h3"])),
        ("HTTP/3, slow answers", stage.stops, lambda t: h3(t, stage, ports["h3"], "/slow", 0.0)),
        ("WebSocket stream", stage.streams_end, lambda t: websocket(t, stage, ports["streams"])),
        ("gRPC stream", stage.streams_end, lambda t: grpc_stream(t, stage, ports["secure"], roots)),
        ("TCP stream", stage.streams_end, lambda t: tcp_stream(t, stage, ports["plain"])),
        ("UDP", stage.streams_end, lambda t: udp(t, stage, ports["datagrams"])),
    ]
    tallies = [Tally(name) for name, _, _ in loads]
    tasks = [
        asyncio.ensure_future(again_and_again(tally, stage, until, partial(load, tally)))
        for tally, (_, until, load) in zip(tallies, loads, strict=True)
    ]
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        match line.strip():
            case b"drain":
                stage.streams_end.set()
                stage.is_draining = True
    stage.stops.set()
    stage.streams_end.set()
    _, late = await asyncio.wait(tasks, timeout=ANSWER_S + 5)
    for task, tally in zip(tasks, tallies, strict=True):
        if task in late:
            tally.fail("did not end")
            task.cancel()
        elif (error := task.exception()) is not None:
            tally.fail(repr(error))
    for tally in tallies:
        sys.stdout.write(json.dumps(tally.report()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.rolling_loads")
    parser.add_argument("--ports", required=True, help="by name, as JSON")
    parser.add_argument("--roots", required=True, help="the certificates that the gRPC client trusts")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
