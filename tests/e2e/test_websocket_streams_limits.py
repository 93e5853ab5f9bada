"""WebSocket over HTTP/2 and HTTP/3 under pressure: who does not read, who breaks a limit, our own end."""

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from tests.e2e.harness import Backend, BackendConnection, Gateway, eventually, resident_kib
from tests.e2e.test_attacks_websocket import (
    ANSWER,
    HELLO,
    MORE,
    PING,
    TEXT,
    answer_late,
    close_code,
    frame,
    unmasked_close_code,
)
from tests.e2e.test_attacks_websocket import _last_frame as last_frame
from tests.e2e.websocket_h2_peers import FLOOD, FLOODS, Stream
from tests.e2e.websocket_sessions import Session
from tests.e2e.websocket_site import LIMIT, RUNTIME, Cell, Ends, Site, accepts, ends, site
from tests.ports import free_port

__all__ = ["ends", "site"]

GATEWAY_BYTES = 1_500_000
"""More than is on the way of a stream whose backend takes nothing: windows, a backlog, sockets."""
SILENCE_S = 0.5
"""Without a byte for so long on loopback: nothing more comes."""
STREAMED: list[Cell] = [("h2", "h1"), ("h2", "h2"), ("h3", "h1"), ("h3", "h2"), ("h3", "h3")]
streamed = pytest.mark.parametrize("cell", STREAMED, ids=["-".join(cell) for cell in STREAMED])
fronts = pytest.mark.parametrize("front", ["h2c", "h3"])
"""In clear text where there is such a thing."""


# -- backpressure ------------------------------------------------------------------------------------------


@streamed
def test_a_client_that_does_not_read_stalls_the_backend(site: Site, cell: Cell) -> None:
    """What is under way is the client's window, one buffer and the sockets', and no more."""
    (worker,) = site.gateway.worker_pids()
    _, back = cell
    with site.link(*cell) as link:
        good = link.connect()
        rss = resident_kib(worker)
        session = link.ask("/floods")
        session.is_reading = False
        session.until(lambda: session.status)
        session.until(lambda: len(session.raw) > 0.9 * link.window)
        with contextlib.suppress(TimeoutError):
            link.pump(lambda: False, SILENCE_S)
        assert len(session.raw) <= link.window, "and no more than it"
        if back != "h1":
            assert site.sockets[back].streams[-1].sent < link.window + 2_500_000
        assert resident_kib(worker) - rss < 4_000
        good.send("unharmed")
        assert good.recv() == "unharmed"
        session.begin()
        session.is_reading = True
        session.give()
        for _ in range(FLOODS):
            assert session.recv() == FLOOD
        assert resident_kib(worker) - rss < 8_000


@pytest.mark.parametrize("cell", [("h2", "h2"), ("h3", "h2"), ("h2", "h3"), ("h3", "h3")], ids="-".join)
def test_a_backend_that_does_not_read_stalls_the_client(site: Site, cell: Cell) -> None:
    (worker,) = site.gateway.worker_pids()
    sockets = site.sockets[cell[1]]
    with site.link(*cell) as link:
        rss = resident_kib(worker)
        session = link.connect("/deaf")
        good = link.connect()
        payload = frame(0x82, b"x" * (LIMIT - 10))
        stream: Stream = sockets.streams[-2]
        assert stream.path == "/deaf"
        sent = 0

        def is_stalled() -> bool:
            nonlocal sent
            sent += session.send_raw(payload[sent:], patience_s=SILENCE_S)
            return stream.received > 0.9 * sockets.window

        eventually(is_stalled, "the window is used up")
        assert stream.received <= sockets.window
        assert stream.received < sent < sockets.window + GATEWAY_BYTES
        assert resident_kib(worker) - rss < 4_000
        good.send("unharmed")
        assert good.recv() == "unharmed"


@fronts
def test_a_backend_of_http_1_that_does_not_read_stalls_the_client(
    ends: Ends, tmp_path: Path, front: str
) -> None:
    port = free_port()
    read_now = threading.Event()
    received: list[int] = []

    def deaf(connection: BackendConnection) -> None:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        assert read_now.wait(60)
        received.append(len(connection.rest()))

    with (
        Backend(accepts(deaf)) as backend,
        Gateway(
            tmp_path,
            ends.listener(front, port, backend.address, limits={"max_message_size_bytes": 100_000_000}),
        ) as gateway,
        ends.link(front, port) as link,
    ):
        (worker,) = gateway.worker_pids()
        session = link.connect()
        rss = resident_kib(worker)
        payload = frame(0x82, bytes(12_000_000))
        sent = session.send_raw(payload, patience_s=SILENCE_S)
        assert sent < 8_000_000, "as much as sockets hold"
        assert resident_kib(worker) - rss < 4_000
        read_now.set()
        session.send_raw(payload[sent:], end=True)
        eventually(lambda: received == [len(payload)], "all of it arrives")


# -- limits ------------------------------------------------------------------------------------------------

_LIMITS = {
    "idle_timeout_seconds": 60,
    "max_message_size_bytes": 1000,
    "ping_rate_limit_per_window": 10,
    "ping_rate_limit_window_seconds": 60,
    "read_frame_timeout_seconds": 60,
}
ABUSE = [
    ("a ping flood", frame(PING) * 11, 1008, "websocket_ping_flood"),
    ("a message over the cap", frame(TEXT, b"x" * 1001), 1009, "websocket_1009"),
    ("fragments over the cap", frame(MORE, b"x" * 600) + frame(0, b"x" * 600), 1009, "websocket_1009"),
    ("an unmasked frame", frame(TEXT, b"hello", mask=False), 1002, "websocket_1002"),
]


