"""Steering on real sockets: what the kernel of this machine does with a group and the program."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.net.batches import UDP_GRO, UDP_SEGMENT
from expressgateway.net.quic import steering
from expressgateway.net.quic.cids import CID_BYTES, destination_of, make_cid, worker_of
from expressgateway.net.quic.steering import spread, steer
from tests.net.quic.test_cids import VERSIONS, long_packet, short_packet

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKERS = 4
CLIENTS = 40


class Group:
    """The members of a listener, and who received what."""

    def __init__(self, host: str = "127.0.0.1", workers: int = WORKERS) -> None:
        self.host = host
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.members: list[socket.socket] = []
        port = 0
        for _ in range(workers):
            member = socket.socket(self.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self.members.append(member)
            member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            member.bind((host, port))
            port = member.getsockname()[1]
        self.address = (host, port)

    def client(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.bind((self.host, 0))
        return sock

    def to(self, packet: bytes, client: socket.socket | None = None) -> int:
        """The index of the member that a packet comes to; from a new address if no client is given."""
        with self.client() if client is None else contextlib.nullcontext(client) as sock:
            sock.sendto(packet, self.address)
            ready, _, _ = select.select(self.members, [], [], 5)
            (member,) = ready
            assert member.recv(65536) == packet
            return self.members.index(member)

    def close(self) -> None:
        for member in self.members:
            member.close()


@pytest.fixture(params=["127.0.0.1", "::1"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    one = Group(request.param)
    assert steer(one.members, "web")
    yield one
    one.close()


class TestHostCids:
    def test_short_headers_from_many_addresses(self, group: Group) -> None:
        for number in range(CLIENTS):
            worker = number % WORKERS
            assert group.to(short_packet(make_cid(worker))) == worker

    @pytest.mark.parametrize("version", VERSIONS)
    def test_long_headers_from_many_addresses(self, group: Group, version: bytes) -> None:
        for number in range(CLIENTS):
            worker = number % WORKERS
            assert group.to(long_packet(make_cid(worker), version)) == worker

    def test_a_client_that_moves_stays_with_its_worker(self, group: Group) -> None:
        cid = make_cid(2)
        assert {group.to(short_packet(cid)) for _ in range(CLIENTS)} == {2}

    def test_without_the_program_it_does_not(self, group: Group) -> None:
        """What the tests above would see if the kernel had ignored the program."""
        plain = Group(group.host)
        cid = make_cid(2)
        assert len({plain.to(short_packet(cid)) for _ in range(CLIENTS)}) > 1
        plain.close()

    def test_the_shortest_packets(self, group: Group) -> None:
        for worker in range(WORKERS):
            for _ in range(5):
                assert group.to(short_packet(make_cid(worker), b"")) == worker

    def test_large_packets(self, group: Group) -> None:
        for worker in range(WORKERS):
            assert group.to(short_packet(make_cid(worker), bytes(60_000))) == worker


class TestBatches:
    def test_a_buffer_goes_where_its_first_datagram_belongs(self, group: Group) -> None:
        """Connections of one port may meet in a buffer: whoever reads it looks at each datagram."""
        packets = [short_packet(make_cid(worker), bytes(100)) for worker in (2, 1, 2, 3)]
        size = len(packets[0])
        member = group.members[2]
        member.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        cut = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))
        with group.client() as client:
            client.sendmsg([b"".join(packets)], [cut], 0, group.address)
        ready, _, _ = select.select(group.members, [], [], 5)
        assert ready == [member]
        assert member.recv(65536) == b"".join(packets)


class TestEverythingElse:
    """Falls back to the kernel's hash: spread over all, and the same for all packets of one pair."""

    PACKETS = (
        short_packet(bytes(CID_BYTES)),
        short_packet(b"\xff" * CID_BYTES),
        short_packet(make_cid(WORKERS)),  # passes the check and names nobody
        short_packet(make_cid(255)),
        short_packet(make_cid(1)[: CID_BYTES - 1], b""),  # cut short
        long_packet(bytes(8)),
        long_packet(make_cid(1) + b"x"),  # one byte too long
        long_packet(make_cid(1)[:-1]),
        long_packet(make_cid(1), payload=b"")[:17],
        b"",
        b"\x40",
        b"\xc0",
        b"\xc0\0\0\0\1\x0c",
    )

    def test_is_spread(self, group: Group) -> None:
        for packet in self.PACKETS:
            assert len({group.to(packet) for _ in range(CLIENTS)}) > 1, packet

    def test_is_consistent_for_each_client(self, group: Group) -> None:
        seen = set()
        for _ in range(CLIENTS):
            with group.client() as client:
                members = {group.to(packet, client) for packet in self.PACKETS}
                members |= {group.to(short_packet(random_cid()), client) for _ in range(10)}
                assert len(members) == 1
                seen |= members
        assert len(seen) > 1

    def test_garbage_does_not_change_where_a_connection_goes(self, group: Group) -> None:
        with group.client() as client:
            for worker in range(WORKERS):
                group.to(b"\x40garbage", client)
                assert group.to(short_packet(make_cid(worker)), client) == worker


