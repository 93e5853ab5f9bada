"""Balancing policies on the listeners ``tcp`` and ``udp``: real connections and flows, from many addresses.

Any address of 127.0.0.0/8 may be a client's: that is how one machine is many clients.
"""

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.backend_crowd import Crowd, get
from tests.e2e.harness import PATIENCE_S, Client, Gateway, eventually
from tests.ports import free_port

NAMES = ("b1", "b2", "b3", "b4")
SOURCES = [f"127.0.{number // 100 + 1}.{number % 100 + 1}" for number in range(60)]

LISTENERS = {
    "tcp_turns": ("tcp", "policy = 'round_robin'", (1, 1, 1, 0)),
    "tcp_smooth": ("tcp", "policy = 'weighted_round_robin'", (5, 1, 1, 0)),
    "tcp_least": ("tcp", "policy = 'least_connections'", (1, 2, 3, 0)),
    "tcp_least_even": ("tcp", "policy = 'least_connections'", (1, 1, 1, 1)),
    "tcp_maglev": ("tcp", "policy = 'maglev'", (1, 1, 1, 1)),
    "tcp_affinity": ("tcp", "policy = 'session_affinity', hash_key = 'client_ip'", (1, 1, 1, 1)),
    "udp_maglev": ("udp", "policy = 'maglev'", (1, 1, 1, 1)),
    "udp_smooth": ("udp", "policy = 'weighted_round_robin'", (5, 1, 1, 0)),
}


