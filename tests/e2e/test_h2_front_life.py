"""How an HTTP/2 connection ends when nobody did wrong: by its budget, idle, at a reload, at a drain.

The client is told in two steps (RFC 9113 6.8): to leave soon, then what is still served. No request is lost.
"""

import contextlib
import signal
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.e2e.h2_raw import MAX, NO_ERROR, RawH2, h2_context, request
from tests.e2e.harness import Backend, BackendConnection, Gateway, certificate, eventually
from tests.e2e.http_world import answer, read_body
from tests.ports import free_port

SWEEP = "[runtime.watchdog]\nsweep_interval_ms = 100\n"


def config(port: int, *backends: str, http: str = "", tls: str = "", more: str = "") -> str:
    tables = ", ".join(f'{{ address = "{each}" }}' for each in backends)
    return f"""
{more}
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
{f'protocol = "h1s"{chr(10)}{tls}' if tls else 'protocol = "h1"' + chr(10) + "h2c = true"}
backends = [{tables}]
[listeners.http]
{http}
"""


@pytest.fixture(params=["tls", "h2c"])
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext | None]]:
    """The lines of a listener's block that make it one of TLS, and a client's context."""
    if request.param == "h2c":
        yield "", None
    else:
        files = certificate(tmp_path)
        lines = f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}'
        yield lines, h2_context(str(files.certificate))


Front = tuple[str, ssl.SSLContext | None]


def named(connection: BackendConnection) -> None:
    """Answer with the backend's name."""
    while True:
        head = connection.until(b"\r\n\r\n")
        read_body(connection, head)
        answer(connection, connection.backend.name.encode())


