"""Real TCP and UDP through the kernel: every way, both versions of IP; the counters say what was there."""

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from expressgateway.l4.xdp.kernel import maps_directory
from expressgateway.l4.xdp.layout import Port
from expressgateway.l4.xdp.libbpf import Map
from tests.e2e.harness import PATIENCE_S, eventually
from tests.e2e.xdp_peers import Forger, forged_datagram
from tests.e2e.xdp_site import (
    BACKENDS,
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
from tests.e2e.xdp_world import front, lan, need_xdp

pytestmark = need_xdp()

BULK_BYTES = 4_000_000
EVERY_WAY = pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
BOTH_VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
HEADERS = {4: 28, 6: 48}
"""Bytes of a datagram that its contents are not."""
_AUXILIARY = (263, 8)  # SOL_PACKET, PACKET_AUXDATA
_IP_MTU_DISCOVER = 10
_IP_PMTUDISC_DONT = 0
_IP_PMTUDISC_DO = 2


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("xdp"), config()) as site:
        yield site


def seen_by_backends(site: Site, way: Way, version: int) -> str:
    """The address that a backend takes for the client."""
    if way.forwarding == "nat":
        return lan("gateway", version)
    return front("far", version) if way.is_far else lan("near", version)


@EVERY_WAY
@BOTH_VERSIONS
def test_tcp_is_byte_identical_and_counted_to_the_packet(site: Site, way: Way, version: int) -> None:
    name = listener(way, "tcp", version)
    before = site.counts(name)
    with site.flow(way, version) as flow:
        assert flow.who() in BACKENDS
        assert flow.seen_as() == seen_by_backends(site, way, version)
        flow.upload(BULK_BYTES)
        flow.download(BULK_BYTES)

        def is_counted() -> bool:
            out, back = flow.segments()
            now = site.counts(name)
            forwarded = now["in_packets"] - before["in_packets"]
            told = now["icmp_too_big"] - before["icmp_too_big"]
            answers = now["out_packets"] - before["out_packets"]
            # A packet that is too big for its outer header is the client's once more.
            return (forwarded + told, answers) == (out, back if way.forwarding == "nat" else 0)

        eventually(is_counted, "the counters agree with both ends' TCP")
        now = site.counts(name)
    assert (now["icmp_too_big"] > before["icmp_too_big"]) == (way is ENCAPSULATED)
    assert now["flows"] - before["flows"] == 1
    assert site.served_in_user_space(name) == 0


@EVERY_WAY
@BOTH_VERSIONS
def test_datagrams_of_every_size_are_counted_to_the_byte(site: Site, way: Way, version: int) -> None:
    name = listener(way, "udp", version)
    before = site.counts(name)
    asked = {each: site.backends[each].datagrams for each in BACKENDS}
    largest = 1500 - HEADERS[version] - (HEADERS[version] - 8 if way is ENCAPSULATED else 0)
    # The answer has the name and the address in front, and is to be one packet as well.
    sizes = [1, 2, 3, 63, 64, 500, 1000, largest - 60]
    with site.datagrams(way, version) as flow:
        answers = [flow.ask(b"x" * size) for size in sizes]
    assert len(set(answers)) == 1
    backend, address = answers[0]
    assert address == seen_by_backends(site, way, version)
    assert site.backends[backend].datagrams - asked[backend] == len(sizes)
    wanted = {
        "flows": 1,
        "in_packets": len(sizes),
        "in_bytes": sum(sizes) + len(sizes) * HEADERS[version],
        "out_packets": len(sizes) if way.forwarding == "nat" else 0,
    }

    def is_counted() -> bool:
        now = site.counts(name)
        return all(now[key] - before[key] == value for key, value in wanted.items())

    eventually(is_counted, f"the counters grow by {wanted}")
    assert site.served_in_user_space(name) == 0


@EVERY_WAY
@BOTH_VERSIONS
def test_both_backends_get_connections(site: Site, way: Way, version: int) -> None:
    for name, flow in site.one_of_each(way, version).items():
        with flow:
            assert flow.who() == name


@BOTH_VERSIONS
def test_a_client_that_we_did_not_write(site: Site, version: int) -> None:
    """curl, which keeps its connection for the second request."""
    host = ONE_ARM.address(version)
    url = f"http://{f'[{host}]' if version == 6 else host}:{PORT}/"
    printed = site.world.near.run("curl", "-gsS", "--max-time", "10", url, url)
    assert printed in ("aa", "bb")


