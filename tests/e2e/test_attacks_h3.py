"""Attacks over HTTP/3 that are made of HTTP/3: the connection ends with H3_EXCESSIVE_LOAD, or a stream does.

One worker serves them all, and a good client throughout. Of each flood as much as is allowed does nothing,
and one more ends it. The limits are HTTP/2's.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from expressgateway.net.quic.credit import varint
from tests.e2e import h3_attacker as h3
from tests.e2e.h3_attacker import ROOM_KIB, Attacker, Site, Steady3, attacked, block, frame, head
from tests.e2e.h3_site import SWEEP, request
from tests.e2e.harness import eventually, resident_kib
from tests.e2e.talks import rest
from tests.e2e.talks_h3 import H3Talk

_RUNTIME = SWEEP + "header_deadline_ms = 400\n"
_HTTP = "body_timeout_ms = 700\n"
_STREAMS = 128  # at once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        attacked(tmp_path_factory.mktemp("h3-attacks"), runtime=_RUNTIME, http=_HTTP) as site,
        site.unharmed(2 * ROOM_KIB),
    ):
        yield site


@pytest.fixture
def steady(site: Site) -> Iterator[Steady3]:
    """A good client that comes with the attack."""
    with Steady3(site) as steady:
        yield steady


def told(site: Site, kind: str, source: str) -> bool:
    """Whether the log has a line for it."""
    lines = [json.loads(line) for line in site.gateway.log().splitlines()]
    return [
        line["listener"] for line in lines if (line.get("kind"), line.get("source")) == (kind, source)
    ] == ["quic"]


# -- floods, by what they count ------------------------------------------------------------------------------


@dataclass
class Flood:
    kind: str
    limit: int
    more: Callable[[Attacker, int], None]
    """So many of it, one after the other."""
    spent: int = 0
    """Counted already by a connection's beginning."""
    free: int = 0
    """Accounted for by one request."""


def _abandoned(attacker: Attacker, number: int, how: Callable[[Attacker, H3Talk], None]) -> None:
    """Requests that are given up as soon as they are made."""
    for _ in range(number):
        how(attacker, attacker.open(head(h3.GET), end=True))


def _stop(attacker: Attacker, talk: H3Talk) -> None:
    with attacker.saying() as quic:
        quic.stop_stream(talk.stream, h3.REQUEST_CANCELLED)


def _rapid_reset(attacker: Attacker, number: int) -> None:
    for _ in range(number):
        talk = attacker.open(head(h3.POST))
        with attacker.saying() as quic:
            quic.reset_stream(talk.stream, h3.REQUEST_CANCELLED)


def _bare_reset(attacker: Attacker, number: int) -> None:
    """RESET_STREAM, and nothing of the stream but that."""
    for _ in range(number):
        with attacker.saying() as quic:
            stream = quic.get_next_available_stream_id()
            quic.send_stream_data(stream, b"", False)
            quic.reset_stream(stream, h3.REQUEST_CANCELLED)


def _provoke(raw: bytes, *, end: bool = True) -> Callable[[Attacker, int], None]:
    """Each is reset before the next one comes: more of them at once would meet the transport's limit."""

    def more(attacker: Attacker, number: int) -> None:
        for _ in range(number):
            talk = attacker.open(raw, end=end)
            attacker.wait_for(lambda each=talk: each.is_lost or attacker.is_closed, "it is reset")  # type: ignore[misc]

    return more


def _control(raw: bytes) -> Callable[[Attacker, int], None]:
    return lambda attacker, number: attacker.say(attacker.control, raw * number)


def _on_a_stream(raw: bytes) -> Callable[[Attacker, int], None]:
    """On a request that is never answered; the same one for all of an attacker's."""

    def more(attacker: Attacker, number: int) -> None:
        if not attacker.held:
            attacker.held.append(attacker.open(head(h3.POST) + frame(h3.DATA, b"x")))
        attacker.say(attacker.held[0].stream, raw * number)

    return more


