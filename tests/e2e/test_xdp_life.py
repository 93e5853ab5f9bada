"""What becomes of flows in the kernel when backends, configurations and gateways come and go."""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import eventually
from tests.e2e.xdp_peers import Conversation, Crowd, Datagrams, Flow
from tests.e2e.xdp_site import (
    BACKENDS,
    DSR,
    ENCAPSULATED,
    ONE_ARM,
    PORT,
    TWO_ARMS,
    WAYS,
    Site,
    Way,
    config,
    listener,
)
from tests.e2e.xdp_world import authority, front, lan, need_xdp

pytestmark = need_xdp()

CONFIG = config(versions=(4,))
FLOWS = 2000
TOLERANCE = 0.05
"""Of all flows: how far a backend's part may be from its weight's. Four times the spread of chance."""
CROWD = "10.80.0.0/16"
CROWD_PORT = 7001
CROWD_SIZE = 1000

EVERY_FORWARDING = pytest.mark.parametrize(
    "way", [TWO_ARMS, DSR, ENCAPSULATED], ids=["nat", "dsr", "encapsulated"]
)
_first_ports = itertools.count(20_000, FLOWS)
"""Of flows that are all to be new."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("xdp"), CONFIG, runtime="xdp_closing_timeout_seconds = 1") as site:
        yield site


def spread(site: Site) -> Counter[str]:
    """Who gets new flows."""
    counts: Counter[str] = Counter()
    first = next(_first_ports)
    for port in range(first, first + FLOWS):
        with Datagrams(site.world.near, ONE_ARM.address(4), PORT, source_port=port) as flow:
            counts[flow.who()] += 1
    return counts


@contextlib.contextmanager
def many(site: Site, way: Way, count: int = 20) -> Iterator[list[tuple[Flow | Datagrams, str]]]:
    """Flows of both protocols, and whose they are."""
    with contextlib.ExitStack() as stack:
        flows: list[Flow | Datagrams] = [stack.enter_context(site.flow(way)) for _ in range(count)]
        flows += [stack.enter_context(site.datagrams(way)) for _ in range(count)]
        found = [(flow, flow.who()) for flow in flows]
        assert {name for _, name in found} == set(BACKENDS)
        yield found


@EVERY_FORWARDING
def test_a_backend_dies(site: Site, way: Way) -> None:
    """Flows to the other one notice nothing; new ones go there as soon as health says so."""
    flows = site.one_of_each(way)
    with flows["a"] as dying, Conversation(flows["b"]) as other:
        site.backends["a"].stop()
        try:
            assert dying.is_reset()
            site.eventually_healthy("b")
            for _ in range(20):
                with site.flow(way) as flow, site.datagrams(way) as datagrams:
                    assert (flow.who(), datagrams.who()) == ("b", "b")
            other.goes_on()
        finally:
            site.backends["a"].start()
        site.eventually_healthy(*BACKENDS)
        other.goes_on()
        for flow in site.one_of_each(way).values():
            flow.close()


def test_a_host_vanishes(site: Site) -> None:
    """Nobody resets anything. Who talks TCP with it is told as soon as health says that it is gone; a UDP
    flow goes to the other one."""
    flows = site.one_of_each(ONE_ARM)
    with flows["a"] as one, flows["b"] as other, site.datagrams(ONE_ARM) as datagrams:
        gone = datagrams.who()
        (left,) = set(BACKENDS) - {gone}
        dying, living = (one, other) if gone == "a" else (other, one)
        site.world[gone].ip("link set lan down")
        try:
            site.eventually_healthy(left)
            assert dying.is_reset()
            assert datagrams.who() == left
            assert living.who() == left
        finally:
            site.world[gone].ip("link set lan up")
            # What a device loses with its link.
            site.world[gone].ip(f"addr replace {lan(gone, 6)}/64 dev lan nodad")
    site.eventually_healthy(*BACKENDS)
    site.resolve()


def test_a_drained_backend_keeps_what_it_has(site: Site) -> None:
    command = ("--config", str(site.gateway.path))
    with many(site, ONE_ARM) as flows:
        site.gateway.command("backend", "drain", "v4", "a", *command)
        site.eventually_healthy("b")
        assert spread(site) == {"b": FLOWS}
        assert [flow.who() for flow, _ in flows] == [name for _, name in flows]
        site.gateway.command("backend", "enable", "v4", "a", *command)
        site.eventually_healthy(*BACKENDS)
        assert spread(site)["a"] > 0
        assert [flow.who() for flow, _ in flows] == [name for _, name in flows]


def test_weights_change_with_a_reload(site: Site) -> None:
    """New flows go by them; those there are stay where they are."""
    with many(site, ONE_ARM) as flows, site.stream(ONE_ARM) as unbroken:
        for weights in ({"a": 1, "b": 3}, {"a": 4, "b": 1}, {"a": 1, "b": 1}):
            assert site.gateway.reload(config(versions=(4,), weights=weights))
            site.eventually_healthy(*BACKENDS)
            unbroken.goes_on()
            counts = spread(site)
            part = weights["a"] / sum(weights.values())
            assert counts["a"] / FLOWS == pytest.approx(part, abs=TOLERANCE)
            assert [flow.who() for flow, _ in flows] == [name for _, name in flows]
    assert len(unbroken.names) == 1


def crowd(*, first: int, weights: tuple[int, ...] = (1,)) -> str:
    """Another listener, with a thousand backends from one of the network's addresses on."""
    turns = itertools.cycle(weights)
    backends = ", ".join(
        f"{{ address = '10.80.{number // 250}.{number % 250 + 1}:{CROWD_PORT}', weight = {next(turns)} }}"
        for number in range(first, first + CROWD_SIZE)
    )
    return CONFIG + (
        f"[[listeners]]\nname = 'crowd'\nprotocol = 'udp'\nxdp = true\nbackends = [{backends}]\n"
        f"address = '{authority(ONE_ARM.address(4), CROWD_PORT)}'\n"
        "load_balancing = { policy = 'maglev' }\ndrain_timeout_ms = 30000\n"
    )


