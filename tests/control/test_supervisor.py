"""The supervisor as a process, with workers that do what a test tells them."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from expressgateway.control.channel import unpack_bytes
from tests.config.material import write_certs
from tests.control.gateway import Client, Gateway
from tests.control.test_rolling import two
from tests.ports import free_port

pytestmark = pytest.mark.slow


class TestStart:
    def test_serves_once_it_says_so(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            ready = gateway.lines[-1]
            assert ready["listeners"] == {"web": f"127.0.0.1:{gateway.web}"}
            assert float(ready["message"].split()[2]) > 0
            assert gateway.get("/readyz") == (200, "ready\n")
            assert gateway.get("/startupz")[0] == 200
            assert gateway.get("/livez")[0] == gateway.get("/healthz")[0] == 200
            status = gateway.status()
            assert [worker["state"] for worker in status["workers"]] == ["serving", "serving"]
            with gateway.connect() as client:
                assert client.pid in [worker["pid"] for worker in status["workers"]]

    def test_booting_is_alive_but_not_ready(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="mute-start", ready=False, timing={"start_s": 60}) as gateway:
            code = None
            while code is None:  # until the admin listener is there; refused before
                try:
                    code = gateway.get("/readyz")
                except ConnectionError:
                    assert gateway.process.poll() is None
            assert code == (503, "booting\n")
            assert gateway.get("/startupz") == (503, "starting\n")
            assert gateway.get("/livez")[0] == 200
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0

    def test_invalid_configuration_exits_78(self, tmp_path: Path) -> None:
        (tmp_path / "gateway.toml").write_text("listners = 1\n")
        with Gateway(tmp_path, ready=False) as gateway:
            assert gateway.wait() == 78
            assert "listners" in gateway.rest()

    def test_missing_file_exits_78(self, tmp_path: Path) -> None:
        gateway = Gateway(tmp_path, ready=False)
        gateway.path = tmp_path / "absent" / "gateway.toml"
        gateway.write = lambda **_: None  # type: ignore[method-assign]  # there is to be no file
        with gateway:
            assert gateway.wait() == 78
            assert "does not exist" in gateway.rest()

    def test_port_in_use_exits_1_and_says_whose(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
            gateway = Gateway(tmp_path, ready=False)
            gateway.web = taken.getsockname()[1]
            with gateway:
                assert gateway.wait() == 1
                said = gateway.rest()
        assert f"the listener 'web' cannot be bound: 127.0.0.1:{gateway.web} is already in use" in said
        assert "choose another port" in said
        assert "Traceback" not in said

    def test_admin_port_in_use_exits_1(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            gateway = Gateway(tmp_path, ready=False)
            gateway.admin = taken.getsockname()[1]
            with gateway:
                assert gateway.wait() == 1
                assert "observability.metrics_bind" in gateway.rest()

    def test_worker_that_cannot_apply_the_configuration(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="cannot-apply", workers=2, ready=False) as gateway:
            assert gateway.wait() == 1
            assert "the configuration cannot be applied: this worker cannot apply that" in gateway.rest()

    def test_worker_that_dies_at_once(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="dies-on-apply", ready=False) as gateway:
            assert gateway.wait() == 1
            assert "worker 0 was killed by SIGKILL before it was configured" in gateway.rest()

    def test_worker_that_never_answers(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="mute-start", ready=False, timing={"start_s": 0.3}) as gateway:
            assert gateway.wait() == 1
            assert "worker 0 did not answer within 0.3 seconds" in gateway.rest()


class TestReplacement:
    def test_killed_worker_is_back_at_once(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            with gateway.connect() as first:
                began = time.monotonic()
                os.kill(first.pid, signal.SIGKILL)
                assert "was killed by SIGKILL" in gateway.wait_log("it is replaced")["message"]
            # Not refused in between: the supervisor holds the socket, and the queue waits.
            with gateway.connect() as second:
                took_s = time.monotonic() - began
                assert second.pid != first.pid
            assert took_s < 10
            gateway.wait_log("serves again")
            assert gateway.metric('worker_restarts_total{worker="0"}') == 1
            assert gateway.metric('worker_up{worker="0"}') == 1

    def test_connections_of_the_dead_are_not_counted_any_more(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            clients = [gateway.connect() for _ in range(10)]
            assert clients[-1].census == 10
            mine = [client for client in clients if client.pid == clients[0].pid]
            os.kill(clients[0].pid, signal.SIGKILL)
            gateway.wait_log("serves again")
            with gateway.connect() as client:
                assert client.census == 10 - len(mine) + 1
            for client in clients:
                client.close()

    def test_the_others_go_on(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            one, other = (worker["pid"] for worker in gateway.status()["workers"])
            os.kill(one, signal.SIGKILL)
            gateway.wait_log("serves again")
            assert gateway.status()["workers"][1]["pid"] == other

    def test_crash_loop_backs_off_and_is_seen(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="crashes") as gateway:
            for deaths, pause in ((2, "0.1"), (3, "0.2"), (4, "0.4")):
                message = gateway.wait_log("does not stay alive")["message"]
                assert f"{deaths} deaths in a row; the next attempt is in {pause} seconds" in message
            assert any("exited with status 3" in line["message"] for line in gateway.lines)
            assert gateway.status()["workers"][0]["restarts"] >= 2

    def test_supervisor_that_was_stopped_itself_kills_nobody(self, tmp_path: Path) -> None:
        timing = {"hung_after_s": 1.5, "tick_s": 0.1, "collect_s": 0.05}
        with Gateway(tmp_path, timing=timing) as gateway:
            (worker,) = gateway.status()["workers"]
            gateway.signal(signal.SIGSTOP)
            # The kernel accepts for a stopped process; 2 s is longer than a hung worker is given.
            with socket.create_connection(("127.0.0.1", gateway.admin), timeout=2) as nobody:
                nobody.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                with pytest.raises(TimeoutError):
                    nobody.recv(1)
            gateway.signal(signal.SIGCONT)
            gateway.signal(signal.SIGUSR1)
            gateway.wait_log("SIGUSR1")
            assert gateway.metric("config_version") == 1
            assert gateway.status()["workers"] == [worker]

    def test_worker_that_sends_garbage_is_cut_off_and_replaced(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="babbles") as gateway:
            gateway.wait_log("the control channel is closed")
            gateway.wait_log("it is replaced")

    def test_orphaned_workers_end_by_themselves(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway, gateway.connect() as client:
            watched = os.pidfd_open(client.pid)
            gateway.process.kill()
            gateway.wait()
            client.close()
            assert select.select([watched], [], [], 10)[0], "the worker outlives its supervisor"
            os.close(watched)


class TestDefect:
    def test_workers_end_with_their_supervisor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE_DEFECT", "1")
        with Gateway(tmp_path, workers=2, timing={"tick_s": 0.5}) as gateway:
            with gateway.connect() as client:
                watched = os.pidfd_open(client.pid)
                assert "this is a defect" in gateway.wait_log("the supervisor failed")["message"]
                assert gateway.wait() == 1
            assert select.select([watched], [], [], 10)[0], "the worker outlives its supervisor"
            os.close(watched)


class TestStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_idle(self, tmp_path: Path, number: signal.Signals) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            gateway.signal(number)
            gateway.wait_log("stopped")
            assert gateway.wait() == 0

    def test_waits_for_what_is_open_and_accepts_no_more(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, drain_ms=20000) as gateway:
            with gateway.connect():
                gateway.signal(signal.SIGTERM)
                line = gateway.wait_log("draining: 1 connection open (web 1)")
                assert line["open"] == {"web": 1}
                assert gateway.get("/readyz") == (503, "draining\n")
                assert gateway.get("/livez")[0] == 200
                with pytest.raises(ConnectionRefusedError):
                    Client(gateway.web)
                assert gateway.process.poll() is None
            gateway.wait_log("0 connections cut off")
            assert gateway.wait() == 0

    def test_settles_first_unready_but_accepting(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, settle_ms=30000, drain_ms=20000) as gateway:
            gateway.signal(signal.SIGTERM)
            gateway.wait_log("unready and still accepting")
            assert gateway.get("/readyz") == (503, "settling\n")
            with gateway.connect():
                pass
            assert (gateway.metric('shutdown_drain_seconds{phase="settle"}') or 0) > 0
            gateway.signal(signal.SIGTERM)
            assert gateway.wait() == 0

    def test_interrupt_from_the_terminal_reaches_workers_through_the_supervisor(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, drain_ms=20000) as gateway, gateway.connect() as client:
            os.killpg(gateway.process.pid, signal.SIGINT)
            gateway.wait_log("draining: 1 connection open (web 1)")
            os.kill(client.pid, 0)  # it is there, and drains as it was told
            client.close()
            assert gateway.wait() == 0

    def test_second_signal_stops_at_once(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, drain_ms=60000) as gateway, gateway.connect():
            gateway.signal(signal.SIGTERM)
            gateway.wait_log("draining: 1 connection")
            gateway.signal(signal.SIGINT)
            gateway.wait_log("stopped at once")
            assert gateway.wait() == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_until_the_very_end(self, tmp_path: Path, number: signal.Signals) -> None:
        """Whoever is impatient changes neither the exit code nor what is said."""
        with Gateway(tmp_path, drain_ms=60000) as gateway:
            gateway.signal(signal.SIGTERM)
            while gateway.process.poll() is None:
                gateway.signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    gateway.process.wait(0.002)
            assert gateway.wait() == 0
            said = gateway.rest()
        assert all(line.startswith("{") for line in said.splitlines()), said

    def test_worker_beyond_its_budget_is_killed_and_its_connections_counted(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, whim="stays", drain_ms=100) as gateway, gateway.connect():
            gateway.signal(signal.SIGTERM)
            gateway.wait_log("has not drained in time")
            assert gateway.wait_log("1 connection cut off")["aborted"] == {"web": 1}
            assert gateway.wait() == 0

    def test_worker_that_dies_in_the_drain_is_not_replaced(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, drain_ms=20000) as gateway, gateway.connect() as client:
            gateway.signal(signal.SIGTERM)
            gateway.wait_log("draining: 1 connection")
            os.kill(client.pid, signal.SIGKILL)
            assert gateway.wait() == 0
            assert "replaced" not in gateway.rest()

    def test_renewal_without_certificates(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            gateway.signal(signal.SIGUSR1)
            gateway.wait_log("SIGUSR1: certificates are read again")
            gateway.wait_log("none has changed")
            assert gateway.metric("config_version") == 1
            assert gateway.metric("certificate_reload_failing") == 0


class TestReload:
    def reload(self, gateway: Gateway, **settings: object) -> dict[str, object]:
        gateway.write(**settings)
        gateway.signal(signal.SIGHUP)
        return gateway.wait_log("reload ")

    def test_applied(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            before = gateway.status()["workers"]
            line = self.reload(gateway, whim="other")
            assert line["result"] == "applied"
            assert "swapped: listener web (http.server_header); kept: " in str(line["message"])
            assert gateway.metric("config_version") == 2
            assert gateway.metric('config_reload_total{result="applied"}') == 1
            assert gateway.metric("config_last_reload_successful") == 1
            assert gateway.status()["workers"] == before  # nobody was restarted for it
            with gateway.connect() as client:
                assert client.version == 2

    def test_replacement_after_a_reload_has_the_new_one(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            self.reload(gateway, whim="other")
            os.kill(gateway.status()["workers"][0]["pid"], signal.SIGKILL)
            gateway.wait_log("serves again")
            with gateway.connect() as client:
                assert client.version == 2

    def test_replacement_that_comes_up_during_a_reload_has_the_new_one(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        gate.touch()
        with Gateway(tmp_path, workers=2) as gateway, gate.open() as lock:
            self.reload(gateway, whim=f"gate={gate}")
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.kill(gateway.status()["workers"][0]["pid"], signal.SIGKILL)
            gateway.wait_log("it is replaced")  # its successor stands at the gate with version 2
            assert self.reload(gateway, whim="other")["result"] == "applied"
            fcntl.flock(lock, fcntl.LOCK_UN)
            gateway.wait_log("serves again")
            newcomer = gateway.status()["workers"][0]["pid"]
            while True:
                with gateway.connect() as client:
                    if client.pid == newcomer:
                        assert client.version == 3
                        break

    def test_invalid_keeps_the_old_one(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            line = self.reload(gateway, listener="no_such_key = 1")
            assert line["result"] == "invalid"
            assert "no_such_key" in str(line["message"])
            assert gateway.metric("config_version") == 1
            assert gateway.metric("config_last_reload_successful") == 0
            with gateway.connect() as client:
                assert client.version == 1

    def test_refused_as_a_whole_if_a_part_cannot_be_had(self, tmp_path: Path) -> None:
        other = free_port()
        with Gateway(tmp_path) as gateway, socket.create_server(("127.0.0.1", other)):
            more = two(other)
            line = self.reload(gateway, whim="other", more=more)
            assert line["result"] == "refused"
            assert f"'two' cannot be bound: 127.0.0.1:{other} is already in use" in str(line["message"])
            with gateway.connect() as client:
                assert client.version == 1  # not even the part that could have been swapped

    def test_unchanged(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            assert self.reload(gateway)["result"] == "unchanged"
            assert gateway.metric("config_version") == 1
            assert gateway.metric("config_last_reload_successful") == 1

    def test_worker_that_cannot_apply_rolls_all_back(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            line = self.reload(gateway, whim="cannot-apply")
            assert line["result"] == "failed"
            assert "this worker cannot apply that" in str(line["message"])
            with gateway.connect() as client:
                assert client.version == 1
            assert gateway.get("/readyz")[0] == 200

    def test_one_worker_that_cannot_apply_takes_it_from_the_others(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            assert self.reload(gateway, whim="one-cannot-apply")["result"] == "failed"
            seen: dict[int, int] = {}
            while len(seen) < 2:
                with gateway.connect() as client:
                    seen[client.pid] = client.version
            assert set(seen.values()) == {1}

    def test_worker_that_dies_over_it_is_replaced_with_the_old_one(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            line = self.reload(gateway, whim="dies-on-apply")
            assert line["result"] == "failed"
            with gateway.connect() as client:
                assert client.version == 1

    def test_signal_during_a_reload_is_not_lost(self, tmp_path: Path) -> None:
        asked = tmp_path / "asked"
        with Gateway(tmp_path, timing={"apply_s": 3}) as gateway:
            gateway.write(whim=f"mute={asked}")  # no answer: the reload takes its 3 seconds
            gateway.signal(signal.SIGHUP)
            while not asked.exists():  # before that the file may still be read
                pass
            assert gateway.status()["reload"]["finished"] == 0
            gateway.write(whim="other")
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "failed"
            assert gateway.wait_log("reload ")["result"] == "applied"

    def test_stop_during_a_reload_follows_it(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, timing={"apply_s": 0.3}) as gateway:
            gateway.write(whim="mute-start")
            gateway.signal(signal.SIGHUP)
            while gateway.status()["reload"]["requested"] < 1:
                pass
            gateway.signal(signal.SIGTERM)
            gateway.wait_log("reload failed")
            gateway.wait_log("stopped")
            assert gateway.wait() == 0


class TestMetrics:
    def test_counters_add_up_across_workers_and_survive_a_death(self, tmp_path: Path) -> None:
        total = 'connections_total{listener="web"}'
        with Gateway(tmp_path, workers=2, timing={"tick_s": 60}) as gateway:
            pids = set()
            for _ in range(40):
                with gateway.connect() as client:
                    pids.add(client.pid)
            assert gateway.metric(total) == 40
            os.kill(pids.pop(), signal.SIGKILL)
            gateway.wait_log("serves again")
            assert gateway.metric(total) == 40
            with gateway.connect():
                pass
            assert gateway.metric(total) == 41
            name = 'http_request_duration_seconds_sum{listener="web",route="default",version="1.1"}'
            assert gateway.metric(name) == pytest.approx(41 * 0.25)

    def test_hung_worker_does_not_hold_the_scrape_up(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2, timing={"collect_s": 0.5}) as gateway:
            with gateway.connect():
                assert gateway.metric('connections_total{listener="web"}') == 1
            for worker in gateway.status()["workers"]:
                os.kill(worker["pid"], signal.SIGSTOP)
            began = time.monotonic()
            assert gateway.metric('connections_total{listener="web"}') == 1
            assert time.monotonic() - began < 10, "long before they are taken for hung"

    def test_processor_time_of_dead_workers_stays(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            used = 'worker_cpu_seconds_total{worker="0"}'
            before = gateway.metric(used)
            assert before is not None
            os.kill(gateway.status()["workers"][0]["pid"], signal.SIGKILL)
            gateway.wait_log("serves again")
            after = gateway.metric(used)
            assert after is not None
            assert after >= before + 0.01  # its own start-up is on top


class TestTickets:
    TLS = """
