"""Public QUIC headers, against aioquic's reading and writing of them."""

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.packet import (
    QuicPacketType,
    encode_quic_version_negotiation,
    get_retry_integrity_tag,
    pull_quic_header,
)
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.wire import quic
from expressgateway.wire.quic import VERSION_1, VERSION_2, LongHeader, read_long, token_of


def long_packet(
    version: int = VERSION_1,
    kind: int = 0,
    destination: bytes = b"d" * 8,
    source: bytes = b"s" * 5,
    rest: bytes = b"\0" + b"x" * 40,
) -> bytes:
    first = 0xC0 | kind << 4
    return (
        bytes((first,))
        + version.to_bytes(4, "big")
        + bytes((len(destination),))
        + destination
        + bytes((len(source),))
        + source
        + rest
    )


def read(packet: bytes) -> LongHeader:
    header = read_long(packet)
    assert header is not None
    return header


class TestLongHeadersRfc8999Section51:
    @pytest.mark.parametrize("version", [VERSION_1, VERSION_2, 0, 0x0A0A0A0A])
    def test_of_any_version(self, version: int) -> None:
        header = read(long_packet(version))
        assert (header.version, header.destination, header.source) == (version, b"d" * 8, b"s" * 5)

    def test_ids_of_255_bytes_in_a_version_unknown(self) -> None:
        header = read(long_packet(7, destination=b"d" * 255, source=b"s" * 255))
        assert (len(header.destination), len(header.source)) == (255, 255)

    @pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
    @pytest.mark.parametrize("side", ["destination", "source"])
    def test_ids_of_21_bytes_in_a_version_known(self, version: int, side: str) -> None:
        long = b"x" * 21
        packet = (
            long_packet(version, destination=long)
            if side == "destination"
            else long_packet(version, source=long)
        )
        assert read_long(packet) is None

    def test_without_the_fixed_bit(self) -> None:
        packet = bytearray(long_packet())
        packet[0] &= ~0x40
        assert read_long(bytes(packet)) is None
        packet[1:5] = (7).to_bytes(4, "big")
        assert read_long(bytes(packet)) is not None  # other versions may do without

    def test_a_short_header_is_none(self) -> None:
        assert read_long(b"\x40" + bytes(40)) is None

    def test_cut_anywhere(self) -> None:
        packet = long_packet(rest=b"")
        assert read(packet).end == len(packet)
        for size in range(len(packet)):
            assert read_long(packet[:size]) is None

    @given(st.binary(max_size=80))
    def test_never_raises(self, packet: bytes) -> None:
        header = read_long(packet)
        if header is not None:
            token_of(packet, header)

    @given(st.binary(max_size=80).map(lambda rest: long_packet(rest=rest)))
    def test_tokens_never_raise(self, packet: bytes) -> None:
        token_of(packet, read(packet))


class TestTypes:
    @pytest.mark.parametrize(
        ("version", "codes"), [(VERSION_1, (0, 1, 2, 3)), (VERSION_2, (1, 2, 3, 0))], ids=["v1", "v2"]
    )
    def test_as_another_reads_them(self, version: int, codes: tuple[int, ...]) -> None:
        kinds = (
            (quic.INITIAL, QuicPacketType.INITIAL),
            (quic.ZERO_RTT, QuicPacketType.ZERO_RTT),
            (quic.HANDSHAKE, QuicPacketType.HANDSHAKE),
        )
        for code, (ours, theirs) in zip(codes, kinds, strict=False):
            rest = (b"\0" if ours == quic.INITIAL else b"") + b"\x20" + bytes(32)
            packet = long_packet(version, code, rest=rest)
            assert read(packet).type == ours
            assert pull_quic_header(Buffer(data=packet)).packet_type == theirs
        assert read(long_packet(version, codes[3])).type == quic.RETRY

    def test_of_a_version_unknown(self) -> None:
        assert read(long_packet(7)).type == quic.UNKNOWN


class TestTokensRfc9000Section1722:
    @pytest.mark.parametrize("size", [0, 1, 63, 64, 300])
    def test_as_another_reads_it(self, size: int) -> None:
        token = b"t" * size
        prefix = bytes((size,)) if size < 64 else (0x4000 | size).to_bytes(2, "big")
        packet = long_packet(rest=prefix + token + b"\x20" + bytes(32))
        assert token_of(packet, read(packet)) == token == pull_quic_header(Buffer(data=packet)).token

    @pytest.mark.parametrize("rest", [b"", b"\x05abcd", b"\x40", b"\xc0\0\0"])
    def test_cut_short(self, rest: bytes) -> None:
        packet = long_packet(rest=rest)
        assert token_of(packet, read(packet)) is None


class TestWriting:
    def test_version_negotiation_as_another_writes_it(self) -> None:
        header = read(long_packet(0x0A0A0A0A))
        ours = quic.version_negotiation(header, (VERSION_1, VERSION_2), 0)
        theirs = encode_quic_version_negotiation(
            source_cid=header.destination,
            destination_cid=header.source,
            supported_versions=[VERSION_1, VERSION_2],
        )
        assert ours[1:] == theirs[1:]
        assert ours[0] & 0xC0 == 0xC0

    @pytest.mark.parametrize("version", [VERSION_1, VERSION_2])
    def test_retry_as_another_reads_it(self, version: int) -> None:
        header = read(long_packet(version))
        packet = quic.retry(header, b"n" * 9, b"token")
        theirs = pull_quic_header(Buffer(data=packet))
        assert theirs.packet_type == QuicPacketType.RETRY
        assert (theirs.destination_cid, theirs.source_cid, theirs.token) == (b"s" * 5, b"n" * 9, b"token")
        assert packet[-16:] == get_retry_integrity_tag(packet[:-16], b"d" * 8, version=version)

    @pytest.mark.parametrize(("received", "size"), [(21, 0), (22, 21), (30, 29), (43, 42), (1200, 42)])
    def test_a_stateless_reset_is_shorter_than_its_cause_rfc9000_section_103(
        self, received: int, size: int
    ) -> None:
        token = quic.reset_token(b"secret", b"cid")
        packet = quic.stateless_reset(token, received, bytes(range(64)))
        assert len(packet) == size
        if size:
            assert packet.endswith(token)
            assert packet[0] & 0xC0 == 0x40

    def test_reset_tokens_differ_by_id_and_secret(self) -> None:
        tokens = {quic.reset_token(secret, cid) for secret in (b"a", b"b") for cid in (b"c", b"d")}
        assert len(tokens) == 4
