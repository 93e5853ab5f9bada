"""A worker that speaks the control channel and serves nothing but its own name, for tests of the supervisor.

What it should do wrong stands in the configuration, as the `server_header` of the first listener:
``cannot-apply`` refuses the configuration, ``one-cannot-apply`` does so in the second worker only,
``dies-on-apply`` dies over it, ``mute-start`` never answers, ``mute-serve`` not when it is to serve,
``mute=FILE`` creates the file and never does, ``gate=FILE`` applies it when nobody holds a lock on the file.
Once it serves, ``crashes`` dies, ``deaf`` answers nothing, ``babbles`` sends bytes that are no message and
stays, and ``raves`` tells of its connections what nobody understands. ``stays`` never ends its drain.
``large`` is 64 MiB larger from its start on. ``once=FILE`` is applied by the first one, which creates it.

A client that connects is sent its worker's pid and user, the version of the configuration, the connections
that the census counts, and the ticket keys; it is served until it closes the connection. Meanwhile each of
its lines is answered by one, about QUIC: ``shared`` (its seat, and which are taken), ``add CID``, ``owner
CID``, ``give SEAT TEXT``, ``handed`` (waits for it), ``datagram`` (waits for one, of the second listener).
Others have it misbehave: ``grow MIB``, ``hang`` (a loop without end), ``block SECONDS`` (in C), ``forget``
(what it does on the signal for its stacks).
"""

import argparse
import asyncio
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import time
from typing import Any

from expressgateway.control.census import MAX_WORKERS, Census
from expressgateway.control.channel import Channel, Message
from expressgateway.control.parcels import INSTEAD, LASTING, LISTENER, receive
from expressgateway.net.quic.handover import Handover
from expressgateway.net.quic.sharing import QuicSharing
from expressgateway.net.quic.spares import Spares
from expressgateway.net.reactor import Reactor
from expressgateway.observe.counters import Sample
from expressgateway.observe.stacks import SIGNAL, tell_on
from expressgateway.worker.options import add_options
from expressgateway.worker.reports import Changes


