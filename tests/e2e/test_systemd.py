"""As a service of systemd: what it is told and when, sockets that it gives, and sockets that it keeps."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.fake_systemd import Systemd, Unit, inode, is_over
from tests.e2e.h3_raw import RawH3
from tests.e2e.harness import PATIENCE_S, Backend, Client, certificate, eventually, listener
from tests.e2e.load import ONCE, Load
from tests.ports import free_port

WATCHDOG_S = 0.2
GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as site:
        yield site


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path) as other:
        yield other


def quic(directory: Path, port: int, backend: Backend, name: str = "quic") -> str:
    files = certificate(directory)
    more = (
        f"[listeners.quic]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
        f"retry_secret_path = '{directory / 'retry.secret'}'"
    )
    return listener(port, backend, more, name=name, protocol="quic")


def ask(client: Client) -> int:
    client.send(GET)
    return client.response()[0]


def get(port: int) -> int:
    with Client(port) as client:
        return ask(client)


def get_quic(port: int) -> bytes:
    with RawH3(port) as client:
        return client.begun().get()[0][b":status"]


def command(unit: Unit, name: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "expressgateway", name, str(unit.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def wait_for(load: Load, total: int) -> None:
    eventually(lambda: load.total > total, "there is load")


class TestTold:
    def test_a_life(self, systemd: Systemd, backend: Backend, tmp_path: Path) -> None:
        port = free_port()
        runtime = "drain_timeout_ms = 10000"
        config = listener(port, backend)
        with Unit(systemd, tmp_path, config, watchdog_s=WATCHDOG_S, runtime=runtime) as unit:
            assert get(port) == 200, "ready means that it answers"
            main = unit.process.pid
            eventually(lambda: systemd.count("WATCHDOG=1") >= 4, "it gives signs of life")
            since = len(systemd.said)
            assert unit.reload(listener(port, backend, "drain_timeout_ms = 9000"))
            reloading = systemd.wait("RELOADING=1", since=since)
            assert int(reloading.value("MONOTONIC_USEC") or 0) > 0
            systemd.wait("READY=1", "STATUS=serving; the last reload: applied", since=since)
            assert command(unit, "reload").returncode == 0  # as ExecReload does
            systemd.wait("READY=1", "STATUS=serving; the last reload: unchanged", since=since)
            with Client(port) as client:
                client.send(GET[:-2])
                since = len(systemd.said)
                unit.process.send_signal(signal.SIGTERM)
                systemd.wait("STOPPING=1", since=since)

                def statuses() -> list[str]:
                    return [found for said in systemd.said[since:] if (found := said.value("STATUS"))]

                eventually(lambda: len(statuses()) >= 3, "it says how far it is")
                assert any("1" in status for status in statuses())
                client.send(b"\r\n")
                assert client.response()[0] == 200
            assert unit.process.wait(PATIENCE_S) == 0
            assert {said.pid for said in systemd.said} == {main}
            kinds = [said.lines[0] for said in systemd.said if not said.lines[0].startswith("STATUS")]
            assert kinds[0] == "READY=1"
            assert kinds[-1] in ("STOPPING=1", "WATCHDOG=1")

    def test_upgrade(self, systemd: Systemd, backend: Backend, tmp_path: Path) -> None:
        port = free_port()
        config = listener(port, backend)
        with Unit(systemd, tmp_path, config, watchdog_s=WATCHDOG_S, keeps=True) as unit:
            eventually(lambda: systemd.stored == 1, "its socket is kept")
            since, old = len(systemd.said), unit.process.pid
            unit.write("[[listeners]]\n")
            done = command(unit, "upgrade")
            assert done.returncode == 1
            assert f"the upgrade failed, process {old} serves: the new process exited" in done.stderr
            assert not systemd.count("READY=1", since=since)
            unit.write(listener(port, backend, name="other"))
            with Load(port, 4) as load:
                eventually(lambda: load.total > 50, "there is load")
                done = command(unit, "upgrade")
                assert done.returncode == 0, done.stderr
                new = int(systemd.wait("READY=1", since=since).pid)
                asked = load.total
                eventually(lambda: load.total > asked + 50, "there is load")
            assert new != old
            assert done.stdout == f"process {new} serves, process {old} drains\n"
            assert set(load.answers) == {200}
            assert (load.refused, load.broken) == (0, [])
            assert systemd.wait(f"MAINPID={new}", since=since).pid == old
            order = [said.lines[0] for said in systemd.said[since:]]
            assert order.index(f"MAINPID={new}") < order.index("READY=1")
            assert unit.process.wait(PATIENCE_S) == 0, "the old one has drained"

            def signs() -> int:
                return sum(said.pid == new and said.lines == ("WATCHDOG=1",) for said in systemd.said)

            eventually(lambda: signs() >= 3, "the new one gives signs of life")
            assert not [
                said for said in systemd.said[since + order.index(f"MAINPID={new}") + 1 :] if said.pid == old
            ], "the old one is silent"
            eventually(lambda: list(systemd.store) == ["kept/other/1/0"], "what is kept has its new name")
            os.kill(new, signal.SIGTERM)
            eventually(lambda: is_over(new), "the new one ends")


class TestGiven:
    """Socket activation: systemd has the sockets before the gateway is there, and after it."""

    @staticmethod
    def sockets(port: int, *, reuses: bool = True, quic: bool = True) -> list[socket.socket]:
        found = [socket.socket(socket.AF_INET, socket.SOCK_STREAM)]
        if quic:
            found.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for sock in found:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuses))
            sock.bind(("127.0.0.1", port))
        found[0].listen(128)
        return found

    @pytest.mark.parametrize("workers", [1, 3])
    def test_tcp_and_quic(self, systemd: Systemd, backend: Backend, tmp_path: Path, workers: int) -> None:
        port = free_port()
        config = listener(port, backend) + quic(tmp_path, port, backend)
        given = self.sockets(port)
        with Client(port) as early:
            early.send(GET)
            fds = [sock.fileno() for sock in given]
            with Unit(systemd, tmp_path, config, fds=fds, workers=workers) as unit:
                assert early.response()[0] == 200, "it waited"
                assert [get(port) for _ in range(10)] == [200] * 10
                assert [get_quic(port) for _ in range(10)] == [b"200"] * 10
                unit.end()
                with Client(port) as late:
                    late.send(GET)
                    unit.begin()
                    assert late.response()[0] == 200, "and this one for the next process"
                    unit.wait_ready()
                assert get_quic(port) == b"200"
        for sock in given:
            sock.close()

    def test_one_queue_for_all_workers(self, systemd: Systemd, backend: Backend, tmp_path: Path) -> None:
        """Without ReusePort, or with sockets of another user: also when workers come and go."""
        port = free_port()
        (given,) = self.sockets(port, reuses=False, quic=False)
        config = listener(port, backend)
        with given, Unit(systemd, tmp_path, config, fds=[given.fileno()], workers=3) as unit:
            with Load(port, 4, ONCE) as load:
                eventually(lambda: load.total > 100, "there is load")
                for workers in (1, 2):
                    self.have(unit, config, workers)
                    asked = load.total + 100
                    wait_for(load, asked)
            assert set(load.answers) == {200}
            assert (load.refused, load.broken) == (0, [])
            unit.end()
            with Client(port):  # it listens still
                pass

    @staticmethod
    def have(unit: Unit, config: str, workers: int) -> None:
        """By a reload."""
        unit._head = re.sub(r"workers = \d", f"workers = {workers}", unit._head)
        assert unit.reload(config)
        eventually(lambda: len(unit.worker_pids()) == workers, f"there are {workers}")

    def test_datagrams_that_cannot_be_shared(
        self, systemd: Systemd, backend: Backend, tmp_path: Path
    ) -> None:
        port = free_port()
        tcp, udp = self.sockets(port, reuses=False)
        unit = Unit(systemd, tmp_path, quic(tmp_path, port, backend), fds=[udp.fileno()], workers=2)
        with tcp, udp:
            unit.begin()
            assert unit.process.wait(PATIENCE_S) == 1
        assert "the listener 'quic' was given 1 socket for 2 workers" in unit.log()
        assert "set runtime.workers = 1" in unit.log()


class TestKept:
    def test_over_a_restart_nobody_is_refused(
        self, systemd: Systemd, backend: Backend, tmp_path: Path
    ) -> None:
        port, other, third = free_port(), free_port(), free_port()
        own = quic(tmp_path, port, backend)
        config = listener(port, backend) + own + listener(other, backend, name="other")
        unit = Unit(systemd, tmp_path, config, keeps=True, workers=2)
        with unit:
            eventually(lambda: len(systemd.store) == 6, "all are kept")
            names = [f"kept/{name}/{at}" for name in ("web/0", "quic/1", "other/2") for at in (0, 1)]
            assert list(systemd.store) == names
            # A reload: one goes, one comes, and what stays is not sent again.
            config = listener(port, backend) + own + listener(third, backend, name="third")
            assert unit.reload(config)
            names = [f"kept/{name}/{at}" for name in ("web/0", "quic/1", "third/3") for at in (0, 1)]
            eventually(lambda: list(systemd.store) == names, "one has gone, one has come")
            assert systemd.stored == 8
            assert unit.reload(config)
            assert systemd.stored == 8
            kept = {name: inode(fd) for name, fd in systemd.store.items()}
            with Load(port, 4) as load, Load(third, 4, ONCE) as closing:
                eventually(lambda: min(load.total, closing.total) > 50, "there is load")
                unit.end()
                with Client(port) as waiting:
                    waiting.send(GET)
                    unit.again()
                    assert waiting.response()[0] == 200
                unit.wait_ready()
                asked = load.total, closing.total
                eventually(lambda: load.total > asked[0] + 50, "there is load")
                eventually(lambda: closing.total > asked[1] + 50, "there is load")
            for one in (load, closing):
                assert set(one.answers) == {200}
                assert (one.refused, one.broken) == (0, [])
            assert get_quic(port) == b"200"
            eventually(
                lambda: (
                    sorted(systemd.store)
                    == sorted(f"kept/{name}/{at}" for name in ("web/0", "quic/1", "third/2") for at in (0, 1))
                ),
                "under the numbers of this process",
            )
            assert sorted(map(inode, systemd.store.values())) == sorted(kept.values())

    def test_over_the_death_of_the_supervisor(
        self, systemd: Systemd, backend: Backend, tmp_path: Path
    ) -> None:
        port = free_port()
        with Unit(systemd, tmp_path, listener(port, backend), keeps=True, workers=2) as unit:
            eventually(lambda: len(systemd.store) == 2, "all are kept")
            workers = unit.worker_pids()
            unit.process.kill()
            unit.process.wait(PATIENCE_S)
            eventually(lambda: all(map(is_over, workers)), "the workers drain and exit")
            with Client(port) as waiting:
                waiting.send(GET)
                unit.again()
                assert waiting.response()[0] == 200
            unit.wait_ready()
            assert unit.log().count("ready in") == 2
