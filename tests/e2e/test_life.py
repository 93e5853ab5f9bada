"""The process as an operator meets it: start, refusal to start, reload, death of a part, drain, end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import expressgateway
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    certificate,
    eventually,
    need,
    run,
)
from tests.e2e.http_world import answer
from tests.e2e.load import ONCE, REQUEST, Load
from tests.ports import free_port


def config(port: int, *backends: str, keys: str = "", http: str = "") -> str:
    """``backends``: addresses, or more keys of their tables."""
    tables = ", ".join(f"{{ {each} }}" if "=" in each else f'{{ address = "{each}" }}' for each in backends)
    return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
backends = [{tables}]
{keys}
[listeners.http]
{http}
"""


def serve(connection: BackendConnection) -> None:
    while True:
        connection.until(b"\r\n\r\n")
        answer(connection, connection.backend.name.encode())


def silent(connection: BackendConnection) -> None:
    connection.until(b"never")


class Held:
    """A backend's script that begins an answer and ends it when told."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, connection: BackendConnection) -> None:
        connection.until(b"\r\n\r\n")
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
        self.begun.set()
        if self.go.wait(20):
            connection.send(b"half")


def status(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gateway.ask("/api/v1/status")[1])
    return found


def serving(gateway: Gateway) -> list[int]:
    """Pids of the workers that serve."""
    return [worker["pid"] for worker in status(gateway)["workers"] if worker["state"] == "serving"]


def processor_s(pid: int) -> float:
    """What a process has had of processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


class TestDrain:
    def test_under_load_no_request_is_lost(self, tmp_path: Path) -> None:
        """Readiness goes first; then every client is told, in an answer, that it is the last."""
        port = free_port()
        runtime = "readiness_settle_ms = 2000\ndrain_timeout_ms = 20000"
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address), workers=2, runtime=runtime) as gateway,
        ):
            with Load(port) as load:
                eventually(lambda: load.total > 200, "there is load")
                gateway.process.send_signal(signal.SIGTERM)
                eventually(lambda: gateway.ask("/readyz")[0] == 503, "it is unready")
                assert gateway.ask("/livez")[0] == 200
                with Client(port) as late:
                    late.send(REQUEST)
                    assert late.response()[0] == 200, "while it settles it still accepts"
                load.join()
            assert gateway.process.wait(30) == 0
            assert not load.broken
            assert set(load.answers) == {200}
            assert load.told >= 8
            assert load.refused == 8, "afterwards nobody listens"

    def test_who_connects_meanwhile_is_served_or_refused(self, tmp_path: Path) -> None:
        """Refused, which says what to do next: not accepted and then reset."""
        port = free_port()
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address), runtime="drain_timeout_ms = 20000") as gateway,
            Client(port) as lasting,
        ):
            lasting.send(REQUEST[:-2])  # keeps the drain going for a while
            with Load(port, request=ONCE) as load:
                eventually(lambda: load.total > 200, "there is load")
                gateway.process.send_signal(signal.SIGTERM)
                load.join()
            lasting.send(b"\r\n")
            assert lasting.response()[1]["connection"] == "close"
            assert load.refused == 8
            assert not load.broken

    @need("wrk")
    def test_under_wrk_no_request_is_lost(self, tmp_path: Path) -> None:
        """wrk goes on when nobody listens: refused connects are failed writes, lost answers failed reads."""
        port = free_port()
        runtime = "readiness_settle_ms = 0\ndrain_timeout_ms = 20000"
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address), runtime=runtime) as gateway,
        ):

            def stop_under_load() -> None:
                eventually(
                    lambda: (
                        gateway.metric("connections_inflight", listener="web") == 8
                        and gateway.metric("http_requests_total") > 200
                    ),
                    "all are connected, and there is load",
                )
                gateway.process.send_signal(signal.SIGTERM)

            with ThreadPoolExecutor() as aside:
                stopping = aside.submit(stop_under_load)
                shown = run("wrk", "-t1", "-c8", "-d4s", f"http://127.0.0.1:{port}/")
                stopping.result()
            assert gateway.process.wait(30) == 0
            assert "Non-2xx" not in shown, shown
            assert re.search(r"connect 0, read 0, write \d+, timeout 0", shown), shown

    def test_an_exchange_under_way_is_finished(self, tmp_path: Path) -> None:
        port = free_port()
        held = Held()
        runtime = "drain_timeout_ms = 30000"
        with (
            Backend(held) as backend,
            Gateway(tmp_path, config(port, backend.address), runtime=runtime) as gateway,
            Client(port) as client,
            Client(port) as idle,
        ):
            client.send(REQUEST)
            assert held.begun.wait(30)
            began = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            assert idle.is_closed(), "an idle connection is closed"
            eventually(lambda: not accepts(port), "it accepts no more")
            assert gateway.process.poll() is None
            held.go.set()
            assert client.response()[::2] == (200, b"halfhalf")
            assert client.is_closed()
            assert gateway.process.wait(30) == 0
            assert time.monotonic() - began < 15, "it does not wait for the end of the budget"
            assert "0 connections cut off" in gateway.log()

    def test_one_that_does_not_end_is_cut_at_the_budget(self, tmp_path: Path) -> None:
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(tmp_path, config(port, backend.address), runtime="drain_timeout_ms = 600") as gateway,
            Client(port) as client,
        ):
            client.send(REQUEST)
            assert held.begun.wait(30)
            began = time.monotonic()
            gateway.process.send_signal(signal.SIGTERM)
            assert client.rest().endswith(b"half"), "and it does not look complete"
            assert 0.5 < time.monotonic() - began < 10
            assert gateway.process.wait(30) == 0
            assert "1 connection cut off" in gateway.log()
            held.go.set()

    @pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_ends_it_at_once(self, tmp_path: Path, second: signal.Signals) -> None:
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(tmp_path, config(port, backend.address), runtime="drain_timeout_ms = 20000") as gateway,
            Client(port) as client,
        ):
            client.send(REQUEST)
            assert held.begun.wait(30)
            pids = gateway.worker_pids()
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: status(gateway)["state"] == "draining", "it drains")
            began = time.monotonic()
            gateway.process.send_signal(second)
            assert gateway.process.wait(30) == 0
            assert time.monotonic() - began < 10
            assert all(map(is_gone, pids))
            held.go.set()

    def test_idle_it_ends_quickly(self, tmp_path: Path) -> None:
        port = free_port()
        with Gateway(
            tmp_path, config(port, f"127.0.0.1:{free_port()}"), runtime="drain_timeout_ms = 20000"
        ) as gateway:
            began = time.monotonic()
            gateway.process.send_signal(signal.SIGINT)
            assert gateway.process.wait(30) == 0
            assert time.monotonic() - began < 10


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


