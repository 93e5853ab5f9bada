"""QUIC whose connection IDs say in the clear whose they are (draft-ietf-quic-load-balancers-21)."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.l4.passthrough.quic_lb import ServerIds
from expressgateway.l4.xdp import layout
from expressgateway.l4.xdp.layout import FlowFlag, Forwarding, Reason, VipFlag
from tests.l4.xdp.scene import DSR, NAT, to_backend, to_client, udp, udp_answer
from tests.l4.xdp.world import BACKENDS, PASS, REDIRECT, V4, V6, Family, World

CONFIG_ID = 2
IDS = {1: b"one", 2: b"two"}
WAYS = pytest.mark.parametrize("forwarding", Forwarding)


def stage(
    world: World, family: Family, forwarding: Forwarding = NAT, *, table: int = 1, length: int = 3
) -> None:
    """Two backends that have IDs, of which the table names one."""
    for number in (1, 2):
        world.backend(number, family.backend(number), family.source)
        name(world, IDS[number].ljust(length, b"."), number)
    world.vip(
        family.vip, table, forwarding=forwarding, flags=VipFlag.VIP_SERVER_IDS, config_id=CONFIG_ID,
        server_id_length=length,
    )  # fmt: skip


def name(world: World, server_id: bytes, backend: int, vip: int = 1) -> None:
    key = layout.ServerId(vip=vip, bytes=layout.octets(server_id.ljust(16, b"\0")))
    world.maps["server_ids"].set(bytes(key), backend.to_bytes(4, "little"))


def cid(server_id: bytes, nonce: bytes = b"nonce", config_id: int = CONFIG_ID) -> bytes:
    body = server_id + nonce
    return bytes([config_id << 5 | len(body)]) + body


def short(of: bytes) -> bytes:
    return b"\x40" + of + bytes(20)


def long(of: bytes, first: int = 0xC0, size: int | None = None) -> bytes:
    return bytes([first]) + b"\0\0\0\1" + bytes([len(of) if size is None else size]) + of + bytes(30)


HEADERS = pytest.mark.parametrize("header", [short, long], ids=["short", "long"])


def chosen(frame: bytes) -> int:
    return next(number for number, at in BACKENDS.items() if frame[:6] == at)


@HEADERS
@WAYS
@pytest.mark.parametrize("nonce", [4, 5, 16])
def test_a_connection_id_names_its_backend(
    world: World, family: Family, forwarding: Forwarding, header: Callable[[bytes], bytes], nonce: int
) -> None:
    """Whatever the table says."""
    for number in (1, 2):
        stage(world, family, forwarding, table=3 - number)
        packet = udp(family, header(cid(IDS[number], bytes(nonce))), port=1000 + number)
        outcome = world.send(packet)
        assert outcome == (REDIRECT, bytes(to_backend(packet, family, forwarding, number=number)))


@pytest.mark.parametrize("length", range(1, 16))
def test_ids_of_every_length(world: World, family: Family, length: int) -> None:
    stage(world, family, length=length)
    name(world, b"x" * length, 2)
    packet = udp(family, short(cid(b"x" * length, b"1234")))
    assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, number=2)))
    other = udp(family, short(cid(b"x" * (length - 1) + b"y", b"1234")), port=4)
    assert chosen(world.send(other).frame) == 1


OTHERS: dict[str, bytes] = {
    "another configuration": short(cid(IDS[2], config_id=1)),
    "no server id (3.2)": short(cid(IDS[2], config_id=7)),
    "an id that nobody has": short(cid(b"six")),
    "a nonce that is too short": short(cid(IDS[2], b"123")),
    "a length of 20 and more": short(cid(IDS[2], bytes(17))),
    "a length that is not the connection ID's": long(cid(IDS[2]), size=8),
    "a connection ID of no bytes": long(b""),
    "less than a connection ID": b"\x40" + cid(IDS[2])[:3],
    "one byte": b"\x40",
    "no byte": b"",
    "a long header that is cut off": long(cid(IDS[2]))[:5],
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_what_names_nobody_is_drawn_by_the_table(world: World, family: Family, data: bytes) -> None:
    stage(world, family, table=1)
    packet = udp(family, data)
    assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, number=1)))


def test_another_vip_s_ids_are_not_asked(world: World, family: Family) -> None:
    stage(world, family, table=1)
    name(world, b"six", 2, vip=2)
    packet = udp(family, short(cid(b"six")))
    assert chosen(world.send(packet).frame) == 1


def test_the_same_id_is_somebody_else_s_at_another_vip(world: World, family: Family) -> None:
    stage(world, family, table=1)
    name(world, b"one", 2, vip=2)
    world.vip(
        family.vip,
        3,
        number=2,
        port=81,
        flags=VipFlag.VIP_SERVER_IDS,
        config_id=CONFIG_ID,
        server_id_length=3,
    )
    packet = udp(family, short(cid(b"one")))
    assert chosen(world.send(packet).frame) == 1
    packet = packet.but(udp={"destination": 81})
    assert chosen(world.send(packet).frame) == 2


def test_a_vip_without_server_ids_reads_none(world: World, family: Family) -> None:
    stage(world, family, table=1)
    world.vip(family.vip, 1)
    packet = udp(family, short(cid(IDS[2])))
    assert chosen(world.send(packet).frame) == 1


class TestFlows:
    @WAYS
    def test_what_follows_goes_the_same_way(
        self, world: World, family: Family, forwarding: Forwarding
    ) -> None:
        """Handshake packets with the client's own connection ID, then those with the backend's."""
        stage(world, family, forwarding, table=1)
        for data in (
            long(b"client's"),
            short(cid(IDS[1])),
            long(b"client's"),
            short(cid(IDS[1], b"other nonce")),
        ):
            packet = udp(family, data)
            assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, forwarding)))
        assert world.counts().flows == 1
        assert all(flow.flags & FlowFlag.FLOW_SERVER_IDS for _, flow in world.flows(family.version))

    @WAYS
    def test_two_connections_of_one_port(self, world: World, family: Family, forwarding: Forwarding) -> None:
        """To two backends: each has its flow, and answers of both find the client."""
        stage(world, family, forwarding, table=1)
        for number in (1, 2, 1, 2, 2, 1):
            packet = udp(family, short(cid(IDS[number])))
            assert world.send(packet) == (
                REDIRECT,
                bytes(to_backend(packet, family, forwarding, number=number)),
            )
        assert world.counts().flows == 2
        if forwarding is NAT:
            for number in (1, 2):
                answer = udp_answer(family, number=number)
                assert world.answer(answer) == (REDIRECT, bytes(to_client(answer, family)))

    def test_a_client_that_has_moved(self, world: World, family: Family) -> None:
        """From another port the connection still finds its backend: which the table would not."""
        stage(world, family, table=1)
        for port in (1000, 2000):
            world.set(first_port=port, last_port=port)
            packet = udp(family, short(cid(IDS[2])), port=port)
            assert world.send(packet) == (REDIRECT, bytes(to_backend(packet, family, number=2, port=port)))

    def test_both_are_swept(self, world: World, family: Family) -> None:
        stage(world, family, table=1)
        for number in (1, 2):
            world.send(udp(family, short(cid(IDS[number]))))
        assert len(world.flows(family.version)) == 4
        world.age(61)
        assert world.sweep().removed == 2
        assert world.flows(family.version) == []

    @WAYS
    def test_a_named_backend_that_is_dead(self, world: World, family: Family, forwarding: Forwarding) -> None:
        """The connection is lost whoever has it: the listener in user space says so, or draws another."""
        stage(world, family, forwarding, table=1)
        world.backend(2, family.backend(2), family.source, alive=False)
        packet = udp(family, short(cid(IDS[2])))
        assert world.send(packet) == (PASS, bytes(packet))
        assert world.reasons() == {Reason.PASS_NO_BACKEND: 1}


@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda first, rest: bytes([first]) + rest,
            st.integers(0, 255),
            st.builds(lambda c, n, tail: cid(c, n) + tail, st.sampled_from(list(IDS.values())),
                      st.binary(max_size=18), st.binary(max_size=40)),
        ),
        st.builds(long, st.builds(cid, st.sampled_from(list(IDS.values())), st.binary(max_size=18)),
                  st.integers(0, 255), st.integers(0, 30)),
    ),
    family=st.sampled_from([V4, V6]),
)  # fmt: skip
def test_the_kernel_reads_what_user_space_reads(made_world: World, data: bytes, family: Family) -> None:
    """The same backend, of whatever datagram that is long enough to be QUIC's (RFC 9001 5.4.2)."""
    world = made_world
    world.reset()
    stage(world, family, DSR, table=1)
    ids = ServerIds(CONFIG_ID, 3, None)
    start = 6 if data[:1] >= b"\x80" else 1
    size = (
        (data[5] if start == 6 and len(data) > 5 else ids.cid_bytes(data[start])) if len(data) > start else 0
    )
    whole = data[start : start + size]
    named = ids.read(whole) if len(whole) == size else None
    expected = 2 if named == IDS[2] and len(data) >= start + 16 else 1
    assert chosen(world.send(udp(family, data)).frame) == expected
