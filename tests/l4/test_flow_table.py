"""The table of flows by itself: what is found, what is counted, and who makes room."""

import os
import random

import pytest

from expressgateway.l4.passthrough.flows import EVICTABLE_S, MAX_CIDS, Entry, FlowTable, Place, source_of

A: Place = ("192.0.2.1", 1)
B: Place = ("192.0.2.2", 2)


def made(table: FlowTable[Entry], place: Place, *cids: bytes, now: float = 0.0) -> Entry:
    entry = Entry(place, str(place[0]), now)
    table.add(entry)
    table.choose(entry, os.urandom(8))
    for cid in cids:
        table.learn(entry, cid)
    return entry


def packet(cid: bytes) -> bytes:
    return b"\x40" + cid + bytes(30)


class TestShortConnectionIds:
    def test_two_flows_with_the_same_one_go_by_their_places(self) -> None:
        """Of 4 bytes, or of backends that do not know of each other."""
        table: FlowTable[Entry] = FlowTable(10, 10)
        a, b = made(table, A, b"same"), made(table, B, b"same")
        assert table.by_short(packet(b"same"), A) is a
        assert table.by_short(packet(b"same"), B) is b
        table.remove(a)
        assert table.by_short(packet(b"same"), B) is b
        assert list(table.lengths) == [4]
        table.remove(b)
        assert not table.lengths

    def test_a_match_by_chance_does_not_move_a_flow(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        a, b = made(table, A, b"four"), made(table, B, b"another1")
        unlearned = b"four" + bytes(4)  # one of b's that nobody has seen
        assert table.by_short(packet(unlearned), B) is b
        assert table.by_short(packet(unlearned), ("192.0.2.3", 3)) is a  # a moved, as far as anybody can tell

    def test_long_ones_do(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        a, _ = made(table, A, b"longlong"), made(table, B, b"another1")
        assert table.by_short(packet(b"longlong"), B) is a
        assert table.by_long(b"longlong", B) is a

    @pytest.mark.parametrize("size", [1, 2, 3, 21, 255])
    def test_too_short_and_too_long_ones_are_not_learned(self, size: int) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        made(table, A, bytes(size))
        assert table.lengths == ()
        assert len(table.by_cid) == 1


class TestBounds:
    def test_connection_ids_of_a_flow(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        a = made(table, A)
        cids = [os.urandom(8) for _ in range(40)]
        for cid in cids:
            table.learn(a, cid)
        assert len(table.by_cid) == len(a.cids) == MAX_CIDS
        assert a.chose in a.cids
        assert a.cids[1:] == cids[-MAX_CIDS + 1 :]

    def test_the_clients_own_is_forgotten_once_the_backends_is_used(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        a = made(table, A, b"longlong")
        chosen = a.chose
        assert chosen is not None
        table.touch(a, 1.0)
        assert table.by_long(chosen, A) is a
        table.prove(a)
        assert table.by_long(chosen, A) is a  # what was under way
        table.touch(a, 2.0)
        assert table.by_long(chosen, A) is None
        assert list(table.by_cid) == [b"longlong"]

    def test_of_a_source(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 2)
        made(table, A)
        made(table, ("192.0.2.1", 9))
        assert table.refusal("192.0.2.1") == "ip_flow_cap"
        assert table.refusal("192.0.2.2") is None
        b = made(table, B)
        assert not table.move(b, ("192.0.2.1", 8), "192.0.2.1")
        assert b.place == B

    def test_a_source(self) -> None:
        assert source_of("192.0.2.1") == "192.0.2.1"
        assert source_of("2001:db8::1") == source_of("2001:db8::2") != source_of("2001:db8:0:1::1")
        assert source_of("fe80::1%eth0") == source_of("fe80::2")


class TestOrder:
    def test_who_makes_room(self) -> None:
        table: FlowTable[Entry] = FlowTable(3, 10)
        old = made(table, A, b"longlong", now=0.0)
        table.prove(old)
        fresh = made(table, B, now=1.0)
        later = made(table, ("192.0.2.3", 3), now=2.0)
        assert table.is_full
        assert table.to_evict(100.0) is fresh
        table.touch(fresh, 3.0)
        assert table.to_evict(100.0) is later
        table.remove(fresh)
        table.remove(later)
        assert table.to_evict(EVICTABLE_S - 0.1) is None
        assert table.to_evict(EVICTABLE_S) is old

    def test_idle_ones_are_found_without_looking_at_others(self) -> None:
        table: FlowTable[Entry] = FlowTable(100, 100)
        flows = [made(table, ("192.0.2.1", at), os.urandom(8), now=float(at)) for at in range(20)]
        for flow in flows[::2]:
            table.prove(flow)
            table.touch(flow, flow.seen_at)
        assert set(table.idle(10.0, 5.0, 100)) == set(flows[:6])
        assert len(table.idle(10.0, 5.0, 2)) == 2

    def test_a_place_is_the_proven_flows(self) -> None:
        table: FlowTable[Entry] = FlowTable(10, 10)
        first = made(table, A, b"firstone")
        second = made(table, A, b"secondone")
        assert table.by_place[A] is second  # nobody has proved anything
        table.prove(first)
        assert table.by_place[A] is first
        made(table, A)
        assert table.by_place[A] is first
        table.prove(second)
        assert table.by_place[A] is second
        table.remove(second)
        table.touch(first, 1.0)
        assert table.by_place[A] is first


def test_whatever_happens_nothing_is_left() -> None:
    chance = random.Random(4)
    table: FlowTable[Entry] = FlowTable(50, 20)
    flows: list[Entry] = []
    for now in range(20_000):
        place = (f"192.0.2.{chance.randrange(8)}", chance.randrange(30))
        what = chance.randrange(6)
        if what == 0 and not table.refusal(place[0]):
            if table.is_full and (gone := table.to_evict(now)) is not None:
                table.remove(gone)
                flows.remove(gone)
            if not table.is_full:
                flows.append(made(table, place, now=now))
        elif flows:
            flow = chance.choice(flows)
            if what == 1:
                table.learn(
                    flow, chance.randbytes(chance.choice((4, 4, 8, 20)))[:4] * chance.choice((1, 2, 5))
                )
            elif what == 2:
                table.prove(flow)
            elif what == 3:
                table.move(flow, place, place[0])
            elif what == 4:
                table.touch(flow, now)
            elif chance.randrange(4) == 0:
                table.remove(flow)
                table.remove(flow)
                flows.remove(flow)
        assert len(table) == len(flows) <= 50
        assert len(table.by_place) <= len(flows)
    for flow in flows:
        table.remove(flow)
    assert not table.by_cid
    assert not table.by_place
    assert not table._sources
    assert table.lengths == ()