def test_a_datagram_that_is_too_big_for_its_outer_header(site: Site) -> None:
    """Its sender is told how large it may be."""
    with site.datagrams(ENCAPSULATED) as flow:
        flow.who()
        flow.sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)

        def is_told() -> bool:
            try:
                flow.sock.send(b"x" * 1472)
            except OSError:
                return True
            return False

        eventually(is_told, "EMSGSIZE")
        assert flow.ask(b"x" * (1500 - 28 - 20))[0] in BACKENDS


def test_what_the_program_does_not_do_is_served_in_user_space(site: Site) -> None:
    """A datagram in fragments."""
    name = listener(ONE_ARM, "udp", 4)
    with site.datagrams(ONE_ARM) as flow:
        flow.sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        assert flow.ask(b"x" * 3000)[0] in BACKENDS
    assert site.served_in_user_space(name) == 1
    site.gateway.wait_metric("xdp_not_forwarded_packets_total", 3, action="pass", reason="fragment")


def test_an_icmp_error_follows_its_flow(site: Site) -> None:
    """A backend whose port is closed: the client of a UDP flow hears of it as if it were on the link."""
    with site.datagrams(ONE_ARM) as flow:
        name = flow.who()
        site.backends[name].close_udp()
        try:

            def is_told() -> bool:
                try:
                    flow.sock.send(b"anybody?")
                    flow.sock.settimeout(0.05)
                    flow.sock.recv(100)
                except ConnectionRefusedError:
                    return True
                except TimeoutError:
                    return False
                return False

            eventually(is_told, "the client hears that its port is closed")
            site.gateway.wait_metric("xdp_icmp_total", listener=listener(ONE_ARM, "udp", 4), kind="followed")
        finally:
            site.backends[name].open_udp()


def heard_tag(sock: socket.socket, data: bytes) -> int:
    """The VLAN of the next frame that carries ``data``; 0: it has none. The kernel takes a tag off what comes
    in and says so beside it; what goes out has it still."""
    while True:
        frame, ancillary, _, _ = sock.recvmsg(2048, 64)
        if frame.endswith(data):
            if frame[12:14] == b"\x81\0":
                return int.from_bytes(frame[14:16], "big")
            (auxiliary,) = (value for level, kind, value in ancillary if (level, kind) == _AUXILIARY)
            return int(struct.unpack_from("16xH", auxiliary)[0])


@contextlib.contextmanager
def tagged(site: Site, vlan: int) -> Iterator[None]:
    """What leaves by ``front`` carries a tag: as if routes there led to a VLAN device, which not every kernel
    can make."""
    key = struct.pack("I", site.world.gateway.ifindex("front"))
    with contextlib.closing(Map.pinned(maps_directory(site.gateway.pins) / "ports")) as ports:
        was = ports.get(key)
        assert was is not None
        port = Port.from_buffer_copy(was)
        port.vlan = vlan
        ports.set(key, bytes(port))
        try:
            yield
        finally:
            ports.set(key, was)


@pytest.mark.parametrize("vlan", [0, 42], ids=["no-tag-out", "tag-out"])
def test_tags_are_taken_off_and_put_on(site: Site, vlan: int) -> None:
    """A datagram comes in with a VLAN's tag; its answer has the one of the device that it leaves by."""
    name = listener(TWO_ARMS, "udp", 4)
    world, source_port = site.world, 7100 + vlan
    address = ("198.51.100.7", source_port)
    data = b"tagged, number %d" % vlan
    mac = ":".join(f"{byte:02x}" for byte in world.far.mac("front"))
    world.gateway.ip(
        f"neigh replace {address[0]} lladdr {mac} dev front nud permanent",
        f"route replace {address[0]} dev front",
    )
    before = site.counts(name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tagged(site, vlan))
        with world.far.entered():
            ear = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        ear.setsockopt(*_AUXILIARY, 1)
        ear.bind(("front", 3))
        ear.settimeout(PATIENCE_S)
        forger = stack.enter_context(Forger(world.far, world.gateway.mac("front"), device="front"))
        forger.send(forged_datagram(*address, TWO_ARMS.address(4), PORT, data), vlan=7)
        # The answer has the backend's name in front; what was sent is heard as well, with its own tag.
        heard = [heard_tag(ear, data), heard_tag(ear, data)]
    assert heard == [7, vlan]
    eventually(
        lambda: site.counts(name)["out_packets"] == before["out_packets"] + 1, "it is counted like any other"
    )
    assert site.counts(name)["in_packets"] == before["in_packets"] + 1
