"""A reload that takes workers away: what they have goes on to its end, and nobody new comes to them.

Each case needs clients on the workers that go. Where a client lands is the kernel's choice, so there are
enough of them for some to be on each worker.
"""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.fake_systemd import is_over
from tests.e2e.h3_raw import DATA, GET, RawH3, frame, head
from tests.e2e.harness import Backend, BackendConnection, Gateway, certificate, eventually, listener
from tests.e2e.passthrough_e2e import is_whole, passthrough, run
from tests.e2e.quic_world import World, client
from tests.ports import free_port

WORKERS = 4
CLIENTS = 12
NEW = 40


class UdpEcho:
    """A backend that says who it is, and what it was asked."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        self.peers: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "UdpEcho":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.sock.getsockname())
        self._thread.join(30)
        self.sock.close()

    def _serve(self) -> None:
        while True:
            data, peer = self.sock.recvfrom(2048)
            if not data:
                return
            if peer not in self.peers:
                self.peers.append(peer)
            self.sock.sendto(data, peer)


def fewer(gateway: Gateway, config: str) -> list[int]:
    """One worker, by a reload; gives those that are to go."""
    before = gateway.worker_pids()
    gateway._head = re.sub(r"workers = \d", "workers = 1", gateway._head)
    assert gateway.reload(config)
    return before[1:]


@contextlib.contextmanager
def datagrams(port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        sock.settimeout(30)
        yield sock


def members(port: int) -> int:
    """How many sockets of this machine are bound to a UDP port."""
    lines = Path("/proc/net/udp").read_text().splitlines()
    return sum(f":{port:04X} 00000000:0000" in line for line in lines)


def test_udp(tmp_path: Path) -> None:
    port = free_port()
    with UdpEcho() as echo:
        config = listener(port, echo.address, protocol="udp")
        with (
            Gateway(tmp_path, config, workers=WORKERS, runtime="drain_timeout_ms = 4000") as gateway,
            contextlib.ExitStack() as stack,
        ):
            old = [stack.enter_context(datagrams(port)) for _ in range(CLIENTS)]
            for one in old:
                one.send(b"old")
                assert one.recv(10) == b"old"
            peers = list(echo.peers)
            assert members(port) == WORKERS
            fewer(gateway, config)
            eventually(lambda: members(port) == 1, "the group has one member")
            for number in range(NEW):
                one = stack.enter_context(datagrams(port))
                one.send(b"%d" % number)
                assert one.recv(10) == b"%d" % number
            # What backends say on flows of workers that go still comes, from the right address.
            for peer in peers:
                echo.sock.sendto(b"late", peer)
            for one in old:
                assert one.recv(10) == b"late"
                one.send(b"again")
                assert one.recv(10) == b"again", "and clients go on with another flow"
            assert not gateway.metric("udp_dropped_total", reason="draining")


class Slow:
    """A backend that begins answers and ends them when told."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, connection: BackendConnection) -> None:
        while True:
            request, _ = connection.request()
            if b" /slow " not in request:
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                continue
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
            self.go.wait(20)
            connection.send(b"half")


def slow_request(one: RawH3) -> int:
    fields = [*GET[:3], (b":path", b"/slow")]
    return one.send(head(*fields), True)


def has_half(one: RawH3, stream: int) -> None:
    one.until(lambda: frame(DATA, b"half") in one.data[stream], "half of the answer")


def test_http3(tmp_path: Path) -> None:
    port = free_port()
    slow = Slow()
    files = certificate(tmp_path)
    more = (
        f"[listeners.quic]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
        f"retry_secret_path = '{tmp_path / 'retry.secret'}'"
    )
    with Backend(slow) as backend:
        config = listener(port, backend, more, protocol="quic")
        with (
            Gateway(tmp_path, config, workers=WORKERS, runtime="drain_timeout_ms = 8000") as gateway,
            contextlib.ExitStack() as stack,
        ):
            old = [stack.enter_context(RawH3(port)).begun() for _ in range(CLIENTS)]
            asked = [slow_request(one) for one in old]
            for one, stream in zip(old, asked, strict=True):
                has_half(one, stream)
            going = fewer(gateway, config)
            eventually(lambda: members(port) == 1, "the group has one member")
            for _ in range(NEW):
                with RawH3(port) as one:
                    assert one.begun().get()[0][b":status"] == b"200"
            slow.go.set()
            for one, stream in zip(old, asked, strict=True):
                fields, body = one.answer(stream)
                assert (fields[b":status"], body) == (b"200", b"halfhalf")
            for one in old:
                one.quic.close()
                one.flush()
            eventually(lambda: all(map(is_over, going)), "then they go")


def test_mode_a(tmp_path: Path) -> None:
    port = free_port()
    with World(certificate(tmp_path)) as world:
        config = passthrough(port, world.server("a"))
        with Gateway(tmp_path, config, workers=WORKERS, runtime="drain_timeout_ms = 4000") as gateway:

            async def main() -> None:
                async with contextlib.AsyncExitStack() as stack:
                    old = [
                        await stack.enter_async_context(client(port, world.configuration()))
                        for _ in range(CLIENTS)
                    ]
                    for one in old:
                        assert await one.who() == "a"
                    fewer(gateway, config)
                    eventually(lambda: members(port) == 1, "the group has one member")
                    for _ in range(NEW // 2):
                        async with client(port, world.configuration()) as one:
                            assert await one.who() == "a"
                    for one in old:
                        await is_whole(one, 20_000)

            run(main)