class World:
    def __init__(self, directory: Path, crowd: Crowd) -> None:
        self.crowd = crowd
        self.ports = {name: free_port() for name in LISTENERS}
        self.gateway = Gateway(directory, self.text(), runtime="drain_timeout_ms = 100")
        self.is_reversed = False

    def reorder(self) -> None:
        """Reload with every list of backends turned round."""
        self.is_reversed = not self.is_reversed
        assert self.gateway.reload(self.text(is_reversed=self.is_reversed)), self.gateway.log()

    def text(self, *, is_reversed: bool = False) -> str:
        text = ""
        for name, (protocol, balancing, weights) in LISTENERS.items():
            tables = [
                self.crowd[member].toml(weight=weight) for member, weight in zip(NAMES, weights, strict=True)
            ]
            if is_reversed:
                tables.reverse()
            text += (
                f"[[listeners]]\nname = '{name}'\naddress = '127.0.0.1:{self.ports[name]}'\n"
                f"protocol = '{protocol}'\nbackends = [{', '.join(tables)}]\n"
                f"load_balancing = {{ {balancing} }}\n"
            )
        return text

    def connect(self, listener: str, source: str = "") -> tuple[Client, str]:
        """A connection that has been served, and by whom."""
        client = Client(self.ports[listener], source=source)
        client.send(get())
        return client, client.response()[2].decode()

    def once(self, listener: str, source: str = "") -> str:
        client, name = self.connect(listener, source)
        with client:
            return name

    def flow(self, listener: str, source: str = "127.0.0.1") -> tuple[socket.socket, str]:
        """A new flow, and who answers to it. A port that was closed may be had again: that is an old flow."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((source, 0))
        sock.settimeout(PATIENCE_S)
        sock.connect(("127.0.0.1", self.ports[listener]))
        sock.send(b"who?")
        return sock, sock.recv(100).decode()

    def datagram(self, listener: str, source: str = "127.0.0.1") -> str:
        """Who answers to an address, where that does not depend on its port."""
        sock, name = self.flow(listener, source)
        sock.close()
        return name


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Crowd(*NAMES) as crowd:
        world = World(tmp_path_factory.mktemp("l4"), crowd)
        with world.gateway:
            yield world


@pytest.fixture
def world(running: World) -> Iterator[World]:
    running.crowd.calm()
    yield running
    running.crowd.calm()
    if running.is_reversed:
        running.reorder()


class TestTcp:
    def test_turns_are_exact(self, world: World) -> None:
        names = [world.once("tcp_turns") for _ in range(90)]
        assert sorted(names[:3]) == ["b1", "b2", "b3"]
        assert names == names[:3] * 30

    def test_smooth_turns_are_exact(self, world: World) -> None:
        names = [world.once("tcp_smooth") for _ in range(70)]
        assert names == ["b1", "b1", "b2", "b1", "b3", "b1", "b1"] * 10

    def test_open_connections_follow_the_weights(self, world: World) -> None:
        """Exactly, and again after those of one backend have gone."""
        with contextlib.ExitStack() as stack:
            clients = [world.connect("tcp_least") for _ in range(60)]
            for client, _ in clients:
                stack.enter_context(client)
            assert Counter(name for _, name in clients) == {"b1": 10, "b2": 20, "b3": 30}
            for client, name in clients:
                if name == "b3":
                    client.sock.close()
            eventually(
                lambda: world.gateway.metric("backend_inflight", pool="tcp_least", backend="b3") == 0,
                "those of b3 are gone",
            )
            more = [world.connect("tcp_least") for _ in range(30)]
            for client, _ in more:
                stack.enter_context(client)
            assert Counter(name for _, name in more) == {"b3": 30}

    def test_a_backend_that_keeps_its_connections_is_avoided(self, world: World) -> None:
        """b2 does not answer, so its connections stay while all others end."""
        world.crowd.hold("b2")
        with contextlib.ExitStack() as stack:
            stuck = 0
            for _ in range(100):
                client = stack.enter_context(Client(world.ports["tcp_least_even"]))
                before = world.crowd.counts()
                client.send(get())
                eventually(lambda before=before: world.crowd.counts() != before, "somebody was asked")  # type: ignore[misc]
                if world.crowd.counts()["b2"] > before["b2"]:
                    stuck += 1
                else:
                    client.response()
                    client.sock.close()
            assert 1 <= stuck <= 10, stuck  # whose turn it is when all the others have one, too
            world.crowd.release("b2")

    @pytest.mark.parametrize("listener", ["tcp_maglev", "tcp_affinity"])
    def test_an_address_has_its_backend(self, world: World, listener: str) -> None:
        before = [world.once(listener, source) for source in SOURCES]
        assert set(before) == set(NAMES)
        assert [world.once(listener, source) for source in SOURCES] == before
        world.reorder()
        assert [world.once(listener, source) for source in SOURCES] == before

    @pytest.mark.parametrize("listener", ["tcp_maglev", "tcp_affinity"])
    def test_addresses_of_a_dead_backend_fall_to_all_others(self, world: World, listener: str) -> None:
        before = [world.once(listener, source) for source in SOURCES]
        world.crowd.stop("b2")
        after = [world.once(listener, source) for source in SOURCES]
        for one, other in zip(before, after, strict=True):
            assert other == one if one != "b2" else other != "b2"
        assert len({other for one, other in zip(before, after, strict=True) if one == "b2"}) == 3
        world.crowd.start("b2")
        again = [world.once(listener, source) for source in SOURCES]
        # A session stays where it fell; a hash goes back.
        assert again == (after if listener == "tcp_affinity" else before)


class TestUdp:
    def test_turns_are_exact(self, world: World) -> None:
        """By flow: each has a port of its own."""
        with contextlib.ExitStack() as keep:
            names = []
            for _ in range(70):
                sock, name = world.flow("udp_smooth")
                keep.enter_context(sock)
                names.append(name)
        assert names == ["b1", "b1", "b2", "b1", "b3", "b1", "b1"] * 10

    def test_a_flow_stays(self, world: World) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(("127.0.0.1", world.ports["udp_smooth"]))
            names = set()
            for _ in range(50):
                sock.send(b"who?")
                names.add(sock.recv(100))
            assert len(names) == 1

    def test_an_address_has_its_backend(self, world: World) -> None:
        """Whatever its port, and whatever the order in the file."""
        before = [world.datagram("udp_maglev", source) for source in SOURCES]
        assert set(before) == set(NAMES)
        assert [world.datagram("udp_maglev", source) for source in SOURCES] == before
        world.reorder()
        assert [world.datagram("udp_maglev", source) for source in SOURCES] == before

    def test_both_layers_agree(self, world: World) -> None:
        """The key is the address, so an address has one backend on both."""
        assert [world.datagram("udp_maglev", source) for source in SOURCES] == [
            world.once("tcp_maglev", source) for source in SOURCES
        ]