class TestReload:
    def test_under_load_every_change_takes_effect_and_nothing_fails(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            Backend(serve, "one") as one,
            Backend(serve, "two") as two,
            Gateway(tmp_path, config(port, one.address, two.address), workers=2) as gateway,
        ):
            weighted = 'load_balancing = { policy = "weighted_round_robin" }'
            with Load(port) as load:

                def now(count: int = 60) -> set[bytes]:
                    """Who answers from now on."""
                    # What was under way may still come from the old set: every client's next answer, at most.
                    load.wait_everybody()
                    load.bodies.clear()
                    eventually(lambda: load.bodies.total() > count, "there is load")
                    return set(load.bodies)

                assert now() == {b"one", b"two"}
                for _ in range(3):
                    text = config(port, f'address = "{one.address}", weight = 0', two.address)
                    assert gateway.reload(text)
                    assert now() == {b"two"}
                    assert gateway.reload(config(port, one.address))
                    assert now() == {b"one"}
                    text = config(
                        port,
                        f'address = "{one.address}", weight = 9',
                        f'address = "{two.address}"',
                        keys=weighted,
                    )
                    assert gateway.reload(text)
                    assert now() == {b"one", b"two"}
                    assert load.bodies[b"one"] > 3 * load.bodies[b"two"]
                for number in range(10):
                    assert gateway.reload(config(port, one.address, http=f'server_header = "edge{number}"'))
            assert not load.broken
            assert set(load.answers) == {200}
            assert gateway.metric("config_reload_total", result="applied") == 19
            assert gateway.metric("worker_restarts_total") == 0
            with Client(port) as client:
                client.send(REQUEST)
                assert client.response()[1]["server"] == "edge9"

    def test_timeouts_change_for_open_connections(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            Backend(silent) as backend,
            Gateway(tmp_path, config(port, backend.address)) as gateway,
            Client(port) as client,
        ):
            client.send(b"GET / HTTP/1.1\r\n")
            gateway.wait_metric("connections_inflight", 1, listener="web")
            assert gateway.reload(config(port, backend.address, http="head_timeout_ms = 300"))
            client.send(b"Host: a.example\r\n\r\n")
            assert client.response()[0] == 504

    def test_an_invalid_file_is_refused_as_a_whole(self, tmp_path: Path) -> None:
        port = free_port()
        with Backend(serve) as backend, Gateway(tmp_path, config(port, backend.address)) as gateway:
            text = config(port, f"127.0.0.1:{free_port()}", http="header_timeout = 5")
            assert not gateway.reload(text)
            assert "header_timeout_ms" in gateway.log(), "the log names the key that was meant"
            with Client(port) as client:
                client.send(REQUEST)
                assert client.response()[2] == b"backend"
            assert status(gateway)["config"]["version"] == 1
            assert gateway.metric("config_reload_total", result="invalid") == 1
            assert gateway.path.read_text().endswith(text), "the operator's file is never written"
            assert gateway.reload(config(port, backend.address, http='server_header = "new"'))

    def test_a_listener_moves(self, tmp_path: Path) -> None:
        port, other = free_port(), free_port()
        with Backend(serve) as backend, Gateway(tmp_path, config(port, backend.address)) as gateway:
            with Client(port) as client:
                assert gateway.reload(config(other, backend.address))
                client.send(REQUEST)
                assert client.response()[2] == b"backend", "its connections may end"
            with Client(other) as client:
                client.send(REQUEST)
                assert client.response()[2] == b"backend"
            assert not accepts(port)

    def test_what_cannot_be_had_refuses_the_reload(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address)) as gateway,
            socket.create_server(("127.0.0.1", free_port())) as taken,
        ):
            assert not gateway.reload(config(taken.getsockname()[1], backend.address))
            assert "is already in use" in gateway.log()
            assert accepts(port)
            assert gateway.metric("config_reload_total", result="refused") == 1

    def test_a_renewed_certificate_is_served(self, tmp_path: Path) -> None:
        port = free_port()
        files = certificate(tmp_path)
        pair = f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}'
        with Backend(serve) as backend:
            text = config(port, backend.address, keys=pair).replace('"h1"', '"h1s"')
            with Gateway(tmp_path, text) as gateway:
                before = served_certificate(port)
                certificate(tmp_path)
                assert served_certificate(port) == before
                assert gateway.reload(text)
                assert served_certificate(port) != before


