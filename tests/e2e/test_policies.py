"""Every balancing policy, chosen by the configuration, through one running worker with real backends.

One gateway serves all: a pool for each policy, by host: ``<policy>.example``.
Clients speak for others with ``X-Forwarded-For``, because the gateway trusts 127.0.0.1. Sessions and layer 4
are in modules of their own.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Crowd, ask, get, shares
from tests.e2e.harness import Client, Gateway, eventually
from tests.ports import free_port

FIVE = {"b1": 1, "b2": 1, "b3": 1, "b4": 1, "b5": 1}
WEIGHTED = {"b1": 1, "b2": 2, "b3": 3, "b4": 4, "b5": 0}
REQUESTS = 12_000
"""Of a share of 0.4, 2 % are then 4.5 standard deviations: chance fails once in 100,000 runs."""
BY_KEY = ("maglev", "ring_hash", "rendezvous")
"""The same clients have the same shares in every run."""
DOCS = Path(__file__).parents[2] / "docs" / "policies.md"

# Pool, its policy and settings, its backends with their weights.
POOLS = {
    "round_robin": ("policy = 'round_robin'", FIVE),
    "round_robin_weighted": ("policy = 'round_robin'", {"b1": 5, "b2": 1, "b3": 1, "b4": 0}),
    "weighted_round_robin": ("policy = 'weighted_round_robin'", {"b1": 5, "b2": 1, "b3": 1, "b4": 0}),
    "random": ("policy = 'random'", {"b1": 1, "b2": 2, "b3": 3, "b4": 4, "b5": 0}),
    "weighted_random": ("policy = 'weighted_random'", WEIGHTED),
    "least_connections": ("policy = 'least_connections'", WEIGHTED),
    "least_requests": ("policy = 'least_requests'", WEIGHTED),
    "power_of_two": ("policy = 'power_of_two'", WEIGHTED),
    "maglev": ("policy = 'maglev'", WEIGHTED),
    "ring_hash": ("policy = 'ring_hash', virtual_nodes = 5000", WEIGHTED),
    "ewma": ("policy = 'ewma'", WEIGHTED),
    "session_affinity": ("policy = 'session_affinity', cookie = {}", WEIGHTED),
    "rendezvous": ("policy = 'theirs.rendezvous:Rendezvous'", WEIGHTED),
    "least_requests_held": ("policy = 'least_requests'", WEIGHTED),
    "least_connections_held": ("policy = 'least_connections'", WEIGHTED),
    "power_of_two_held": ("policy = 'power_of_two'", WEIGHTED),
    "least_connections_5": ("policy = 'least_connections'", FIVE),
    "least_requests_5": ("policy = 'least_requests'", FIVE),
    "power_of_two_5": ("policy = 'power_of_two'", FIVE),
    "ewma_5": ("policy = 'ewma', decay_ms = 100", FIVE),
    "maglev_5": ("policy = 'maglev'", FIVE),
    "ring_hash_5": ("policy = 'ring_hash'", FIVE),
    "maglev_reversed": ("policy = 'maglev'", dict(reversed(FIVE.items()))),
    "ring_hash_reversed": ("policy = 'ring_hash'", dict(reversed(FIVE.items()))),
    "maglev_header": ("policy = 'maglev', hash_key = 'header:X-User'", FIVE),
    "maglev_cookie": ("policy = 'maglev', hash_key = 'cookie:user'", FIVE),
    "maglev_path": ("policy = 'maglev', hash_key = 'path'", FIVE),
    "ring_hash_header": ("policy = 'ring_hash', virtual_nodes = 5000, hash_key = 'header:X-User'", FIVE),
    "ring_hash_cookie": ("policy = 'ring_hash', virtual_nodes = 5000, hash_key = 'cookie:user'", FIVE),
    "ring_hash_path": ("policy = 'ring_hash', hash_key = 'path'", FIVE),
}


class World:
    """The gateway and its backends; a test that changes a pool has the others left alone."""

    def __init__(self, directory: Path, crowd: Crowd) -> None:
        self.crowd = crowd
        self.port = free_port()
        self.backends: dict[str, Mapping[str, int]] = {name: pool[1] for name, pool in POOLS.items()}
        self.gateway = Gateway(
            directory, self.text(), runtime="max_keepalive_requests = 0\ntrusted_proxies = ['127.0.0.1']"
        )

    def text(self) -> str:
        text = f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{self.port}'\nprotocol = 'h1'\n"
        for name in POOLS:
            text += f"[[listeners.routes]]\nmatch.host = '{host_of(name)}'\npool = '{name}'\n"
        for name, (balancing, _) in POOLS.items():
            backends = self.backends[name].items()
            tables = ", ".join(self.crowd[member].toml(weight=weight) for member, weight in backends)
            text += f"[[pools]]\nname = '{name}'\nload_balancing = {{ {balancing} }}\nbackends = [{tables}]\n"
        return text

    def set(self, name: str, backends: Mapping[str, int]) -> None:
        """Reload with other backends in one pool."""
        self.backends[name] = backends
        assert self.gateway.reload(self.text()), self.gateway.log()

    def ask(
        self, name: str, number: int = 1, *, lanes: int = 4, window: int = 16, source: str = ""
    ) -> list[str]:
        """The names of the backends that answered so many requests from as many clients."""
        host = host_of(name)
        requests = [get(host, X_Forwarded_For=client(at)) for at in range(number)]
        return self.names(requests, lanes=lanes, window=window, source=source)

    def names(
        self, requests: Sequence[bytes], *, lanes: int = 4, window: int = 16, source: str = ""
    ) -> list[str]:
        answers = ask(self.port, requests, lanes=lanes, window=window, source=source)
        shares(answers)
        return [answer.name for answer in answers]


def host_of(name: str) -> str:
    return f"{name.replace('_', '-')}.example"


def client(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("policies")
    # Somebody else's policy is the one the documentation gives as its example.
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    package = directory / "python" / "theirs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "rendezvous.py").write_text(code[1])
    with Crowd("b1", "b2", "b3", "b4", "b5", "b6") as crowd:
        world = World(directory, crowd)
        path = os.environ.get("PYTHONPATH")
        world.gateway.environment["PYTHONPATH"] = f"{package.parent}{':' + path if path else ''}"
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> World:
    running.crowd.calm()
    return running


def assert_shares(counts: Mapping[str, int], weights: Mapping[str, int]) -> None:
    """Everybody's share of the whole is within 2 % of the whole; weight 0 has nothing."""
    total = sum(counts.values())
    of = sum(weights.values())
    for name, weight in weights.items():
        share = counts.get(name, 0) / total
        assert abs(share - weight / of) < 0.02, (name, share, counts)
        if not weight:
            assert not counts.get(name, 0)
    assert set(counts) <= set(weights)