[[listeners]]
name = "secure"
address = "127.0.0.1:{port}"
protocol = "tls"
backends = [{{ address = "127.0.0.1:9" }}]
[listeners.tls]
cert_path = "certs/server.pem"
key_path = "certs/server.key"
ticket_rotation_interval_seconds = {every}
ticket_rotation_overlap_seconds = 60
"""

    def test_shared_kept_across_replacement_and_reload_and_rotated(self, tmp_path: Path) -> None:
        write_certs(tmp_path)
        port = free_port()
        with Gateway(tmp_path, workers=2, more=self.TLS.format(port=port, every=3600)) as gateway:
            seen: dict[int, str] = {}
            while len(seen) < 2:
                with Client(port) as client:
                    seen[client.pid] = client.tickets
            (keys,) = set(seen.values())
            for pid in seen:
                os.kill(pid, signal.SIGKILL)
                gateway.wait_log("serves again")
            with Client(port) as client:
                assert client.tickets == keys
            gateway.write(more=self.TLS.format(port=port, every=1))
            gateway.signal(signal.SIGHUP)
            assert gateway.wait_log("reload ")["result"] == "applied"
            while True:
                with Client(port) as client:
                    if client.tickets != keys:
                        break
            assert unpack_bytes(client.tickets).endswith(unpack_bytes(keys)), "the old key opens no more"