def served_certificate(port: int) -> str:
    import ssl

    return ssl.get_server_certificate(("127.0.0.1", port), timeout=60)


class TestDeath:
    def test_of_a_worker_costs_its_own_exchanges_only(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address), workers=2) as gateway,
        ):
            counts: list[float] = []
            with Load(port, clients=8) as load:
                eventually(lambda: load.total > 200, "there is load")
                for _ in range(3):
                    victim, survivor = serving(gateway)
                    broken = len(load.broken)
                    counts.append(gateway.metric("http_requests_total"))
                    began = time.monotonic()
                    os.kill(victim, signal.SIGKILL)
                    with Client(port) as client:
                        client.send(REQUEST)
                        assert client.response()[0] == 200, "the next connection is served"
                    counts.append(gateway.metric("http_requests_total"))
                    eventually(
                        lambda gone=victim: len(serving(gateway)) == 2 and gone not in serving(gateway),  # type: ignore[misc]
                        "it is replaced",
                    )
                    took_s = time.monotonic() - began
                    counts.append(gateway.metric("http_requests_total"))
                    assert took_s < 15, "about half a second on an idle machine"
                    assert survivor in serving(gateway)
                    assert len(load.broken) - broken <= 8
            assert load.refused == 0
            assert set(load.answers) == {200}
            assert counts == sorted(counts), "counters never go backwards"
            assert gateway.metric("worker_restarts_total") == 3
            assert not any(error.startswith("connect") for error in load.broken)

    def test_of_the_supervisor_drains_the_workers(self, tmp_path: Path) -> None:
        port = free_port()
        held = Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path, config(port, backend.address), workers=2, runtime="drain_timeout_ms = 30000"
            ) as gateway,
            Client(port) as client,
        ):
            client.send(REQUEST)
            assert held.begun.wait(30)
            pids = gateway.worker_pids()
            gateway.process.kill()
            gateway.process.wait()
            eventually(lambda: not accepts(port), "nobody accepts")
            held.go.set()
            assert client.response()[::2] == (200, b"halfhalf")
            eventually(lambda: all(map(is_gone, pids)), "no worker is left", 15)

    def test_of_the_backend_is_not_ours(self, tmp_path: Path) -> None:
        port = free_port()
        with Backend(serve) as backend, Gateway(tmp_path, config(port, backend.address)) as gateway:
            pids = gateway.worker_pids()
            backend.__exit__()
            for _ in range(3):
                with Client(port) as client:
                    client.send(REQUEST)
                    assert client.response()[0] == 502
            assert gateway.worker_pids() == pids