class TestShares:
    def test_round_robin_takes_everyone_in_turn(self, world: World) -> None:
        names = world.ask("round_robin", 1000, lanes=1)
        order = names[:5]
        assert sorted(order) == sorted(FIVE)
        assert names == order * 200

    @pytest.mark.parametrize("policy", ["round_robin_weighted", "weighted_round_robin"])
    def test_smooth_turns_are_those_of_nginx(self, world: World, policy: str) -> None:
        names = world.ask(policy, 1400, lanes=1)
        assert names == ["b1", "b1", "b2", "b1", "b3", "b1", "b1"] * 200

    def test_turns_are_exact_with_many_connections(self, world: World) -> None:
        assert Counter(world.ask("weighted_round_robin", 2100, lanes=8)) == {
            "b1": 1500,
            "b2": 300,
            "b3": 300,
        }

    def test_random_looks_at_no_weight_but_0(self, world: World) -> None:
        counts = Counter(world.ask("random", REQUESTS))
        assert_shares(counts, {"b1": 1, "b2": 1, "b3": 1, "b4": 1, "b5": 0})

    @pytest.mark.parametrize(
        "policy", ["weighted_random", "maglev", "ring_hash", "session_affinity", "rendezvous"]
    )
    def test_weights_are_followed(self, world: World, policy: str) -> None:
        number = 5000 if policy in BY_KEY else REQUESTS
        assert_shares(Counter(world.ask(policy, number)), WEIGHTED)

    @pytest.mark.parametrize(
        "policy",
        [
            "least_requests",
            "power_of_two",
            "least_connections",
        ],
    )
    def test_an_idle_pool_follows_the_weights(self, world: World, policy: str) -> None:
        """Nothing is in flight when a request comes."""
        assert_shares(Counter(world.ask(policy, REQUESTS, lanes=1)), WEIGHTED)

    @pytest.mark.parametrize("policy", ["least_requests", "least_connections"])
    def test_what_is_in_flight_follows_the_weights_exactly(self, world: World, policy: str) -> None:
        assert self.in_flight(world, f"{policy}_held", 100) == {"b1": 10, "b2": 20, "b3": 30, "b4": 40}

    def test_what_is_in_flight_nearly_follows_the_weights_with_two_choices(self, world: World) -> None:
        counts = self.in_flight(world, "power_of_two_held", 100)
        for name, weight in WEIGHTED.items():
            assert abs(counts[name] - 10 * weight) <= 6, counts

    def in_flight(self, world: World, pool: str, number: int) -> Counter[str]:
        """Where requests are, none of which has been answered yet."""
        world.crowd.hold(*world.crowd.names)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(world.port)) for _ in range(number)]
            for each in clients:
                each.send(get(host_of(pool)))
            eventually(lambda: world.crowd.counts().total() == number, "every request has come")
            counts = world.crowd.counts()
            for name in world.crowd.names:
                world.crowd.release(name)
            for each in clients:
                assert each.response()[0] == 200
        return counts

    def test_latency_decides_among_those_with_weight(self, world: World) -> None:
        counts = Counter(world.ask("ewma", 2000))
        assert set(counts) == {"b1", "b2", "b3", "b4"}


