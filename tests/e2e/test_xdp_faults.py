"""The XDP data plane under attack, and where it cannot be: a flood, denied sources, what a start refuses."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expressgateway.l4.xdp.bpffs import Lock
from tests.e2e.harness import PATIENCE_S, eventually, program
from tests.e2e.xdp_peers import Conversation, Forger, connected
from tests.e2e.xdp_site import BACKENDS, DSR, ONE_ARM, PORT, TWO_ARMS, Site, Way, config, listener
from tests.e2e.xdp_world import BPF_FS, World, XdpGateway, front, need_xdp, passing, unpin

pytestmark = need_xdp()

WAYS = (ONE_ARM, TWO_ARMS, DSR)
CONFIG = config(WAYS, versions=(4,))
MAX_FLOWS = 1024
CAP = 1000
"""New flows a second on each CPU, the lowest that can be configured."""
FLOODS = 5
FLOOD = 4000
"""SYNs in each: more than the table holds."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    runtime = (
        f"xdp_max_flows = {MAX_FLOWS}\nxdp_new_flow_cap_per_sec_per_cpu = {CAP}\n"
        f"xdp_closing_timeout_seconds = 1\nxdp_denied = ['{front(66)}/32', '{front(0x66, 6)}/128']"
    )
    text = config(WAYS, versions=(4, 6))
    with Site(tmp_path_factory.mktemp("xdp"), text, runtime=runtime) as site:
        yield site


@pytest.mark.parametrize("way", [ONE_ARM, DSR], ids=["nat", "dsr"])
def test_a_flood_of_syns_beside_good_clients(site: Site, way: Way) -> None:
    """What they have goes on, and they get new connections; what is remembered is bounded."""
    name = listener(way, "tcp", 4)
    metric = site.gateway.metric
    began, before = time.monotonic(), metric("xdp_flows_total")
    with contextlib.ExitStack() as stack:
        talking = [stack.enter_context(Conversation(site.flow(way))) for _ in range(3)]
        forger = stack.enter_context(Forger(site.world.near, site.world.gateway.mac("lan")))
        for number in range(FLOODS):
            forger.flood(way.address(4), PORT, FLOOD, first=number * FLOOD)
            with site.flow(way) as new:
                assert new.who() in BACKENDS
            for each in talking:
                each.goes_on(5)
            assert metric("xdp_flow_entries", family="ipv4") <= 2 * MAX_FLOWS

        def over_cap() -> float:
            if way is DSR:
                return metric("xdp_stateless_packets_total", listener=name)
            return metric("xdp_not_forwarded_packets_total", listener=name, reason="over_cap")

        # The rest found the queue of a wire full.
        eventually(lambda: over_cap() >= FLOODS * FLOOD / 4, "SYNs are above the cap")
        seconds = time.monotonic() - began + 2  # of the clock: the first and the last are not whole
        assert metric("xdp_flows_total") - before <= seconds * CAP * (os.cpu_count() or 1)
    eventually(lambda: metric("xdp_flow_entries", family="ipv4") < 100, "SYNs with no answer are forgotten")


@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_denied_sources(site: Site, version: int) -> None:
    """Their packets end at the interface; who has another address is served, and a reload lets them in."""
    denied = front(66 if version == 4 else 0x66, version)
    site.world.far.ip(f"addr add {denied}/{24 if version == 4 else 64} dev front{' nodad' * (version == 6)}")
    name = listener(TWO_ARMS, "tcp", version)
    heard = site.backends["a"].connections + site.backends["b"].connections
    with site.flow(TWO_ARMS, version, source=(front("far", version), 0)) as flow:
        assert flow.who() in BACKENDS
    with pytest.raises(TimeoutError):
        connected(site.world.far, TWO_ARMS.address(version), PORT, (denied, 0), patience_s=0.3)

    def drops() -> float:
        return site.gateway.metric(
            "xdp_not_forwarded_packets_total", listener=name, action="drop", reason="denied"
        )

    eventually(lambda: drops() >= 1, "they are counted")
    assert site.served_in_user_space(name) == 0
    assert heard <= site.backends["a"].connections + site.backends["b"].connections


