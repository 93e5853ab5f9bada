"""The data plane against the kernel: what is attached, what is in the maps, and who takes it over.

Each test has a network namespace of its own, and a directory on the BPF file system.
"""

import contextlib
import secrets
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from expressgateway.l4.xdp import bpffs, layout, libbpf
from expressgateway.l4.xdp.attachments import detach_pinned
from expressgateway.l4.xdp.faults import XdpError, missing_capabilities
from expressgateway.l4.xdp.kernel import maps_directory
from expressgateway.l4.xdp.libbpf import Link, Map
from expressgateway.l4.xdp.plane import DataPlane
from expressgateway.l4.xdp.wanted import (
    DSR,
    TCP,
    UDP,
    Rules,
    ServerIds,
    Wanted,
    WantedBackend,
    WantedPool,
    WantedVip,
)
from tests.namespaces import Namespace

FLOWS = 1024
SIZE = 251


def why_not() -> str:
    if (why := libbpf.available()) is not None:
        return why
    if missing := missing_capabilities():
        return f"needs {' and '.join(missing)}"
    if bpffs.file_system_of(bpffs.USUAL) != "bpf":
        return "needs a BPF file system at /sys/fs/bpf"
    try:
        with Namespace("probe") as namespace:
            namespace.ip("link add x0 type veth peer name x1")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this kernel makes no network namespaces or veth pairs: {error}"
    return ""


_WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace("plane") as namespace:
        namespace.ip(
            "link add e0 type veth peer name e1",
            "link add f0 type veth peer name f1",
            "addr add 10.0.0.1/24 dev e0",
            "addr add 2001:db8::1/64 dev e0 nodad",
            *(f"link set {name} up" for name in ("e0", "e1", "f0", "f1")),
        )
        with namespace.entered():
            yield namespace


@pytest.fixture
def pins() -> Iterator[Path]:
    path = bpffs.USUAL / f"eg-plane-{secrets.token_hex(4)}"
    yield path
    if path.exists():
        detach_pinned(path)


@pytest.fixture
def plane(namespace: Namespace, pins: Path) -> Iterator[DataPlane]:
    plane = opened(pins)
    yield plane
    plane.detach()


def opened(pins: Path, *interfaces: str, mode: str = "auto", takes_over: bool = False) -> DataPlane:
    return DataPlane.open(interfaces or ("e0",), mode, pins, FLOWS, takes_over=takes_over)


def backend(number: int, **more: object) -> WantedBackend:
    return WantedBackend(f"b{number}", ip_address(f"10.0.0.{number + 10}"), 8080, **more)  # type: ignore[arg-type]


def vip(name: str = "web", port: int = 80, protocol: int = TCP, **more: object) -> WantedVip:
    address = ip_address("203.0.113.1")
    return WantedVip(name, address, port, protocol, "pool", drain_s=5.0, **more)  # type: ignore[arg-type]


def wanted(*backends: WantedBackend, vips: tuple[WantedVip, ...] = (vip(),), **more: object) -> Wanted:
    pool = WantedPool("pool", backends, SIZE, drain_s=5.0)
    return Wanted(vips, {"pool": pool}, **more)  # type: ignore[arg-type]


class Kernel:
    """What is in the maps, read by their names."""

    def __init__(self, pins: Path) -> None:
        self._pins = maps_directory(pins)

    def entries(self, name: str) -> dict[bytes, bytes]:
        with contextlib.closing(Map.pinned(self._pins / name)) as found:
            return {key: found.get(key) or b"" for key in found.keys()}  # noqa: SIM118 - a map is no dict

    def vips(self) -> dict[tuple[str, int, int], layout.Vip]:
        found = {}
        for key, value in self.entries("vips").items():
            place = layout.VipKey.from_buffer_copy(key)
            found[str(place.address), place.port, place.protocol] = layout.Vip.from_buffer_copy(value)
        return found

    def backend(self, number: int) -> layout.Backend:
        raw = self.entries("backends")[number.to_bytes(4, "little")]
        return layout.Backend.from_buffer_copy(raw)

    def numbers(self) -> dict[str, int]:
        """Of living backends, by address."""
        found = {}
        for key, raw in self.entries("backends").items():
            entry = layout.Backend.from_buffer_copy(raw)
            if entry.flags & layout.BackendFlag.BACKEND_ALIVE:
                found[str(entry.address)] = int.from_bytes(key, "little")
        return found


