"""What a reload rolls: listeners that come, go, move and change; workers that are more, fewer, or others."""

import contextlib
import http.client
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.control.gateway import PATIENCE_S, Client, Gateway
from tests.ports import free_port

pytestmark = pytest.mark.slow

TWO = """
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{protocol}"
backends = [{{ address = "127.0.0.1:9" }}]
"""


def two(port: int, name: str = "two", protocol: str = "h1") -> str:
    return TWO.format(name=name, port=port, protocol=protocol)


def reload(gateway: Gateway, **settings: object) -> str:
    gateway.write(**settings)
    gateway.signal(signal.SIGHUP)
    line = gateway.wait_log("reload ")
    assert line["result"] == "applied", line["message"]
    return str(line["message"])


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # somebody listened until just now
    return False


def pids(gateway: Gateway) -> list[int]:
    return [worker["pid"] for worker in gateway.status()["workers"]]


class TestListeners:
    def test_one_comes_moves_changes_and_goes(self, tmp_path: Path) -> None:
        first, second = free_port(), free_port()
        with Gateway(tmp_path, workers=2) as gateway, gateway.connect() as old:
            before = pids(gateway)
            assert "rolled: listener two (added); swapped: nothing; kept: listener web" in reload(
                gateway, more=two(first)
            )
            Client(first).close()
            assert "rolled: listener two (address)" in reload(gateway, more=two(second))
            Client(second).close()
            assert is_refused(first)
            assert "rolled: listener other (name)" in reload(gateway, more=two(second, "other"))
            Client(second).close()
            assert "rolled: listener other (protocol" in reload(gateway, more=two(second, "other", "tcp"))
            Client(second).close()
            assert "rolled: listener other (removed)" in reload(gateway, more="")
            assert is_refused(second)
            assert old.ask("shared"), "nobody who was not concerned has noticed"
            assert pids(gateway) == before
            assert [one["name"] for one in gateway.status()["listeners"]] == ["web"]

    def test_connections_of_one_that_goes_may_end(self, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, more=two(port)) as gateway, contextlib.closing(Client(port)) as client:
            reload(gateway, more="")
            assert is_refused(port)
            assert client.ask("shared") == "0 of [0]"

    def test_what_a_worker_refuses_is_taken_back(self, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path, workers=2) as gateway:
            gateway.write(whim="one-cannot-apply", more=two(port))
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "failed"
            while not is_refused(port):
                pass  # a worker has not heard of it yet
            with socket.create_server(("127.0.0.1", port)):
                pass  # nobody has it
            reload(gateway, whim="x", more=two(port))
            Client(port).close()

    def test_a_replacement_has_the_new_ones(self, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(tmp_path) as gateway:
            reload(gateway, more=two(port))
            os.kill(pids(gateway)[0], signal.SIGKILL)
            gateway.wait_log("serves again")
            Client(port).close()
            gateway.connect().close()

    def test_the_admin_listener_moves(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            old, gateway.admin = gateway.admin, free_port()
            reload(gateway)
            assert gateway.get("/readyz")[0] == 200
            assert is_refused(old)

    def test_the_admin_listener_stays_where_the_new_place_is_taken(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway, socket.create_server(("127.0.0.1", free_port())) as other:
            old, gateway.admin = gateway.admin, other.getsockname()[1]
            gateway.write(whim="other")
            gateway.signal(signal.SIGHUP)
            line = gateway.wait_log("reload ")
            assert line["result"] == "refused"
            assert "admin listener" in line["message"]
            gateway.admin = old
            assert gateway.get("/readyz")[0] == 200


class TestWorkers:
    def test_more(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=1) as gateway, gateway.connect() as old:
            before = pids(gateway)
            assert "rolled: block runtime (workers)" in reload(gateway, workers=3)
            now = pids(gateway)
            assert (len(now), now[:1]) == (3, before)
            for index in range(3):
                gateway.connect_to(index).close()
            assert old.ask("shared") == "0 of [0, 1, 2]"

    def test_fewer(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=3) as gateway, gateway.connect_to(2) as leaving:
            before = pids(gateway)
            reload(gateway, workers=1)
            assert pids(gateway) == before[:1]
            gateway.wait_log("which had left, is gone")
            assert leaving.ask("shared"), "what is open may end"
            for _ in range(20):
                with gateway.connect() as client:
                    assert client.pid == before[0]
            leaving.close()
            gateway.wait_log("which had left, is gone")
            with gateway.connect_to(0) as client:
                assert client.ask("shared") == "0 of [0]"

    def test_more_again_while_some_still_leave(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2, drain_ms=20_000) as gateway, gateway.connect_to(1) as leaving:
            reload(gateway, workers=1)
            reload(gateway, workers=2)
            assert leaving.pid not in pids(gateway)
            gateway.connect_to(1).close()
            assert leaving.ask("shared") == "1 of [0, 1, 2]"

    def test_more_than_can_be_had(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            before = pids(gateway)
            gateway.write(workers=2, whim="one-cannot-apply")
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "failed"
            assert pids(gateway) == before
            with gateway.connect() as client:
                assert (client.version, client.ask("shared")) == (1, "0 of [0]")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
    def test_others(self, tmp_path: Path) -> None:
        """Of another user, which here is root again, by its name."""
        with Gateway(tmp_path, workers=2, drain_ms=20_000) as gateway, gateway.connect() as old:
            before = pids(gateway)
            assert "rolled: block runtime (user)" in reload(gateway, runtime='user = "root"')
            assert not set(before) & set(pids(gateway))
            for index in range(2):
                gateway.connect_to(index).close()
            assert old.ask("shared").endswith("2, 3]"), "it drains beside them"
            old.close()
            with gateway.connect() as client:
                while not client.ask("shared").endswith("of [2, 3]"):
                    pass  # one of them is not gone yet

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
    def test_others_that_cannot_be_had(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            before = pids(gateway)
            gateway.write(whim="one-cannot-apply", runtime='user = "root"')
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "failed"
            assert pids(gateway) == before
            with gateway.connect() as client:
                assert client.ask("shared").endswith("of [0, 1]")


class TestUpgrade:
    """The process changes; the test's log goes on with the new one, which inherits it."""

    def upgrade(self, gateway: Gateway) -> dict[str, Any]:
        before = gateway.status()["pid"]
        os.kill(before, signal.SIGUSR2)
        gateway.wait_log("taken over")
        after = gateway.status()
        assert after["pid"] != before
        return after

    def test_another_process_serves(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway, gateway.connect() as old:
            before = pids(gateway)
            after = self.upgrade(gateway)
            assert after["state"] == "serving"
            assert not set(before) & set(pids(gateway))
            with gateway.connect() as client:
                assert client.pid in pids(gateway)
                assert client.ask("shared").endswith("of [0, 1, 2, 3]")
                assert client.census == 2, "connections are counted together"
            assert old.ask("shared").endswith("of [0, 1, 2, 3]")
            old.close()
            assert gateway.wait() == 0

    def test_again_and_again(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            for _ in range(3):
                self.upgrade(gateway)
                gateway.connect().close()
            os.kill(gateway.status()["pid"], signal.SIGTERM)
            gateway.wait_log("drained in")

    def test_what_is_kept(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=1) as gateway:
            write(gateway, "/api/v1/pools/web/backends/127.0.0.1:9", {"state": "draining"})
            self.upgrade(gateway)
            _, body = gateway.get("/api/v1/pools/web")
            (backend,) = json.loads(body)["backends"]
            assert backend["state"] == "draining"

    def test_one_that_does_not_start(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            before = gateway.status()["pid"], pids(gateway)
            gateway.write(whim="cannot-apply")
            gateway.signal(signal.SIGUSR2)
            line = gateway.wait_log("upgrade failed, this process goes on")
            assert "exited with status 1 before it was ready" in line["message"]
            assert (gateway.status()["pid"], pids(gateway)) == before
            assert "exited with status 1" in gateway.status()["upgrade"]["last_failure"]
            assert gateway.metric("upgrade_failures_total") == 1
            with gateway.connect() as client:
                assert client.ask("shared") == "0 of [0]"
            gateway.write(whim="x")
            self.upgrade(gateway)

    def test_one_that_dies_when_it_is_to_serve(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway, gateway.connect() as old:
            gateway.write(whim="mute-serve")
            gateway.signal(signal.SIGUSR2)
            gateway.wait_log("upgrade: another process is started")
            while old.ask("shared") != "0 of [0, 1]":
                pass  # it is not ready yet
            (successor,) = others(gateway.process.pid, pids(gateway))
            os.kill(successor, signal.SIGKILL)
            gateway.wait_log("upgrade failed, this process goes on")
            while old.ask("shared") != "0 of [0]":
                pass  # its worker has not noticed yet
            with gateway.connect() as client:
                assert client.pid in pids(gateway)

    def test_the_old_one_is_killed_while_it_drains(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, drain_ms=20_000) as gateway, gateway.connect() as old:
            self.upgrade(gateway)
            gateway.process.kill()
            gateway.process.wait(PATIENCE_S)
            for _ in range(20):
                gateway.connect().close()
            assert old.ask("shared")


def write(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.admin, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("PATCH", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()


def others(pid: int, known: list[int]) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if int(child) not in known]
