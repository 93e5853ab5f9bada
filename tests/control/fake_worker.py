"""A worker that speaks the control channel and serves nothing but its own name, for tests of the supervisor.

What it should do wrong stands in the configuration, as the `server_header` of the first listener:
``cannot-apply`` refuses the configuration, ``one-cannot-apply`` does so in the second worker only,
``dies-on-apply`` dies over it, ``mute-start`` never answers, ``gate=FILE`` applies it when nobody holds a
lock on the file. Once it serves, ``crashes`` dies, ``deaf`` answers nothing, and ``babbles`` sends bytes that
are no message and stays. ``stays`` never finishes its drain.

A client that connects is sent its worker's pid and user, the version of the configuration, the connections
that the census counts, and the ticket keys; it is served until it closes the connection.
"""

import argparse
import asyncio
import fcntl
import os
import signal
import socket
import sys
from typing import Any

from expressgateway.control.census import Census
from expressgateway.control.channel import Channel, Message


class FakeWorker:
    def __init__(self, options: argparse.Namespace, channel: Channel) -> None:
        self.channel = channel
        self.index: int = options.index
        self.census = Census(options.census, options.index, options.workers)
        self.sockets = {
            int(position): socket.socket(fileno=int(fd))
            for position, fd in (given.split("=") for given in options.listener)
        }
        self.names: list[str] = []
        self.protocols: list[str] = []
        self.whim = ""
        self.version = 0
        self.accepted = 0
        self.open: dict[str, int] = {}
        self.tickets: dict[str, str] = {}
        self.writers: set[asyncio.StreamWriter] = set()
        self.servers: list[asyncio.Server] = []
        self.is_idle = asyncio.Event()
        self.is_idle.set()

    async def live(self) -> None:
        while (message := await self.channel.receive()) is not None:
            answer = getattr(self, f"on_{message['type']}")
            if (reply := await answer(message)) is not None:
                self.channel.send(reply)
        if self.whim == "babbles":
            await asyncio.get_running_loop().create_future()
        await self.drain()

    async def on_configure(self, message: Message) -> Message | None:
        first = message["config"]["listeners"][0]
        whim = first.get("http", {}).get("server_header", "")
        if whim == "mute-start":
            return None
        if whim.startswith("gate="):
            with open(whim.removeprefix("gate=")) as gate:  # noqa: ASYNC230 - to block is the point
                fcntl.flock(gate, fcntl.LOCK_SH)
        error = None
        if whim == "cannot-apply" or (whim == "one-cannot-apply" and self.index == 1):
            error = "this worker cannot apply that"
        elif whim == "dies-on-apply":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self.whim = whim
            self.version = message["version"]
            self.names = [one["name"] for one in message["config"]["listeners"]]
            self.protocols = [one["protocol"] for one in message["config"]["listeners"]]
        return {"type": "configured", "version": message["version"], "error": error}

    async def on_tickets(self, message: Message) -> None:
        self.tickets[message["listener"]] = message["keys"]

    async def on_serve(self, _: Message) -> Message:
        for position, sock in self.sockets.items():
            if self.protocols[position] == "udp":
                continue
            name = self.names[position]

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                await self.serve(name, reader, writer)

            self.servers.append(await asyncio.start_server(serve, sock=sock))
        if self.whim == "crashes":
            asyncio.get_running_loop().call_later(0.05, os._exit, 3)
        if self.whim == "babbles":
            nonsense = b"\xff\xff\xff\xffnonsense"
            asyncio.get_running_loop().call_later(0.05, os.write, self.channel_fd(), nonsense)
        return {"type": "serving"}

    def channel_fd(self) -> int:
        transport: Any = self.channel._transport
        return int(transport.get_extra_info("socket").fileno())

    async def on_collect(self, message: Message) -> Message | None:
        if self.whim == "deaf":
            return None
        name = self.names[0]
        durations = [self.accepted, *[0] * 14, 0.25 * self.accepted]
        samples = [
            ["connections", [name], self.accepted],
            ["connections_inflight", [name], self.open.get(name, 0)],
            ["http_request_duration_seconds", [name, "1.1"], durations],
            ["worker_faults", [str(self.index)], 0],
            ["no_such_family", [], 1],
        ]
        return {"type": "samples", "id": message["id"], "samples": samples, "open": self.open}

    async def on_ping(self, message: Message) -> Message | None:
        return None if self.whim == "deaf" else {"type": "pong", "id": message["id"]}

    async def on_drain(self, _: Message) -> None:
        for server in self.servers:
            server.close()
        self.channel.send({"type": "draining", "open": self.open})
        if self.whim == "stays":
            await asyncio.get_running_loop().create_future()
        await self.is_idle.wait()
        self.channel.send({"type": "drained", "aborted": {}})
        self.channel.close()

    async def drain(self) -> None:
        for writer in list(self.writers):
            writer.close()

    async def serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        if self.census.enter("192.0.2.1") is not None:
            writer.close()
            return
        self.accepted += 1
        self.open[name] = self.open.get(name, 0) + 1
        self.is_idle.clear()
        keys = self.tickets.get(name, "-")
        writer.write(
            f"{os.getpid()} {os.getuid()} {self.version} {sum(self.census._totals)} {keys}\n".encode()
        )
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.open[name] -= 1
            self.census.leave("192.0.2.1")
            self.writers.discard(writer)
            writer.close()
            if not any(self.open.values()):
                self.is_idle.set()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--census", type=int, required=True)
    parser.add_argument("--listener", action="append", default=[])
    options = parser.parse_args()
    channel = await Channel.open(socket.socket(fileno=options.channel))
    await FakeWorker(options, channel).live()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