class Held:
    """Answers in two halves, the second when told; anything but ``/held`` at once."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, connection: BackendConnection) -> None:
        while True:
            head = connection.until(b"\r\n\r\n")
            connection.backend.requests.append((head, b""))
            if b" /held " not in head:
                answer(connection, b"at once")
                continue
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
            if self.go.wait(20):
                connection.send(b"half")


def ended(client: RawH2) -> None:
    """Read to the end; both steps were taken and nothing was wrong."""
    client.rest()
    client.sock.close()  # or the gateway waits a little for that
    assert [code for _, code, _ in client.goaways] == [NO_ERROR, NO_ERROR]
    assert client.goaways[0][0] == MAX


class TestBudget:
    def test_it_ends_with_goaway_and_no_lost_request(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path,
                config(port, backend.address, tls=lines, more=SWEEP),
                runtime="max_keepalive_requests = 5",
            ),
            RawH2(port, tls=tls) as client,
        ):
            slow = client.open(request("/held"))
            client.until(lambda: client.answer(slow).size == 4)
            for number in range(4):
                assert not client.goaways, number
                assert client.ask(request()).body == b"at once"
            client.until(lambda: client.goaways, "the first GOAWAY")
            assert client.goaways == [(MAX, NO_ERROR, b"")]
            late = [client.open(request()) for _ in range(3)]
            for stream in late:
                assert client.response(stream).body == b"at once", "on its way while the notice was"
            client.until(lambda: len(client.goaways) == 2, "the second GOAWAY")
            assert client.goaways[1][0] == late[-1]
            served = len(backend.requests)
            refused = client.open(request("/too-late"))
            client.pong()
            held.go.set()
            assert client.response(slow).body == b"halfhalf"
            ended(client)
            assert client.answer(refused).status == 0
            assert len(backend.requests) == served, "the client may repeat it elsewhere"


class TestIdleness:
    def test_an_idle_connection_is_told_and_closed(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path,
                config(port, backend.address, tls=lines, more=SWEEP, http="idle_timeout_ms = 1500"),
            ) as gateway,
            RawH2(port, tls=tls) as client,
            RawH2(port, tls=tls) as silent,
        ):
            for _ in range(3):
                assert client.ask(request()).body == b"backend"
            began = time.monotonic()
            ended(client)
            assert 1 < time.monotonic() - began < 20
            ended(silent)
            eventually(lambda: gateway.metric("connections_inflight", listener="web") == 0, "all are closed")

    def test_one_with_an_exchange_is_not_idle(self, tmp_path: Path) -> None:
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path,
                config(port, backend.address, more=SWEEP, http="idle_timeout_ms = 1000"),
            ),
            RawH2(port) as client,
        ):
            stream = client.open(request("/held"))
            client.until(lambda: client.answer(stream).size == 4)
            client.sock.settimeout(1.5)
            with contextlib.suppress(TimeoutError):
                client.read()
            client.sock.settimeout(60)
            assert not client.goaways
            held.go.set()
            assert client.response(stream).body == b"halfhalf"


class Load:
    """Clients with a few streams at once each. A stream that GOAWAY has not promised is asked again."""

    def __init__(self, port: int, tls: ssl.SSLContext | None, clients: int = 4, streams: int = 4) -> None:
        self._port = port
        self._tls = tls
        self._streams = streams
        self.bodies: Counter[bytes] = Counter()
        self.told = 0
        """Connections that ended in two steps."""
        self.broken: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs"

    @property
    def total(self) -> int:
        return self.bodies.total()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                client = RawH2(self._port, tls=self._tls)
            except (ConnectionRefusedError, ConnectionResetError, ssl.SSLError):
                return  # nobody listens any more
            with client:
                try:
                    self._ask(client)
                except (OSError, EOFError, AssertionError) as error:
                    self.broken.append(f"{error!r} {client!r}")
                    return

    def _ask(self, client: RawH2) -> None:
        first: set[int] = set()
        while True:
            is_leaving = len(client.goaways) > 1 or self._stop.is_set()
            if is_leaving and not first:
                break
            while not is_leaving and len(first) < self._streams:
                try:
                    first.add(client.open(request()))
                except OSError:
                    is_leaving = True  # it has gone; what it has said is still to be read
            if not first:
                break
            try:
                client.read()
            except (EOFError, ConnectionResetError):
                # Sent when it had gone, and never promised.
                if len(client.goaways) < 2:
                    raise
                first = {stream for stream in first if stream <= client.goaways[-1][0]}
                if first:
                    raise
                break
            if len(client.goaways) > 1:
                first = {stream for stream in first if stream <= client.goaways[-1][0]}
            for stream in [each for each in first if client.answer(each).is_over]:
                found = client.answer(stream)
                if found.status != 200 or not found.is_complete:
                    self.broken.append(repr(found))
                self.bodies[found.body] += 1
                first.discard(stream)
                del client.answers[stream]
        if [last for last, _, _ in client.goaways][:1] == [MAX] and len(client.goaways) == 2:
            self.told += 1
        elif client.goaways and not self._stop.is_set():
            self.broken.append(f"GOAWAY {client.goaways}")


class TestReload:
    def test_under_load_nothing_fails(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        with (
            Backend(named, name="one") as one,
            Backend(named, name="two") as two,
            Gateway(
                tmp_path,
                config(port, one.address, tls=lines),
                workers=2,
                runtime="max_keepalive_requests = 0",
            ) as gateway,
            Load(port, tls) as load,
        ):
            eventually(lambda: load.bodies[b"one"] > 100, "there is load")
            for turn in range(4):
                backend = (two, one)[turn % 2]
                assert gateway.reload(config(port, backend.address, tls=lines)), gateway.log()
                before = load.bodies[backend.name.encode()]
                eventually(lambda: load.bodies[backend.name.encode()] > before + 50, "it holds")  # noqa: B023  # called within the turn
            assert not load.broken, load.broken[:3]
            assert load.told == 0, "a change of backends leaves connections alone"
        assert not load.broken, load.broken[:3]
        assert set(load.bodies) == {b"one", b"two"}


class TestDrain:
    def test_under_load_nothing_fails_and_everybody_is_told_twice(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        clients = 4
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path,
                config(port, backend.address, tls=lines),
                workers=2,
                runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 6000",
            ) as gateway,
            Load(port, tls, clients) as load,
        ):
            eventually(lambda: load.total > 200, "there is load")
            gateway.process.send_signal(signal.SIGTERM)
            load.join()
            assert gateway.process.wait(30) == 0
        assert not load.broken, load.broken[:3]
        assert load.told >= clients

    def test_an_exchange_under_way_is_finished(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path, config(port, backend.address, tls=lines), runtime="drain_timeout_ms = 6000"
            ) as gateway,
            RawH2(port, tls=tls) as client,
        ):
            slow = client.open(request("/held"))
            client.until(lambda: client.answer(slow).size == 4)
            gateway.process.send_signal(signal.SIGTERM)
            client.until(lambda: client.goaways, "the first GOAWAY")
            assert client.ask(request()).body == b"at once"
            client.until(lambda: len(client.goaways) == 2, "the second GOAWAY")
            held.go.set()
            assert client.response(slow).body == b"halfhalf"
            ended(client)
            assert gateway.process.wait(30) == 0

    def test_one_that_does_not_end_is_cut_at_the_budget(self, tmp_path: Path, front: Front) -> None:
        lines, tls = front
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path, config(port, backend.address, tls=lines), runtime="drain_timeout_ms = 1500"
            ) as gateway,
            RawH2(port, tls=tls) as client,
        ):
            slow = client.open(request("/held"))
            client.until(lambda: client.answer(slow).size == 4)
            gateway.process.send_signal(signal.SIGTERM)
            client.rest()
            assert client.goaways
            assert not client.answer(slow).is_complete, "it must not look complete"
            assert gateway.process.wait(30) == 0
            held.go.set()
