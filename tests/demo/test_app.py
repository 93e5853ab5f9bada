"""The demo's own work, with a stand-in for the gateway: what it starts, says, passes on and leaves behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from typing import TYPE_CHECKING

import pytest

from expressgateway.config.load import load
from expressgateway.demo import app
from expressgateway.demo.app import Demo, DemoError, run_demo
from expressgateway.demo.backends import DemoBackends
from expressgateway.demo.certificate import make_certificate, write_certificate
from expressgateway.demo.ports import Ports
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Answers /readyz after one 503, and ends with exit code 7 on SIGTERM and 8 on SIGINT.
STAND_IN = """
import pathlib, signal, socket, sys, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
for number, code in ((signal.SIGTERM, 7), (signal.SIGINT, 8)):
    signal.signal(number, lambda *_, code=code: sys.exit(code))
host, port = config["observability"]["metrics_bind"].split(":")
with socket.create_server((host, int(port))) as listening:
    statuses = ["503 Booting"]
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            status = statuses.pop() if statuses else "200 OK"
            connection.sendall(f"HTTP/1.1 {status}\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
"""


def stand_in(code: str = STAND_IN) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


def free_ports() -> Ports:
    return Ports(*(free_port() for _ in range(7)))


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def left_behind() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("expressgateway-demo-")]


def test_the_configuration_is_one_the_gateway_takes(tmp_path: Path) -> None:
    async def main() -> None:
        demo = Demo(Ports())
        demo.directory = tmp_path
        demo.files = write_certificate(tmp_path, make_certificate())
        async with DemoBackends() as backends:
            demo.config_path.write_text(demo._config(backends))
            addresses = [server.address for server in (*backends.http, *backends.tcp)]
            addresses += [server.address for server in backends.udp]
        loaded = load(demo.config_path)
        assert loaded.warnings == ()
        assert [listener.protocol for listener in loaded.config.listeners] == [
            "h1",
            "h1s",
            "quic",
            "tcp",
            "tls",
            "udp",
        ]
        ports = [listener.address.port for listener in loaded.config.listeners]
        assert ports == [8080, 8443, 8443, 9000, 9443, 9053]
        behind = {
            backend.address.port for listener in loaded.config.listeners for backend in listener.backends
        }
        assert behind == {port for _, port in addresses}

    asyncio.run(main())


class TestDemo:
    def test_starts_waits_and_cleans_up(self) -> None:
        async def main() -> None:
            async with Demo(free_ports(), stand_in()) as demo:
                assert demo.config_path.exists()
                assert demo.files.key.exists()
                assert os.getpgid(demo.pid) == demo.pid != os.getpgid(0)
                assert str(demo.pid) in "".join(command.command for command in demo.commands)
                directory = demo.directory
            assert await demo.wait() == 7
            assert not directory.exists()
            assert left_behind() == []

        asyncio.run(main())

    def test_a_gateway_that_ends_at_once(self) -> None:
        async def main() -> None:
            demo = Demo(free_ports(), stand_in("raise SystemExit(78)"))
            with pytest.raises(DemoError, match="ended before it was ready") as caught:
                await demo.__aenter__()
            assert caught.value.exit_code == 78
            assert not demo.directory.exists()

        asyncio.run(main())

    def test_a_gateway_that_is_never_ready_and_does_not_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(app, "READY_TIMEOUT_S", 2.5)  # by then it ignores the signal
        monkeypatch.setattr(app, "STOP_TIMEOUT_S", 0.1)
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

        async def main() -> None:
            demo = Demo(free_ports(), stand_in(stubborn))
            with pytest.raises(DemoError, match=r"not ready after 2\.5 seconds"):
                await demo.__aenter__()
            assert await demo.wait() == 128 + signal.SIGKILL

        asyncio.run(main())

    def test_is_not_asked_before_its_start(self) -> None:
        with pytest.raises(RuntimeError):
            _ = Demo(Ports()).pid


class Signalling(io.StringIO):
    """Standard output that sends this process a signal once `text` was written to it."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__()
        self.text = text
        self.number = number

    def write(self, text: str) -> int:
        if self.text in text:
            os.kill(os.getpid(), self.number)
        return super().write(text)


class TestRunDemo:
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, 7), (signal.SIGINT, 8), (signal.SIGHUP, 7)]
    )
    def test_passes_signal_and_exit_code_on(self, number: int, code: int) -> None:
        out = Signalling("ExpressGateway is running", number)
        assert run_demo(free_ports().http, out, stand_in()) == code
        assert left_behind() == []
        for part in ("\n# Ask over HTTP", "\ncurl -i http://127.0.0.1:", "kill -HUP ", "Ctrl-C ends it.\n"):
            assert part in out.getvalue()

    def test_says_which_port_is_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            out = Signalling("ExpressGateway is running", signal.SIGTERM)
            run_demo(port, out, stand_in())
        assert out.getvalue().startswith(f"Port {port} for http is in use: taking ")
        assert f"http://127.0.0.1:{port}/" not in out.getvalue()

    def test_a_gateway_that_fails(self) -> None:
        out = io.StringIO()
        assert run_demo(free_ports().http, out, stand_in("raise SystemExit(78)")) == 78
        assert out.getvalue().endswith("The gateway ended before it was ready.\n")

    def test_a_signal_while_it_starts(self, tmp_path: Path) -> None:
        started = tmp_path / "started"
        code = f"""
            import pathlib, time
            pathlib.Path({str(started)!r}).touch()
            time.sleep(60)
        """
        starting = (
            "import sys; from expressgateway.demo.app import run_demo;"
            f"sys.exit(run_demo({free_ports().http}, program={stand_in(code)!r}))"
        )
        with subprocess.Popen([sys.executable, "-c", starting]) as process:
            wait_for(started.exists, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        assert left_behind() == []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02)
