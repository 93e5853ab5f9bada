"""How HTTP/3 connections live and end: budget, idleness, reloads, drains, workers, ports that change.

The client is ``aioquic``. It is told of an end in two steps (RFC 9114 5.2), and no request is lost.
"""

import os
import queue
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Self

import pytest

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h3_site import SWEEP, ask, closing, quic_listener, request
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Gateway,
    certificate,
    eventually,
)
from tests.e2e.http_world import answer, read_body
from tests.e2e.talks import CutError, rest
from tests.e2e.talks_h3 import H3End, dial_h3
from tests.ports import free_port

H3_NO_ERROR = 0x100
MAX_ID = 2**62 - 4
MOVES = 3  # after which the transport's core knows no more paths: see tests/net/quic/test_changes.py
ENDLESS = "max_requests_per_h3_connection = 0"


def named(connection: BackendConnection) -> None:
    """Answer with the backend's name and the body that came."""
    while True:
        head = connection.until(b"\r\n\r\n")
        answer(connection, connection.backend.name.encode() + b":" + read_body(connection, head))


class Held:
    """Answers in two halves, the second when told; anything but ``/held`` at once."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, connection: BackendConnection) -> None:
        while True:
            head = connection.until(b"\r\n\r\n")
            connection.backend.requests.append((head, b""))
            if b" /held " not in head:
                answer(connection, b"at once")
                continue
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
            if self.go.wait(PATIENCE_S):
                connection.send(b"half")


class Load:
    """Clients that ask again and again, each on its connection, and on another when told to leave."""

    def __init__(self, files: CertificateFiles, port: int, clients: int = 3) -> None:
        self.failed: list[str] = []
        self.names: Counter[bytes] = Counter()
        self.ends: list[H3End] = []
        self.stays = False
        """Whether a connection that was told to leave is the last."""
        self._files = files
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for end in self.ends:
            end.close()

    def more(self) -> None:
        """Wait until some more were served."""
        wanted = self.names.total() + 12
        eventually(lambda: self.names.total() > wanted or self.failed, "there is load")

    def stop(self, *, is_told: bool = False) -> None:
        """``is_told``: by the gateway."""
        if not is_told:
            self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _run(self) -> None:
        try:
            end = self._dial()
            while not self._stop.is_set():
                if end.goaway:
                    if self.stays:
                        return
                    end = self._dial()
                talks = [end.call(request("/x", method="POST"), end=False) for _ in range(4)]
                for number, talk in enumerate(talks):
                    body = b"%d" % number * 3000
                    talk.send(body, end=True)
                    status = talk.read_head()[":status"]
                    name, _, got = rest(talk).partition(b":")
                    if status != "200" or got != body:
                        self.failed.append(f"{status} {name!r}")
                    self.names[name] += 1
        except (CutError, AssertionError) as error:
            self.failed.append(repr(error))

    def _dial(self) -> H3End:
        end = dial_h3(self._files, self._port)
        self.ends.append(end)
        return end


def told_twice(end: H3End) -> None:
    """It was closed after both steps, and nothing was wrong."""
    terminated = end.until_closed()
    assert terminated.error_code == H3_NO_ERROR, terminated
    assert len(end.goaway) == 2
    assert end.goaway[0] == MAX_ID


class TestBudget:
    def test_it_ends_with_goaway_and_no_lost_request(self, tmp_path: Path) -> None:
        files, port, held = certificate(tmp_path), free_port(), Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path,
                quic_listener(files, port, backend.address) + SWEEP,
                runtime="max_requests_per_h3_connection = 5",
            ),
            closing(dial_h3(files, port)) as client,
        ):
            slow = client.call(request("/held"), end=True)
            slow.read_head()
            for number in range(4):
                assert not client.goaway, number
                assert rest(ask(client, "/x")) == b"at once"
            client.until(lambda: client.goaway)
            assert client.goaway == [MAX_ID]
            late = [ask(client, "/late") for _ in range(3)]
            assert [rest(each) for each in late] == [b"at once"] * 3, "on its way while the notice was"
            client.until(lambda: len(client.goaway) == 2)
            assert client.goaway[1] == late[-1].stream + 4
            served = len(backend.requests)
            refused = client.call(request("/too-late"), end=True)
            refused.until_lost()
            held.go.set()
            assert rest(slow) == b"halfhalf"
            told_twice(client)
            assert len(backend.requests) == served

    def test_an_idle_connection_is_told_and_closed(self, tmp_path: Path) -> None:
        files, port = certificate(tmp_path), free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path, quic_listener(files, port, backend.address, http="idle_timeout_ms = 1500") + SWEEP
            ),
            closing(dial_h3(files, port)) as client,
        ):
            rest(ask(client, "/x"))
            told_twice(client)
            with closing(dial_h3(files, port)) as other:  # while the first still answers for its close
                assert rest(ask(other, "/x"))


class TestReload:
    def test_ten_under_load_and_nothing_fails(self, tmp_path: Path) -> None:
        files, port = certificate(tmp_path), free_port()
        with Backend(named, "one") as one, Backend(named, "two") as two:

            def config(turn: int) -> str:
                to = [(one.address,), (two.address,), (one.address, two.address)][turn % 3]
                return quic_listener(files, port, *to, http=f"head_timeout_ms = {20_000 + turn}")

            with (
                Gateway(tmp_path, config(0), workers=2, runtime=ENDLESS) as gateway,
                Load(files, port) as load,
            ):
                for turn in range(1, 11):
                    assert gateway.reload(config(turn)), gateway.log()
                    load.more()
                    assert not load.failed
                load.stop()
                assert load.failed == []
                assert {b"one", b"two"} == set(load.names)
                assert not any(end.goaway for end in load.ends), "a reload leaves connections alone"
                assert gateway.metric("config_reload_total", result="applied") == 10
                total = gateway.metric("http_requests_total", version="3", status_class="2xx")
                assert total == load.names.total()


class TestDrain:
    def test_under_load_nothing_fails_and_everybody_is_told_twice(self, tmp_path: Path) -> None:
        files, port = certificate(tmp_path), free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path,
                quic_listener(files, port, backend.address) + SWEEP,
                workers=2,
                runtime=f"{ENDLESS}\ndrain_timeout_ms = 10000",
            ) as gateway,
            Load(files, port) as load,
        ):
            load.stays = True
            eventually(lambda: load.names.total() > 20, "there is load")
            gateway.process.send_signal(signal.SIGTERM)
            load.stop(is_told=True)
            assert load.failed == []
            for end in load.ends:
                told_twice(end)
            assert gateway.process.wait(PATIENCE_S) == 0

    def test_an_exchange_under_way_is_finished(self, tmp_path: Path) -> None:
        files, port, held = certificate(tmp_path), free_port(), Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path,
                quic_listener(files, port, backend.address) + SWEEP,
                runtime="drain_timeout_ms = 10000",
            ) as gateway,
            closing(dial_h3(files, port)) as client,
        ):
            talk = ask(client, "/held")
            gateway.process.send_signal(signal.SIGTERM)
            client.until(lambda: len(client.goaway) == 2)
            assert gateway.process.poll() is None, "it waits"
            held.go.set()
            assert rest(talk) == b"halfhalf"
            told_twice(client)
            assert gateway.process.wait(PATIENCE_S) == 0

    def test_one_that_does_not_end_is_cut_at_the_budget(self, tmp_path: Path) -> None:
        files, port, held = certificate(tmp_path), free_port(), Held()
        with (
            Backend(held) as backend,
            Gateway(
                tmp_path,
                quic_listener(files, port, backend.address) + SWEEP,
                runtime="drain_timeout_ms = 1500",
            ) as gateway,
            closing(dial_h3(files, port)) as client,
        ):
            talk = ask(client, "/held")
            gateway.process.send_signal(signal.SIGTERM)
            with pytest.raises(CutError):
                rest(talk)
            client.until_closed()
            assert gateway.process.wait(PATIENCE_S) == 0


class TestWorkers:
    """Four, and whichever the kernel gives a datagram to."""

    def test_clients_whose_port_changes_in_the_middle(self, tmp_path: Path) -> None:
        """As behind a NAT that forgets: the same connection goes on, up and down."""
        files, port = certificate(tmp_path), free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path, quic_listener(files, port, backend.address), workers=4, runtime=ENDLESS
            ) as gateway,
        ):
            for _ in range(4):
                with closing(dial_h3(files, port)) as client:
                    body = os.urandom(300_000)
                    talk = client.call(request("/x", method="POST"), end=False)
                    talk.send(body[:100_000])
                    client.move()
                    talk.send(body[100_000:], end=True)
                    talk.read_head()
                    got = talk.read()
                    client.move()
                    assert got + rest(talk) == b"backend:" + body
                    client.move()
                    assert rest(ask(client, "/x")) == b"backend:"
            assert gateway.metric("connections_total", listener="quic") == 4
            assert gateway.metric("http_requests_total", version="3", status_class="2xx") == 8

    def test_a_client_that_migrates_with_another_connection_id(self, tmp_path: Path) -> None:
        files, port = certificate(tmp_path), free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path, quic_listener(files, port, backend.address), workers=4, runtime=ENDLESS
            ) as gateway,
            closing(dial_h3(files, port)) as client,
        ):
            used = set()
            for _ in range(MOVES + 1):
                assert rest(ask(client, "/x", body=b"abc")) == b"backend:abc"
                with client.changed:
                    used.add(client.quic._peer_cid.cid)
                if len(used) <= MOVES:
                    with client.changed:
                        client.quic.change_connection_id()
                    client.move()
            assert len(used) == MOVES + 1
            assert gateway.metric("connections_total", listener="quic") == 1

    def test_one_that_dies_ends_its_connections_and_no_others(self, tmp_path: Path) -> None:
        """A client hears a stateless reset as soon as it says something, and connects again."""
        files, port = certificate(tmp_path), free_port()
        with (
            Backend(named) as backend,
            Gateway(
                tmp_path, quic_listener(files, port, backend.address), workers=2, runtime=ENDLESS
            ) as gateway,
        ):
            clients = [dial_h3(files, port) for _ in range(12)]
            for client in clients:
                rest(ask(client, "/x"))
            victim = gateway.worker_pids()[0]
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: victim not in gateway.worker_pids(), "it is gone")
            eventually(lambda: gateway.metric("worker_up") == 2, "another is there")
            outcomes: queue.Queue[str] = queue.Queue()

            def try_one(client: H3End) -> None:
                try:
                    rest(ask(client, "/x"))
                    outcomes.put("served")
                except (CutError, AssertionError):
                    outcomes.put("reset" if client.is_reset else "silent")

            threads = [threading.Thread(target=try_one, args=(client,)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = Counter(outcomes.get() for _ in clients)
            assert set(found) == {"served", "reset"}, found
            for client in clients:
                client.close()
            with closing(dial_h3(files, port)) as client:
                assert rest(ask(client, "/x")) == b"backend:"


class TestMetrics:
    def test_retries_are_counted(self, tmp_path: Path) -> None:
        files, port = certificate(tmp_path), free_port()
        config = quic_listener(files, port, "127.0.0.1:1").replace(
            "[listeners.quic]\n", '[listeners.quic]\nretry = "always"\n'
        )
        with Gateway(tmp_path, config) as gateway, closing(dial_h3(files, port)) as client:
            assert ask(client, "/x").headers[":status"] == "502"
            assert gateway.metric("quic_retries_total", listener="quic") == 1
            assert gateway.metric("tls_handshakes_total", listener="quic", result="ok") == 1
            assert gateway.metric("connections_inflight", listener="quic") == 1