class Recorded:
    """A backend's script that records sessions."""

    def __init__(self, says: bytes = b"") -> None:
        self.received: list[bytearray] = []
        self.over = 0
        self._says = says

    def __call__(self, connection: BackendConnection) -> None:
        received = bytearray()
        self.received.append(received)
        connection.send(self._says)
        while data := connection.sock.recv(65_536):
            received += data
        self.over += 1

    def are_over(self) -> bool:
        """All but the first have ended."""
        return self.over == len(self.received) - 1


def _farewell(session: Session) -> bytes:
    """What the gateway said at the end of the stream, which it then ended."""
    session.until(lambda: session.has_ended)
    return bytes(session.raw)


@fronts
def test_abuse_ends_the_session_with_its_code_and_no_other(ends: Ends, tmp_path: Path, front: str) -> None:
    port = free_port()
    recorded = Recorded()
    with (
        Backend(accepts(recorded)) as backend,
        Gateway(
            tmp_path, ends.listener(front, port, backend.address, limits=_LIMITS), runtime=RUNTIME
        ) as gateway,
        ends.link(front, port) as link,
    ):
        good = link.open()
        hello = frame(TEXT, b"hello")
        for name, abuse, code, kind in ABUSE:
            closed = gateway.metric("websocket_closed_total", code=str(code))
            session = link.open()
            session.send_raw(hello)
            eventually(lambda: recorded.received[-1] == hello, "the session works")
            session.send_raw(abuse)
            assert close_code(_farewell(session)) == code, name
            assert session.reset in (None, 0)
            assert gateway.metric("security_events_total", kind=kind) >= 1, name
            assert gateway.metric("websocket_closed_total", code=str(code)) == closed + 1, name
            eventually(recorded.are_over, "the backend is told")
            received = bytes(recorded.received[-1])
            assert received.startswith(hello)
            assert unmasked_close_code(last_frame(received)) == code, name
        good.send_raw(hello)
        eventually(lambda: recorded.received[0] == hello, "the other session of that client goes on")
        assert gateway.metric("websocket_sessions_open") == 1


@fronts
def test_the_answers_to_what_came_before_come_before_the_code(ends: Ends, tmp_path: Path, front: str) -> None:
    port = free_port()
    with (
        Backend(accepts(answer_late)) as backend,
        Gateway(
            tmp_path, ends.listener(front, port, backend.address, limits=_LIMITS), runtime=RUNTIME
        ) as gateway,
        ends.link(front, port) as link,
    ):
        session = link.open()
        session.send_raw(HELLO + frame(0x83, b"x"))
        said = _farewell(session)
        assert said.startswith(ANSWER)
        assert close_code(said[len(ANSWER) :]) == 1002
        assert session.reset in (None, 0)
        eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the session is over")


@fronts
def test_half_a_frame_and_silence(ends: Ends, tmp_path: Path, front: str) -> None:
    port = free_port()
    short = _LIMITS | {"idle_timeout_seconds": 2, "read_frame_timeout_seconds": 1}
    recorded = Recorded()
    with (
        Backend(accepts(recorded)) as backend,
        Gateway(
            tmp_path, ends.listener(front, port, backend.address, limits=short), runtime=RUNTIME
        ) as gateway,
        ends.link(front, port) as link,
    ):
        stalled = link.open()
        eventually(lambda: len(recorded.received) == 1, "it is the first")
        silent = link.open()
        half = frame(TEXT, b"x" * 500)[:20]
        stalled.send_raw(half)
        assert close_code(_farewell(stalled)) == 1008
        assert close_code(_farewell(silent)) == 1001
        assert gateway.metric("security_events_total", kind="websocket_frame_stall") == 1
        eventually(lambda: gateway.metric("websocket_sessions_open") == 0, "the sessions are over")
        assert bytes(recorded.received[0]) == half, "in mid-frame there is no place for a Close frame"
        assert unmasked_close_code(bytes(recorded.received[1])) == 1001


@pytest.mark.parametrize("cell", [("h2", "h2"), ("h3", "h2"), ("h3", "h3")], ids="-".join)
def test_a_message_over_the_cap_towards_a_backend_on_a_stream(site: Site, cell: Cell) -> None:
    with site.link(*cell) as link:
        session = link.open()
        session.send_raw(frame(TEXT, declared=LIMIT + 1))
        assert close_code(_farewell(session)) == 1009
        stream = site.sockets[cell[1]].streams[-1]
        eventually(lambda: stream.close_code == 1009, "the backend is told")
        eventually(lambda: stream.has_ended, "and its stream is ended")


@pytest.mark.parametrize("back", ["h1", "h2", "h3"])
def test_a_drain_says_1001(ends: Ends, tmp_path: Path, back: str) -> None:
    ports = {front: free_port() for front in ("h2c", "h3")}
    recorded = Recorded()
    with (
        Backend(accepts(recorded)) as scripted,
        ends.sockets("h2" if back == "h1" else back) as sockets,
        contextlib.ExitStack() as keep,
    ):
        address = scripted.address if back == "h1" else sockets.address
        config = "".join(ends.listener(front, port, address, back) for front, port in ports.items())
        gateway = keep.enter_context(Gateway(tmp_path, config, runtime="drain_timeout_ms = 500\n"))
        links = {front: keep.enter_context(ends.link(front, port)) for front, port in ports.items()}
        sessions = [(link, link.open()) for link in links.values()]
        gateway.process.terminate()
        for link, session in sessions:
            assert close_code(_farewell(session)) == 1001
            assert link.goaway is not None
            assert session.reset is None
        gateway.process.wait(30)
        assert links["h2c"].goaway == 0
        if back == "h1":
            assert [unmasked_close_code(bytes(each)) for each in recorded.received] == [1001, 1001]
        else:
            assert [each.close_code for each in sockets.streams] == [1001, 1001]
