"""Steady load from threads: keep-alive clients that count what became of every request."""

import threading
from collections import Counter
from typing import Self

from tests.e2e.harness import Client, eventually

ONCE = b"GET /load HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"
REQUEST = b"GET /load HTTP/1.1\r\nHost: a.example\r\n\r\n"


class Load:
    """Clients that ask, one after the other, until the block ends or nobody listens any more.

    ``answers`` counts statuses, ``bodies`` what was said; ``broken`` are requests that were sent and not
    answered completely, ``told`` connections whose last answer said ``close``.
    """

    def __init__(self, port: int, clients: int = 8, request: bytes = REQUEST) -> None:
        self.port = port
        self._request = request
        self.answers: Counter[int] = Counter()
        self.bodies: Counter[bytes] = Counter()
        self.broken: list[str] = []
        self.told = 0
        self.refused = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._asked = [0] * clients
        self._threads = [threading.Thread(target=self._work, args=(each,)) for each in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        """Wait until every client has stopped."""
        for thread in self._threads:
            thread.join(30)
            if thread.is_alive():
                raise AssertionError("a client hangs")

    @property
    def total(self) -> int:
        return self.answers.total()

    def wait_everybody(self) -> None:
        """Until every client has begun a request since now, and has its answer."""
        begun = list(self._asked)
        for client, before in enumerate(begun):
            eventually(lambda: self._asked[client] >= before + 2, "every client goes on")  # noqa: B023 - called within the turn

    def _work(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                client = Client(self.port)
            except ConnectionRefusedError:
                self.refused += 1
                return
            except OSError as error:
                self.broken.append(f"connect: {error!r}")
                continue
            with client:
                self._ask(client, number)

    def _ask(self, client: Client, number: int) -> None:
        asked = 0
        while not self._stop.is_set():
            asked += 1
            self._asked[number] += 1
            try:
                client.send(self._request)
                status, headers, body = client.response()
            except (OSError, AssertionError) as error:
                self.broken.append(f"request {asked} of its connection: {error!r}")
                return
            with self._lock:
                self.answers[status] += 1
                self.bodies[body] += 1
            if headers.get("connection") == "close":
                self.told += 1
                return