def test_an_interface_goes_and_comes_back(site: Site) -> None:
    """Its clients are gone with it; the others' flows notice nothing, and it is attached to again."""
    gateway = site.world.gateway
    gateway.ip("link add extra type veth peer name extra-end")
    was = site.gateway._head
    site.gateway._head = was.replace("['lan', 'front']", "['lan', 'front', 'extra']")
    metric = site.gateway.metric
    try:
        assert site.gateway.reload(config(WAYS)), site.gateway.log()
        assert site.gateway.is_attached("extra")
        with site.stream(ONE_ARM) as unbroken:
            gateway.ip("link del extra")
            eventually(lambda: metric("xdp_attached", interface="extra") == 0, "it is gone")
            assert "not attached to extra any more: the interface is gone" in site.gateway.log()
            assert metric("xdp_attached", interface="lan") == 1
            gateway.ip("link add extra type veth peer name extra-end")
            eventually(lambda: metric("xdp_attached", interface="extra") == 1, "it is attached to again")
            unbroken.goes_on()
    finally:
        site.gateway._head = was
        assert site.gateway.reload(config(WAYS)), site.gateway.log()
        gateway.ip("link del extra")


def test_the_generic_mode(site: Site, tmp_path: Path) -> None:
    """Where a driver can do nothing the kernel has the program in front of its stack."""
    was = site.gateway._head
    site.gateway._head = was.replace("xdp_mode = 'native'", "xdp_mode = 'skb'")
    try:
        assert site.gateway.reload(config(WAYS)), site.gateway.log()
        assert "xdpgeneric" in site.world.gateway.show("link show lan")
        name = listener(ONE_ARM, "tcp", 4)
        before = site.counts(name)["flows"]
        with site.flow(ONE_ARM) as flow:
            flow.upload(1_000_000)
            flow.download(1_000_000)
        eventually(lambda: site.counts(name)["flows"] > before, "it is a flow of the kernel's")
    finally:
        site.gateway._head = was
        assert site.gateway.reload(config(WAYS)), site.gateway.log()


# -- what a start refuses


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        yield world


def refused(world: World, directory: Path, *before: str, runtime: str = "", **more: object) -> str:
    """What a start says that ends with an error. `before`: what runs the interpreter."""
    gateway = XdpGateway(world, directory, CONFIG, runtime=runtime, **more)  # type: ignore[arg-type]
    try:
        with world.gateway.entered():
            done = subprocess.run(
                [*before, sys.executable, "-m", "expressgateway", str(gateway.path)],
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                env={**os.environ, "LB_LOG_FORMAT": "text"},
                check=False,
            )
    finally:
        unpin(gateway.pins)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said, said
    for device in ("lan", "front"):
        assert "balance" not in world.gateway.show(f"link show {device}")
    return said


def test_without_privileges(world: World, tmp_path: Path) -> None:
    less = (program("setpriv"), "--bounding-set=-bpf,-sys_admin")
    assert "lacks CAP_BPF" in refused(world, tmp_path, *less)


def test_an_interface_that_is_not_there(world: World, tmp_path: Path) -> None:
    assert "there is no network interface nowhere" in refused(world, tmp_path, interfaces=("lan", "nowhere"))


def test_another_program_is_attached(world: World, tmp_path: Path) -> None:
    with passing(world.gateway, "lan"):
        said = refused(world, tmp_path)
    assert "the interface lan has another XDP program already: program " in said
    assert "'passing' (native mode)" in said


def test_a_mode_that_the_driver_does_not_have(world: World, tmp_path: Path) -> None:
    assert "the interface lan does not support xdp_mode = 'hw'" in refused(world, tmp_path, mode="hw")


def test_forwarding_is_off(world: World, tmp_path: Path) -> None:
    world.forwarding(False)
    try:
        said = refused(world, tmp_path)
    finally:
        world.forwarding(True)
    assert "sysctl -w net.ipv4.conf.lan.forwarding=1 net.ipv4.conf.front.forwarding=1" in said


def test_a_place_that_is_not_on_a_bpf_file_system(world: World, tmp_path: Path) -> None:
    said = refused(world, tmp_path, pins=tmp_path / "pins")
    assert f"runtime.xdp_pin_path {tmp_path}/pins is not on a BPF file system" in said


def test_somebody_elses_place(world: World, tmp_path: Path) -> None:
    """Two gateways of one machine would write into one another's maps."""
    pins = BPF_FS / f"eg-{os.getpid()}"
    pins.mkdir()
    try:
        with contextlib.closing(Lock(pins)) as lock:
            assert lock.take()
            said = refused(world, tmp_path, pins=pins)
        assert f"another gateway has its XDP program below {pins}" in said
    finally:
        unpin(pins)
