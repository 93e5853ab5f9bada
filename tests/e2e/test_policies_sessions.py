"""``session_affinity`` through a running gateway: cookies, keys, and backends that drain, leave or die."""

import http.client
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Answer, Crowd, ask, get, shares
from tests.e2e.harness import Client, Gateway, descriptors, eventually
from tests.ports import free_port

NAMES = ("b1", "b2", "b3", "b4")
COOKIE = (
    "policy = 'session_affinity', cookie = { name = 'lane', path = '/app', same_site = 'strict', "
    "max_age_seconds = 600 }"
)
KEYED = "policy = 'session_affinity', hash_key = 'header:X-User'"
RUNTIME = "max_keepalive_requests = 0\n"


def config(port: int, crowd: Crowd, names: Sequence[str] = NAMES) -> str:
    """Hosts ``cookie.example`` and ``keyed.example``, with a pool each."""
    tables = ", ".join(crowd[name].toml() for name in names)
    text = f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{port}'\nprotocol = 'h1'\n"
    for name, balancing in (("cookie", COOKIE), ("keyed", KEYED)):
        text += f"[[listeners.routes]]\nmatch.host = '{name}.example'\npool = '{name}'\n"
        text += f"[[pools]]\nname = '{name}'\nbackends = [{tables}]\nload_balancing = {{ {balancing} }}\n"
    # Tables of routes and of pools may alternate: TOML attaches each route to the listener that came last.
    return text