_UPPER = head(request("/good", ("Upper", "x")))
_FLOODS = {
    "rapid reset by RESET_STREAM": Flood("rapid_reset", 100, _rapid_reset),
    "rapid reset by STOP_SENDING": Flood("rapid_reset", 100, lambda one, n: _abandoned(one, n, _stop)),
    "rapid reset by bare RESET_STREAM": Flood("rapid_reset", 100, _bare_reset),
    "made-you-reset by a name": Flood("made_you_reset", 100, _provoke(_UPPER)),
    "made-you-reset by a missing :path": Flood("made_you_reset", 100, _provoke(head(h3.GET[:-1]))),
    "made-you-reset by a length": Flood(
        "made_you_reset",
        100,
        _provoke(head([*h3.POST, ("content-length", "1")]) + frame(h3.DATA, b"xx")),
    ),
    "made-you-reset by no head": Flood("made_you_reset", 100, _provoke(frame(0x21, b"x"))),
    "MAX_PUSH_ID": Flood("settings_flood", 100, _control(frame(h3.MAX_PUSH_ID, varint(1000))), spent=2),
    "GOAWAY": Flood("settings_flood", 100, _control(frame(h3.GOAWAY, varint(0))), spent=2),
    "empty DATA": Flood("empty_frame_flood", 100, _on_a_stream(frame(h3.DATA))),
    "unknown frames": Flood("unknown_frame_flood", 1000, _control(frame(0x21, b"x")), free=2),
    "unknown frames on a request": Flood("unknown_frame_flood", 1000, _on_a_stream(frame(0x21)), free=4),
}


@pytest.mark.parametrize("flood", _FLOODS.values(), ids=list(_FLOODS))
def test_as_much_as_is_allowed_and_one_more(site: Site, steady: Steady3, flood: Flood) -> None:
    before = site.events(flood.kind)
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        flood.more(attacker, flood.limit - flood.spent)
        # Answered while all that is known, or about to be: none of it was too much.
        assert attacker.is_served()
        assert not attacker.is_closed
        assert site.events(flood.kind) == before
        flood.more(attacker, 1 + flood.free)
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
        assert told(site, flood.kind, attacker.source)
    assert site.events(flood.kind) == before + 1
    assert resident_kib(site.pid) - resident < ROOM_KIB


@pytest.mark.parametrize("name", list(_FLOODS))
def test_a_flood_at_full_speed_ends_at_once(site: Site, steady: Steady3, name: str) -> None:
    """Not only one too many, but all that the attacker has got: it costs no more than that."""
    flood = _FLOODS[name]
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        flood.more(attacker, 3000)
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
    assert resident_kib(site.pid) - resident < ROOM_KIB


# -- what is not only counted --------------------------------------------------------------------------------


def test_more_than_half_of_all_streams_reset(site: Site, steady: Steady3) -> None:
    """Each was answered before, so that none counts as too early."""
    before = site.events("rapid_reset")
    with site.attacker() as attacker:
        for _ in range(201):
            talk = attacker.open(head(request("/half")), end=True)
            assert talk.read_head()[":status"] == "200"
            assert not attacker.is_closed
            _stop(attacker, talk)
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
    assert site.events("rapid_reset") == before + 1


def test_streams_that_are_hoarded(site: Site, steady: Steady3) -> None:
    """As many as are allowed cost a place each. There is no more room for others until one of them ends."""
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        held = [attacker.open(head(h3.GET), end=True) for _ in range(_STREAMS)]
        late = attacker.open(head(request("/good")), end=True)
        attacker.wait_for(lambda: attacker.quic._streams_blocked_bidi, "the limit is met")
        _stop(attacker, held[0])
        assert late.read_head()[":status"] == "200"
        assert not attacker.is_closed
    assert resident_kib(site.pid) - resident < ROOM_KIB


def test_settings_that_come_twice(site: Site, steady: Steady3) -> None:
    with site.attacker() as attacker:
        attacker.say(attacker.control, frame(h3.SETTINGS))
        assert attacker.verdict() == h3.FRAME_UNEXPECTED