class TestLoad:
    """One of five backends takes 100 ms; the others answer at once."""

    @pytest.mark.parametrize("policy", ["least_requests", "least_connections", "power_of_two", "ewma"])
    def test_a_slow_backend_is_avoided(self, world: World, policy: str) -> None:
        world.crowd["b3"].delay_s = 0.1
        counts = Counter(world.ask(f"{policy}_5", 3000, lanes=8))
        assert counts["b3"] <= 60, counts  # a fifth would be 600
        others = [counts[name] for name in FIVE if name != "b3"]
        if policy != "ewma":  # it makes a difference between the others, too
            assert min(others) > 0.7 * max(others), counts

    def test_ewma_leaves_a_slow_backend_and_comes_back(self, world: World) -> None:
        """By its latency alone: nothing else is ever in flight."""
        world.crowd["b3"].delay_s = 0.05
        eventually(lambda: "b3" in world.ask("ewma_5", 20, lanes=1), "b3 is known to be slow")
        counts = Counter(world.ask("ewma_5", 200, lanes=1))
        assert counts["b3"] <= 10, counts  # a fifth would be 40
        world.crowd["b3"].delay_s = 0.0

        def is_back() -> bool:
            return Counter(world.ask("ewma_5", 300, lanes=1))["b3"] >= 30

        eventually(is_back, "b3 has its share again")


KEYS = ["client_ip", "header", "cookie", "path"]


def keyed(kind: str, host: str, number: int) -> bytes:
    """A request of the client with this number, told by the key of this kind and by nothing else."""
    match kind:
        case "client_ip":
            return get(host, X_Forwarded_For=f"{client(number)}, 127.0.0.1", X_User="somebody")
        case "header":
            return get(host, X_User=f"user {number}")
        case "cookie":
            return get(host, Cookie=f"xuser=nobody; user=u{number}; a={number % 3}")
        case _:
            return get(host, f"/item/{number}?random={os.urandom(4).hex()}")