class FakeWorker:
    def __init__(self, options: argparse.Namespace, channel: Channel) -> None:
        self.channel = channel
        self.index: int = options.slot
        self.seat: int = options.seat
        self.census = Census(options.census, options.seat, MAX_WORKERS)
        self.parcels = socket.socket(fileno=options.parcels)
        self.quic = QuicSharing(
            options.seat,
            Spares(options.spares, options.seat, MAX_WORKERS),
            Handover(socket.socket(fileno=options.reader), {}),
        )
        self.handed: asyncio.Queue[str] = asyncio.Queue()
        self.quic.handover.start(Reactor(asyncio.get_running_loop()), self)
        self.sockets: dict[int, socket.socket] = {}
        self.numbers: list[int] = []
        self.started: dict[int, asyncio.Server] = {}
        self.changes = Changes()
        self.names: list[str] = []
        self.protocols: list[str] = []
        self.whim = ""
        self.log_level = ""
        self.version = 0
        self.accepted = 0
        self.open: dict[str, int] = {}
        self.tickets: dict[str, str] = {}
        self.answers: dict[str, Any] = {}
        self.health: dict[str, Any] = {}
        self.writers: set[asyncio.StreamWriter] = set()
        self.ballast: list[bytes] = []
        self.ending: asyncio.Future[None] | None = None
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

    async def on_sockets(self, _: Message) -> None:
        for label, fd in receive(self.parcels):
            kind, _space, number = label.partition(" ")
            sock = socket.socket(fileno=fd)
            if kind in (LISTENER, LASTING):
                self.sockets[int(number)] = sock
            elif kind == INSTEAD:
                self.sockets.pop(int(number)).close()
                sock.close()
            else:
                self.quic.connect(int(number), sock)

    async def on_seats(self, message: Message) -> Message:
        self.census.set_live(message["live"])
        self.quic.seat_all(message["live"], message["moving"])
        return {"type": "seated", "id": message["id"]}

    async def on_configure(self, message: Message) -> Message | None:
        first = message["config"]["listeners"][0]
        whim = first.get("http", {}).get("server_header", "")
        if whim == "mute-start":
            return None
        if whim.startswith("mute="):
            open(whim.removeprefix("mute="), "x").close()  # noqa: ASYNC230 - a moment
            return None
        if whim.startswith("gate="):
            with open(whim.removeprefix("gate=")) as gate:  # noqa: ASYNC230 - to block is the point
                fcntl.flock(gate, fcntl.LOCK_SH)
        error = None
        is_late = False
        if whim.startswith("once="):
            try:
                open(whim.removeprefix("once="), "x").close()  # noqa: ASYNC230 - a moment
            except FileExistsError:
                is_late = True
        if is_late or whim == "cannot-apply" or (whim == "one-cannot-apply" and self.index == 1):
            error = "this worker cannot apply that"
        elif whim == "dies-on-apply":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self.whim = whim
            self.version = message["version"]
            self.names = [one["name"] for one in message["config"]["listeners"]]
            self.protocols = [one["protocol"] for one in message["config"]["listeners"]]
            self.numbers = message["numbers"]
        return {"type": "configured", "version": message["version"], "error": error}

    async def on_tickets(self, message: Message) -> None:
        self.tickets[message["listener"]] = message["keys"]

    async def on_answers(self, message: Message) -> None:
        self.answers = message["names"]

    async def on_health(self, message: Message) -> None:
        self.health.update(message["pools"])

    async def on_commit(self, _: Message) -> None:
        for number in [one for one in self.started if one not in self.numbers]:
            self.started.pop(number).close()
        for number in [one for one in self.sockets if one not in self.numbers]:
            self.sockets.pop(number).close()
        for number, name, protocol in zip(self.numbers, self.names, self.protocols, strict=False):
            if protocol in ("udp", "quic") or number in self.started:
                continue

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                await self.serve(name, reader, writer)

            self.started[number] = await asyncio.start_server(serve, sock=self.sockets[number])

    async def on_serve(self, message: Message) -> Message | None:
        if self.whim == "mute-serve":
            return None
        await self.on_commit(message)
        if self.whim == "large":
            self.grow(64)
        if self.whim == "crashes":
            asyncio.get_running_loop().call_later(0.05, os._exit, 3)
        if self.whim == "babbles":
            nonsense = b"\xff\xff\xff\xffnonsense"
            asyncio.get_running_loop().call_later(0.05, os.write, self.channel_fd(), nonsense)
        return {"type": "serving"}

    def grow(self, mib: int) -> None:
        self.ballast.append(b"x" * (mib * 1024 * 1024))

    def hang(self) -> None:
        while True:
            pass

    def channel_fd(self) -> int:
        transport: Any = self.channel._transport
        return int(transport.get_extra_info("socket").fileno())

    async def on_collect(self, message: Message) -> Message | None:
        if self.whim == "deaf":
            return None
        name = self.names[0]
        durations = [self.accepted, *[0] * 14, 0.25 * self.accepted]
        samples: list[Sample] = [
            ("connections", (name,), self.accepted),
            ("connections_inflight", (name,), self.open.get(name, 0)),
            ("http_request_duration_seconds", (name, "default", "1.1"), durations),
            ("worker_faults", (str(self.index),), 0),
        ]
        self.changes.look((self, None, lambda: samples))
        self.changes.finish()
        part = self.changes.take()
        if part["new"]:
            part["new"].append([99, "no_such_family", []])
        return {"type": "samples", "id": message["id"], **part, "open": self.open}

    async def on_connections(self, message: Message) -> Message | None:
        if self.whim == "deaf":
            return None
        counts = {name: {"tcp": number} for name, number in self.open.items()}
        listed = [[name, "tcp", "192.0.2.1", 5, 1.5, None, "active"] for name in counts]
        if self.whim == "raves":
            listed = [["web", 7]]
        return {
            "type": "connections",
            "id": message["id"],
            "counts": counts,
            "looked_at": sum(self.open.values()),
            "listed": listed[: message["limit"]],
        }

    async def on_log_level(self, message: Message) -> None:
        self.log_level = message["level"]

    async def on_ping(self, message: Message) -> Message | None:
        return None if self.whim == "deaf" else {"type": "pong", "id": message["id"]}

    async def on_drain(self, _: Message) -> None:
        for server in self.started.values():
            server.close()
        self.channel.send({"type": "draining", "open": self.open})
        if self.whim != "stays":
            self.ending = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        await self.is_idle.wait()
        self.channel.send({"type": "drained", "aborted": {}})
        self.channel.close()

    async def drain(self) -> None:
        """The supervisor is gone. One that drains already goes on with that."""
        if self.ending is not None:
            await self.ending
            return
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
        writer.write(f"{os.getpid()} {os.getuid()} {self.version} {self.census.inflight} {keys}\n".encode())
        try:
            while line := await reader.readline():
                writer.write((await self.answer(*line.decode().split()) + "\n").encode())
        except ConnectionError:
            pass
        finally:
            self.open[name] -= 1
            self.census.leave("192.0.2.1")
            self.writers.discard(writer)
            writer.close()
            if not any(self.open.values()):
                self.is_idle.set()

    async def answer(self, question: str, *words: str) -> str:
        quic = self.quic
        match question:
            case "shared":
                return f"{quic.seat} of {sorted(quic.live)}"
            case "add":
                return str(quic.spares.add(bytes.fromhex(words[0])))
            case "owner":
                return str(quic.spares.owner(bytes.fromhex(words[0])))
            case "give":
                data = words[1].encode()
                return str(quic.handover.give(int(words[0]), 1, data, len(data), ("192.0.2.1", 5), [], 0))
            case "handed":
                return await self.handed.get()
            case "datagram":
                data = await asyncio.get_running_loop().sock_recv(self.sockets[self.numbers[1]], 2000)
                return data.hex()
            case "grow":
                self.grow(int(words[0]))
                return "grown"
            case "hang":
                self.hang()
                return "never"
            case "block":
                time.sleep(float(words[0]))  # noqa: ASYNC251 - to block is the point
                return "late"
            case "forget":
                faulthandler.unregister(SIGNAL)
                signal.signal(SIGNAL, signal.SIG_IGN)
                return "forgotten"
            case _:
                return "what?"

    def on_handed(
        self,
        position: int,
        data: bytes,
        segment_bytes: int,
        address: tuple[Any, ...],
        control: list[Any],
        ecn: int,
    ) -> None:
        self.handed.put_nowait(data.decode())


async def main() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args()
    tell_on(options.stacks)
    channel = await Channel.open(socket.socket(fileno=options.channel))
    await FakeWorker(options, channel).live()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