# -- QPACK ---------------------------------------------------------------------------------------------------

_ALL_OF_IT = b"\x3f\xe1\x1f"  # Set Dynamic Table Capacity: 4096 (RFC 9204 4.3.1)


def _insertion(value: bytes) -> bytes:
    """Insert with Literal Name (RFC 9204 4.3.3)."""
    size = len(value) - 127
    return b"\x41x\x7f" + bytes((size & 0x7F | 0x80, size >> 7)) + value


def _saying_much(times: int) -> bytes:
    """A block in which one entry of the dynamic table stands so many times."""
    return frame(h3.HEADERS, b"\x02\x00" + block(request("/good"))[2:] + b"\x80" * times)


def test_insertions_that_nothing_uses(site: Site, steady: Steady3) -> None:
    before = site.events("qpack_bomb")
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        attacker.say(attacker.encoder, _ALL_OF_IT)
        attacker.say(attacker.encoder, _insertion(b"v" * 4000) * 60)
        assert attacker.is_served(), "a table that is filled anew now and then"
        attacker.say(attacker.encoder, _insertion(b"v" * 4000) * 2000)
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
        assert told(site, "qpack_bomb", attacker.source)
    assert site.events("qpack_bomb") == before + 1
    assert resident_kib(site.pid) - resident < ROOM_KIB


def test_indexed_fields_that_stand_for_much(site: Site, steady: Steady3) -> None:
    """4 kB in the table, and a byte for each time it is said: 431 first, and the end if it is repeated."""
    oversized, bombs = site.events("head_too_large"), site.events("qpack_bomb")
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        attacker.say(attacker.encoder, _ALL_OF_IT + _insertion(b"v" * 3900))
        assert attacker.open(_saying_much(16), end=True).read_head()[":status"] == "200", "within the limit"
        for _ in range(3):
            talk = attacker.open(_saying_much(16_000), end=True)
            assert talk.read_head()[":status"] == "431"
        assert attacker.is_served(), "the table is right, and the connection goes on"
        attacker.open(_saying_much(16_000), end=True)
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
    assert site.events("head_too_large") == oversized + 3
    assert site.events("qpack_bomb") == bombs + 1
    assert resident_kib(site.pid) - resident < ROOM_KIB, "64 MB were asked for, four times"


def test_heads_that_are_too_large_as_they_are(site: Site, steady: Steady3) -> None:
    """They are answered by what their frame says; not a byte of them is kept."""
    bombs = site.events("qpack_bomb")
    resident = resident_kib(site.pid)
    with site.attacker() as attacker:
        for _ in range(3):
            talk = attacker.open(varint(h3.HEADERS) + varint(2**40) + bytes(100_000))
            assert talk.read_head()[":status"] == "431"
        assert attacker.is_served()
        attacker.open(varint(h3.HEADERS) + varint(2**40))
        assert attacker.verdict() == h3.EXCESSIVE_LOAD
    assert site.events("qpack_bomb") == bombs + 1
    assert resident_kib(site.pid) - resident < ROOM_KIB


def test_streams_that_wait_for_insertions_that_never_come(site: Site, steady: Steady3) -> None:
    before = site.events("qpack_blocked_streams")
    with site.attacker() as attacker:
        waiting = [attacker.open(_saying_much(1), end=True) for _ in range(16)]
        assert attacker.is_served(), "as many as may"
        assert not any(talk.headers for talk in waiting)
        attacker.open(_saying_much(1), end=True)
        assert attacker.verdict() == h3.QPACK_DECOMPRESSION_FAILED
    assert site.events("qpack_blocked_streams") == before + 1


