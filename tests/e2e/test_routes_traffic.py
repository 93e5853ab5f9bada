"""Routes that share traffic out: splits, mirrors, routes swapped under load, and thousands of them."""

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Answer, Crowd, ask, get, shares
from tests.e2e.harness import Client, Gateway, eventually
from tests.e2e.load import Load
from tests.ports import free_port

ROUTES = """
[[listeners.routes]]
name = 'drawn'
match.path = '/drawn'
split = [{ pool = 'a', weight = 80 }, { pool = 'b', weight = 20 }, { pool = 'c', weight = 0 }]

[[listeners.routes]]
match.path = '/cookie'
split = [{ pool = 'a', weight = 80 }, { pool = 'b', weight = 20 }]
sticky = 'cookie:lane'

[[listeners.routes]]
match.path = '/header'
split = [{ pool = 'a', weight = 80 }, { pool = 'b', weight = 20 }]
sticky = 'header:X-User'

[[listeners.routes]]
match.path = '/copied'
pool = 'a'
mirror = { pool = 'shadow' }

[[listeners.routes]]
match.path = '/half'
pool = 'a'
mirror = { pool = 'shadow', percent = 50 }

[[listeners.routes]]
match.path = '/deaf'
pool = 'a'
mirror = { pool = 'deaf' }

[[listeners.routes]]
match.path = '/edited'
split = [{ pool = 'a' }]
mirror = { pool = 'shadow' }
rewrite = { path = '/changed' }
headers.request.set = { x-set = 'ours' }

"""


POOLS = {"a": ["a"], "b": ["b"], "c": ["c"], "shadow": ["m"]}
BODY = bytes(range(256)) * 160
"""40,960 bytes: less than a mirror holds for a backend that is not there yet."""
AT_ONCE_S = 10.0
"""Whoever waits for a mirror that does not answer waits for longer than that, however busy the machine is."""


class World:
    def __init__(self, directory: Path, crowd: Crowd, deaf: int) -> None:
        self.crowd = crowd
        self.port, self.load_port = free_port(), free_port()
        self.deaf = deaf
        self.gateway = Gateway(
            directory, self.text(), runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 200"
        )

    def text(self, load: str = "pool = 'a'") -> str:
        """``load``: where the second listener's route leads."""
        text = f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n{ROUTES}"
        text += f"[[listeners]]\nname = 'load'\naddress = '127.0.0.1:{self.load_port}'\nprotocol = 'h1'\n"
        text += f"[[listeners.routes]]\nname = 'load'\nmatch = {{ host = 'a.example' }}\n{load}\n"
        text += f"[[pools]]\nname = 'deaf'\nbackends = [{{ address = '127.0.0.1:{self.deaf}' }}]\n"
        for name, members in POOLS.items():
            tables = ", ".join(self.crowd[member].toml() for member in members)
            text += f"[[pools]]\nname = '{name}'\nbackends = [{tables}]\n"
        return text

    def ask(self, *requests: bytes, lanes: int = 4, window: int = 16) -> list[Answer]:
        return ask(self.port, requests, lanes=lanes, window=window)

    def mirrored(self, result: str = "", pool: str = "shadow") -> float:
        """Copies that are over, by what became of them."""
        labels = {"result": result} if result else {}
        return self.gateway.metric("pool_mirrored_total", pool=pool, **labels)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Crowd("a", "b", "c", "m") as crowd, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)  # the kernel makes the connections; nobody ever reads from them
        world = World(tmp_path_factory.mktemp("routes"), crowd, deaf.getsockname()[1])
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> Iterator[World]:
    running.crowd.calm()
    yield running
    running.crowd.calm()


