"""`config/examples/xdp.toml`, started as it is in a namespace of its own: attached, and served in user space.

On `lo` there is no next hop, so the program passes on what it would forward elsewhere.
"""

import contextlib
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.chromium import CHROMIUM, chromium
from tests.e2e.examples import EXAMPLES
from tests.e2e.harness import Gateway, eventually, need
from tests.e2e.xdp_world import BPF_FS, need_xdp, unpin
from tests.namespaces import Namespace

pytestmark = need_xdp()


class Example(Gateway):
    """As the file has it, but for the place of its pins, which is another gateway's."""

    def __init__(self, directory: Path, namespace: Namespace, pins: Path) -> None:
        self._namespace = namespace
        self._pins = pins
        super().__init__(directory, (EXAMPLES / "xdp.toml").read_text())
        self.admin = 9090

    def write(self, config: str) -> None:
        pins = f'xdp_pin_path = "{self._pins}"\nreadiness_settle_ms = 0\n'
        self.path.write_text(config.replace("[runtime]\n", f"[runtime]\n{pins}"))

    def ask(self, path: str) -> tuple[int, str]:
        with self._namespace.entered():
            return super().ask(path)


def answering(port: int) -> socket.socket:
    """A backend that says its port."""
    server = socket.create_server(("127.0.0.1", port))

    def run() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(str(port).encode())

    threading.Thread(target=run, daemon=True).start()
    return server


def answer_once(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # nobody asked
        sock.sendto(b"pong", sock.recvfrom(64)[1])


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("example") as namespace:
        namespace.sysctl(ipv4__conf__lo__forwarding=1)
        yield namespace


@pytest.fixture
def example(tmp_path: Path, namespace: Namespace) -> Iterator[Example]:
    pins = BPF_FS / f"eg-{secrets.token_hex(4)}"
    with namespace.entered():
        servers = [answering(3000), answering(3001)]
        names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind(("127.0.0.1", 3053))
        names.settimeout(10)
        threading.Thread(target=answer_once, args=(names,), daemon=True).start()
        try:
            with Example(tmp_path, namespace, pins) as example:
                yield example
        finally:
            for each in (*servers, names):
                each.close()
            unpin(pins)


@need(CHROMIUM)
def test_the_dashboard_shows_it(example: Example, namespace: Namespace, tmp_path: Path) -> None:
    with namespace.entered(), chromium(tmp_path, None) as browser:
        page = browser.page()
        page.watch()
        page.open("http://127.0.0.1:9090/")

        def text(selector: str) -> str:
            return str(page.run(f"document.querySelector({selector!r})?.textContent ?? ''"))

        eventually(lambda: text("#xdp-note").startswith("attached"), "the panel is shown")
        assert page.run("document.getElementById('xdp-card').hidden") is False
        assert "lo" in text("#xdp-interfaces tbody tr")
        assert "nat" in text("#xdp-listeners tbody tr")
        for width in (390, 1280):
            page.resize(width)
            assert (
                page.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
            )
        assert page.complaints() == []
        page.close()


def test_it_starts_and_serves(example: Example) -> None:
    assert example.metric("xdp_attached", interface="lo", mode="skb") == 1
    answers: Counter[bytes] = Counter()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", 8080), timeout=10) as client:
            answers[client.recv(64)] += 1
    assert answers.total() == 20
    assert set(answers) <= {b"3000", b"3001"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"ping", ("127.0.0.1", 8053))
        assert client.recv(64) == b"pong"

    def passed() -> float:
        return example.metric(
            "xdp_not_forwarded_packets_total", listener="web", action="pass", reason="no_route"
        )

    eventually(lambda: passed() >= 20, "the program has seen them, and left them to user space")