def owners(plane: DataPlane, name: str = "web") -> Counter[int]:
    """How many slots each number has in a VIP's table, as it was put into the kernel last."""
    held = next(each for each in plane._vips.values() if each.name == name)
    assert held.table is not None
    return Counter(held.table)


class TestAttaching:
    def test_to_several_and_away(self, namespace: Namespace, pins: Path) -> None:
        plane = opened(pins, "e0", "f0")
        assert [(one.name, one.mode) for one in plane.attachments.each.values()] == [
            ("e0", "native"),
            ("f0", "native"),
        ]
        plane.attachments.attach(("f0",), "auto")
        assert not libbpf.attached(plane.attachments.each["f0"].ifindex - 2)
        assert (pins / "link-f0").exists()
        assert not (pins / "link-e0").exists()
        plane.detach()
        assert not pins.exists()

    def test_in_another_mode(self, plane: DataPlane) -> None:
        plane.attachments.attach(("e0",), "skb")
        (one,) = plane.attachments.each.values()
        assert list(libbpf.attached(one.ifindex)) == ["skb"] == [one.mode]

    def test_a_mode_that_cannot_be_leaves_all_as_it_was(self, plane: DataPlane) -> None:
        with pytest.raises(XdpError, match=r"e0 does not support xdp_mode = 'hw'"):
            plane.attachments.attach(("e0",), "hw")
        (one,) = plane.attachments.each.values()
        assert list(libbpf.attached(one.ifindex).values()) == [plane.program_id]

    def test_an_interface_that_is_not_there_leaves_all_as_it_was(self, plane: DataPlane, pins: Path) -> None:
        with pytest.raises(XdpError, match="there is no network interface nope"):
            plane.attachments.attach(("e0", "f0", "nope"), "auto")
        assert list(plane.attachments.each) == ["e0"]
        assert not (pins / "link-f0").exists()

    def test_a_start_that_fails_leaves_nothing(self, namespace: Namespace, pins: Path) -> None:
        with pytest.raises(XdpError, match="there is no network interface nope"):
            opened(pins, "e0", "nope")
        with pytest.raises(XdpError, match="does not support"):
            opened(pins, mode="hw")
        assert not pins.exists()

    def test_somebody_elses_program_is_named(self, plane: DataPlane, pins: Path) -> None:
        other = pins.with_name(f"{pins.name}-other")
        with pytest.raises(
            XdpError, match=rf"e0 has another XDP program already: program {plane.program_id} "
        ):
            opened(other)
        assert not other.exists()

    def test_one_directory_for_one_gateway(self, plane: DataPlane, pins: Path) -> None:
        with pytest.raises(XdpError, match="another gateway has its XDP program below"):
            opened(pins, "f0")

    def test_an_interface_goes_and_comes_back(self, plane: DataPlane, namespace: Namespace) -> None:
        assert not plane.watch()
        namespace.ip("link del e0")
        assert plane.watch()
        (one,) = plane.attachments.each.values()
        assert (one.is_attached, one.fault) == (False, "the interface is gone")
        assert not plane.watch()
        namespace.ip("link add e0 type veth peer name e1", "link set e0 up", "link set e1 up")
        assert plane.watch()
        assert (one.is_attached, one.fault) == (True, "")

    def test_a_link_that_somebody_detached_is_made_again(self, plane: DataPlane, pins: Path) -> None:
        link = Link.pinned(pins / "link-e0")
        link.detach()
        link.close()
        assert plane.watch()
        (one,) = plane.attachments.each.values()
        assert list(libbpf.attached(one.ifindex).values()) == [plane.program_id]

    def test_one_that_is_gone_is_waited_for(self, plane: DataPlane, namespace: Namespace) -> None:
        namespace.ip("link del e0")
        plane.watch()
        plane.attachments.attach(("e0", "f0"), "auto")
        assert [(one.name, one.is_attached) for one in plane.attachments.each.values()] == [
            ("e0", False),
            ("f0", True),
        ]
        namespace.ip("link add e0 type veth peer name e1", "link set e0 up", "link set e1 up")
        assert plane.watch()
        assert plane.attachments.each["e0"].is_attached

    def test_maps_of_another_layout_go_with_who_used_them(self, plane: DataPlane, pins: Path) -> None:
        other = pins / "layout0"
        other.mkdir()
        plane.keep_neighbours()
        assert not other.exists()
        assert maps_directory(pins).exists()

    def test_a_name_with_a_dot(self, namespace: Namespace, pins: Path) -> None:
        namespace.ip("link set e0 name e0.x", "link set e0.x up")
        plane = opened(pins, "e0.x")
        assert (pins / "link-e0%2ex").exists()
        plane.close()
        again = opened(pins, "e0.x")
        assert again.is_adopted
        again.detach()


