"""The maps' layout in Python is the header's; and a difference is seen."""

import ctypes
import re
from ipaddress import IPv4Address, IPv6Address

import pytest

from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import LayoutError, Reason
from expressgateway.l4.xdp.libbpf import Object, Struct, Types
from tests.l4.xdp.world import OBJECT

HEADER = (OBJECT.parent / "layout.h").read_text()


@pytest.fixture(scope="module")
def types() -> Types:
    with Object.open(OBJECT) as committed:
        return committed.types()


class Pretended:
    """An object that says something else."""

    path = OBJECT

    def __init__(self, types: Types) -> None:
        self._types = types

    def types(self) -> Types:
        return self._types


def refusal(types: Types) -> str:
    with pytest.raises(LayoutError) as caught:
        layout.check(Pretended(types))  # type: ignore[arg-type]
    return str(caught.value)


def test_every_struct_and_enum_of_the_header_is_here() -> None:
    assert set(re.findall(r"^struct (\w+) {", HEADER, re.MULTILINE)) == layout.STRUCTS.keys()
    assert set(re.findall(r"^enum (\w+) {", HEADER, re.MULTILINE)) == layout.ENUMS.keys()


@pytest.mark.parametrize(("name", "value"), re.findall(r"^#define (\w+) (\d+)", HEADER, re.MULTILINE))
def test_every_number_of_the_header_is_here(name: str, value: str) -> None:
    assert getattr(layout, name) == int(value)


def test_the_first_reason_to_drop_is_the_header_s() -> None:
    found = re.search(r"^#define FIRST_DROP (\w+)", HEADER, re.MULTILINE)
    assert found is not None
    assert found[1] == layout.FIRST_DROP.name


def test_another_size_is_seen(types: Types) -> None:
    vip = types.structs["vip"]
    other = types._replace(structs=types.structs | {"vip": Struct(vip.size + 4, vip.offsets)})
    assert "struct vip" in refusal(other)
    assert f"{vip.size + 4} bytes" in refusal(other)


@pytest.mark.parametrize("name", layout.STRUCTS)
def test_a_member_elsewhere_is_seen(types: Types, name: str) -> None:
    struct = types.structs[name]
    moved = {member: at + 1 for member, at in struct.offsets.items()}
    assert f"struct {name}" in refusal(
        types._replace(structs=types.structs | {name: Struct(struct.size, moved)})
    )
    more = struct.offsets | {"another": 0}
    assert "another" in refusal(types._replace(structs=types.structs | {name: Struct(struct.size, more)}))


@pytest.mark.parametrize("name", layout.ENUMS)
def test_another_number_is_seen(types: Types, name: str) -> None:
    numbers = types.enums[name]
    for each in numbers:
        other = types._replace(enums=types.enums | {name: numbers | {each: 99}})
        assert each in refusal(other)
    assert "NEW" in refusal(types._replace(enums=types.enums | {name: numbers | {"NEW": 50}}))


def test_what_an_object_does_not_tell_is_seen(types: Types) -> None:
    without = {name: struct for name, struct in types.structs.items() if name != "flow"}
    assert "nothing about struct flow" in refusal(types._replace(structs=without))
    rest = {name: numbers for name, numbers in types.enums.items() if name != "reason"}
    assert "nothing about enum reason" in refusal(types._replace(enums=rest))


class TestAddresses:
    @pytest.mark.parametrize("text", ["0.0.0.0", "192.0.2.1", "255.255.255.255", "::", "::1", "2001:db8::1"])
    def test_there_and_back(self, text: str) -> None:
        packed = layout.address_bytes(text)
        assert len(packed) == 16
        assert str(layout.ip_of(packed)) == text
        assert str(layout.address_of(text)) == text
        assert bytes(layout.address_of(text)) == packed

    def test_ipv4_is_mapped(self) -> None:
        assert layout.address_bytes(IPv4Address("192.0.2.1")) == IPv6Address("::ffff:192.0.2.1").packed

    def test_ports_are_in_network_byte_order(self) -> None:
        key = layout.VipKey(port=0x1234)
        assert key.port == 0x1234
        assert bytes(key)[16:18] == b"\x12\x34"

    @pytest.mark.parametrize(("source", "size"), [("192.0.2.1", 16), ("2001:db8::1", 40)])
    def test_keys_of_flows(self, source: str, size: int) -> None:
        one = layout.Tuple(
            source=layout.address_of(source), destination=layout.address_of(source), source_port=1,
            destination_port=2, protocol=17, backend=3,
        )  # fmt: skip
        key = layout.key_of(one)
        assert len(key) == size
        assert bytes(layout.tuple_of(key)) == bytes(one)


def test_bytes_become_fields() -> None:
    port = layout.Port(ifindex=3, vlan=7, mac=layout.octets(b"\2\0\0\0\0\1"))
    assert bytes(port) == b"\3\0\0\0\7\0\2\0\0\0\0\1"
    assert bytes(port.mac) == b"\2\0\0\0\0\1"


def test_sizes_are_those_of_maps() -> None:
    """By which pinned maps are told apart."""
    with Object.open(OBJECT) as committed:
        shapes = committed.map_shapes()
    for name, key, value in (
        ("vips", layout.VipKey, layout.Vip),
        ("flows4", layout.Tuple4, layout.Flow),
        ("flows6", layout.Tuple, layout.Flow),
        ("denied4", layout.Prefix4, ctypes.c_uint8),
        ("denied6", layout.Prefix6, ctypes.c_uint8),
        ("server_ids", layout.ServerId, ctypes.c_uint32),
        ("ports", ctypes.c_uint32, layout.Port),
        ("backends", ctypes.c_uint32, layout.Backend),
        ("settings", ctypes.c_uint32, layout.Settings),
        ("vip_counts", ctypes.c_uint32, layout.VipCount),
        ("backend_counts", ctypes.c_uint32, layout.BackendCount),
        ("rates", ctypes.c_uint32, layout.Rate),
    ):
        assert shapes[name][:2] == (ctypes.sizeof(key), ctypes.sizeof(value)), name
    assert shapes["vips"].max_entries == shapes["tables"].max_entries == layout.MAX_VIPS
    assert shapes["vip_counts"].max_entries == layout.MAX_VIPS
    assert shapes["backends"].max_entries == shapes["backend_counts"].max_entries == layout.MAX_BACKENDS
    assert shapes["ports"].max_entries == layout.MAX_PORTS
    assert shapes["denied4"].max_entries == shapes["denied6"].max_entries == layout.MAX_DENIED
    assert shapes["server_ids"].max_entries == layout.MAX_SERVER_IDS
    assert shapes["flows4"].max_entries == shapes["flows6"].max_entries == layout.MAX_FLOW_ENTRIES
    assert Reason(0) is Reason.PASS_FRAGMENT
