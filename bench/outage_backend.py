"""A backend that can be made to fail: one process, to be killed, stopped, slowed or spoiled while it works.

``python -m bench.outage_backend PORT NAME`` answers every GET with its name and counts what it served. Asked
directly, ``/mode/ok``, ``/mode/slow`` (each answer takes `SLOW_S`) and ``/mode/error`` (each is a 500) change
how it works, ``/count`` tells its count. ``/health`` is well in every mode: it is the work that goes wrong.
Requests have no bodies here.
"""

import asyncio
import sys
from typing import Final

WORK_S: Final = 0.005  # what an answer takes, so that there is something under way when a fault comes
SLOW_S: Final = 2.0
MODES: Final = ("ok", "slow", "error")
MAX_HEAD_BYTES: Final = 65536  # of a request; a longer one ends the connection


class State:
    """How the process works, and what it has done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mode = "ok"
        self.served = 0


def answer(text: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode("ascii")


class Connection(asyncio.Protocol):
    """One client: requests one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._transport: asyncio.Transport | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._serve(head.split(b" ", 2)[1].decode("ascii", "replace"))
        if len(self._received) > MAX_HEAD_BYTES and self._transport is not None:
            self._transport.abort()

    def _serve(self, path: str) -> None:
        state = self._state
        first, _, last = path.removeprefix("/").partition("/")
        if first == "health":
            self._send(answer("well"))
        elif first == "count":
            self._send(answer(str(state.served)))
        elif first == "mode":
            state.mode = last if last in MODES else state.mode
            self._send(answer(state.mode))
        elif state.mode == "error":
            self._work(answer("out of order", "500 Internal Server Error"))
        else:
            wait_s = SLOW_S if state.mode == "slow" else WORK_S
            asyncio.get_running_loop().call_later(wait_s, self._work, answer(state.name))

    def _work(self, data: bytes) -> None:
        self._state.served += 1
        self._send(data)

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(port: int, name: str) -> None:
    state = State(name)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(state), "127.0.0.1", port, backlog=512
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