class TestBackends:
    def test_share_the_table_and_have_our_address(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1), backend(2, weight=3)))
        kernel = Kernel(pins)
        numbers = kernel.numbers()
        assert set(numbers) == {"10.0.0.11", "10.0.0.12"}
        entry = kernel.backend(numbers["10.0.0.11"])
        assert (str(entry.source), entry.port) == ("10.0.0.1", 8080)
        assert kernel.vips()["203.0.113.1", 80, TCP].table_size == SIZE
        shares = owners(plane)
        assert shares.total() == SIZE
        assert abs(shares[numbers["10.0.0.12"]] - SIZE * 3 / 4) < 3

    def test_one_that_is_down_has_no_slots_and_no_flows(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1), backend(2)))
        numbers = Kernel(pins).numbers()
        before = list(next(iter(plane._vips.values())).table or ())
        plane.apply(wanted(backend(1), backend(2, is_alive=False, is_open=False)))
        after = list(next(iter(plane._vips.values())).table or ())
        assert set(after) == {numbers["10.0.0.11"]}
        assert Kernel(pins).numbers() == {"10.0.0.11": numbers["10.0.0.11"]}
        plane.apply(wanted(backend(1), backend(2)))
        assert list(next(iter(plane._vips.values())).table or ()) == before
        assert Kernel(pins).numbers() == numbers

    def test_one_that_drains_keeps_its_flows(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1), backend(2, is_open=False), backend(3, weight=0, is_open=False)))
        numbers = Kernel(pins).numbers()
        assert len(numbers) == 3
        assert set(owners(plane)) == {numbers["10.0.0.11"]}

    def test_one_that_leaves_may_end_its_flows(self, plane: DataPlane, pins: Path) -> None:
        clock = Clock()
        plane._clock = clock
        plane.apply(wanted(backend(1), backend(2)))
        numbers = Kernel(pins).numbers()
        generation = Kernel(pins).backend(numbers["10.0.0.12"]).generation
        plane.apply(wanted(backend(1)))
        assert set(owners(plane)) == {numbers["10.0.0.11"]}
        assert Kernel(pins).numbers() == numbers
        clock.now_s += 4.9
        plane.expire()
        assert Kernel(pins).numbers() == numbers
        clock.now_s += 0.2
        plane.expire()
        assert set(Kernel(pins).numbers()) == {"10.0.0.11"}
        plane.apply(wanted(backend(1), backend(3)))
        assert Kernel(pins).numbers()["10.0.0.13"] == numbers["10.0.0.12"]
        assert Kernel(pins).backend(numbers["10.0.0.12"]).generation > generation

    def test_one_that_comes_back_in_time_is_the_same(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1), backend(2)))
        numbers = Kernel(pins).numbers()
        generation = Kernel(pins).backend(numbers["10.0.0.12"]).generation
        plane.apply(wanted(backend(1)))
        plane.apply(wanted(backend(2), backend(1)))
        assert Kernel(pins).numbers() == numbers
        assert Kernel(pins).backend(numbers["10.0.0.12"]).generation == generation

    def test_the_same_id_at_another_address_is_another_one(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1)))
        numbers = Kernel(pins).numbers()
        plane.apply(wanted(WantedBackend("b1", ip_address("10.0.0.99"), 8080)))
        assert Kernel(pins).numbers()["10.0.0.99"] != numbers["10.0.0.11"]

    def test_one_in_slow_start_gains(self, plane: DataPlane, pins: Path) -> None:
        clock = Clock()
        plane._clock = clock
        shares = []
        for passed_s in (0.0, 5.0, 10.0):
            clock.now_s = 1000.0 + passed_s
            young = backend(2, ramp_from_s=1000.0)
            pool = WantedPool("pool", (backend(1), young), SIZE, slow_start_s=10.0)
            plane.apply(Wanted((vip(),), {"pool": pool}))
            shares.append(owners(plane)[Kernel(pins).numbers()["10.0.0.12"]] / SIZE)
            assert plane.is_ramping is (passed_s < 10)
        assert shares == pytest.approx([0.025, 0.25, 0.5], abs=0.05)

    def test_those_it_cannot_reach_are_left_out(self, plane: DataPlane) -> None:
        nowhere = WantedBackend("far", ip_address("192.0.2.1"), 80)
        other = WantedBackend("v6", ip_address("2001:db8::9"), 80)
        plane.apply(wanted(backend(1), nowhere, other))
        assert plane.left_out == {
            ("pool", "far"): "there is no route to it",
            ("pool", "v6"): "it has other addresses than listener web",
        }
        assert len(owners(plane)) == 1

    def test_in_dsr_the_port_is_the_listeners(self, plane: DataPlane) -> None:
        plane.apply(wanted(backend(1), vips=(vip(forwarding=DSR),)))
        assert plane.left_out == {("pool", "b1"): "it has another port than listener web"}
        assert set(owners(plane)) == {0}

    def test_nobody_at_all(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted())
        assert set(owners(plane)) == {0}
        assert Kernel(pins).vips()["203.0.113.1", 80, TCP].table_size == SIZE


