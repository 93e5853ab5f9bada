"""A bad path for datagrams: a relay that loses, repeats, reorders, corrupts and measures what it passes on.

The same seed makes the same decisions, in the order in which datagrams come; that order is the network's.
"""

import heapq
import itertools
import random
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Final, Self

DATAGRAM_BYTES: Final = 65_535
MAX_CLIENTS: Final = 64


@dataclass(frozen=True, slots=True)
class Weather:
    """Shares of datagrams, 0 to 1, in each direction."""

    lose: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0
    """These arrive up to ``late_s`` later than the others."""
    corrupt: float = 0.0
    """One bit of these is another."""
    cut: float = 0.0
    """The end of these is missing."""
    late_s: float = 0.01
    mtu_bytes: int = DATAGRAM_BYTES
    """Larger ones are lost, whatever comes."""


class Lossy:
    """Relays UDP from ``port`` to ``to``, in a thread; each client has its own there."""

    def __init__(self, to: int, weather: Weather, seed: int = 1) -> None:
        self.weather = weather
        self.passed = 0
        self.lost = 0
        self._to = ("127.0.0.1", to)
        self._random = random.Random(seed)
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self.port: int = self._front.getsockname()[1]
        self._backs: dict[tuple[str, int], socket.socket] = {}
        self._clients: dict[socket.socket, tuple[str, int]] = {}
        self._flying: list[tuple[float, int, bytes, tuple[str, int], bool]] = []
        self._order = itertools.count()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        for sock in (self._front, self._stopped, *self._backs.values()):
            sock.close()

    def _run(self) -> None:
        while True:
            wait = max(0.0, self._flying[0][0] - time.monotonic()) if self._flying else None
            ready, _, _ = select.select([self._front, self._stopped, *self._clients], [], [], wait)
            if self._stopped in ready:
                return
            for sock in ready:
                self._read(sock)
            now = time.monotonic()
            while self._flying and self._flying[0][0] <= now:
                _, _, data, client, is_forward = heapq.heappop(self._flying)
                self._pass_on(data, client, is_forward)

    def _read(self, sock: socket.socket) -> None:
        for _ in range(64):
            try:
                data, address = sock.recvfrom(DATAGRAM_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:  # what was sent before had no receiver
                continue
            is_forward = sock is self._front
            if is_forward and address not in self._backs:
                if len(self._backs) >= MAX_CLIENTS:
                    continue
                back = self._backs[address] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                back.connect(self._to)
                self._clients[back] = address
            self._meet(data, address if is_forward else self._clients[sock], is_forward)

    def _meet(self, data: bytes, client: tuple[str, int], is_forward: bool) -> None:
        weather = self.weather
        chance = self._random.random
        if chance() < weather.lose or len(data) > weather.mtu_bytes:
            self.lost += 1
            return
        if chance() < weather.corrupt:
            at = self._random.randrange(len(data))
            data = data[:at] + bytes((data[at] ^ 1 << self._random.randrange(8),)) + data[at + 1 :]
        if chance() < weather.cut:
            data = data[: self._random.randrange(1, len(data) + 1)]
        for _ in range(2 if chance() < weather.repeat else 1):
            if chance() < weather.reorder:
                at_s = time.monotonic() + chance() * weather.late_s
                heapq.heappush(self._flying, (at_s, next(self._order), data, client, is_forward))
            else:
                self._pass_on(data, client, is_forward)

    def _pass_on(self, data: bytes, client: tuple[str, int], is_forward: bool) -> None:
        self.passed += 1
        try:
            if is_forward:
                self._backs[client].send(data)
            else:
                self._front.sendto(data, client)
        except OSError:
            self.lost += 1
