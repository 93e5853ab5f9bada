"""The PROXY protocol, versions 1 and 2: who the client was, told by a proxy before us or by us to a backend.

Words: a *header* is the block in front of the connection's first own byte. Its *source* and *destination* are
(address, port) pairs as the sender saw them. A header without them is *unknown* (v1 UNKNOWN, v2 AF_UNSPEC
or AF_UNIX) or *local* (v2 LOCAL: the sender speaks for itself, as in its health checks); in both cases the
addresses of the connection itself hold.

The text this follows is HAProxy's proxy-protocol.txt; sections are quoted as "PP 2.1" (v1) and "PP 2.2" (v2).

This module refuses to know who may be believed (the listener's trusted networks), how long to wait for a
header, and what a TLV says: TLVs are walked, so that a broken one is refused, and the checksum is verified;
no other is read.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

__all__ = [
    "MAX_V1_BYTES",
    "MAX_V2_BYTES",
    "V1_UNKNOWN",
    "V2_LOCAL",
    "V2_UNKNOWN",
    "Address",
    "Header",
    "ProxyProtocolError",
    "Transport",
    "encode_v1",
    "encode_v2",
    "parse",
]

Address = tuple[str, int]
"""(textual address without scope, port)."""

MAX_V1_BYTES: Final = 107
"""PP 2.1: the longest line, CRLF included."""

MAX_V2_BYTES: Final = 4096
"""Our cap on a whole v2 header; the length field could say 65,551.

Addresses need at most 216 bytes. The rest is for TLVs: a TLS TLV with subject, version and cipher is some
hundred bytes, and cloud load balancers add their endpoint ids. A header with a whole client certificate
inside is refused.
"""

V1_PREFIX: Final = b"PROXY "
V2_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"

V1_UNKNOWN: Final = b"PROXY UNKNOWN\r\n"
"""What to send in version 1 when there is nothing to say."""

V2_UNKNOWN: Final = V2_SIGNATURE + b"\x21\x00\x00\x00"
"""A proxied connection whose addresses cannot be expressed."""

V2_LOCAL: Final = V2_SIGNATURE + b"\x20\x00\x00\x00"
"""A connection of the gateway's own, as a health check is."""

V2_FIXED_BYTES: Final = 16  # signature, version and command, family and transport, length
PORT: Final = re.compile(rb"0|[1-9][0-9]{0,4}")

# PP 2.2: the bytes of addresses for each address family (the high nibble); anything missing is refused.
AF_UNSPEC, AF_INET, AF_INET6, AF_UNIX = range(4)
ADDRESS_BYTES: Final = {AF_UNSPEC: 0, AF_INET: 12, AF_INET6: 36, AF_UNIX: 216}

TLV_CRC32C: Final = 0x03
TLV_HEAD_BYTES: Final = 3


class ProxyProtocolError(Exception):
    """The bytes are not a PROXY header, or a wrong one; the connection has no meaning any more.

    The text is a sentence's end ("the header ...") for logs.
    """


class Transport(enum.Enum):
    """What the original client spoke. Version 1 knows only TCP."""

    UNKNOWN = 0
    STREAM = 1
    DATAGRAM = 2


@dataclass(frozen=True, slots=True)
class Header:
    """One parsed header. `source` and `destination` are both set or both None (unknown and local)."""

    version: int
    source: Address | None = None
    destination: Address | None = None
    transport: Transport = Transport.UNKNOWN
    is_local: bool = False


def parse(buffer: bytes | bytearray) -> tuple[Header, int] | None:
    """Read the header at the beginning of `buffer`: (header, its length), or None while bytes are missing.

    Never asks for more than MAX_V1_BYTES or MAX_V2_BYTES, and says so as early as the bytes tell. Raises
    ProxyProtocolError, and nothing else, whatever the bytes are.
    """
    if buffer.startswith(V1_PREFIX):
        return _parse_v1(buffer)
    if buffer.startswith(V2_SIGNATURE):
        return _parse_v2(buffer)
    if V1_PREFIX.startswith(buffer) or V2_SIGNATURE.startswith(buffer):
        return None
    raise ProxyProtocolError("there is no PROXY header where one is required")