class TestListeners:
    def test_come_go_and_change(self, plane: DataPlane, pins: Path) -> None:
        clock = Clock()
        plane._clock = clock
        both = (vip(), vip("names", 53, UDP, is_by_address=True, forwarding="dsr_encapsulated"))
        plane.apply(wanted(backend(1), vips=both))
        vips = Kernel(pins).vips()
        assert vips["203.0.113.1", 53, UDP].flags == layout.VipFlag.VIP_BY_ADDRESS
        assert vips["203.0.113.1", 53, UDP].forwarding == layout.Forwarding.FORWARD_DSR_ENCAPSULATED
        plane.apply(wanted(backend(1), vips=both[:1]))
        assert set(Kernel(pins).vips()) == {("203.0.113.1", 80, TCP)}
        third = vip("third", 81)
        plane.apply(wanted(backend(1), vips=(both[0], third)))
        # the number of the one that left is not given away while flows of its may go on
        assert Kernel(pins).vips()["203.0.113.1", 81, TCP].number == 3
        clock.now_s += 6
        plane.expire()
        plane.apply(wanted(backend(1), vips=(both[0], third, vip("fourth", 82))))
        assert Kernel(pins).vips()["203.0.113.1", 82, TCP].number == 2

    def test_a_table_of_another_size(self, plane: DataPlane, pins: Path) -> None:
        for size in (251, 509, 11):
            pool = WantedPool("pool", (backend(1), backend(2)), size)
            plane.apply(Wanted((vip(),), {"pool": pool}))
            assert Kernel(pins).vips()["203.0.113.1", 80, TCP].table_size == size
            assert owners(plane).total() == size

    def test_server_ids(self, plane: DataPlane, pins: Path) -> None:
        backends = tuple(
            WantedBackend(id_, ip_address(f"10.0.0.{at}"), 443) for at, id_ in ((21, "0a01"), (22, "0a02"))
        )
        mode_a = vip("passthrough", 443, UDP, server_ids=ServerIds(3, 2))
        plane.apply(wanted(*backends, vips=(mode_a,)))
        entry = Kernel(pins).vips()["203.0.113.1", 443, UDP]
        assert (entry.flags, entry.config_id, entry.server_id_length) == (layout.VipFlag.VIP_SERVER_IDS, 3, 2)
        found = {
            bytes(layout.ServerId.from_buffer_copy(key).bytes)[:2]: int.from_bytes(value, "little")
            for key, value in Kernel(pins).entries("server_ids").items()
        }
        numbers = Kernel(pins).numbers()
        assert found == {b"\x0a\x01": numbers["10.0.0.21"], b"\x0a\x02": numbers["10.0.0.22"]}
        plane.apply(wanted(*backends[:1], vips=(mode_a,)))
        assert len(Kernel(pins).entries("server_ids")) == 1

    def test_while_it_closes_there_are_no_new_flows(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1), is_closing=True))
        assert Kernel(pins).vips()["203.0.113.1", 80, TCP].table_size == 0
        assert len(Kernel(pins).numbers()) == 1
        (raw,) = Kernel(pins).entries("settings").values()
        assert layout.Settings.from_buffer_copy(raw).closing_ns == 1_000_000_000


