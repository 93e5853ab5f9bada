"""Telling a client that its connection is not taken, without keeping anything for it (RFC 9000 10.2.3)."""

from typing import Final

from qh3._hazmat import QuicConnectionCore

from expressgateway.net.quic.events import Address
from expressgateway.net.quic.unnamed import UnnamedClient
from expressgateway.wire.quic import MIN_INITIAL_BYTES, read_long

_PADDING_FRAME: Final = 0x0


def refuse_initial(datagram: bytes, cid: bytes, address: Address, code: int, now: float) -> list[bytes]:
    """The packets that say so, with an error ``code``. The datagram should have an Initial; it may be
    anything all the same."""
    header = read_long(datagram)
    if header is None:
        return []
    unnamed = None if header.source else UnnamedClient(header.destination, cid)
    destination = b"" if unnamed is not None else header.destination
    try:
        core = QuicConnectionCore(
            False, header.version, ("0.0.0.0", 0), address, cid, destination, False, 2,
            MIN_INITIAL_BYTES, False, 1.0, 3, None, None, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.333, 0.025, now,
        )  # fmt: skip
        if unnamed is not None:
            unnamed.install(core, header.version)
            datagram = unnamed.readdressed(datagram)
        if not core.receive_datagram(datagram, address, now)[2]:
            return []
        core.close(code, _PADDING_FRAME, b"")
        sent = core.poll_transmit(now)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return []
    return [sent[0]] if sent is not None else []