class TestStart:
    def start(self, tmp_path: Path, text: str) -> tuple[int, str]:
        """Exit code and what was said, of a start that must fail."""
        path = tmp_path / "bad.toml"
        path.write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "expressgateway", str(path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    def test_with_a_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, said = self.start(tmp_path, config(port, "127.0.0.1:1"))
        assert code == 1
        assert f"127.0.0.1:{port}" in said
        assert "in use" in said

    def test_with_the_admin_port_in_use(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            text = f'[observability]\nmetrics_bind = "127.0.0.1:{port}"\n' + config(
                free_port(), "127.0.0.1:1"
            )
            code, said = self.start(tmp_path, text)
        assert code == 1
        assert f"127.0.0.1:{port}" in said

    @pytest.mark.parametrize(
        ("spoil", "wanted"),
        [
            (lambda files, other: files.key.unlink(), r"server\.key"),
            (lambda files, other: files.key.chmod(0o644), r"chmod|0600|readable"),
            (lambda files, other: files.key.write_bytes(other.key.read_bytes()), r"match|belong|pair"),
            (lambda files, other: files.certificate.write_text("no PEM"), r"server\.crt"),
        ],
        ids=["missing key", "key readable by all", "wrong pair", "not a certificate"],
    )
    def test_with_bad_key_material(self, tmp_path: Path, spoil: Callable[..., object], wanted: str) -> None:
        files, other = certificate(tmp_path), certificate(tmp_path, stem="other")
        spoil(files, other)
        pair = f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}'
        code, said = self.start(
            tmp_path, config(free_port(), "127.0.0.1:1", keys=pair).replace('"h1"', '"h1s"')
        )
        assert code == 78
        assert re.search(wanted, said), said
        assert "bad.toml:" in said, "it names the place"

    def test_with_an_unknown_key(self, tmp_path: Path) -> None:
        code, said = self.start(tmp_path, config(free_port(), "127.0.0.1:1", http="idle_timeout = 5"))
        assert code == 78
        assert "idle_timeout_ms" in said

    def test_with_no_file(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "expressgateway", str(tmp_path / "none.toml")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode in (2, 78)
        assert "none.toml" in done.stderr

    def test_is_quick(self, tmp_path: Path) -> None:
        """By what it takes of processors: how long they let it wait is not its doing."""
        with Gateway(tmp_path, config(free_port(), "127.0.0.1:1"), workers=2) as gateway:
            spent_s = sum(processor_s(pid) for pid in (gateway.process.pid, *gateway.worker_pids()))
            assert re.search(r"ready in [\d.]+ seconds with 2 workers", gateway.log())
        assert spent_s < 4, "about a second on an idle machine, for three processes"


class TestWorkers:
    def test_both_get_connections(self, tmp_path: Path) -> None:
        port = free_port()
        with (
            Backend(serve) as backend,
            Gateway(tmp_path, config(port, backend.address), workers=2) as gateway,
        ):
            before = {pid: sockets_of(pid) for pid in gateway.worker_pids()}
            clients = [Client(port) for _ in range(60)]
            gateway.wait_metric("connections_inflight", 60)
            got = [sockets_of(pid) - count for pid, count in before.items()]
            for client in clients:
                client.sock.close()
        assert sum(got) == 60
        assert min(got) > 10

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_run_as_the_configured_user_with_keys_only_root_can_read(self, tmp_path: Path) -> None:
        port = free_port()
        files = certificate(tmp_path)
        assert files.key.stat().st_mode & 0o777 == 0o600
        pair = f'tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}'
        runtime = 'user = "nobody"\ngroup = "nogroup"'
        with Backend(serve) as backend:
            text = config(port, backend.address, keys=pair).replace('"h1"', '"h1s"')
            gateway = Gateway(tmp_path, text, workers=2, runtime=runtime)
            gateway.interpreter, path = interpreter_for(NOBODY)
            gateway.environment["PYTHONPATH"] = path
            with gateway:
                self._check_identity(gateway)
                victim = gateway.worker_pids()[0]
                os.kill(victim, signal.SIGKILL)
                eventually(lambda: victim not in serving(gateway), "it died")
                eventually(lambda: len(serving(gateway)) == 2, "it is replaced")
                self._check_identity(gateway)
                assert served_certificate(port)

    def _check_identity(self, gateway: Gateway) -> None:
        for pid in gateway.worker_pids():
            lines = Path(f"/proc/{pid}/status").read_text()
            for name in ("Uid", "Gid"):
                assert re.search(rf"^{name}:(\t{NOBODY}){{4}}$", lines, re.MULTILINE), lines
            assert re.search(rf"^Groups:\s*({NOBODY})?\s*$", lines, re.MULTILINE), lines
            assert re.search(r"^CapEff:\t0+$", lines, re.MULTILINE), lines


NOBODY = 65534


def interpreter_for(user: int) -> tuple[str, str]:
    """A Python that this user may run, and the path on which it finds what this one has."""
    package = Path(expressgateway.__file__).parent.parent
    path = os.pathsep.join([str(package), *(each for each in sys.path if each.endswith("-packages"))])
    for candidate in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [candidate, "-c", "import expressgateway.worker, pydantic_core, uvloop"],
                user=user, group=user, env={"PYTHONPATH": path}, capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return candidate, path
    pytest.skip("no Python interpreter here can be run by nobody")


def sockets_of(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(link).startswith("socket:")
        except OSError:
            continue
    return count