class TestRules:
    def test_settings(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(rules=Rules(7, 6, 5, 4000, 20000, 30000)))
        (raw,) = Kernel(pins).entries("settings").values()
        found = layout.Settings.from_buffer_copy(raw)
        assert (found.tcp_idle_ns, found.udp_idle_ns, found.closing_ns) == (7 * 10**9, 6 * 10**9, 5 * 10**9)
        assert (found.new_flows_per_second, found.first_port, found.last_port) == (4000, 20000, 30000)
        assert not found.denies

    def test_denied_networks_by_their_differences(self, plane: DataPlane, pins: Path) -> None:
        first = frozenset(map(ip_network, ("192.0.2.0/24", "198.51.100.7/32", "2001:db8:f::/48")))
        plane.apply(wanted(rules=Rules(denied=first)))
        assert len(Kernel(pins).entries("denied4")) == 2
        (key,) = Kernel(pins).entries("denied6")
        found = layout.Prefix6.from_buffer_copy(key)
        assert (found.length, bytes(found.bytes)[:6]) == (48, bytes.fromhex("20010db8000f"))
        plane.apply(wanted(rules=Rules(denied=frozenset(map(ip_network, ("192.0.2.0/24", "10.0.0.0/8"))))))
        keys = {
            (each.length, bytes(each.bytes)[0])
            for each in map(layout.Prefix4.from_buffer_copy, Kernel(pins).entries("denied4"))
        }
        assert keys == {(24, 192), (8, 10)}
        assert not Kernel(pins).entries("denied6")

    def test_places_are_those_of_the_interfaces(
        self, plane: DataPlane, namespace: Namespace, pins: Path
    ) -> None:
        plane.apply(wanted())
        namespace.ip("link set e0 address 02:00:00:00:00:77")
        plane.watch()
        (raw,) = Kernel(pins).entries("ports").values()
        port = layout.Port.from_buffer_copy(raw)
        assert (bytes(port.mac), port.vlan) == (bytes.fromhex("020000000077"), 0)


