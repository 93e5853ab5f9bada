"""PROXY protocol headers: read, refused, written. Sections are those of proxy-protocol.txt."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.wire import proxy_protocol as pp
from expressgateway.wire.proxy_protocol import Header, ProxyProtocolError, Transport, parse

V4 = Header(1, ("192.0.2.7", 56324), ("198.51.100.1", 443), Transport.STREAM)
V6 = Header(1, ("2001:db8::7", 56324), ("2001:db8::1", 443), Transport.STREAM)
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def binary(body: bytes, ver_cmd: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    """A version 2 header put together by hand, right or wrong."""
    return SIGNATURE + struct.pack("!BBH", ver_cmd, family, len(body) if length is None else length) + body


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


V4_BODY = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + struct.pack("!HH", 56324, 443)
V6_BODY = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::7")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + struct.pack("!HH", 56324, 443)
)


def checked(body: bytes) -> bytes:
    """`binary(body)` with a right checksum TLV at the end, computed bit by bit."""
    blank = binary(body + tlv(0x03, bytes(4)))
    value = 0xFFFFFFFF
    for byte in blank:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return blank[:-4] + struct.pack("!I", value ^ 0xFFFFFFFF)


ACCEPTED = [
    pytest.param(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n", V4, id="v1-tcp4"),
    pytest.param(b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n", V6, id="v1-tcp6"),
    pytest.param(
        b"PROXY TCP6 2001:0DB8:0:0:0:0:0:7 2001:db8::1 56324 443\r\n", V6, id="v1-tcp6-other-spelling"
    ),
    pytest.param(
        b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 56324 443\r\n", V4, id="v1-mapped-is-ipv4"
    ),
    pytest.param(
        b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n",
        Header(1, ("0.0.0.0", 0), ("255.255.255.255", 65535), Transport.STREAM),
        id="v1-extremes",
    ),
    pytest.param(b"PROXY UNKNOWN\r\n", Header(1), id="v1-unknown"),
    pytest.param(
        b"PROXY UNKNOWN " + b"ffff:" * 14 + b"f 65535 65535" + b"x" * 8 + b"\r\n", Header(1), id="v1-107"
    ),
    pytest.param(binary(V4_BODY), Header(2, V4.source, V4.destination, Transport.STREAM), id="v2-tcp4"),
    pytest.param(
        binary(V6_BODY, family=0x21), Header(2, V6.source, V6.destination, Transport.STREAM), id="v2-tcp6"
    ),
    pytest.param(
        binary(V4_BODY, family=0x12), Header(2, V4.source, V4.destination, Transport.DATAGRAM), id="v2-udp4"
    ),
    pytest.param(
        binary(V6_BODY, family=0x22), Header(2, V6.source, V6.destination, Transport.DATAGRAM), id="v2-udp6"
    ),
    pytest.param(binary(bytes(216), family=0x31), Header(2), id="v2-unix-stream"),
    pytest.param(binary(bytes(216), family=0x32), Header(2), id="v2-unix-datagram"),
    pytest.param(binary(b"", family=0x00), Header(2), id="v2-unspec"),
    pytest.param(binary(V4_BODY, family=0x10), Header(2), id="v2-inet-without-transport"),
    pytest.param(binary(b"", ver_cmd=0x20, family=0x00), Header(2, is_local=True), id="v2-local"),
    pytest.param(
        binary(b"anything", ver_cmd=0x20, family=0x11), Header(2, is_local=True), id="v2-local-body-discarded"
    ),
    pytest.param(
        binary(V4_BODY + tlv(0x02, b"example.org") + tlv(0x04, b"") + tlv(0xEE, b"\x01vpce-1")),
        Header(2, V4.source, V4.destination, Transport.STREAM),
        id="v2-tlvs",
    ),
    pytest.param(
        checked(V4_BODY), Header(2, V4.source, V4.destination, Transport.STREAM), id="v2-right-checksum"
    ),
    pytest.param(
        binary(V4_BODY + tlv(0x04, bytes(pp.MAX_V2_BYTES - 16 - 12 - 3))),
        Header(2, V4.source, V4.destination, Transport.STREAM),
        id="v2-longest",
    ),
]

REFUSED = [
    pytest.param(b"GET / HTTP/1.1\r\n", "no PROXY header", id="not-a-header"),
    pytest.param(b"\x16\x03\x01\x02\x00", "no PROXY header", id="tls-hello"),
    pytest.param(b"proxy TCP4 1.1.1.1 2.2.2.2 1 2\r\n", "no PROXY header", id="v1-lower-case"),
    pytest.param(b"PROXY\tTCP4 1.1.1.1 2.2.2.2 1 2\r\n", "no PROXY header", id="v1-tab"),
    pytest.param(b"PROXY TCP5 1.1.1.1 2.2.2.2 1 2\r\n", "a family other", id="v1-family"),
    pytest.param(b"PROXY UDP4 1.1.1.1 2.2.2.2 1 2\r\n", "a family other", id="v1-udp"),
    pytest.param(b"PROXY tcp4 1.1.1.1 2.2.2.2 1 2\r\n", "a family other", id="v1-family-case"),
    pytest.param(b"PROXY UNKNOWNX\r\n", "a family other", id="v1-unknown-glued"),
    pytest.param(b"PROXY \r\n", "a family other", id="v1-empty"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n", "exactly two", id="v1-field-missing"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2 3\r\n", "exactly two", id="v1-field-extra"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2 \r\n", "exactly two", id="v1-blank-at-end"),
    pytest.param(b"PROXY TCP4  1.1.1.1 2.2.2.2 1 2\r\n", "exactly two", id="v1-two-blanks"),
    pytest.param(b"PROXY TCP4 1.1.1.1 ::1 1 2\r\n", "not one of its family", id="v1-v6-in-tcp4"),
    pytest.param(b"PROXY TCP6 1.1.1.1 ::1 1 2\r\n", "not one of its family", id="v1-v4-in-tcp6"),
    pytest.param(b"PROXY TCP4 1.1.1.01 2.2.2.2 1 2\r\n", "not one of its family", id="v1-octal"),
    pytest.param(b"PROXY TCP4 1.1.257 2.2.2.2 1 2\r\n", "not one of its family", id="v1-short-address"),
    pytest.param(b"PROXY TCP4 1.1.1.256 2.2.2.2 1 2\r\n", "not one of its family", id="v1-256"),
    pytest.param(b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "not one of its family", id="v1-scope"),
    pytest.param(b"PROXY TCP4 1.1.1.\xb2 2.2.2.2 1 2\r\n", "not one of its family", id="v1-not-ascii"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n", "not a plain number", id="v1-leading-zero"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 00 2\r\n", "not a plain number", id="v1-double-zero"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 +1 2\r\n", "not a plain number", id="v1-signed"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n", "not a plain number", id="v1-port-too-big"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 -2\r\n", "not a plain number", id="v1-negative"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 \r\n", "not a plain number", id="v1-no-port"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\n", "bare LF", id="v1-lf"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\rX", "bare CR", id="v1-cr"),
    pytest.param(b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\r\n", "bare CR", id="v1-cr-crlf"),
    pytest.param(b"PROXY UNKNOWN x\ny\r\n", "bare LF", id="v1-unknown-lf"),
    pytest.param(b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", "longer than 107", id="v1-108"),
    pytest.param(b"PROXY UNKNOWN " + b"x" * 5000, "longer than 107", id="v1-endless"),
    pytest.param(SIGNATURE[:11] + b"\r", "no PROXY header", id="v2-signature"),
    pytest.param(binary(V4_BODY, ver_cmd=0x11), "not of version 2", id="v2-version-1"),
    pytest.param(binary(V4_BODY, ver_cmd=0x31), "not of version 2", id="v2-version-3"),
    pytest.param(binary(V4_BODY, ver_cmd=0x22), "other than LOCAL and PROXY", id="v2-command"),
    pytest.param(binary(V4_BODY, family=0x41), "unassigned", id="v2-family"),
    pytest.param(binary(V4_BODY, family=0x13), "unassigned", id="v2-transport"),
    pytest.param(binary(V4_BODY[:-1]), "shorter than the addresses", id="v2-v4-short"),
    pytest.param(binary(V6_BODY[:-1], family=0x21), "shorter than the addresses", id="v2-v6-short"),
    pytest.param(binary(bytes(215), family=0x31), "shorter than the addresses", id="v2-unix-short"),
    pytest.param(binary(V4_BODY + b"\x04"), "head of a TLV", id="v2-tlv-head"),
    pytest.param(binary(V4_BODY + b"\x04\x00\x02x"), "value of a TLV", id="v2-tlv-value"),
    pytest.param(binary(V4_BODY + tlv(3, bytes(3))), "not four bytes", id="v2-checksum-size"),
    pytest.param(checked(V4_BODY)[:-1] + b"\x00", "does not match", id="v2-checksum-wrong"),
    pytest.param(binary(b"", length=4081), "more than 4096", id="v2-too-long"),
    pytest.param(binary(b"", ver_cmd=0x20, length=65535), "more than 4096", id="v2-local-too-long"),
]


def first_result(data: bytes) -> tuple[Header, int] | ProxyProtocolError | None:
    """What a connection sees that gets `data` one byte at a time."""
    for size in range(len(data) + 1):
        try:
            result = parse(bytearray(data[:size]))
        except ProxyProtocolError as error:
            return error
        if result is not None:
            return result
    return None


class TestReading:
    @pytest.mark.parametrize(("data", "header"), ACCEPTED)
    def test_whole_and_followed_by_the_clients_own_bytes(self, data: bytes, header: Header) -> None:
        assert parse(data) == (header, len(data))
        assert parse(data + b"PROXY more\r\n\r\n") == (header, len(data))

    @pytest.mark.parametrize(("data", "header"), ACCEPTED)
    def test_split_at_every_byte(self, data: bytes, header: Header) -> None:
        for size in range(len(data)):
            assert parse(data[:size]) is None
        assert first_result(data) == (header, len(data))

    @pytest.mark.parametrize(("data", "reason"), REFUSED)
    def test_refused_with_the_reason(self, data: bytes, reason: str) -> None:
        with pytest.raises(ProxyProtocolError, match=reason):
            parse(data)

    @pytest.mark.parametrize(("data", "reason"), REFUSED)
    def test_refused_alike_when_split(self, data: bytes, reason: str) -> None:
        result = first_result(data)
        assert isinstance(result, ProxyProtocolError)
        assert reason in str(result)

    def test_a_wrong_version_is_refused_before_the_length_is_there(self) -> None:
        with pytest.raises(ProxyProtocolError):
            parse(SIGNATURE + b"\x11")

    def test_the_longest_v1_line_is_107_bytes(self) -> None:
        line = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
        assert len(line) == pp.MAX_V1_BYTES
        assert parse(line) == (Header(1), 107)

    @given(
        st.binary(max_size=300),
        st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21"]),
    )
    @example(b"TCP6 ::ffff:1.2.3.4%0 ::1 1 1\r\n", b"PROXY ")
    def test_garbage_raises_nothing_else_and_splitting_changes_nothing(
        self, data: bytes, prefix: bytes
    ) -> None:
        data = prefix + data
        try:
            whole: tuple[Header, int] | ProxyProtocolError | None = parse(data)
        except ProxyProtocolError as error:
            whole = error
        split = first_result(data)
        if isinstance(whole, ProxyProtocolError):
            assert isinstance(split, ProxyProtocolError)
            assert str(split) == str(whole)
        else:
            assert split == whole

    @given(st.binary(min_size=12, max_size=60), st.sampled_from([0x11, 0x12, 0x21, 0x31, 0x00]))
    def test_any_body_is_a_header_or_refused(self, body: bytes, family: int) -> None:
        try:
            result = parse(binary(body, family=family))
        except ProxyProtocolError:
            return
        assert result is not None
        assert result[1] == 16 + len(body)

    def test_a_body_that_never_comes_is_bounded(self) -> None:
        assert parse(binary(b"", family=0x11, length=4080)) is None
        with pytest.raises(ProxyProtocolError):
            parse(binary(b"", family=0x11, length=4081))


class TestChecksum:
    def test_the_published_check_value(self) -> None:
        assert pp.crc32c(b"123456789") == 0xE3069283

    @given(st.integers(0, 15 + 12 + 3 + 3), st.integers(0, 7))
    def test_any_flipped_bit_is_noticed(self, position: int, bit: int) -> None:
        data = bytearray(checked(V4_BODY))
        data[position] ^= 1 << bit
        try:
            result = parse(data)
        except ProxyProtocolError:
            return
        # A flipped bit in type or length may also hide the checksum, or ask for bytes that are not there.
        assert result is None or position in {12, 13, 14, 15, 28, 29, 30}


addresses = st.ip_addresses().map(str)
ports = st.integers(0, 65535)
ends = st.tuples(addresses, ports)


def unmapped(end: tuple[str, int]) -> tuple[str, int]:
    return pp._text(ip_address(end[0])), end[1]


class TestWriting:
    @given(ends, ends)
    @example(("::ffff:1.2.3.4", 1), ("10.0.0.1", 2))
    def test_v1_round_trip(self, source: tuple[str, int], destination: tuple[str, int]) -> None:
        data = pp.encode_v1(source, destination)
        assert len(data) <= pp.MAX_V1_BYTES
        assert parse(data) == (
            Header(1, unmapped(source), unmapped(destination), Transport.STREAM),
            len(data),
        )

    @given(ends, ends, st.sampled_from([Transport.STREAM, Transport.DATAGRAM]))
    def test_v2_round_trip(
        self, source: tuple[str, int], destination: tuple[str, int], transport: Transport
    ) -> None:
        data = pp.encode_v2(source, destination, transport)
        assert parse(data) == (Header(2, unmapped(source), unmapped(destination), transport), len(data))

    def test_v1_bytes(self) -> None:
        assert (
            pp.encode_v1(("192.0.2.7", 56324), ("198.51.100.1", 443))
            == b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"
        )
        assert (
            pp.encode_v1(("2001:db8::7", 56324), ("2001:db8::1", 443))
            == b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n"
        )

    def test_v2_bytes(self) -> None:
        assert pp.encode_v2(("192.0.2.7", 56324), ("198.51.100.1", 443)) == binary(V4_BODY)
        assert pp.encode_v2(("2001:db8::7", 56324), ("2001:db8::1", 443)) == binary(V6_BODY, family=0x21)

    def test_a_mixed_pair_is_told_in_ipv6(self) -> None:
        data = pp.encode_v1(("192.0.2.7", 1), ("2001:db8::1", 2))
        assert data.startswith(b"PROXY TCP6 ::ffff:")
        assert parse(data) == (Header(1, ("192.0.2.7", 1), ("2001:db8::1", 2), Transport.STREAM), len(data))

    def test_a_dual_stack_socket_tells_ipv4_as_ipv4(self) -> None:
        pair = ("::ffff:192.0.2.7", 1), ("192.0.2.8", 2)
        assert pp.encode_v1(*pair) == b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n"
        assert pp.encode_v2(*pair)[13] == 0x11

    def test_a_scope_is_left_out(self) -> None:
        assert pp.encode_v1(("fe80::1%eth0", 1), ("fe80::2", 2)) == b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"

    def test_nothing_to_say(self) -> None:
        assert pp.encode_v1(None, ("192.0.2.7", 1)) == b"PROXY UNKNOWN\r\n"
        assert pp.encode_v2(("192.0.2.7", 1), None) == pp.V2_UNKNOWN
        assert pp.encode_v2(("192.0.2.7", 1), ("192.0.2.8", 1), Transport.UNKNOWN) == pp.V2_UNKNOWN
        assert parse(pp.V2_UNKNOWN) == (Header(2), 16)
        assert parse(pp.V2_LOCAL) == (Header(2, is_local=True), 16)

    @pytest.mark.parametrize(("host", "port"), [("nowhere", 1), ("192.0.2.7", -1), ("192.0.2.7", 65536)])
    def test_our_own_mistakes_are_value_errors(self, host: str, port: int) -> None:
        for encode in (pp.encode_v1, pp.encode_v2):
            with pytest.raises(ValueError):  # noqa: PT011 - two kinds of it, both meant
                encode((host, port), ("192.0.2.8", 1))
            with pytest.raises(ValueError):  # noqa: PT011
                encode(("192.0.2.8", 1), (host, port))
