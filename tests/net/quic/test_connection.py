"""The connection between engine, session and network: who is told of a flush."""

from collections.abc import Sequence
from typing import Any

import pytest

from expressgateway.net.datagram import Control
from expressgateway.net.quic.connection import QuicConnection


class Here:
    """The way, the reactor, the timers, the engine and the session of one connection."""

    address = ("127.0.0.1", 1)
    now = 1.0
    is_over = False

    def __init__(self) -> None:
        self.reactor: Any = self
        self.timers: Any = self
        self.built: list[bytes] = []
        self.sent: list[bytes] = []
        self.room = 100
        self.flushed = 0

    def wake(self, connection: QuicConnection) -> None: ...

    def send(self, datagrams: list[bytes], address: object, control: Sequence[Control]) -> int:
        taken = datagrams[: self.room]
        self.sent += taken
        return len(taken)

    def blocked(self, connection: QuicConnection) -> None: ...

    def transmit(self, now: float, most: int) -> list[tuple[bytes, tuple[str, int]]]:
        built, self.built = self.built, []
        return [(each, self.address) for each in built]

    def timer(self) -> None: ...

    def on_flushed(self) -> None:
        self.flushed += 1


@pytest.mark.parametrize("built", [[], [b"datagram"]])
def test_the_session_is_told_whether_or_not_there_was_something_to_send(built: list[bytes]) -> None:
    """Who woke the connection for nothing waits for this before it wakes it again."""
    here: Any = Here()
    connection = QuicConnection(here)
    connection.engine = here
    connection.session = here
    here.built = list(built)
    connection.flush()
    assert here.sent == built
    assert here.flushed == 1


def test_not_while_the_network_takes_nothing() -> None:
    here: Any = Here()
    connection = QuicConnection(here)
    connection.engine = here
    connection.session = here
    here.built = [b"one", b"two"]
    here.room = 1
    connection.flush()
    connection.flush()
    assert here.sent == [b"one", b"two"]
    assert here.flushed == 2
    here.room = 0
    here.built = [b"three"]
    connection.flush()
    assert here.flushed == 3, "it was asked"
    connection.flush()
    assert here.flushed == 3, "nothing is asked before the rest is gone"