class TestSameAsPython:
    def test_the_program_and_worker_of_agree(self) -> None:
        group = Group(workers=256)
        assert steer(group.members, "web")
        client = group.client()
        home = group.to(b"", client)  # where the hash leads

        @settings(max_examples=300)
        @given(
            st.one_of(
                st.binary(max_size=40),
                st.tuples(
                    st.sampled_from((short_packet, long_packet)),
                    st.integers(0, 255),
                    st.integers(0, 11),
                    st.sampled_from((0, 0, 0, 1, 128, 255)),
                ).map(_spoiled),
            )
        )
        def agree(packet: bytes) -> None:
            cid = destination_of(packet)
            if cid is None and len(packet) >= 18 and packet[0] >= 0x80 and packet[5] == CID_BYTES:
                cid = packet[6:18]  # of a long header the program reads no more than this
            worker = worker_of(cid) if cid is not None else None
            assert group.to(packet, client) == (home if worker is None else worker)

        try:
            agree()
        finally:
            client.close()
            group.close()


def random_cid() -> bytes:
    """A spare one, that is; of 65,536 one passes for a host CID, but not here."""
    while worker_of(cid := os.urandom(CID_BYTES)) is not None:
        pass
    return cid


def _spoiled(given: tuple[object, int, int, int]) -> bytes:
    make, worker, at, change = given
    cid = bytearray(make_cid(worker))
    cid[at] ^= change
    return short_packet(bytes(cid)) if make is short_packet else long_packet(bytes(cid))


class TestMembers:
    def test_the_last_takes_the_place_of_a_closed_one(self, group: Group) -> None:
        """Why the supervisor keeps all members open: see the module."""
        first, second, third, fourth = group.members
        second.close()
        group.members = [first, third, fourth]
        assert {group.to(short_packet(make_cid(1))) for _ in range(10)} == {2}  # the fourth
        assert {group.to(short_packet(make_cid(2))) for _ in range(10)} == {1}  # the third, as before
        assert len({group.to(short_packet(make_cid(3))) for _ in range(CLIENTS)}) == 3  # no such index

    def test_a_member_that_somebody_holds_keeps_its_place(self, group: Group) -> None:
        held = group.members[1].dup()
        group.members[1].close()
        group.members[1] = held
        for worker in range(WORKERS):
            assert group.to(short_packet(make_cid(worker))) == worker

    def test_the_kernel_refuses(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(steering, "_SO_ATTACH_REUSEPORT_CBPF", 9999)
        group = Group()
        with caplog.at_level(logging.WARNING):
            assert not steer(group.members, "web")
        (record,) = caplog.records
        assert (
            "'web' to their workers; workers hand them over to each other (Protocol not available)"
            in record.getMessage()
        )
        group.close()


class TestSeats:
    def test_each_worker_is_found_by_its_seat(self, group: Group) -> None:
        seats = {200: 0, 7: 1, 255: 2, 0: 3, 9: 1}
        assert steer(group.members, "web", seats)
        for seat, member in seats.items():
            for make in (short_packet, long_packet):
                assert {group.to(make(make_cid(seat))) for _ in range(8)} == {member}

    def test_who_has_no_seat_is_found_by_address(self, group: Group) -> None:
        assert steer(group.members, "web", {1: 0})
        assert len({group.to(short_packet(make_cid(2))) for _ in range(CLIENTS)}) > 1

    def test_as_many_as_there_can_be(self, group: Group) -> None:
        assert steer(group.members, "web", {seat: seat % WORKERS for seat in range(256)})
        for seat in (0, 1, 127, 254, 255):
            assert {group.to(long_packet(make_cid(seat))) for _ in range(4)} == {seat % WORKERS}
            assert {group.to(short_packet(make_cid(seat))) for _ in range(4)} == {seat % WORKERS}


class TestSpread:
    def test_new_connections_go_to_the_first_members_only(self) -> None:
        members: list[socket.socket] = []
        port = 0
        for _ in range(3):
            member = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            member.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            member.bind(("127.0.0.1", port))
            port = member.getsockname()[1]
            members.append(member)
        for member in members:
            member.listen(256)
        assert spread(members, "web", 2)
        clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(60)]
        taken = []
        for member in members:
            taken.append(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    member.accept()[0].close()
                    taken[-1] += 1
        assert sum(taken) == 60
        assert taken[2] == 0
        assert all(taken[:2])
        for sock in (*clients, *members):
            sock.close()

    def test_where_the_kernel_refuses(self, caplog: pytest.LogCaptureFixture) -> None:
        with socket.socket() as alone, caplog.at_level(logging.WARNING):
            assert not spread([alone], "web", 0), "there is no remainder by 0"
        assert "a few may be reset" in caplog.text
