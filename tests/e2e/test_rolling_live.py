"""Changes that nobody notices: reloads of every class, renewals, upgrades and the drain, with real workers.

`bench.rolling` is the long version of the first test: the same loads, each change many times. The others look
at what a load cannot show: a handshake in the middle of an upgrade, what an upgrade keeps, what becomes of
workers whose supervisor is killed.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.rolling import Report, Run, backends
from bench.rolling_world import FIXED, Places, State
from bench.rolling_world import Gateway as Rolled

from tests.e2e.h3_raw import GET, RawH3, head
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Client,
    Gateway,
    certificate,
    eventually,
    need,
)
from tests.ports import free_port

pytestmark = pytest.mark.slow

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
WAITING = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"


@need("nginx", "wrk", "h2load")
@pytest.mark.peer
@pytest.mark.timeout(240)
def test_every_class_of_change_under_load(tmp_path: Path) -> None:
    """Each class of reload once, certificates by signal and by their files, an upgrade, a drain."""
    arguments = argparse.Namespace(reloads=14, rotations=2, upgrades=1, pause=0.05, settles=False)
    report = Report()
    with backends(tmp_path) as (site, ports):
        *listeners, passthrough, admin = (free_port() for _ in range(len(FIXED) + 3))
        places = Places(dict(zip((*FIXED, "turning"), listeners, strict=True)), ports, passthrough)
        gateway = Rolled(tmp_path, site, places, State(admin=admin, drain_timeout_ms=60_000))
        try:
            Run(gateway, arguments, report).run()
        finally:
            gateway.end()
    assert report.problems == []
    assert {load["name"]: load["told"] for load in report.loads if load["failures"]} == {}
    assert all(load["requests"] for load in report.loads)
    assert report.counts.total() >= 16


class Site(Gateway):
    """A gateway whose process may be another one after an upgrade. Its backend answers ``/wait`` when it is
    told to."""

    def __init__(self, directory: Path) -> None:
        self.web, self.h3 = free_port(), free_port()
        self.goes_on = threading.Event()
        self.backend = Backend(self._answer, "one")
        self.files = certificate(directory)
        super().__init__(
            directory,
            self.text(),
            workers=2,
            runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 20000",
        )

    def text(self, status: int = 418) -> str:
        """``/teapot`` answers with the status."""
        routes = f'[[listeners.routes]]\nmatch = {{ path = "/teapot" }}\nrespond = {{ status = {status} }}\n'
        return f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{self.web}"
protocol = "h1"
pool = "app"
{routes}
[[listeners]]
name = "h3"
address = "127.0.0.1:{self.h3}"
protocol = "quic"
pool = "app"
quic = {{ cert_path = "{self.files.certificate}", key_path = "{self.files.key}", \
retry_secret_path = "{self.directory_of_secrets}/retry.secret" }}
[[pools]]
name = "app"
backends = [
    {{ id = "one", address = "{self.backend.address}", weight = 3 }},
    {{ id = "two", address = "127.0.0.1:9", weight = 0 }},
]
load_balancing = {{ policy = "weighted_round_robin" }}
"""

    @property
    def directory_of_secrets(self) -> Path:
        return Path(self.files.key).parent

    def _answer(self, connection: BackendConnection) -> None:
        while True:
            request, _ = connection.request()
            if request.startswith(b"GET /wait"):
                assert self.goes_on.wait(PATIENCE_S)
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\none")

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/api/v1/status")[1])
        return found

    def upgrade(self) -> int:
        """The process that serves now."""
        before = self.status()["pid"]
        os.kill(before, signal.SIGUSR2)

        def is_over() -> bool:
            try:
                status = self.status()
            except (OSError, ValueError, http.client.HTTPException):
                return False
            return bool(status["pid"] != before and status["state"] == "serving")

        eventually(is_over, "another process serves")
        return int(self.status()["pid"])

    def patch(self, path: str, **body: object) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=PATIENCE_S)
        connection.request("PATCH", f"/api/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        connection.close()

    def __enter__(self) -> "Site":
        self.backend.__enter__()
        try:
            return super().__enter__()
        except BaseException:
            self.backend.__exit__()
            raise

    def __exit__(self, kind: object, *more: object) -> None:
        self.goes_on.set()
        try:
            if self.process.poll() is None or self._is_answering():
                last = self.status()["pid"]
                if last != self.process.pid:
                    os.kill(last, signal.SIGTERM)
                    eventually(lambda: not is_running(last), "the last process has ended")
            super().__exit__(kind)
        finally:
            self.backend.__exit__()

    def _is_answering(self) -> bool:
        try:
            return self.ask("/livez")[0] == 200
        except OSError:
            return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site")) as it:
        yield it


def test_an_upgrade_and_what_is_open_meanwhile(site: Site) -> None:
    """Over QUIC a connection with an exchange under way, and one in the middle of its handshake: both go on
    with the workers of before, to which new ones hand their packets. So does an exchange of HTTP/1.1."""
    site.patch("pools/app/backends/one", weight=7)
    site.patch("pools/app/backends/two", state="draining")
    with RawH3(site.h3) as used, RawH3(site.h3) as half, Client(site.web) as client:
        used.begun()
        waiting = used.send(head(*GET[:3], (b":path", b"/wait")), True)
        used.flush()
        half.flush()  # the client's first packet, and nothing after it
        client.send(WAITING)
        eventually(lambda: site.metric("connections_inflight", listener="h3") == 2, "both have begun")
        eventually(lambda: len(site.backend.received) >= 2, "both exchanges are under way")
        before = site.process
        after = site.upgrade()
        assert before.poll() is None, "its workers drain"
        with RawH3(site.h3) as new, Client(site.web) as another:
            assert new.begun().get()[1] == b"one"
            another.send(REQUEST)
            assert another.response()[::2] == (200, b"one")
            half.begun()
            assert half.get()[1] == b"one", "the handshake went on, and its first request was served"
            site.goes_on.set()
            assert used.answer(waiting)[1] == b"one"
            status, fields, body = client.response()
            assert (status, body) == (200, b"one")
            assert fields["connection"] == "close"
            assert new.get()[1] == b"one", "who came after the upgrade stays"
    assert before.wait(PATIENCE_S) == 0
    assert site.status()["pid"] == after
    pool = json.loads(site.ask("/api/v1/pools/app")[1])
    told = {backend["id"]: (backend["weight"], backend["state"]) for backend in pool["backends"]}
    assert told["one"][0] == 7, "a weight that was set while it ran"
    assert told["two"][1] == "draining", "and an operator's word"
    assert "0 connections cut off" in site.log()


def test_a_storm_of_reloads(site: Site) -> None:
    """A hundred in a moment, with another file each time: all are answered, and the last one is in force."""
    before = site.status()
    with Client(site.web) as client:
        for number in range(100):
            site.write(site.text(status=400 + number))
            os.kill(before["pid"], signal.SIGHUP)
        client.send(b"GET /teapot HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert 400 <= client.response()[0] < 500, "it is served meanwhile"

        def is_over() -> bool:
            status = site.status()["reload"]
            return bool(status["requested"] == status["finished"] > before["reload"]["finished"])

        eventually(is_over, "every reload is answered")
        client.send(b"GET /teapot HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.response()[0] == 499
    assert site.status()["reload"]["last_result"] in ("applied", "unchanged")


def test_a_stop_during_an_upgrade_ends_the_gateway(tmp_path: Path) -> None:
    """Whoever is the gateway by then: nothing is left behind, and what is under way is completed."""
    with Site(tmp_path) as site, Client(site.web) as client:
        site.goes_on.set()
        client.send(REQUEST)
        assert client.response()[0] == 200
        site.process.send_signal(signal.SIGUSR2)
        eventually(lambda: "another process is started" in site.log(), "the upgrade has begun")
        site.process.send_signal(signal.SIGTERM)
        client.send(WAITING)
        assert client.response()[::2] == (200, b"one")
        assert site.process.wait(PATIENCE_S) == 0
        eventually(lambda: site.log().count("drained in") == 2, "both have drained")
        assert site.log().count("0 connections cut off") == 2


def test_workers_of_a_killed_supervisor_drain(site: Site) -> None:
    """They serve what is open, take nothing new, and end."""
    site.goes_on.clear()
    status = site.status()
    workers = [worker["pid"] for worker in status["workers"]]
    with Client(site.web) as client:
        client.send(REQUEST)
        assert client.response()[0] == 200
        count = len(site.backend.received)
        client.send(WAITING)
        eventually(lambda: len(site.backend.received) > count, "an exchange is under way")
        os.kill(status["pid"], signal.SIGKILL)

        def is_refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", site.web), PATIENCE_S).close()
            except ConnectionRefusedError:
                return True
            return False

        eventually(is_refused, "nothing new is taken")
        site.goes_on.set()
        assert client.response()[0] == 200
    eventually(lambda: not any(map(is_running, workers)), "the workers have ended")
    site.process.wait(PATIENCE_S)