def test_a_thousand_backends_are_swapped_without_a_lost_packet(site: Site) -> None:
    """Streams and newcomers while weights change, half of the backends, and all of them. Flows stay where
    they are: backends that leave have time to drain."""
    site.world.gateway.ip(f"route add {CROWD} via {lan('b')}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(Crowd(site.world.b, CROWD, CROWD_PORT))
        assert site.gateway.reload(crowd(first=0)), site.gateway.log()
        streams = [stack.enter_context(site.stream(ONE_ARM, CROWD_PORT, pause_s=0.002)) for _ in range(4)]
        newcomers = stack.enter_context(site.newcomers(ONE_ARM, CROWD_PORT, first_source_port=10_000))
        for text in (
            crowd(first=0, weights=(1, 5, 2)),
            crowd(first=CROWD_SIZE // 2),
            crowd(first=2 * CROWD_SIZE),
            crowd(first=0),
        ):
            assert site.gateway.reload(text), site.gateway.log()
            newcomers.goes_on()
            for each in streams:
                each.goes_on()
        assert site.served_in_user_space("crowd") == 0
        assert len(newcomers.answers) > 50
    assert all(len(each.names) == 1 for each in streams)
    assert site.gateway.reload(CONFIG), site.gateway.log()


def shown(site: Site, *command: str) -> dict[str, Any]:
    """What a command of ``expressgateway xdp`` says."""
    printed = site.gateway.command("xdp", *command, "--config", str(site.gateway.path), "--json")
    found: dict[str, Any] = json.loads(printed)
    return found


def test_what_has_ended_is_forgotten(site: Site) -> None:
    """FIN from both sides, and RST from either; what is open stays, and all of it is shown."""
    name = listener(TWO_ARMS, "tcp", 4)

    def ports() -> dict[int, dict[str, Any]]:
        """What is known of flows of this listener, by the client's port."""
        flows = shown(site, "flows", "--limit", "10000")["flows"]
        return {int(flow["client"].rpartition(":")[2]): flow for flow in flows if flow["listener"] == name}

    ended = site.gateway.metric("xdp_flows_ended_total")
    with site.flow(TWO_ARMS) as stays:
        backend = stays.who()
        port = stays.sock.getsockname()[1]
        gone = []
        for end in (Flow.close, Flow.reset, Flow.have_reset):
            flow = site.flow(TWO_ARMS)
            flow.who()
            gone.append(flow.sock.getsockname()[1])
            end(flow)
            flow.close()
        eventually(lambda: site.gateway.metric("xdp_flows_ended_total") >= ended + 3, "they are forgotten")
        eventually(lambda: not ports().keys() & set(gone), "and not shown any more")
        known = ports()[port]
        assert (known["backend"], known["state"], known["forwarding"]) == (backend, "open", "nat")
        assert known["client"] == f"{front('far')}:{port}"
        assert known["source"] == " ".join(stays.ask("who").split()[1:]).replace(" ", ":")
        assert site.served_in_user_space(name) == 0


def test_the_command_agrees_with_the_metrics(site: Site) -> None:
    """To the packet, once nothing moves."""
    with site.flow(ONE_ARM) as flow:
        flow.upload(100_000)
        status = shown(site, "status")
        assert status["state"] == "attached"
        for each in status["listeners"]:
            counts = site.counts(each["name"])
            for key in ("flows", "in_packets", "out_packets", "in_bytes", "out_bytes"):
                assert each[key] == counts[key], (each["name"], key)


def test_an_upgrade_loses_nothing(site: Site) -> None:
    """Another process takes over: packets of flows, and new flows, meanwhile."""
    flows = site.one_of_each(DSR)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(site.stream(way)) for way in WAYS]
        conversations = [stack.enter_context(Conversation(flow)) for flow in flows.values()]
        newcomers = stack.enter_context(site.newcomers(ONE_ARM, first_source_port=10_000))
        held = stack.enter_context(many(site, TWO_ARMS))
        site.gateway.upgrade()
        newcomers.goes_on()
        for each in streams:
            each.goes_on()
        for conversation in conversations:
            conversation.goes_on()
        assert [flow.who() for flow, _ in held] == [name for _, name in held]
    assert all(len(each.names) == 1 for each in streams)


def test_flows_outlive_a_supervisor_that_is_killed(site: Site) -> None:
    """Nothing in user space is left for a while; the next process takes over what there is."""
    gateway = site.gateway
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(site.stream(way)) for way in (TWO_ARMS, DSR)]
        newcomers = stack.enter_context(site.newcomers(ONE_ARM, first_source_port=15_000))
        held = stack.enter_context(many(site, TWO_ARMS))
        gateway.kill()
        newcomers.goes_on()
        assert [flow.who() for flow, _ in held] == [name for _, name in held]
        gateway.restart()
        site.eventually_healthy(*BACKENDS)
        newcomers.goes_on()
        for each in streams:
            each.goes_on()
        assert [flow.who() for flow, _ in held] == [name for _, name in held]
        assert site.served_in_user_space() == 0
    assert all(len(each.names) == 1 for each in streams)