def _parse_v1(buffer: bytes | bytearray) -> tuple[Header, int] | None:
    line_end = buffer.find(b"\r", 0, MAX_V1_BYTES - 1)
    if buffer.find(b"\n", 0, line_end if line_end >= 0 else MAX_V1_BYTES) >= 0:
        raise ProxyProtocolError("the header line contains a bare LF")
    if line_end < 0:
        if len(buffer) >= MAX_V1_BYTES - 1:
            raise ProxyProtocolError(f"the header line is longer than {MAX_V1_BYTES} bytes")
        return None
    if len(buffer) == line_end + 1:
        return None
    if buffer[line_end + 1] != 0x0A:
        raise ProxyProtocolError("the header line contains a bare CR")
    return _read_v1_line(bytes(buffer[len(V1_PREFIX) : line_end])), line_end + 2


def _read_v1_line(line: bytes) -> Header:
    """`line` is what stands between "PROXY " and CRLF."""
    fields = line.split(b" ")
    family = fields[0]
    if family == b"UNKNOWN":
        # PP 2.1: "the receiver must ignore anything presented before the CRLF is found".
        return Header(1)
    if family not in {b"TCP4", b"TCP6"}:
        raise ProxyProtocolError("the header names a family other than TCP4, TCP6 and UNKNOWN")
    if len(fields) != 5:
        raise ProxyProtocolError("the header line has not exactly two addresses and two ports")
    make = IPv4Address if family == b"TCP4" else IPv6Address
    source = (_read_v1_address(fields[1], make), _read_v1_port(fields[3]))
    destination = (_read_v1_address(fields[2], make), _read_v1_port(fields[4]))
    return Header(1, source, destination, Transport.STREAM)


def _read_v1_address(field: bytes, make: type[IPv4Address] | type[IPv6Address]) -> str:
    try:
        if b"%" in field:
            raise ValueError("a scope means nothing on another machine")
        return _text(make(field.decode("ascii")))
    except ValueError:
        raise ProxyProtocolError(
            "the header line contains an address that is not one of its family"
        ) from None


def _read_v1_port(field: bytes) -> int:
    if not PORT.fullmatch(field) or int(field) > 65535:
        raise ProxyProtocolError("the header line contains a port that is not a plain number up to 65535")
    return int(field)


def _parse_v2(buffer: bytes | bytearray) -> tuple[Header, int] | None:
    # Each byte is judged as soon as it is there: a stranger is not made to wait for the sixteenth.
    size = len(buffer)
    if size < 13:
        return None
    command = buffer[12] & 0x0F
    if buffer[12] >> 4 != 2:
        raise ProxyProtocolError("the binary header is not of version 2")
    if command > 1:
        raise ProxyProtocolError("the binary header has a command other than LOCAL and PROXY")
    if size < V2_FIXED_BYTES:
        return None
    family, transport = buffer[13] >> 4, buffer[13] & 0x0F
    body_bytes = buffer[14] << 8 | buffer[15]
    end = V2_FIXED_BYTES + body_bytes
    if end > MAX_V2_BYTES:
        raise ProxyProtocolError(f"the binary header is {end} bytes long, more than {MAX_V2_BYTES}")
    if command == 0:
        # PP 2.2: the receiver "must discard the protocol block including the family which is ignored".
        return (Header(2, is_local=True), end) if size >= end else None
    address_bytes = ADDRESS_BYTES.get(family)
    if address_bytes is None or transport > 2:
        raise ProxyProtocolError("the binary header has an unassigned family or transport")
    if body_bytes < address_bytes:
        raise ProxyProtocolError("the binary header is shorter than the addresses of its family")
    if size < end:
        return None
    _check_tlvs(buffer, V2_FIXED_BYTES + address_bytes, end)
    if family not in {AF_INET, AF_INET6} or transport == 0:
        return Header(2), end
    half = 4 if family == AF_INET else 16
    ports = V2_FIXED_BYTES + 2 * half
    source = bytes(buffer[V2_FIXED_BYTES : V2_FIXED_BYTES + half])
    destination = bytes(buffer[V2_FIXED_BYTES + half : ports])
    header = Header(
        2,
        (_text(ip_address(source)), buffer[ports] << 8 | buffer[ports + 1]),
        (_text(ip_address(destination)), buffer[ports + 2] << 8 | buffer[ports + 3]),
        Transport(transport),
    )
    return header, end