class World:
    def __init__(self, directory: Path, crowd: Crowd, workers: int = 1) -> None:
        self.crowd = crowd
        self.port = free_port()
        self.gateway = Gateway(directory, config(self.port, crowd), workers=workers, runtime=RUNTIME)

    def ask(self, requests: Sequence[bytes], lanes: int = 4) -> list[Answer]:
        answers = ask(self.port, requests, lanes=lanes)
        shares(answers)
        return answers

    def new_sessions(self, number: int) -> list[Answer]:
        """The answers to so many clients without a cookie."""
        return self.ask([get("cookie.example")] * number)

    def again(self, cookies: Sequence[str]) -> list[Answer]:
        return self.ask([get("cookie.example", Cookie=f"a=b; lane={cookie}; c=d") for cookie in cookies])

    def users(self, number: int) -> list[str]:
        """The backends of so many users who are known by a field."""
        return [
            answer.name
            for answer in self.ask([get("keyed.example", X_User=f"u{at}") for at in range(number)])
        ]

    def patch(self, pool: str, backend: str, **body: object) -> None:
        """Through the admin API; workers follow a moment later."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.admin, timeout=60)
        path = f"/api/v1/pools/{pool}/backends/{backend}"
        connection.request("PATCH", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert response.status == 200, text


def cookie_of(answer: Answer) -> str:
    """The token the answer gives; empty if it gives none."""
    match = re.match(r"lane=([^;]+)", answer.header("Set-Cookie"))
    return match[1] if match else ""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Crowd(*NAMES) as crowd:
        world = World(tmp_path_factory.mktemp("sessions"), crowd)
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> Iterator[World]:
    running.crowd.calm()
    yield running
    running.crowd.calm()
    for pool in ("cookie", "keyed"):
        for name in NAMES:
            running.patch(pool, name, state="ready")
    assert running.gateway.reload(config(running.port, running.crowd))


class TestCookie:
    def test_it_is_given_once(self, world: World) -> None:
        first = world.new_sessions(1)[0]
        field = first.header("Set-Cookie")
        assert re.fullmatch(
            r"lane=[0-9a-f]{32}; Path=/app; Max-Age=600; Secure; HttpOnly; SameSite=Strict", field
        )
        again = world.again([cookie_of(first)] * 50)
        assert {answer.name for answer in again} == {first.name}
        assert not any(answer.header("Set-Cookie") for answer in again)
        assert b"lane=" in world.crowd[first.name].requests[-1][0]  # backends may read it

    def test_everybody_stays(self, world: World) -> None:
        """Over other connections, and a reload that reorders the backends."""
        first = world.new_sessions(400)
        names = [answer.name for answer in first]
        assert set(names) == set(NAMES)
        cookies = [cookie_of(answer) for answer in first]
        assert len(set(cookies)) == len(NAMES)  # they tell backends, not clients
        assert [answer.name for answer in world.again(cookies)] == names
        assert world.gateway.reload(config(world.port, world.crowd, NAMES[::-1]))
        assert [answer.name for answer in world.again(cookies)] == names

    @pytest.mark.parametrize(
        "forged", ["b1", "", '"', "0" * 32, "b1; lane=b2", "%62%31", "\xff" * 40, "x" * 4000]
    )
    def test_a_forged_one_counts_as_none(self, world: World, forged: str) -> None:
        request = f"GET / HTTP/1.1\r\nHost: cookie.example\r\nCookie: lane={forged}\r\n\r\n".encode("latin-1")
        answers = world.ask([request] * 60)
        assert len({answer.name for answer in answers}) > 1  # nobody is chosen by it
        assert all(cookie_of(answer) for answer in answers)

    def test_a_token_with_one_digit_changed(self, world: World) -> None:
        token = cookie_of(world.new_sessions(1)[0])
        wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
        answers = world.again([wrong] * 60)
        assert len({answer.name for answer in answers}) > 1
        assert all(cookie_of(answer) != wrong for answer in answers)

    def test_a_draining_backend_keeps_its_sessions(self, world: World) -> None:
        first = world.new_sessions(200)
        cookies = [cookie_of(answer) for answer in first]
        world.patch("cookie", "b2", state="draining")
        eventually(lambda: "b2" not in shares(world.new_sessions(60)), "b2 gets nobody new")
        assert "b2" not in shares(world.new_sessions(400))
        again = world.again(cookies)
        assert [answer.name for answer in again] == [answer.name for answer in first]
        assert not any(cookie_of(answer) for answer in again)
        world.patch("cookie", "b2", state="ready")
        eventually(lambda: "b2" in shares(world.new_sessions(60)), "b2 gets new ones again")

    def test_weight_0_keeps_its_sessions(self, world: World) -> None:
        first = world.new_sessions(200)
        cookies = [cookie_of(answer) for answer in first]
        world.patch("cookie", "b3", weight=0)
        eventually(lambda: "b3" not in shares(world.new_sessions(60)), "b3 gets nobody new")
        assert "b3" not in shares(world.new_sessions(400))
        assert [answer.name for answer in world.again(cookies)] == [answer.name for answer in first]

    def test_a_disabled_backend_loses_its_sessions(self, world: World) -> None:
        cookie = cookie_of(next(answer for answer in world.new_sessions(200) if answer.name == "b4"))
        world.patch("cookie", "b4", state="disabled")
        eventually(lambda: "b4" not in shares(world.again([cookie] * 40)), "b4 gets nothing")
        again = world.again([cookie] * 200)
        # Its sessions have one token in common; they are spread over all the others nevertheless.
        assert set(shares(again)) == {"b1", "b2", "b3"}
        for answer in again:
            assert world.again([cookie_of(answer)])[0].name == answer.name

    def test_sessions_of_a_backend_that_died_are_bound_anew(self, world: World) -> None:
        first = next(answer for answer in world.new_sessions(200) if answer.name == "b1")
        world.crowd.stop("b1")
        moved = world.again([cookie_of(first)])[0]
        assert moved.name != "b1"
        cookie = cookie_of(moved)
        assert cookie not in ("", cookie_of(first))
        assert {answer.name for answer in world.again([cookie] * 20)} == {moved.name}
        world.crowd.start("b1")
        assert {answer.name for answer in world.again([cookie] * 20)} == {moved.name}
        # Who did not ask meanwhile comes back to where it was.
        assert {answer.name for answer in world.again([cookie_of(first)] * 20)} == {"b1"}

    def test_two_workers_know_the_same_cookies(self, tmp_path: Path) -> None:
        with Crowd(*NAMES) as crowd:
            world = World(tmp_path, crowd, workers=2)
            with world.gateway as gateway:
                answers = world.new_sessions(100)
                pids = gateway.worker_pids()
                assert len(pids) == 2
                before = [descriptors(pid) for pid in pids]
                lanes = [Client(world.port) for _ in range(64)]
                try:
                    for answer in answers[:8]:
                        for lane in lanes:
                            lane.send(get("cookie.example", Cookie=f"lane={cookie_of(answer)}"))
                        found = [lane.response() for lane in lanes]
                        assert {body.decode() for _, _, body in found} == {answer.name}
                        assert not any("set-cookie" in headers for _, headers, _ in found)
                    # Both had their part of it.
                    after = [descriptors(pid) for pid in pids]
                    assert all(now - then >= 8 for now, then in zip(after, before, strict=True)), (
                        before,
                        after,
                    )
                finally:
                    for lane in lanes:
                        lane.sock.close()


class TestKeyed:
    def test_everybody_stays(self, world: World) -> None:
        names = world.users(300)
        assert set(names) == set(NAMES)
        assert world.users(300) == names
        assert world.gateway.reload(config(world.port, world.crowd, NAMES[::-1]))
        assert world.users(300) == names
        assert not any(
            answer.header("Set-Cookie") for answer in world.ask([get("keyed.example", X_User="u")])
        )

    def test_a_joining_backend_moves_nobody(self, world: World) -> None:
        assert world.gateway.reload(config(world.port, world.crowd, NAMES[:3]))
        eventually(lambda: "b4" not in world.users(200), "b4 has left")
        names = world.users(300)
        assert set(names) == {"b1", "b2", "b3"}
        assert world.gateway.reload(config(world.port, world.crowd))

        def is_used() -> bool:
            new = [get("keyed.example", X_User=f"new{at}") for at in range(100)]
            return "b4" in shares(world.ask(new))

        eventually(is_used, "b4 gets new ones")
        assert world.users(300) == names

    def test_a_draining_backend_keeps_its_users(self, world: World) -> None:
        names = world.users(200)
        world.patch("keyed", "b2", state="draining")
        at = 1000

        def is_left() -> bool:
            nonlocal at
            at += 100
            return "b2" not in shares(
                world.ask([get("keyed.example", X_User=f"u{n}") for n in range(at, at + 100)])
            )

        eventually(is_left, "b2 gets nobody new")
        assert world.users(200) == names

    def test_users_of_a_backend_that_died_stay_where_they_fell(self, world: World) -> None:
        names = world.users(200)
        world.crowd.stop("b1")
        moved = world.users(200)
        for before, after in zip(names, moved, strict=True):
            assert after == before if before != "b1" else after != "b1"
        # Spread over the others, not heaped on one.
        heirs = Counter(after for before, after in zip(names, moved, strict=True) if before == "b1")
        assert len(heirs) == 3, heirs
        world.crowd.start("b1")
        assert world.users(200) == moved