# -- clients that take their time ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [head(request("/good"))[:-1], b"\x01", b"", _saying_much(1)],
    ids=["all but a byte", "half a frame header", "nothing", "a block that waits for the table"],
)
def test_a_head_that_is_never_complete(site: Site, steady: Steady3, raw: bytes) -> None:
    """Its stream is reset, and that alone: others of the connection go on."""
    before = site.events("slow_head")
    with site.attacker() as attacker:
        other = attacker.open(head(h3.POST))
        if raw:
            talk = attacker.open(raw)
        else:
            # An unknown frame in front of it, so that the stream is there.
            talk = attacker.open(frame(0x21))
        attacker.wait_for(lambda: talk.is_lost and attacker.stops, "it is reset")
        assert (talk.lost_code, attacker.stops[talk.stream]) == (h3.REQUEST_INCOMPLETE,) * 2
        assert attacker.is_served()
        assert told(site, "slow_head", attacker.source)
        assert attacker.resets.keys() == {talk.stream}
        assert not other.is_lost
    assert site.events("slow_head") == before + 1


def test_a_head_that_trickles(site: Site, steady: Steady3) -> None:
    """Each byte is new, and the time counts from the first."""
    before = site.events("slow_head")
    raw = head(request("/good", ("x", "y" * 5000)))
    with site.attacker() as attacker:
        talk = attacker.open(raw[:1])
        for each in raw[1:]:
            with attacker.changed:
                if attacker.changed.wait_for(lambda: attacker.stops, 0.01):
                    break
                attacker.say(talk.stream, bytes((each,)))
        attacker.wait_for(lambda: talk.is_lost, "it is reset")
        assert attacker.resets == {talk.stream: h3.REQUEST_INCOMPLETE}
        assert attacker.is_served()
    assert site.events("slow_head") == before + 1


@pytest.mark.parametrize("is_trickling", [True, False])
def test_a_body_that_does_not_get_on(site: Site, steady: Steady3, is_trickling: bool) -> None:
    before = site.events("slow_body")
    with site.attacker() as attacker:
        talk = attacker.open(head(h3.POST) + frame(h3.DATA, b"half"))
        for _ in range(1000):
            with attacker.changed:
                if attacker.changed.wait_for(lambda: attacker.stops, 0.05):
                    break
                if is_trickling:  # 20 bytes a second; 64 are asked for
                    attacker.say(talk.stream, frame(h3.DATA, b"x"))
        assert talk.read_head()[":status"] == "408"
        rest(talk)
        assert attacker.stops == {talk.stream: h3.NO_ERROR}, "nothing more is read of it"
        assert attacker.is_served()
        assert told(site, "slow_body", attacker.source)
    assert site.events("slow_body") == before + 1


def test_many_that_read_nothing(site: Site, steady: Steady3) -> None:
    """Each stream on its own, and their connection serves on."""
    before = site.events("slow_reader")
    resident = resident_kib(site.pid)
    sizes = [resident]
    with site.attacker(is_stingy=True, max_stream_data=100_000) as attacker:
        talks = [attacker.open(head(request("/big")), end=True) for _ in range(20)]

        def are_reset() -> bool:
            sizes.append(resident_kib(site.pid))
            return all(talk.is_lost for talk in talks)

        eventually(are_reset, "they are reset")
        assert {talk.lost_code for talk in talks} == {h3.INTERNAL_ERROR}, "none of them is complete"
        assert attacker.is_served()
    assert site.events("slow_reader") == before + 20
    assert max(sizes) - resident < 20 * 1024


@pytest.mark.parametrize(("path", "code"), [("/big", h3.INTERNAL_ERROR), ("/good", h3.REQUEST_CANCELLED)])
def test_a_connection_that_gives_no_credit(site: Site, steady: Steady3, path: str, code: int) -> None:
    """Not even for a small answer, whose exchange is over long since."""
    before = site.events("slow_reader")
    with site.attacker(is_stingy=True, max_data=300) as attacker:
        talks = [attacker.open(head(request(path)), end=True) for _ in range(10)]
        attacker.wait_for(lambda: all(talk.is_lost or talk.is_ended for talk in talks), "they are reset")
        lost = [talk for talk in talks if talk.is_lost]
        assert len(lost) > 5
        assert {talk.lost_code for talk in lost} == {code}
        assert not attacker.is_closed
    assert site.events("slow_reader") == before + len(lost)