class TestSplit:
    def test_by_weight(self, world: World) -> None:
        """10,000 draws: 2 % are 5 standard deviations."""
        counts = shares(world.ask(*[get(path="/drawn")] * 10_000))
        assert set(counts) == {"a", "b"}
        assert abs(counts["b"] / 10_000 - 0.2) < 0.02, counts

    def test_sticky_by_cookie(self, world: World) -> None:
        first = world.ask(*[get(path="/cookie")] * 2000)
        counts = shares(first)
        assert abs(counts["b"] / 2000 - 0.2) < 0.045, counts  # 5 standard deviations
        fields = [answer.header("Set-Cookie") for answer in first]
        assert all(field.endswith("; Path=/; HttpOnly; SameSite=Lax") for field in fields), fields[0]
        cookies = [field.partition(";")[0] for field in fields]
        assert len(set(cookies)) == 2000
        again = world.ask(*(get(path="/cookie", Cookie=f"x=y; {cookie}") for cookie in cookies))
        assert [answer.name for answer in again] == [answer.name for answer in first]
        assert not any(answer.header("Set-Cookie") for answer in again)
        # The same after a reload that changes something else.
        assert world.gateway.reload(world.text("pool = 'b'"))
        again = world.ask(*(get(path="/cookie", Cookie=cookie) for cookie in cookies))
        assert [answer.name for answer in again] == [answer.name for answer in first]

    def test_sticky_by_header(self, world: World) -> None:
        users = [get(path="/header", X_User=f"user-{number}") for number in range(2000)]
        first = world.ask(*users)
        assert abs(shares(first)["b"] / 2000 - 0.2) < 0.045
        assert [answer.name for answer in world.ask(*users)] == [answer.name for answer in first]
        assert not any(answer.header("Set-Cookie") for answer in first)
        assert len(shares(world.ask(*[get(path="/header")] * 200))) == 2  # without it, by chance


class TestMirror:
    @pytest.mark.parametrize("is_chunked", [False, True])
    def test_a_copy_is_complete(self, world: World, is_chunked: bool) -> None:
        with Client(world.port) as client:
            head = "POST /copied?q=%20 HTTP/1.1\r\nHost: a.example\r\nX-Own: 1\r\n"
            if is_chunked:
                client.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
                for at in range(0, len(BODY), 8192):
                    client.send(b"2000\r\n" + BODY[at : at + 8192] + b"\r\n")
                client.send(b"0\r\n\r\n")
            else:
                client.send(f"{head}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
            assert client.response()[2] == b"a"
        eventually(lambda: world.crowd["m"].requests, "the copy has come")
        (real,), (copy,) = world.crowd["a"].requests, world.crowd["m"].requests
        assert copy[1] == real[1] == BODY
        assert copy[0].startswith(b"POST /copied?q=%20 HTTP/1.1\r\n")
        assert sorted(copy[0].lower().split(b"\r\n")) == sorted(real[0].lower().split(b"\r\n"))

    def test_a_copy_is_made_of_what_is_forwarded(self, world: World) -> None:
        world.ask(get(path="/edited"))
        eventually(lambda: world.crowd["m"].requests, "the copy has come")
        (copy, _), (real, _) = world.crowd["m"].requests[0], world.crowd["a"].requests[0]
        assert copy.startswith(b"GET /changed HTTP/1.1\r\n")
        assert b"\r\nx-set: ours\r\n" in copy.lower()
        assert copy == real

    def test_a_part_of_the_requests(self, world: World) -> None:
        """Half of 4,000, within 5 standard deviations; every one is counted."""
        before = world.mirrored()
        shares(world.ask(*[get(path="/half")] * 4000))
        eventually(lambda: world.mirrored() - before == len(world.crowd["m"].requests), "all are counted")
        assert abs(world.mirrored() - before - 2000) < 160
        assert world.mirrored("answered") == world.mirrored()

    def test_one_that_hangs(self, world: World) -> None:
        world.crowd.hold("m")
        slowest = self.slowest(world, 300)
        assert slowest < AT_ONCE_S
        assert world.gateway.metric("backend_inflight", pool="shadow", backend="m") == 300
        assert len(world.crowd["a"].requests) == 300
        # They are bounded: what comes when there are 1,024 of them is not copied.
        shares(world.ask(*[get(path="/copied")] * 1000))
        assert world.gateway.metric("backend_inflight", pool="shadow", backend="m") == 1024
        assert world.mirrored("too_many") == 276
        world.crowd.release("m")
        eventually(
            lambda: world.gateway.metric("backend_inflight", pool="shadow", backend="m") == 0, "all are over"
        )

    def test_one_that_is_dead(self, world: World) -> None:
        world.crowd.stop("m")
        before = world.mirrored("connect_failed")
        assert self.slowest(world, 200) < AT_ONCE_S
        eventually(lambda: world.mirrored("connect_failed") - before >= 190, "failures are counted")

    def test_one_that_says_500(self, world: World) -> None:
        world.crowd["m"].says = b"HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
        errors = world.gateway.metric("http_gateway_errors_total")
        assert self.slowest(world, 200) < AT_ONCE_S
        eventually(
            lambda: world.gateway.metric("backend_requests_total", pool="shadow", status_class="5xx") == 200,
            "answers are counted",
        )
        assert world.gateway.metric("http_gateway_errors_total") == errors

    def test_one_that_does_not_speak_http(self, world: World) -> None:
        world.crowd["m"].says = b"\x00\x01 nonsense\r\n\r\n"
        before = world.mirrored("failed")
        assert self.slowest(world, 100) < AT_ONCE_S
        eventually(lambda: world.mirrored("failed") - before == 100, "failures are counted")

    def slowest(self, world: World, number: int) -> float:
        """Of so many exchanges that are copied, all of which must go well."""
        slowest = 0.0
        with Client(world.port) as client:
            for _ in range(number):
                started = time.monotonic()
                client.send(get(path="/copied"))
                status, _, body = client.response()
                assert (status, body) == (200, b"a")
                slowest = max(slowest, time.monotonic() - started)
        return slowest

    def test_one_that_does_not_read(self, world: World) -> None:
        """An upload of 20 MB is complete although its mirror took next to nothing of it."""
        piece = b"x" * 1_000_000
        started = time.monotonic()
        with Client(world.port) as client:
            client.send(b"PUT /deaf HTTP/1.1\r\nHost: a.example\r\nContent-Length: 20000000\r\n\r\n")
            for _ in range(20):
                client.send(piece)
            assert client.response()[2] == b"a"
        assert time.monotonic() - started < AT_ONCE_S
        assert len(world.crowd["a"].requests[0][1]) == 20_000_000
        eventually(lambda: world.mirrored("too_slow", "deaf") == 1, "it is given up")

    def test_an_upload_cut_short_is_no_complete_copy(self, world: World) -> None:
        with Client(world.port) as client:
            client.send(b"PUT /copied HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1000\r\n\r\npart")
            eventually(
                lambda: world.gateway.metric("backend_inflight", pool="shadow", backend="m") == 1,
                "the copy is under way",
            )
        eventually(lambda: world.mirrored("cut_short") == 1, "it is given up")
        assert not world.crowd["m"].requests


class TestManyAndOften:
    def test_routes_are_swapped_under_load(self, world: World) -> None:
        leads = [
            "pool = 'b'",
            "split = [{ pool = 'a' }, { pool = 'c' }]",
            "pool = 'c'\nrewrite = { path = '/elsewhere' }\nmirror = { pool = 'shadow' }",
            "respond = { status = 200, body = 'here' }",
        ]
        wanted = [{b"b"}, {b"a", b"c"}, {b"c"}, {b"here"}]
        with Load(world.load_port, clients=4) as load:
            for _ in range(3):
                for lead, expected in zip(leads, wanted, strict=True):
                    assert world.gateway.reload(world.text(lead))
                    # From now on: whoever asks is led by the new route.
                    answers = ask(world.load_port, [get("a.example")] * 10, lanes=1)
                    assert {answer.body for answer in answers} <= expected
            assert world.gateway.reload(world.text())
        assert not load.broken, load.broken[:3]
        assert not load.refused
        assert set(load.answers) == {200}
        assert load.total > 100
        assert set(load.bodies) == {b"a", b"b", b"c", b"here"}

    def test_two_thousand_routes(self, tmp_path: Path) -> None:
        with Crowd("a", "b") as crowd:
            port = free_port()
            text = "max_label_cardinality = 100_000\n"  # of [observability]: each route has its histograms
            text += f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{port}'\nprotocol = 'h1'\n"
            for number in range(2000):
                text += (
                    f"[[listeners.routes]]\n"
                    f"match = {{ host = 'h{number % 100}.example', path_prefix = '/p/{number}' }}\n"
                    f"pool = '{'ab'[number % 3 > 0]}'\nrewrite = {{ path = '/{number}' }}\n"
                )
            for name in "ab":
                text += f"[[pools]]\nname = '{name}'\nbackends = [{crowd[name].toml()}]\n"
            with Gateway(tmp_path, text, runtime="max_keepalive_requests = 0"):
                numbers = random.sample(range(2000), 500)
                answers = ask(port, [get(f"h{each % 100}.example", f"/p/{each}/x") for each in numbers])
                assert [answer.name for answer in answers] == ["ab"[each % 3 > 0] for each in numbers]
                got = Counter(head.split(b" ")[1] for each in crowd for head, _ in each.requests)
                assert got == Counter(b"/%d" % each for each in numbers)
                wrong = ask(port, [get(f"h{(each + 1) % 100}.example", f"/p/{each}") for each in numbers])
                assert {answer.status for answer in wrong} == {404}