def _check_tlvs(buffer: bytes | bytearray, position: int, end: int) -> None:
    """Walk the type-length-value fields (PP 2.2.1), which must fill the header exactly; verify a checksum."""
    while position < end:
        value_at = position + TLV_HEAD_BYTES
        if value_at > end:
            raise ProxyProtocolError("the binary header ends inside the head of a TLV")
        value_end = value_at + (buffer[position + 1] << 8 | buffer[position + 2])
        if value_end > end:
            raise ProxyProtocolError("the binary header ends inside the value of a TLV")
        if buffer[position] == TLV_CRC32C:
            _check_crc(buffer, value_at, value_end, end)
        position = value_end


def _check_crc(buffer: bytes | bytearray, value_at: int, value_end: int, end: int) -> None:
    if value_end - value_at != 4:
        raise ProxyProtocolError("the binary header has a checksum that is not four bytes long")
    expected = int.from_bytes(buffer[value_at:value_end], "big")
    # PP 2.2.2: computed over the whole header with the checksum itself taken for zero.
    blanked = b"".join((buffer[:value_at], b"\0\0\0\0", buffer[value_end:end]))
    if crc32c(blanked) != expected:
        raise ProxyProtocolError("the binary header does not match its checksum")


def encode_v1(source: Address | None, destination: Address | None) -> bytes:
    """The version 1 line for a TCP connection; UNKNOWN when either address is None.

    Raises ValueError on an address or port that is none: that is our own mistake, never a peer's.
    """
    if source is None or destination is None:
        return V1_UNKNOWN
    sender, receiver = _same_family(source[0], destination[0])
    family = "TCP4" if sender.version == 4 else "TCP6"
    _check_port(source[1])
    _check_port(destination[1])
    return f"PROXY {family} {sender} {receiver} {source[1]} {destination[1]}\r\n".encode("ascii")


def encode_v2(
    source: Address | None, destination: Address | None, transport: Transport = Transport.STREAM
) -> bytes:
    """The version 2 header, without TLVs; V2_UNKNOWN when either address or the transport is not known.

    Raises ValueError like `encode_v1`. For a connection of the gateway's own, send V2_LOCAL.
    """
    if source is None or destination is None or transport is Transport.UNKNOWN:
        return V2_UNKNOWN
    sender, receiver = _same_family(source[0], destination[0])
    family = AF_INET if sender.version == 4 else AF_INET6
    _check_port(source[1])
    _check_port(destination[1])
    return b"".join(
        (
            V2_SIGNATURE,
            bytes((0x21, family << 4 | transport.value)),
            ADDRESS_BYTES[family].to_bytes(2, "big"),
            sender.packed,
            receiver.packed,
            source[1].to_bytes(2, "big"),
            destination[1].to_bytes(2, "big"),
        )
    )


def _check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is not a port")


def _same_family(
    source: str, destination: str
) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address]:
    """Both addresses in one family, as both versions require: a mixed pair becomes IPv6 with one mapped."""
    sender, receiver = _plain(source), _plain(destination)
    if sender.version != receiver.version:
        return _as_v6(sender), _as_v6(receiver)
    return sender, receiver


def _plain(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text.partition("%")[0])
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _as_v6(address: IPv4Address | IPv6Address) -> IPv6Address:
    return address if isinstance(address, IPv6Address) else IPv6Address(f"::ffff:{address}")


def _text(address: IPv4Address | IPv6Address) -> str:
    """An IPv4-mapped address comes out as IPv4: one client has one name, for caps and for X-Forwarded-For."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


CRC32C_TABLE: Final = _crc32c_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as PP 2.2.2 asks for. Headers are short, so a table in Python is enough."""
    value = 0xFFFFFFFF
    for byte in data:
        value = CRC32C_TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF
