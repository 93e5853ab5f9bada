"""What an operator is told, from what the kernel said."""

import errno
import socket
from ipaddress import ip_address
from pathlib import Path

import pytest

from expressgateway.l4.xdp import bpffs, devices, faults
from expressgateway.l4.xdp.faults import XdpError, check_capabilities, not_attached, refused
from expressgateway.l4.xdp.libbpf import BpfError


def error(number: int, *said: str) -> BpfError:
    return BpfError(number, "load the object", said)


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ("000001ffffffffff", []),
        ("0000000000000000", ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]),
        (f"{1 << 39 | 1 << 12:016x}", ["CAP_PERFMON"]),
        (f"{1 << 21:016x}", ["CAP_NET_ADMIN"]),  # CAP_SYS_ADMIN stands for the others
        (f"{1 << 21 | 1 << 12:016x}", []),
    ],
)
def test_missing_capabilities_are_named(
    held: str, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"Name:\tx\nCapEff:\t{held}\n")
    assert faults.missing_capabilities() == missing
    if missing:
        with pytest.raises(XdpError, match=f"lacks .*{missing[-1]}"):
            check_capabilities()
    else:
        check_capabilities()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "forbidden by the kernel"),
        (errno.ENOSYS, "this kernel has no BPF"),
        (errno.ENOMEM, "cannot load the object"),
        (errno.EINVAL, "the verifier says no"),
    ],
)
def test_what_the_kernel_refuses(number: int, words: str) -> None:
    assert words in str(refused(error(number, "the verifier says no")))


@pytest.mark.parametrize(
    ("number", "mode", "words"),
    [
        (errno.EOPNOTSUPP, "native", "e0 does not support xdp_mode = 'native'"),
        (errno.EINVAL, "native", "LRO"),
        (errno.ENODEV, "skb", "cannot be attached to the interface e0"),
        (errno.EBUSY, "native", "cannot be attached to the interface e0"),  # and nobody is there to be named
    ],
)
def test_what_an_interface_refuses(
    number: int, mode: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "attached", lambda _: {})
    assert words in str(not_attached(error(number, "underlying driver: LRO is on"), "e0", 1, mode))


def test_others_are_named_as_far_as_they_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(number: int) -> None:
        raise error(errno.EPERM)

    monkeypatch.setattr(faults, "attached", lambda _: {"native": 41})
    monkeypatch.setattr(faults, "program_info", forbidden)
    told = str(not_attached(error(errno.EBUSY), "e0", 1, "native"))
    assert "e0 has another XDP program already: program 41 (native mode)" in told
    assert "ip link set dev e0 xdp off" in told


class TestDevices:
    def test_of_lo(self) -> None:
        (place, *_) = devices.places_of("lo")
        assert (place.ifindex, place.vlan, place.mac) == (devices.ifindex_of("lo"), 0, bytes(6))

    def test_of_nobody(self) -> None:
        assert devices.ifindex_of("nope") == 0
        assert devices.mac_of("nope") is None
        assert devices.places_of("nope") == []
        assert devices.forwarding_off(["nope"], {4, 6}) == []

    def test_vlans_are_those_on_top(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        listed = tmp_path / "config"
        listed.write_text(
            "VLAN Dev name    | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n"
            "eth0.100       | 100  | eth0\nback           | 7  | eth0\neth1.5         | 5  | eth1\n"
        )
        monkeypatch.setattr(devices, "_VLANS", listed)
        assert devices.vlans_on("eth0") == [("eth0.100", 100), ("back", 7)]
        assert devices.vlans_on("eth2") == []
        monkeypatch.setattr(devices, "_VLANS", tmp_path / "there is no such module")
        assert devices.vlans_on("eth0") == []

    def test_forwarding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for family, value in (("ipv4", 1), ("ipv6", 0)):
            directory = tmp_path / "net" / family / "conf" / "eth0.7"
            directory.mkdir(parents=True)
            (directory / "forwarding").write_text(f"{value}\n")
        monkeypatch.setattr(devices, "_SYSCTL", tmp_path)
        assert devices.forwarding_off(["eth0.7"], {4}) == []
        assert devices.forwarding_off(["eth0.7"], {4, 6}) == ["net.ipv6.conf.eth0/7.forwarding"]

    def test_our_address_on_the_way(self) -> None:
        assert devices.source_towards(ip_address("127.0.0.1")) == ip_address("127.0.0.1")
        if socket.has_ipv6:
            assert devices.source_towards(ip_address("::ffff:0:1")) != ip_address("127.0.0.1")


class TestFileSystem:
    def test_another_one_is_told_of(self, tmp_path: Path) -> None:
        with pytest.raises(XdpError, match="is not on a BPF file system"):
            bpffs.prepare(tmp_path / "pins")
        assert bpffs.file_system_of(Path("/proc/self")) == "proc"

    @pytest.mark.parametrize("name", ["eth0", "eth0.100", "a%b", "a%2eb", "..."])
    def test_names_of_interfaces_are_names_of_files(self, name: str) -> None:
        assert "." not in bpffs.file_name(name)
        assert bpffs.named(bpffs.file_name(name)) == name

    def test_a_directory_has_one_master(self, tmp_path: Path) -> None:
        first, second = bpffs.Lock(tmp_path), bpffs.Lock(tmp_path)
        assert first.take()
        assert first.take()
        assert not second.take()
        first.close()
        first.close()
        assert second.take()
        second.close()
