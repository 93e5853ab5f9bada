"""Limits of a pool on a running gateway: who waits, who is refused, and what is counted.

Backends hold their answers, so that a test says how much is in flight: nothing here depends on who is quick.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Crowd, ask, get, shares
from tests.e2e.harness import Client, Gateway, eventually
from tests.ports import free_port

USUAL_S = 20.0
"""Less than whoever waits is made to wait where nothing is configured."""
LONG = "pending_timeout_ms = 60000"
"""The usual one may pass while a busy machine reloads."""
# Each pool has a listener's host of its own, ``<name>.example``.
POOLS = {
    "requests": ("ab", f"circuit_breaker = {{ max_requests = 3, max_pending = 4, {LONG} }}"),
    "connections": ("ab", "circuit_breaker = { max_connections = 2, max_pending = 0 }"),
    "pool-requests": ("ab", "circuit_breaker = { pool_max_requests = 5, max_pending = 0 }"),
    "pool-connections": ("ab", "circuit_breaker = { pool_max_connections = 5, max_pending = 0 }"),
    "order": ("a", f"circuit_breaker = {{ max_requests = 1, {LONG} }}"),
    "late": ("a", "circuit_breaker = { max_requests = 1, pending_timeout_ms = 300 }"),
    "budget": ("ab", "retry = { attempts = 2, on = [503], budget_percent = 20 }"),
    "no-budget": ("ab", "retry = { attempts = 2, on = [503], budget_percent = 0 }"),
    "resized": ("a", f"circuit_breaker = {{ max_requests = 2, max_pending = 10, {LONG} }}"),
    "tcp": ("ab", f"circuit_breaker = {{ pool_max_connections = 3, max_pending = 2, {LONG} }}"),
    "tcp-late": ("a", "circuit_breaker = { max_connections = 1, pending_timeout_ms = 300 }"),
    "free": ("ab", ""),
}


class World:
    def __init__(self, directory: Path, crowd: Crowd, workers: int = 1) -> None:
        self.crowd = crowd
        self.port = free_port()
        self.tcp = {name: free_port() for name in POOLS if name.startswith("tcp")}
        self.gateway = Gateway(
            directory,
            self.text(),
            workers=workers,
            runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 200",
        )

    def text(self, **other: str) -> str:
        """``other``: keys of pools that differ from the usual ones."""
        text = f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n"
        for name in POOLS:
            text += f"[[listeners.routes]]\nmatch.host = '{name}.example'\npool = '{name}'\n"
        for name, port in self.tcp.items():
            text += f"[[listeners]]\nname = '{name}'\naddress = '127.0.0.1:{port}'\nprotocol = 'tcp'\n"
            text += f"pool = 'l4-{name}'\n"
        for name, (members, keys) in POOLS.items():
            tables = ", ".join(self.crowd[member].toml() for member in members)
            for pool in (name, f"l4-{name}") if name in self.tcp else (name,):
                text += f"[[pools]]\nname = '{pool}'\nbackends = [{tables}]\n{other.get(name, keys)}\n"
        return text

    def metric(self, name: str, pool: str, **labels: str) -> float:
        return self.gateway.metric(name, pool=pool, **labels)

    def wait(self, name: str, pool: str, value: float, **labels: str) -> None:
        """Until a metric has the value."""
        eventually(lambda: self.metric(name, pool, **labels) == value, f"{name} of {pool} is {value}")


class Clients:
    """Clients that ask one after the other, each on a connection of its own, and are not answered yet."""

    def __init__(self, world: World, pool: str) -> None:
        self._world = world
        self._pool = pool
        self.all: list[Client] = []

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.all:
            client.sock.close()

    def ask(self, number: int, then_held: int) -> list[Client]:
        """So many more; backends hold so many requests then."""
        new = []
        for at in range(number):
            client = Client(self._world.port)
            self.all.append(client)
            new.append(client)
            client.send(get(f"{self._pool}.example", f"/{len(self.all)}"))
            if then_held - number + at + 1 > 0:
                eventually(
                    lambda least=then_held - number + at + 1: held(self._world) >= least,  # type: ignore[misc]
                    "it is held",
                )
        assert held(self._world) == then_held
        return new


def held(world: World) -> int:
    return sum(len(member.held) for member in world.crowd)


def is_refused(client: Client, reason: str) -> bool:
    status, headers, body = client.response()
    assert status == 503, (status, body)
    assert headers["retry-after"] == "1"
    assert "error=connection_limit_reached" in headers["proxy-status"]
    return reason.encode() in body


def is_turned_away(port: int) -> bool:
    """Whether a new connection is closed without a byte; its reset may come before ``connect`` is over."""
    try:
        with Client(port) as client:
            return client.is_closed()
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Crowd("a", "b") as crowd:
        world = World(tmp_path_factory.mktemp("breakers"), crowd)
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> Iterator[World]:
    running.crowd.calm()
    yield running
    running.crowd.calm()


class TestLimits:
    def test_requests_of_a_backend(self, world: World) -> None:
        """3 on each of two; 4 wait; the next is refused at once."""
        world.crowd.hold("a", "b")
        with Clients(world, "requests") as clients:
            first = clients.ask(6, 6)
            assert len(world.crowd["a"].held) == len(world.crowd["b"].held) == 3
            waiting = [Client(world.port) for _ in range(4)]
            clients.all += waiting
            for client in waiting:
                client.send(get("requests.example"))
            world.wait("pool_pending", "requests", 4)
            assert world.metric("pool_inflight", "requests") == 6
            assert world.metric("pool_limit", "requests", limit="max_requests") == 3
            assert world.metric("pool_limit", "requests", limit="max_pending") == 4
            assert world.metric("pool_limit_hits_total", "requests", limit="max_requests") >= 1
            with Client(world.port) as late:
                started = time.monotonic()
                late.send(get("requests.example"))
                assert is_refused(late, "saturated")
                assert time.monotonic() - started < USUAL_S
            assert world.metric("pool_queued_total", "requests", result="waited") == 4
            assert world.metric("pool_queued_total", "requests", result="refused") == 1
            assert held(world) == 6
            world.crowd.release("b", 1)  # one place: one of those who wait goes on, to that backend
            eventually(lambda: len(world.crowd["b"].held) == 3, "the next one is there")
            world.wait("pool_pending", "requests", 3)
            for name in "ab":
                world.crowd.release(name)
            for client in (*first, *waiting):
                assert client.response()[0] == 200
            assert world.metric("pool_pending", "requests") == 0
            assert world.metric("pool_inflight", "requests") == 0
            assert world.gateway.metric("http_gateway_errors_total", reason="saturated") == 1

    @pytest.mark.parametrize(
        ("pool", "limit", "most"),
        [
            ("connections", "max_connections", 4),  # 2 to each
            ("pool-requests", "pool_max_requests", 5),
            ("pool-connections", "pool_max_connections", 5),
        ],
    )
    def test_nobody_waits(self, world: World, pool: str, limit: str, most: int) -> None:
        """With ``max_pending = 0``, what is beyond the limit is refused at once."""
        world.crowd.hold("a", "b")
        with Clients(world, pool) as clients:
            first = clients.ask(most, most)
            for client in clients.ask(3, most):
                assert is_refused(client, "saturated")
            assert world.metric("pool_limit_hits_total", pool, limit=limit) >= 3
            assert world.metric("pool_limit", pool, limit=limit) == most / (
                2 if limit == "max_connections" else 1
            )
            assert world.metric("pool_queued_total", pool, result="refused") == 3
            for name in "ab":
                world.crowd.release(name)
            for client in first:
                assert client.response()[0] == 200
        # And then there is room again.
        assert shares(ask(world.port, [get(f"{pool}.example")] * 20, lanes=1)).total() == 20

    def test_connections_are_never_more(self, world: World) -> None:
        """200 requests from 4 clients at a time over 2 connections to each backend."""
        before = [member.connections for member in world.crowd]
        assert shares(ask(world.port, [get("connections.example")] * 200, lanes=4)).total() == 200
        for member, old in zip(world.crowd, before, strict=True):
            assert member.connections - old <= 2
        for backend in "ab":
            assert world.metric("pool_connections", "connections", backend=backend) <= 2

    def test_other_pools_do_not_mind(self, world: World) -> None:
        """Limits are a pool's, although its backend is in another one, too."""
        world.crowd.hold("a")
        with Clients(world, "order") as full, Clients(world, "resized") as others:
            full.ask(1, 1)
            full.ask(2, 1)
            others.ask(2, 3)
            assert world.metric("pool_pending", "resized") == 0
            world.crowd.release("a")
            for client in (*full.all, *others.all):
                assert client.response()[0] == 200