def served_by_workers(site: Site) -> None:
    """Everything goes on as on any other listener."""
    eventually(lambda: not site.gateway.is_attached("lan"), "the program is gone")
    assert not site.gateway.pins.exists()
    name = listener(ONE_ARM, "tcp", 4)
    before = site.served_in_user_space(name)
    with site.flow(ONE_ARM) as flow:
        flow.upload(1_000_000)
        flow.download(1_000_000)
    assert site.served_in_user_space(name) == before + 1
    with site.datagrams(TWO_ARMS) as datagrams:
        assert datagrams.who() in BACKENDS


def served_by_the_kernel(site: Site) -> None:
    assert site.gateway.is_attached("lan")
    before = site.served_in_user_space()
    with site.datagrams(ONE_ARM) as datagrams, site.flow(TWO_ARMS) as flow:
        assert {datagrams.who(), flow.who()} <= set(BACKENDS)
    assert site.served_in_user_space() == before


def test_turned_off_and_on_by_reloads(site: Site) -> None:
    served_by_the_kernel(site)
    site.gateway._head = site.gateway._head.replace("xdp_enabled = true", "xdp_enabled = false")
    try:
        assert site.gateway.reload(CONFIG), site.gateway.log()
        served_by_workers(site)
    finally:
        site.gateway._head = site.gateway._head.replace("xdp_enabled = false", "xdp_enabled = true")
    assert site.gateway.reload(CONFIG), site.gateway.log()
    served_by_the_kernel(site)


def test_detached_by_an_operator(site: Site) -> None:
    """Until the file is read again."""
    printed = site.gateway.command("xdp", "detach", "--config", str(site.gateway.path))
    assert printed.startswith("detached: ")
    served_by_workers(site)
    assert site.gateway.reload(CONFIG), site.gateway.log()
    served_by_the_kernel(site)


def test_what_a_killed_gateway_left_is_removed(site: Site) -> None:
    site.gateway.kill()
    assert site.gateway.is_attached("lan")
    printed = site.gateway.command("xdp", "detach", "--config", str(site.gateway.path))
    assert printed.startswith("detached from front, lan; ")
    assert not site.gateway.is_attached("lan")
    assert not site.gateway.pins.exists()
    site.gateway.restart()
    served_by_the_kernel(site)
