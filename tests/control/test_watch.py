"""Workers that hang, and workers that grow: what the supervisor does about them, with real processes."""

import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.control.gateway import PATIENCE_S, Client, Gateway

pytestmark = pytest.mark.slow

WATCHING = {"hung_after_s": 2.0, "tick_s": 0.1, "collect_s": 0.1, "stacks_s": 3.0}
HANGS = 'worker_hangs_total{worker="0"}'
MIB = 1024 * 1024
LIMIT = f"worker_memory_limit_bytes = {64 * MIB}"


def ask_and_forget(client: Client, question: str) -> None:
    """Of a worker that will not answer."""
    client.sock.sendall(f"{question}\n".encode())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway(tmp_path_factory.mktemp("hanging"), timing=WATCHING) as gateway:
        yield gateway


class TestHanging:
    def hang(self, gateway: Gateway, *questions: str) -> dict[str, object]:
        """What the log says of it."""
        before = gateway.metric(HANGS) or 0
        with gateway.connect() as client:
            for question in questions[:-1]:
                client.ask(question)
            ask_and_forget(client, questions[-1])
            line = gateway.wait_log("it hangs and is killed")
        gateway.wait_log("serves again")
        assert gateway.metric(HANGS) == before + 1
        gateway.connect().close()
        return line

    def test_in_a_loop(self, gateway: Gateway) -> None:
        line = self.hang(gateway, "hang")
        stack = str(line["stack"])
        assert "most recent call first" in stack
        assert "fake_worker.py" in stack
        assert " in hang" in stack
        assert " in answer" in stack
        assert line["worker"] == 0

    def test_in_c(self, gateway: Gateway) -> None:
        assert " in answer" in str(self.hang(gateway, "block 1000")["stack"])

    def test_stopped(self, gateway: Gateway) -> None:
        os.kill(gateway.status()["workers"][0]["pid"], signal.SIGSTOP)
        line = gateway.wait_log("it hangs and is killed")
        assert line["message"].endswith("there is no stack of it: it is stopped, by SIGSTOP or a debugger")
        assert line["stack"] == ""
        gateway.wait_log("serves again")

    def test_one_that_tells_nothing(self, gateway: Gateway) -> None:
        line = self.hang(gateway, "forget", "hang")
        assert str(line["message"]).endswith("there is no stack of it: it wrote none within 3 seconds")

    def test_slow_is_not_hanging(self, tmp_path: Path) -> None:
        """It answers again and again, each time late, for longer in all than a hung worker is given."""
        with Gateway(tmp_path, timing=WATCHING | {"hung_after_s": 3.0}) as gateway:
            with gateway.connect() as client:
                for _ in range(5):
                    assert client.ask("block 0.7") == "late"
                assert gateway.status()["workers"][0]["pid"] == client.pid
            assert gateway.metric(HANGS) == 0

    def test_who_answers_before_it_is_killed_goes_on(self, tmp_path: Path) -> None:
        """It tells no stack, so there is time in which it can answer."""
        timing = WATCHING | {"hung_after_s": 0.5, "stacks_s": 15.0}
        with Gateway(tmp_path, timing=timing) as gateway, gateway.connect() as client:
            client.ask("forget")
            assert client.ask("block 2") == "late"
            gateway.wait_log("answers again: it is slow, and goes on")
            assert client.ask("shared") == "0 of [0]"
            assert gateway.metric(HANGS) == 0

    def test_a_signal_from_anybody_harms_nobody(self, gateway: Gateway) -> None:
        with gateway.connect() as client:
            for _ in range(100):
                os.kill(client.pid, signal.SIGQUIT)
                assert client.ask("shared") == "0 of [0]"
        assert " in hang" in str(self.hang(gateway, "hang")["stack"]), "the newest, however often before"


THEIRS = """
class Hangs:
    def __init__(self, backends):
        self.backends = list(backends)

    def pick(self, key):
        while key == b"/hang":
            pass
        return self.backends[0]

    def others(self, picked):
        return self.backends[1:]

    def rebuilt(self, backends):
        return Hangs(backends)
"""


def test_a_real_worker_in_somebody_elses_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("REAL_WORKERS", "1")
    policy = "load_balancing = { policy = 'theirs:Hangs', hash_key = 'path' }"
    with Gateway(tmp_path, listener=policy, timing=WATCHING | {"hung_after_s": 2.0}) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.web), PATIENCE_S) as client:
            client.sendall(b"GET /hang HTTP/1.1\r\nHost: a.example\r\n\r\n")
            line = gateway.wait_log("it hangs and is killed")
            assert client.recv(1) == b"", "its own connections are lost"
        assert "theirs.py" in line["stack"]
        assert " in pick" in line["stack"]
        gateway.wait_log("serves again")
        with socket.create_connection(("127.0.0.1", gateway.web), PATIENCE_S) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 502"