class TestQueue:
    def test_first_come_first_served(self, world: World) -> None:
        world.crowd.hold("a")
        with Clients(world, "order") as clients:
            clients.ask(1, 1)
            for number in range(2, 8):
                client = Client(world.port)
                clients.all.append(client)
                client.send(get("order.example", f"/{number}"))
                world.wait("pool_pending", "order", number - 1)
            for at, client in enumerate(clients.all):
                world.crowd.wait_held("a", 1)
                assert len(world.crowd["a"].requests) == at + 1
                world.crowd.release("a", 1)
                assert client.response()[0] == 200
            paths = [head.split(b" ")[1] for head, _ in world.crowd["a"].requests]
            assert paths == [b"/%d" % number for number in range(1, 8)]

    def test_who_leaves_is_forgotten(self, world: World) -> None:
        world.crowd.hold("a")
        with Clients(world, "order") as clients:
            clients.ask(1, 1)
            gone, stays = Client(world.port), Client(world.port)
            gone.send(get("order.example", "/gone"))
            world.wait("pool_pending", "order", 1)
            clients.all.append(stays)
            stays.send(get("order.example", "/stays"))
            world.wait("pool_pending", "order", 2)
            gone.sock.close()
            world.wait("pool_pending", "order", 1)
            world.crowd.release("a")
            assert stays.response()[0] == 200
        assert b"/gone" not in {head.split(b" ")[1] for head, _ in world.crowd["a"].requests}

    def test_waiting_ends(self, world: World) -> None:
        world.crowd.hold("a")
        with Clients(world, "late") as clients:
            (first,) = clients.ask(1, 1)
            started = time.monotonic()
            (late,) = clients.ask(1, 1)
            assert is_refused(late, "queue_timeout")
            assert 0.25 < time.monotonic() - started < USUAL_S
            assert world.metric("pool_queued_total", "late", result="timeout") == 1
            assert world.gateway.metric("http_gateway_errors_total", reason="queue_timeout") == 1
            assert world.metric("pool_pending", "late") == 0
            world.crowd.release("a")
            assert first.response()[0] == 200

    def test_bodies_wait_too(self, world: World) -> None:
        """An upload that waits is complete when its turn comes."""
        world.crowd.hold("a")
        body = b"0123456789" * 30_000
        with Clients(world, "order") as clients:
            clients.ask(1, 1)
            client = Client(world.port)
            clients.all.append(client)
            client.sock.settimeout(0.2)
            client.send(
                f"POST /up HTTP/1.1\r\nHost: order.example\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            )
            world.wait("pool_pending", "order", 1)
            client.sock.settimeout(60)
            client.send(body)
            world.crowd.release("a")
            assert client.response()[0] == 200
        assert world.crowd["a"].requests[-1][1] == body

    def test_a_limit_is_raised_by_a_reload(self, world: World) -> None:
        world.crowd.hold("a")
        with Clients(world, "resized") as clients:
            clients.ask(2, 2)
            clients.ask(4, 2)
            world.wait("pool_pending", "resized", 4)
            assert world.gateway.reload(
                world.text(resized=f"circuit_breaker = {{ max_requests = 5, {LONG} }}")
            )
            eventually(lambda: held(world) == 5, "three more have room")
            world.wait("pool_pending", "resized", 1)
            assert world.gateway.reload(world.text(resized=""))
            eventually(lambda: held(world) == 6, "and the last one")
            world.crowd.release("a")
            for client in clients.all:
                assert client.response()[0] == 200
        assert world.gateway.reload(world.text())


class TestWorkers:
    def test_two_share_a_limit(self, tmp_path: Path) -> None:
        """Each holds to its half: together they never pass it, and reach it when both are busy."""
        with Crowd("a", "b") as crowd:
            world = World(tmp_path, crowd, workers=2)
            with world.gateway, contextlib.ExitStack() as stack:
                assert (
                    world.metric("pool_limit", "order", limit="max_requests") == 2
                )  # 1 each: no worker is without
                assert world.metric("pool_limit", "resized", limit="max_requests") == 2
                assert world.metric("pool_limit", "resized", limit="max_pending") == 10
                crowd.hold("a")
                for number in range(1, 13):
                    client = stack.enter_context(Client(world.port))
                    client.send(get("resized.example"))
                    eventually(
                        lambda asked=number: (  # type: ignore[misc]
                            world.metric("pool_pending", "resized")
                            + world.metric("pool_inflight", "resized")
                            + world.metric("pool_queued_total", "resized", result="refused")
                            >= asked
                        ),
                        "it is in flight, waits, or was refused",
                    )
                    assert held(world) <= 2
                eventually(lambda: held(world) == 2, "both workers have one in flight")
                crowd.release("a")


class TestBudget:
    def test_retries_are_a_share_of_the_traffic(self, world: World) -> None:
        """20 % of 200, and a reserve of 10."""
        for name in "ab":
            world.crowd[name].says = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
        answers = ask(world.port, [get("budget.example")] * 200, lanes=1)
        assert {answer.status for answer in answers} == {503}
        retries = world.metric("backend_retries_total", "budget", reason="status")
        assert retries == sum(answer.header("X-Gateway-Attempts") == "2" for answer in answers)
        assert abs(retries - 50) <= 1, retries
        assert world.metric("pool_retries_refused_total", "budget") == 200 - retries
        assert world.crowd.counts().total() == 200 + retries

    def test_no_budget(self, world: World) -> None:
        for name in "ab":
            world.crowd[name].says = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
        ask(world.port, [get("no-budget.example")] * 20)
        assert world.metric("backend_retries_total", "no-budget", reason="status") == 0
        assert world.metric("pool_retries_refused_total", "no-budget") == 20

    def test_a_refused_retry_takes_no_turn(self, world: World) -> None:
        """One of two backends fails; without retries the other one answers every second request."""
        world.crowd["a"].says = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
        answers = ask(world.port, [get("no-budget.example")] * 40, lanes=1)
        assert sum(answer.status == 200 for answer in answers) == 20


class TestTcp:
    def test_connections_of_the_pool(self, world: World) -> None:
        """3 are relayed, 2 wait and are not read from, the rest is closed."""
        with contextlib.ExitStack() as stack:
            port = world.tcp["tcp"]
            clients = [stack.enter_context(Client(port)) for _ in range(3)]
            for client in clients:
                client.send(get())
                assert client.response()[0] == 200
            waiting = []
            for number in range(1, 3):
                client = stack.enter_context(Client(port))
                client.send(get(path="/waited"))
                waiting.append(client)
                world.wait("pool_pending", "l4-tcp", number)
            assert is_turned_away(port)
            assert world.metric("pool_queued_total", "l4-tcp", result="refused") == 1
            assert world.metric("pool_limit_hits_total", "l4-tcp", limit="pool_max_connections") >= 1
            assert world.crowd.counts().total() == 3
            clients[1].sock.close()
            assert waiting[0].response()[0] == 200  # first come, first served
            assert world.metric("pool_pending", "l4-tcp") == 1
            clients[0].sock.close()
            assert waiting[1].response()[0] == 200
        world.wait("pool_inflight", "l4-tcp", 0)

    def test_waiting_ends(self, world: World) -> None:
        with Client(world.tcp["tcp-late"]) as first:
            first.send(get())
            assert first.response()[0] == 200
            started = time.monotonic()
            assert is_turned_away(world.tcp["tcp-late"])
            assert 0.25 < time.monotonic() - started < USUAL_S
            assert world.metric("pool_queued_total", "l4-tcp-late", result="timeout") == 1
            first.send(get())
            assert first.response()[0] == 200  # who was there first is not disturbed
