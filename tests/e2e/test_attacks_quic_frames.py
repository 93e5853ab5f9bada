"""Attacks by a client with a QUIC connection of its own: frames that no client should send, or not so many.

The connection is closed or goes on; the worker does, without a fault and without growing, and so does a good
client beside it.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from expressgateway.net.quic.credit import varint
from tests.e2e import h3_attacker as h3
from tests.e2e.h3_attacker import Site, attacked
from tests.e2e.harness import eventually, resident_kib

# RFC 9000 20.1
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_LIMIT_ERROR: Final = 0x4
STREAM_STATE_ERROR: Final = 0x5
FRAME_ENCODING_ERROR: Final = 0x7
CONNECTION_ID_LIMIT_ERROR: Final = 0x9
PROTOCOL_VIOLATION: Final = 0xA
CRYPTO_BUFFER_EXCEEDED: Final = 0xD

_STREAMS: Final = 128  # at once
_STREAM: Final = varint(4 * 100)  # one that nothing else uses
_ROOM: Final = 1100  # of a packet
_STREAM_BYTES: Final = 262_144
_LARGEST: Final = (1 << 62) - 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with attacked(tmp_path_factory.mktemp("frames")) as site:
        yield site


def packets(make: Callable[[int], bytes], number: int, room: int = _ROOM) -> list[bytes]:
    """So many frames, as many in a packet as there is room for."""
    out = []
    packet = b""
    for each in range(number):
        one = make(each)
        if len(packet) + len(one) > room:
            out.append(packet)
            packet = b""
        packet += one
    return [*out, packet]


def stream_frame(stream: bytes, offset: int, data: bytes = b"x") -> bytes:
    return b"\x0e" + stream + varint(offset) + varint(len(data)) + data


def crypto(offset: int, data: bytes = b"x") -> bytes:
    return b"\x06" + varint(offset) + varint(len(data)) + data


# -- what no client may send ---------------------------------------------------------------------------------

_VIOLATIONS = {
    "a stream above the limit": (STREAM_LIMIT_ERROR, stream_frame(varint(4 * _STREAMS), 0)),
    "a stream far above the limit": (STREAM_LIMIT_ERROR, stream_frame(varint(_LARGEST - 3), 0)),
    "a unidirectional stream above the limit": (STREAM_LIMIT_ERROR, stream_frame(varint(4 * 1000 + 2), 0)),
    "an offset behind the last": (FRAME_ENCODING_ERROR, stream_frame(_STREAM, _LARGEST)),
    "a reset of more than was granted": (FLOW_CONTROL_ERROR, b"\x04" + _STREAM + b"\x00" + varint(1 << 40)),
    "crypto behind the last offset": (FRAME_ENCODING_ERROR, crypto(_LARGEST)),
    "an ACK of what was not sent": (PROTOCOL_VIOLATION, b"\x02" + varint(1 << 30) + bytes(3)),
    "an ACK of what cannot be": (FRAME_ENCODING_ERROR, b"\x02\x01\x00\x00\x05"),
    "a connection ID retired that never was": (PROTOCOL_VIOLATION, b"\x19" + varint(1000)),
    "a connection ID of 21 bytes": (FRAME_ENCODING_ERROR, b"\x18\x09\x00\x15" + bytes(21 + 16)),
    "more connection IDs than are taken": (
        CONNECTION_ID_LIMIT_ERROR,
        b"".join(b"\x18" + varint(n) + b"\x00\x08" + os.urandom(8 + 16) for n in range(20, 40)),
    ),
    "credit for a stream that nobody opened": (STREAM_STATE_ERROR, b"\x11\x01" + varint(1000)),
    "STOP_SENDING of a stream that nobody opened": (STREAM_STATE_ERROR, b"\x05\x01\x00"),
    "NEW_TOKEN": (PROTOCOL_VIOLATION, b"\x07\x01x"),
    "HANDSHAKE_DONE": (PROTOCOL_VIOLATION, b"\x1e"),
    "DATAGRAM": (PROTOCOL_VIOLATION, b"\x31\x01x"),
    "a frame of no known type": (FRAME_ENCODING_ERROR, b"\x3f"),
    "more streams than can be": (FRAME_ENCODING_ERROR, b"\x12" + varint((1 << 60) + 1)),
}


def told(site: Site, kind: str, source: str) -> bool:
    """Whether the log has a line for it."""
    lines = [json.loads(line) for line in site.gateway.log().splitlines()]
    return any((line.get("kind"), line.get("source")) == (kind, source) for line in lines)


@pytest.mark.parametrize(("code", "payload"), _VIOLATIONS.values(), ids=list(_VIOLATIONS))
def test_a_violation_ends_the_connection(site: Site, code: int, payload: bytes) -> None:
    before = site.events("quic_violation")
    with site.unharmed(), site.attacker() as attacker:
        attacker.inject(payload)
        assert attacker.verdict() == code
        eventually(lambda: site.events("quic_violation") == before + 1, "it is counted")
        assert told(site, "quic_violation", attacker.source)


def test_more_bytes_than_were_granted(site: Site) -> None:
    before = site.events("quic_violation")
    with site.unharmed(), site.attacker() as attacker:
        # A head that waits for an entry of the table: nothing behind it is used.
        talk = attacker.open(h3.frame(h3.HEADERS, b"\x02\x00\x80") + varint(h3.DATA) + varint(1 << 40))
        with attacker.saying() as quic:
            # It believes that it may.
            quic._streams[talk.stream].max_stream_data_remote = 1 << 40
            quic._remote_max_data = 1 << 40
        attacker.say(talk.stream, bytes(2 * _STREAM_BYTES))
        assert attacker.verdict() == FLOW_CONTROL_ERROR
        eventually(lambda: site.events("quic_violation") == before + 1, "it is counted")


# -- too many of what may be sent ----------------------------------------------------------------------------


@dataclass
class Churn:
    packets: Callable[[], list[bytes]]
    code: int = 0
    """That the connection is closed with; 0: it goes on."""
    is_mute: bool = False
    """The attacker acknowledges nothing, so that what it is owed piles up."""
    is_deaf: bool = False
    """What it says leaves it without a connection ID that it knows: it cannot hear an answer."""


def _new_ids() -> list[bytes]:
    """Each retires all the others, and we owe a RETIRE_CONNECTION_ID for every one."""
    return packets(lambda n: b"\x18" + varint(n + 10) + varint(n + 10) + b"\x08" + os.urandom(8 + 16), 10_000)


def _challenges() -> list[bytes]:
    return packets(lambda n: b"\x1a" + n.to_bytes(8, "big"), 30_000)


_CHURN = {
    "PATH_CHALLENGE": Churn(_challenges, PROTOCOL_VIOLATION),
    "PATH_CHALLENGE of who hears nothing": Churn(_challenges, PROTOCOL_VIOLATION, is_mute=True),
    "PATH_RESPONSE": Churn(lambda: packets(lambda n: b"\x1b" + n.to_bytes(8, "big"), 30_000)),
    "NEW_CONNECTION_ID": Churn(_new_ids, is_deaf=True),
    "NEW_CONNECTION_ID of who hears nothing": Churn(_new_ids, is_mute=True),
    "RETIRE_CONNECTION_ID": Churn(lambda: packets(lambda n: b"\x19" + varint(n + 1), 3), is_deaf=True),
    "PING": Churn(lambda: packets(lambda n: b"\x01", 200_000)),
    "PADDING": Churn(lambda: [b"\x01" + bytes(_ROOM)] * 500),
    "MAX_DATA": Churn(lambda: packets(lambda n: b"\x10" + varint(1 << 60), 30_000)),
    "MAX_STREAM_DATA": Churn(lambda: packets(lambda n: b"\x11" + _STREAM + varint(1 << 50), 30_000)),
    "MAX_STREAMS": Churn(lambda: packets(lambda n: b"\x12" + varint(1 << 59), 30_000)),
    "DATA_BLOCKED": Churn(lambda: packets(lambda n: b"\x14" + varint(1 << 20), 30_000)),
    "STREAM_DATA_BLOCKED": Churn(
        lambda: packets(lambda n: b"\x15" + varint(4 * (n % 100 + 1)) + varint(_STREAM_BYTES), 30_000)
    ),
    "STREAMS_BLOCKED": Churn(lambda: packets(lambda n: b"\x16" + varint(_STREAMS), 30_000)),
    "crypto with holes": Churn(
        lambda: [crypto(2 + 1001 * n, bytes(1000)) for n in range(2000)], CRYPTO_BUFFER_EXCEEDED
    ),
    "crypto byte by byte": Churn(lambda: packets(lambda n: crypto(2 + 2 * n), 30_000)),
    "a stream byte by byte": Churn(lambda: packets(lambda n: stream_frame(_STREAM, 2 + 2 * n), 30_000)),
    "a byte far away": Churn(lambda: [stream_frame(_STREAM, 1 << 40), crypto(1 << 40)]),
}


@pytest.mark.parametrize("churn", _CHURN.values(), ids=list(_CHURN))
def test_churn(site: Site, churn: Churn) -> None:
    before = site.events("quic_violation")
    with site.unharmed(), site.attacker() as attacker:
        attacker.quic.is_mute = churn.is_mute
        attacker.inject(*churn.packets())
        attacker.spent()
        if churn.code:
            assert attacker.verdict() == churn.code
            eventually(lambda: site.events("quic_violation") == before + 1, "it is counted")
        elif not churn.is_deaf and not churn.is_mute:
            assert attacker.is_served()


@pytest.mark.parametrize("room", [_ROOM, 100])
def test_pieces_that_never_join(site: Site, room: int) -> None:
    """On as many streams as there may be, in packets of any size, and each byte alone: it takes a hundred."""
    before = site.events("quic_violation")
    with site.attacker() as attacker:
        resident = resident_kib(site.pid)

        numbers = itertools.count()

        def piece(_: int) -> bytes:
            number = next(numbers)
            return stream_frame(varint(4 * (number % _STREAMS)), 2 + 2 * (number // _STREAMS))

        def is_closed() -> bool:
            assert resident_kib(site.pid) - resident < 100_000
            if not attacker.quic.extra:
                attacker.inject(*packets(piece, 20_000, room))
            return attacker.is_closed

        eventually(is_closed, "it is too much")
        assert attacker.verdict() == FLOW_CONTROL_ERROR
    eventually(lambda: site.events("quic_violation") == before + 1, "it is counted")
    with site.unharmed():
        pass
