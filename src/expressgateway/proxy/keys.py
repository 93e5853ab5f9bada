"""What a request is hashed by: the client's address, its path, a field or a cookie.

Introduces ``Key``, a function from a request to bytes, or None for a request that has no such thing. It reads
the head as the client sent it, before ``Forwarding`` gives it other fields.
"""

import re
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Final

from expressgateway.proxy.forwarding import Peer, TrustedProxies
from expressgateway.proxy.paths import PathError, normalise
from expressgateway.wire.head import RequestHead

Key = Callable[[RequestHead, Peer], bytes | None]

_MAX_HOPS: Final = 32  # of a forwarding chain, from the right; the rest is not looked at
_MAX_CHAIN_BYTES: Final = 4096  # a longer chain of ``Forwarded`` is not believed
_KEPT_CHAINS: Final = 1024  # chains and whom they name; starts afresh when full
_KEPT_CHAIN_BYTES: Final = 256  # longer ones are read each time
_MAX_COOKIES: Final = 64  # places in one Cookie field where the name is looked at

# RFC 7239 4: pairs of one element are separated by semicolons, elements by commas.
_PAIR: Final = re.compile(
    rb"[ \t]*+(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+)="
    rb'(?:([!#$%&\'*+.^_`|~0-9A-Za-z-]+)|"((?:[^"\\]|\\.)*+)"))?[ \t]*+([;,]|\Z)'
)
_V4_WITH_PORT: Final = re.compile(r"([0-9.]+):[0-9]+")


def key_of(spec: str, trusted: TrustedProxies) -> Key:
    """The key for ``client_ip``, ``path``, ``header:NAME`` or ``cookie:NAME``. Raises ``ValueError``."""
    kind, _, name = spec.partition(":")
    match kind:
        case "client_ip" if not name:
            return ClientIp(trusted)
        case "path" if not name:
            return _path
        case "header" if name:
            return _header(name.lower().encode("ascii"))
        case "cookie" if name:
            return _cookie(name.encode("ascii"))
    raise ValueError(f"no such key: {spec}")


def _path(head: RequestHead, _: Peer) -> bytes | None:
    try:
        return normalise(head.path)
    except PathError:
        return None


def _header(name: bytes) -> Key:
    if name == b"host":
        return lambda head, _: head.authority or None

    def value(head: RequestHead, _: Peer) -> bytes | None:
        lines = [field[1] for field in head.headers if field[0] == name]
        # Several lines are one list (RFC 9110 5.3).
        return (lines[0] if len(lines) == 1 else b", ".join(lines)) or None

    return value


def _cookie(name: bytes) -> Key:
    wanted = name + b"="
    return lambda head, _: _cookie_of(head, wanted) or None


# -- cookies


def cookie_value(head: RequestHead, name: bytes) -> bytes | None:
    """The value of the first cookie of that name, without quotes; None if there is none.

    Reads what clients send (RFC 6265 4.2.1) and skips what is not that; names are compared exactly.
    """
    return _cookie_of(head, name + b"=")


def _cookie_of(head: RequestHead, wanted: bytes) -> bytes | None:
    for field, line in head.headers:
        if field == b"cookie":
            at = line.find(wanted)
            if at > 0 and line[at - 2 : at] != b"; ":
                at = _first_of(line, wanted, at)
            if at >= 0:
                start = at + len(wanted)
                end = line.find(b";", start)
                value = (line[start:] if end < 0 else line[start:end]).strip(b" \t")
                is_quoted = value[:1] == b'"' and value[-1:] == b'"' and len(value) > 1
                return value[1:-1] if is_quoted else value
    return None


def _first_of(line: bytes, wanted: bytes, at: int) -> int:
    """Where the cookie is, ``at`` or behind it; -1 if nowhere. Not every ``name=`` is one: ``xname=``."""
    for _ in range(_MAX_COOKIES):
        before = line[:at].rstrip(b" \t")
        if not before or before.endswith(b";"):
            return at
        at = line.find(wanted, at + 1)
        if at < 0:
            break
    return -1


# -- the client's address


class ClientIp:
    """The address of the client, as far as it can be believed; never None.

    The peer's own, unless the peer is a trusted proxy: then the chain it sent (``X-Forwarded-For``, or else
    ``Forwarded``) is read from the right, past trusted proxies, to the first address that is none. What
    stands left of that is the client's own claim. Where the chain cannot be read, the last address that could
    be is the answer. Addresses have one spelling, and IPv4 in IPv6 is IPv4.
    """

    __slots__ = ("_kept", "_trusted")

    def __init__(self, trusted: TrustedProxies) -> None:
        self._trusted = trusted
        self._kept: dict[bytes, bytes] = {}

    def __call__(self, head: RequestHead, peer: Peer) -> bytes:
        # fast path: nobody to ask
        if not peer.is_trusted:
            return peer.ip
        chain = [value for name, value in head.headers if name == b"x-forwarded-for"]
        is_rfc = not chain
        if is_rfc:
            chain = [value for name, value in head.headers if name == b"forwarded"]
            if not chain:
                return peer.ip
        text = chain[0] if len(chain) == 1 else b",".join(chain)
        key = b"=" + text if is_rfc else text  # no address begins with it
        found = self._kept.get(key)
        if found is None:
            found = self._last_of(_forwarded(text) if is_rfc else _x_forwarded_for(text))
            if len(key) <= _KEPT_CHAIN_BYTES:
                if len(self._kept) >= _KEPT_CHAINS:
                    self._kept.clear()
                self._kept[key] = found
        return found or peer.ip

    def _last_of(self, nodes: Sequence[bytes]) -> bytes:
        """The last node that is not trusted, or else the first; empty if none can be read."""
        found = ""
        for node in reversed(nodes[-_MAX_HOPS:]):
            address = _address(node)
            if address is None:
                break
            found = address
            if address not in self._trusted:
                break
        return found.encode("ascii")


def _x_forwarded_for(text: bytes) -> list[bytes]:
    nodes = text.rsplit(b",", _MAX_HOPS)
    return nodes[1:] if len(nodes) > _MAX_HOPS else nodes


def _forwarded(text: bytes) -> list[bytes]:
    """The ``for`` of each element (RFC 7239 5.2), empty where it is missing; none of a malformed value.

    It can only be read from the left: what looks like an element may stand inside a quoted string.
    """
    if len(text) > _MAX_CHAIN_BYTES:
        return []
    nodes = [b""]
    at = 0
    while True:
        match = _PAIR.match(text, at)
        if match is None:
            return []
        name, token, quoted, separator = match.groups()
        if name is not None and name.lower() == b"for":
            nodes[-1] = token if token is not None else re.sub(rb"\\(.)", rb"\1", quoted)
        if not separator:
            return nodes
        if separator == b",":
            nodes.append(b"")
        at = match.end()


def _address(node: bytes) -> str | None:
    """The address of a node, with or without port, in its one spelling; None for anything else."""
    text = node.strip(b" \t").decode("latin-1")
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif match := _V4_WITH_PORT.fullmatch(text):
        text = match[1]
    if len(text) > 45 or "%" in text or not text.isascii():
        return None
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)