class TestTakingOver:
    def test_the_next_process_finds_everything(self, namespace: Namespace, pins: Path) -> None:
        want = wanted(backend(1), backend(2), rules=Rules(denied=frozenset([ip_network("192.0.2.0/24")])))
        first = opened(pins)
        first.apply(want)
        numbers, vips = Kernel(pins).numbers(), Kernel(pins).vips()
        generations = {at: Kernel(pins).backend(number).generation for at, number in numbers.items()}
        first.close()
        second = opened(pins)
        assert second.is_adopted
        ifindex = second.attachments.each["e0"].ifindex
        assert list(libbpf.attached(ifindex).values()) == [second.program_id]
        second.apply(want)
        assert Kernel(pins).numbers() == numbers
        assert Kernel(pins).vips().keys() == vips.keys()
        assert {at: Kernel(pins).backend(n).generation for at, n in numbers.items()} == generations
        second.detach()

    def test_what_is_not_wanted_any_more_leaves(self, namespace: Namespace, pins: Path) -> None:
        first = opened(pins)
        first.apply(wanted(backend(1), backend(2), vips=(vip(), vip("other", 81))))
        first.close()
        second = opened(pins)
        clock = Clock()
        second._clock = clock
        second.apply(wanted(backend(2)))
        assert set(Kernel(pins).vips()) == {("203.0.113.1", 80, TCP)}
        assert len(Kernel(pins).numbers()) == 2
        clock.now_s += 60
        second.expire()
        assert set(Kernel(pins).numbers()) == {"10.0.0.12"}
        second.detach()

    def test_from_a_process_that_still_runs(self, plane: DataPlane, pins: Path) -> None:
        plane.apply(wanted(backend(1)))
        other = opened(pins, takes_over=True)
        assert other.is_adopted
        ifindex = other.attachments.each["e0"].ifindex
        assert list(libbpf.attached(ifindex).values()) == [other.program_id]
        other.close()

    def test_in_another_mode_it_is_attached_anew(self, namespace: Namespace, pins: Path) -> None:
        opened(pins).close()
        second = opened(pins, mode="skb")
        (one,) = second.attachments.each.values()
        assert (second.is_adopted, one.mode) == (True, "skb")
        second.detach()

    def test_interfaces_that_are_not_named_any_more_are_left(self, namespace: Namespace, pins: Path) -> None:
        first = opened(pins, "e0", "f0")
        ifindex = first.attachments.each["f0"].ifindex
        first.close()
        second = opened(pins, "e0")
        assert libbpf.attached(ifindex) == {}
        second.detach()

    def test_flow_maps_of_another_size_are_made_anew(self, namespace: Namespace, pins: Path) -> None:
        opened(pins).close()
        second = DataPlane.open(("e0",), "auto", pins, 2 * FLOWS)
        assert second.status()["max_flows"] == 2 * FLOWS
        second.detach()

    def test_what_is_left_behind_can_be_removed(self, namespace: Namespace, pins: Path) -> None:
        plane = opened(pins, "e0", "f0")
        plane.apply(wanted(backend(1)))
        ifindex = plane.attachments.each["e0"].ifindex
        plane.close()
        assert detach_pinned(pins) == ["e0", "f0"]
        assert libbpf.attached(ifindex) == {}
        assert not pins.exists()


class TestSeen:
    def test_counts_and_flows_of_nothing(self, plane: DataPlane) -> None:
        plane.apply(wanted(backend(1)))
        plane.sweep()
        counts = plane.counts()
        assert counts.vips["web"].flows == 0
        assert counts.backends["pool", "b1"].in_packets == 0
        assert plane.flows == (0, 0)
        assert plane.evicted == 0
        assert plane.seen_flows(10) == []

    def test_next_hops_are_kept(self, plane: DataPlane) -> None:
        plane.apply(wanted(backend(1), backend(2)))
        assert plane.keep_neighbours() is False
        assert plane.hops == 2

    def test_another_address_of_ours_is_noticed(
        self, plane: DataPlane, namespace: Namespace, pins: Path
    ) -> None:
        want = wanted(backend(1))
        plane.apply(want)
        namespace.ip("addr del 10.0.0.1/24 dev e0", "addr add 10.0.0.2/24 dev e0")
        assert plane.keep_neighbours() is True
        plane.apply(want)
        (number,) = Kernel(pins).numbers().values()
        assert str(Kernel(pins).backend(number).source) == "10.0.0.2"


def test_it_may_be_used_by_any_thread(namespace: Namespace, pins: Path) -> None:
    """One after the other: the supervisor's own."""
    plane = opened(pins)
    done: list[str] = []

    def work() -> None:
        with namespace.entered():
            plane.apply(wanted(backend(1)))
            done.append("applied")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert done == ["applied"]
    plane.detach()