class TestMemory:
    @contextlib.contextmanager
    def gateway(self, tmp_path: Path, pause_s: float = 60.0, **settings: object) -> Iterator[Gateway]:
        timing = WATCHING | {"hung_after_s": 30.0, "memory_pause_s": pause_s}
        gateway = Gateway(tmp_path, timing=timing, runtime=LIMIT, drain_ms=20_000)
        gateway.write(**settings)
        with gateway:
            yield gateway

    def test_replaced_and_drains(self, tmp_path: Path) -> None:
        with self.gateway(tmp_path, workers=2) as gateway, gateway.connect_to(0) as client:
            before = [worker["pid"] for worker in gateway.status()["workers"]]
            assert gateway.metric("worker_memory_limit_bytes") == 64 * MIB
            assert client.ask("grow 64") == "grown"
            line = gateway.wait_log("runtime.worker_memory_limit_bytes")
            assert line["rss_bytes"] > 64 * MIB
            gateway.wait_log("the old one drains")
            after = [worker["pid"] for worker in gateway.status()["workers"]]
            assert (after[0] != before[0], after[1]) == (True, before[1])
            assert client.ask("shared").startswith("0 of"), "what is open goes on"
            gateway.connect_to(0).close()
            client.close()
            gateway.wait_log("which had left, is gone")
            assert gateway.metric('worker_replacements_total{worker="0",cause="memory"}') == 1
            assert gateway.metric('worker_restarts_total{worker="0"}') == 0
            with gateway.connect_to(1) as other:
                assert other.ask("shared") == "1 of [1, 2]"

    def test_nobody_is_turned_away_meanwhile(self, tmp_path: Path) -> None:
        with self.gateway(tmp_path) as gateway, gateway.connect() as first:
            assert first.ask("grow 64") == "grown"
            for _ in range(10_000):
                with gateway.connect() as client:
                    assert client.ask("shared")
                    if client.pid != first.pid:
                        break
            else:
                raise AssertionError("it is not replaced")

    def test_growing_on_ends_the_drain(self, tmp_path: Path) -> None:
        with self.gateway(tmp_path) as gateway, gateway.connect() as client:
            client.ask("grow 64")
            gateway.wait_log("the old one drains")
            ask_and_forget(client, "grow 128")
            assert "1 connections are cut" in gateway.wait_log("has grown on from")["message"]
            gateway.wait_log("which had left, is gone")
            assert gateway.metric('shutdown_aborted_connections_total{listener="web"}') == 1
            gateway.connect().close()

    def test_too_low_a_limit_is_told_of_and_makes_no_storm(self, tmp_path: Path) -> None:
        with self.gateway(tmp_path, whim="large") as gateway:
            line = gateway.wait_log("is too low for what is configured, raise it; it is replaced now")
            gateway.wait_log("the old one drains")
            gateway.wait_log("raise it; it is replaced in 60 seconds")
            assert line["limit_bytes"] == 64 * MIB
            assert gateway.metric('worker_replacements_total{worker="0",cause="memory"}') == 1
            # Another limit is another matter, and takes hold without a new worker.
            pid = gateway.status()["workers"][0]["pid"]
            gateway.write(runtime=f"worker_memory_limit_bytes = {1024 * MIB}")
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "applied"
            assert gateway.metric("worker_memory_limit_bytes") == 1024 * MIB
            assert gateway.status()["workers"][0]["pid"] == pid

    def test_one_that_cannot_be_had(self, tmp_path: Path) -> None:
        """The new one refuses: the old one goes on, nobody notices, and it is tried again later."""
        whim = f"once={tmp_path}/applied"
        with self.gateway(tmp_path, 0.5, whim=whim) as gateway, gateway.connect() as client:
            client.ask("grow 64")
            for _ in range(2):
                message = gateway.wait_log("goes on: it cannot be replaced")["message"]
                assert "this worker cannot apply that; the next attempt is in" in message
            assert gateway.status()["workers"][0]["pid"] == client.pid
            assert gateway.metric('worker_replacements_total{worker="0",cause="memory"}') == 0
            assert client.ask("shared") == "0 of [0]"

    def test_upgrade_does_not_meet_it(self, tmp_path: Path) -> None:
        with self.gateway(tmp_path, whim="large") as gateway:
            os.kill(gateway.status()["pid"], signal.SIGUSR2)
            gateway.wait_log("taken over")
            gateway.connect().close()
            watched = os.pidfd_open(gateway.process.pid)
            assert select.select([watched], [], [], 20)[0]
            os.close(watched)


def test_a_crash_loop_is_seen(tmp_path: Path) -> None:
    with Gateway(tmp_path, workers=2, whim="crashes") as gateway:
        gateway.wait_log("3 deaths in a row")
        _, body = gateway.get("/api/v1/workers")
        assert any(worker["deaths_in_a_row"] > 1 for worker in json.loads(body)["workers"])
        looping = [gateway.metric(f'worker_crash_looping{{worker="{index}"}}') for index in range(2)]
        assert 1 in looping
