"""`expressgateway status`: once, in a pipe, and drawn again in a terminal, beside a gateway under load."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import PATIENCE_S, Backend, Gateway, Steady, eventually
from tests.ports import free_port


class Site:
    """A gateway with a backend that serves, and one that is ejected, for nobody is there."""

    def __init__(self, directory: Path, good: Backend) -> None:
        self.port = free_port()
        config = (
            f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n"
            "pool = 'shop'\n"
            f"[[pools]]\nname = 'shop'\nbackends = [{{ id = 'good', address = '{good.address}' }}, "
            f"{{ id = 'bad', address = '127.0.0.1:{free_port()}' }}]\nretry = {{ budget_percent = 100 }}\n"
            "outlier = { consecutive_failures = 1, ejection_ms = 300000 }\n"
        )
        self.gateway = Gateway(directory, config, runtime="max_keepalive_requests = 0")

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "expressgateway", "status", str(self.gateway.path), *more]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Backend() as good:
        site = Site(tmp_path_factory.mktemp("status"), good)
        with site.gateway, Steady(site.port):
            site.gateway.wait_metric("backend_ejections_total", backend="bad")
            yield site


def test_once(site: Site) -> None:
    done = subprocess.run(site.command(), capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    text = done.stdout
    assert f"serving, pid {site.gateway.process.pid}" in text
    assert "!! shop / bad is ejected: " in text
    assert "requests/s   p50 " in text
    assert "\x1b" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["web"][1:4] == [f"127.0.0.1:{site.port}", "h1", "1"]
    assert float(rows["web"][5]) > 0, "requests a second"
    assert rows["bad"][1] == "ejected"
    assert rows["good"][1] in ("healthy", "unknown")
    assert rows["0"][2] == "serving"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command: list[str], columns: int = 120, rows: int = 50) -> None:
        self._fd, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
        )
        os.close(inside)
        os.set_blocking(self._fd, False)
        self.seen = ""

    def read(self) -> str:
        with contextlib.suppress(BlockingIOError, OSError):  # OSError: everybody has left it
            while data := os.read(self._fd, 65536):
                self.seen += data.decode(errors="replace")
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._fd)


@contextlib.contextmanager
def terminal(*arguments: str, site: Site, **size: int) -> Iterator[Terminal]:
    shown = Terminal(site.command(*arguments), **size)
    try:
        yield shown
    finally:
        shown.close()


def screens(text: str) -> list[str]:
    return text.split("\x1b[H")[1:]


def test_drawn_again_in_a_terminal_until_it_is_told_to_end(site: Site) -> None:
    with terminal("--watch", site=site) as shown:
        eventually(lambda: len(screens(shown.read())) >= 3, "three screens")
        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(PATIENCE_S) == 0
        seen = shown.read()
    assert seen.startswith("\x1b[?1049h\x1b[?25l")
    assert seen.endswith("\x1b[?25h\x1b[?1049l")
    for screen in screens(seen):
        assert "serving, pid" in screen
        assert "\x1b[31m!! shop / bad is ejected: " in screen
        assert len(screen.split("\r\n")) <= 50
    ups = {screen.split(" up ")[1].split("\x1b")[0] for screen in screens(seen)}
    assert len(ups) > 1, "nothing moved"


def test_a_small_terminal_and_a_plain_end(site: Site) -> None:
    with terminal("--watch", site=site, columns=40, rows=8) as shown:
        eventually(lambda: len(screens(shown.read())) >= 2, "two screens")
        shown.process.send_signal(signal.SIGTERM)
        assert shown.process.wait(PATIENCE_S) == 0
        seen = shown.read()
    assert seen.endswith("\x1b[?25h\x1b[?1049l")
    lines = screens(seen)[0].replace("\x1b[K", "").split("\r\n")
    assert len(lines) <= 8
    assert lines[-2].endswith("more lines: the terminal is too low")
    for line in lines[:-2]:
        assert len(line.replace("\x1b[1m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")) <= 40


def watched(site: Site, *more: str, lines: int) -> list[str]:
    """So many lines of a command that goes on."""
    process = subprocess.Popen(site.command("--watch", *more), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        found = [process.stdout.readline() for _ in range(lines)]
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_S)
    return found


def test_a_line_a_second_in_a_pipe(site: Site) -> None:
    for line in watched(site, lines=2):
        assert "  serving  " in line
        assert "requests/s" in line
        assert line.endswith("1 to look at\n")


def test_json_in_a_pipe(site: Site) -> None:
    (line,) = watched(site, "--json", lines=1)
    assert json.loads(line)["pools"][0]["name"] == "shop"


def test_a_gateway_that_stops_is_told(tmp_path: Path) -> None:
    with Backend() as good:
        site = Site(tmp_path, good)
        with site.gateway, terminal("--watch", site=site) as shown:
            eventually(lambda: screens(shown.read()), "a screen")
            site.gateway.process.send_signal(signal.SIGTERM)
            assert shown.process.wait(PATIENCE_S) == 1
            seen = shown.read()
    assert "does not answer any more" in seen.rpartition("\x1b[?1049l")[2]
    nobody = subprocess.run(site.command("--watch"), capture_output=True, text=True, check=False, timeout=60)
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
