"""The fields a gateway adds, replaces and removes (RFC 9110 7.6, RFC 7239, W3C Trace Context).

A client repeats its header section on a connection, and the codec then gives the very same tuple again; so
the part of the answer that does not change from request to request is kept on the ``Peer`` and looked up by
identity.
"""

import ipaddress
import re
from collections.abc import Sequence
from email.utils import formatdate
from typing import Final

from expressgateway.proxy.trace_context import Ids, read_parent, read_state
from expressgateway.upstream.backend import Addresses
from expressgateway.wire.head import (
    NO_FIELDS,
    NO_SHARED,
    Field,
    Fields,
    RequestHead,
    ResponseHead,
    SharedFields,
)

_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,200}")

OURS: Final = frozenset(
    {
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"forwarded",
        b"via",
        b"x-request-id",
        b"traceparent",
        b"tracestate",
    }
)

_KEPT_RESPONSES: Final = 128  # header sections of responses and what was made of them

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class TrustedProxies:
    """The networks whose forwarding fields are believed."""

    __slots__ = ("_networks",)

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks: tuple[Network, ...] = tuple(ipaddress.ip_network(text) for text in networks)

    def __contains__(self, ip: str) -> bool:
        if not self._networks:
            return False
        try:
            address = ipaddress.ip_address(ip.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return any(address in network for network in self._networks)


class Peer:
    """What exchanges on one client connection have in common. Also the memory of the last forwarding."""

    __slots__ = (
        "addresses",
        "began",
        "ip",
        "is_trusted",
        "kept",
        "kept_by",
        "kept_request_id",
        "kept_trace",
        "node",
        "scheme",
        "seen",
        "seen_authority",
        "seen_version",
        "sni",
    )

    def __init__(
        self,
        ip: str,
        is_trusted: bool,
        scheme: bytes,
        sni: str | None = None,
        addresses: Addresses | None = None,
        began: float = 0.0,
    ) -> None:
        self.ip = ip.encode("ascii")
        self.node = b'"[%s]"' % self.ip if ":" in ip else self.ip  # RFC 7239 6
        self.is_trusted = is_trusted
        self.scheme = scheme
        self.sni = sni
        self.addresses = addresses
        self.began = began
        """When its connection did, by the reactor's clock."""
        # What ``Forwarding`` made of the last request: by which rules, of what, and the result.
        self.kept_by: Forwarding | None = None
        self.seen: Fields | None = None
        self.seen_authority = b""
        self.seen_version = b""
        self.kept = NO_SHARED
        self.kept_request_id = b""
        self.kept_trace: Field | None = None


class Forwarding:
    """One listener's rules for both directions."""

    __slots__ = (
        "_adds_any",
        "_alt_svc",
        "_date",
        "_date_at",
        "_forwarded",
        "_kept",
        "_server",
        "_via",
        "_x_forwarded",
        "ids",
        "name",
    )

    def __init__(
        self, *, forwarded: str, via: bool, server_header: str, alt_svc: str | None, ids: Ids
    ) -> None:
        """``forwarded``: ``x-forwarded``, ``forwarded``, ``both`` or ``none``."""
        self._x_forwarded = forwarded in ("x-forwarded", "both")
        self._forwarded = forwarded in ("forwarded", "both")
        self._adds_any = forwarded != "none"
        # A Server value may be anything; a pseudonym is one token (RFC 9110 7.6.3, RFC 9209 2).
        self.name = server_header.encode("ascii") if _TOKEN.fullmatch(server_header) else b"expressgateway"
        self._via = b" " + self.name if via else b""
        self._server: Field = (b"server", server_header.encode("ascii"))
        self._alt_svc: Field | None = (b"alt-svc", alt_svc.encode("ascii")) if alt_svc else None
        self._kept: dict[int, tuple[Fields, bytes, int, SharedFields]] = {}
        self._date: Field = (b"date", b"")
        self._date_at = -1
        self.ids = ids

    # -- towards the backend ---------------------------------------------------------------------------

    def request(self, head: RequestHead, peer: Peer) -> bytes:
        """Give the head the fields to send; returns this request's id."""
        if (
            head.headers is not peer.seen
            or peer.kept_by is not self
            or head.authority != peer.seen_authority
            or head.version != peer.seen_version
        ):
            self._remember(head, peer)
        ids = self.ids
        number = ids.make()
        request_id = peer.kept_request_id or ids.request_id(number)
        head.shared = peer.kept
        head.headers = (
            (b"x-request-id", request_id),
            peer.kept_trace or (b"traceparent", ids.traceparent(number)),
        )
        return request_id

    def _remember(self, head: RequestHead, peer: Peer) -> None:
        base: list[Field] = []
        chain: list[bytes] = []
        forwarded: list[bytes] = []
        via: list[bytes] = []
        parents: list[bytes] = []
        states: list[bytes] = []
        proto = host = b""
        peer.kept_request_id = b""
        peer.kept_trace = None
        headers: Fields = head.headers
        if OURS.isdisjoint(dict(headers)):
            # fast path: nothing of ours to look at
            base = list(headers)
            headers = NO_FIELDS
        for field in headers:
            name = field[0]
            if name not in OURS:
                base.append(field)
            elif name == b"via":
                via.append(field[1])
            elif name == b"tracestate":
                states.append(field[1])
            elif name == b"traceparent":
                parents.append(field[1])
            elif not peer.is_trusted:
                continue  # who is not trusted has no say in where a request came from
            elif not self._adds_any and name != b"x-request-id":
                base.append(field)  # ``none`` leaves a trusted proxy's fields as they are
            elif name == b"x-forwarded-for":
                chain.append(field[1])
            elif name == b"x-forwarded-proto":
                proto = field[1]
            elif name == b"x-forwarded-host":
                host = field[1]
            elif name == b"forwarded":
                forwarded.append(field[1])
            elif name == b"x-request-id" and _REQUEST_ID.fullmatch(field[1]):
                peer.kept_request_id = field[1]
        if parents and (parent := read_parent(parents)) is not None:
            peer.kept_trace = (b"traceparent", parent)
            # The state of a trace that we begin anew means nothing: W3C Trace Context 4.3.
            if states and (state := read_state(states)):
                base.append((b"tracestate", state))
        if self._x_forwarded:
            base.append((b"x-forwarded-for", b", ".join((*chain, peer.ip))))
            base.append((b"x-forwarded-proto", proto or peer.scheme))
            if host or head.authority:
                base.append((b"x-forwarded-host", host or head.authority))
        if self._forwarded:
            element = b"for=" + peer.node + b";proto=" + peer.scheme
            if head.authority:
                element += b';host="' + head.authority + b'"'
            base.append((b"forwarded", b", ".join((*forwarded, element))))
        if self._via:
            via.append(head.version + self._via)
        if via:
            base.append((b"via", b", ".join(via)))
        peer.kept = SharedFields(tuple(base))
        peer.kept_by = self
        peer.seen = head.headers
        peer.seen_version = head.version
        peer.seen_authority = head.authority

    # -- towards the client ----------------------------------------------------------------------------

    def response(self, head: ResponseHead, wall_s: int) -> None:
        """Give the head the fields to send.

        ``wall_s``: whole seconds of wall time, for the Date of a backend that sent none (RFC 9110 6.6.1).
        """
        # fast path: backends repeat themselves, too, and the codec gives the same tuple for the same fields
        kept = self._kept.get(id(head.headers))
        if (
            kept is not None
            and kept[0] is head.headers
            and kept[1] == head.version
            and (not kept[2] or kept[2] == wall_s)
        ):
            head.shared = kept[3]
            head.headers = NO_FIELDS
            return
        fields: list[Field] = []
        has_date = has_server = is_secret = False
        via = b""
        alt_svc = self._alt_svc
        for field in head.headers:
            name = field[0]
            if name == b"date":
                has_date = True
            elif name == b"server":
                has_server = True
            elif name == b"via":
                via = via + b", " + field[1] if via else field[1]
                continue
            elif name == b"set-cookie":
                is_secret = True
            elif name == b"alt-svc" and alt_svc is not None:
                continue
            fields.append(field)
        if not has_date:
            fields.append(self.date(wall_s))
        if not has_server:
            fields.append(self._server)
        if alt_svc is not None:
            fields.append(alt_svc)
        if self._via:
            own = head.version + self._via
            fields.append((b"via", via + b", " + own if via else own))
        elif via:
            fields.append((b"via", via))
        shared = SharedFields(tuple(fields))
        if len(self._kept) >= _KEPT_RESPONSES:
            self._kept.clear()
        if not is_secret:
            # The tuple is kept with its id, so that no other can come to have it.
            self._kept[id(head.headers)] = (head.headers, head.version, 0 if has_date else wall_s, shared)
        head.shared = shared
        head.headers = NO_FIELDS

    def own(self, wall_s: int) -> list[Field]:
        """What every answer of our own carries."""
        fields = [self.date(wall_s), self._server]
        if self._alt_svc is not None:
            fields.append(self._alt_svc)
        return fields

    def date(self, wall_s: int) -> Field:
        if wall_s != self._date_at:
            self._date_at = wall_s
            self._date = (b"date", formatdate(wall_s, usegmt=True).encode("ascii"))
        return self._date