class TestKeys:
    @pytest.mark.parametrize("kind", KEYS)
    @pytest.mark.parametrize("policy", ["maglev", "ring_hash"])
    def test_a_key_has_its_backend(self, world: World, policy: str, kind: str) -> None:
        """Asked in another order, over other connections, and after a reload that reorders the backends."""
        pool = f"{policy}_5" if kind == "client_ip" else f"{policy}_{kind}"
        requests = [keyed(kind, host_of(pool), number) for number in range(500)]
        before = world.names(requests, lanes=8)
        assert set(before) == set(FIVE)
        assert world.names(requests[::-1], lanes=3, window=5) == before[::-1]
        world.set(pool, dict(reversed(FIVE.items())))
        assert world.names(requests) == before
        assert world.gateway.metric("config_last_reload_successful") == 1

    @pytest.mark.parametrize("policy", ["maglev", "ring_hash"])
    def test_the_order_of_the_file_is_of_no_account(self, world: World, policy: str) -> None:
        """Another pool, with the same ids the other way round, whose table was never another one."""
        assert world.ask(f"{policy}_reversed", 1000) == world.ask(f"{policy}_5", 1000)

    @pytest.mark.parametrize("kind", ["header", "cookie"])
    @pytest.mark.parametrize("policy", ["maglev", "ring_hash"])
    def test_without_the_key_chance_decides(self, world: World, policy: str, kind: str) -> None:
        pool = f"{policy}_{kind}"
        requests = [get(host_of(pool), Cookie="xuser=1; other=2")] * 7000
        assert_shares(Counter(world.names(requests)), FIVE)

    def test_a_client_cannot_choose_its_address(self, world: World) -> None:
        """127.0.0.2 is no trusted proxy: what it says of others is not believed."""
        assert len(set(world.ask("maglev_5", 200, source="127.0.0.2"))) == 1
        assert len(set(world.ask("maglev_5", 200, source="127.0.0.1"))) == 5


class TestRemapping:
    """2,000 clients and five backends, of which one leaves, or which one joins, by a reload."""

    @pytest.fixture(params=["maglev_5", "ring_hash_5"])
    def pool(self, request: pytest.FixtureRequest, world: World) -> Iterator[str]:
        pool: str = request.param
        world.set(pool, FIVE)
        yield pool
        world.set(pool, FIVE)

    def stayed(self, before: Sequence[str], after: Sequence[str], left_out: str) -> float:
        pairs = [pair for pair in zip(before, after, strict=True) if left_out not in pair]
        return sum(one == other for one, other in pairs) / len(pairs)

    def test_one_leaves(self, world: World, pool: str) -> None:
        before = world.ask(pool, 2000)
        world.set(pool, {name: 1 for name in FIVE if name != "b3"})
        during = world.ask(pool, 2000)  # while the new table is built, in part
        after = world.ask(pool, 2000)
        assert "b3" not in during
        assert self.stayed(before, during, "b3") > 0.97
        stayed = self.stayed(before, after, "b3")
        assert stayed == 1 if pool == "ring_hash_5" else stayed > 0.97
        heirs = Counter(new for old, new in zip(before, after, strict=True) if old == "b3")
        assert len(heirs) == 4
        assert max(heirs.values()) < 0.4 * heirs.total(), heirs

    def test_one_joins(self, world: World, pool: str) -> None:
        before = world.ask(pool, 2000)
        world.set(pool, {**FIVE, "b6": 1})
        eventually(lambda: "b6" in world.ask(pool, 500), "the new table is in use")
        after = world.ask(pool, 2000)
        assert abs(after.count("b6") / 2000 - 1 / 6) < 0.04
        stayed = self.stayed(before, after, "b6")
        assert stayed == 1 if pool == "ring_hash_5" else stayed > 0.97
        world.set(pool, FIVE)
        eventually(lambda: world.ask(pool, 500) == before[:500], "everybody is back")
        assert world.ask(pool, 2000) == before
