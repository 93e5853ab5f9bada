"""Which route a request takes: a table, compiled once and never changed.

Theory. Of all routes that match, the most specific wins, and being specific is lexicographic: the host first,
then the path, then the other conditions. So the table is a walk over *places*, from the most specific to the
least, in which every step is a lookup:

- hosts: the exact one, then wildcards from the longest suffix, then routes for any host. What an authority
  gives is remembered.
- in a host, paths: the exact one, then expressions, then prefixes from the longest, then routes for any path.
  Prefixes are a tree by segment. Each node holds all that still applies there, in order, so that a walk goes
  down and never back up.
- in a place, *shapes*: routes that ask for the same things (a method, those fields, those parameters) and
  differ only in the values. A shape is a dict from the values to the route.

If the conditions of a place do not hold, the next place is asked. Two routes of one rank that could both
match are refused by the configuration; which of them would win here is left open. What a match costs depends
on the request and on how many shapes its places have, not on how many routes there are.

What is compared: the host without its port, in lower case, without a trailing dot; the normalised path
(``paths.normalise``); a field's lines combined with ``, `` (RFC 9110 5.3), so that whoever merges or splits
lines on the way changes nothing; a parameter's first value, decoded.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final, Generic, TypeVar
from urllib.parse import unquote_to_bytes

from expressgateway.regex import RegexSet
from expressgateway.wire.head import Field, RequestHead

T = TypeVar("T")

_MAX_HOST_BYTES: Final = 253  # RFC 1035 2.3.4; a longer one is no host at all, and has at most 127 labels
_MAX_PARAMETERS: Final = 256  # of a query; conditions do not see what comes after
_SEEN_HOSTS: Final = 1024  # authorities and what they gave; starts afresh when full
_PORT: Final = re.compile(rb":[0-9]*\Z")


@dataclass(frozen=True, slots=True)
class Match:
    """What a request must look like. Everything given must hold; at most one of the three paths is given."""

    host: bytes | None = None
    """As ``host_of`` gives it; of a wildcard, the suffix without ``*.``."""
    is_wildcard: bool = False
    path: bytes | None = None
    path_prefix: bytes | None = None
    path_regex: bytes | None = None
    method: bytes | None = None
    headers: tuple[Field, ...] = ()
    """By name, each name once, lower-case."""
    query: tuple[tuple[bytes, bytes], ...] = ()
    """By name, each name once, decoded."""

    @classmethod
    def of(
        cls,
        *,
        host: str | None = None,
        path: str | None = None,
        path_prefix: str | None = None,
        path_regex: str | None = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> "Match":
        """The same from the words of the configuration, which has validated them."""
        is_wildcard = host is not None and host.startswith("*.")
        return cls(
            host=host.lower().removeprefix("*.").encode("ascii") if host is not None else None,
            is_wildcard=is_wildcard,
            path=path.encode("ascii") if path is not None else None,
            path_prefix=path_prefix.encode("ascii") if path_prefix is not None else None,
            path_regex=path_regex.encode("ascii") if path_regex is not None else None,
            method=method.encode("ascii") if method is not None else None,
            headers=tuple(sorted((n.encode("ascii"), v.encode("ascii")) for n, v in (headers or {}).items())),
            query=tuple(sorted((n.encode(), v.encode()) for n, v in (query or {}).items())),
        )


def host_of(authority: bytes) -> bytes:
    """An authority's host as routes know it; empty if it is none that a route could name."""
    host = authority.lower()
    if host.startswith(b"["):
        try:
            return b"[%s]" % str(IPv6Address(host[1 : host.index(b"]")].decode("ascii"))).encode("ascii")
        except ValueError:
            return b""
    host = _PORT.sub(b"", host).removesuffix(b".")
    if len(host) > _MAX_HOST_BYTES or host.startswith(b".") or b".." in host:
        return b""
    return host


def parameters(target: bytes) -> dict[bytes, bytes]:
    """The first value of each parameter of a target's query, decoded: ``+`` is a blank, ``&`` separates."""
    found: dict[bytes, bytes] = {}
    query = target.partition(b"?")[2]
    if query:
        for pair in query.split(b"&", _MAX_PARAMETERS)[:_MAX_PARAMETERS]:
            name, _, value = pair.partition(b"=")
            if b"%" in pair or b"+" in pair:
                name, value = _decoded(name), _decoded(value)
            found.setdefault(name, value)
    return found


def _decoded(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))


def combined(fields: Sequence[Field]) -> dict[bytes, bytes]:
    """The value of each field: of several lines of one name, the list they are (RFC 9110 5.3)."""
    found = dict(fields)
    if len(found) == len(fields):
        return found
    lines: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for name, value in fields:
        lines[name].append(value)
    # RFC 9113 8.2.3: pieces of Cookie are joined as cookies are.
    return {name: (b"; " if name == b"cookie" else b", ").join(each) for name, each in lines.items()}


class _Facts:
    """What conditions ask of one request, worked out when the first of them asks."""

    __slots__ = ("_fields", "_parameters", "head")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self._fields: dict[bytes, bytes] | None = None
        self._parameters: dict[bytes, bytes] | None = None

    def fields(self) -> dict[bytes, bytes]:
        if self._fields is None:
            self._fields = combined(self.head.headers)
        return self._fields

    def parameters(self) -> dict[bytes, bytes]:
        if self._parameters is None:
            self._parameters = parameters(self.head.path)
        return self._parameters


class _Shape(Generic[T]):
    """Routes of one place that ask for the same things."""

    __slots__ = ("_fields", "_parameters", "_routes", "_wants_method", "methods", "only")

    def __init__(self, match: Match) -> None:
        self._wants_method = match.method is not None
        self._fields = tuple(name for name, _ in match.headers)
        self._parameters = tuple(name for name, _ in match.query)
        self._routes: dict[tuple[bytes, ...], T] = {}
        self.only: T | None = None
        """The one route of a shape that asks for nothing."""
        self.methods: dict[bytes, T] | None = None
        """The routes of a shape that asks for the method only."""
        if self._wants_method and not self._fields and not self._parameters:
            self.methods = {}

    def add(self, match: Match, route: T) -> None:
        if self.methods is not None and match.method is not None:
            self.methods.setdefault(match.method, route)
        values = [match.method] if match.method is not None else []
        values += [value for _, value in match.headers]
        values += [value for _, value in match.query]
        if not values and self.only is None:
            self.only = route
        self._routes.setdefault(tuple(values), route)

    def find(self, facts: _Facts) -> T | None:
        values = [facts.head.method] if self._wants_method else []
        if self._fields:
            fields = facts.fields()
            for name in self._fields:
                value = fields.get(name)
                if value is None:
                    return None
                values.append(value)
        if self._parameters:
            given = facts.parameters()
            for name in self._parameters:
                value = given.get(name)
                if value is None:
                    return None
                values.append(value)
        return self._routes.get(tuple(values))


_Shapes = tuple[_Shape[T], ...]
_Rank = tuple[bool, int, int, tuple[bytes, ...], tuple[bytes, ...]]


class _Place(Generic[T]):
    """Routes with one condition on the host and one on the path, while the table is built."""

    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[_Rank, _Shape[T]] = {}

    def add(self, match: Match, route: T) -> None:
        fields = tuple(name for name, _ in match.headers)
        given = tuple(name for name, _ in match.query)
        rank = (match.method is None, -len(fields), -len(given), fields, given)
        if rank not in self._shapes:
            self._shapes[rank] = _Shape(match)
        self._shapes[rank].add(match, route)

    def shapes(self) -> _Shapes[T]:
        """From the most specific to the least."""
        return tuple(self._shapes[rank] for rank in sorted(self._shapes))


def _chain(first: _Shapes[T], then: _Shapes[T]) -> _Shapes[T]:
    """One after the other; nobody gets past a shape that asks for nothing, which is always the last."""
    return first if first and first[-1].only is not None else first + then


class _Segment(Generic[T]):
    """A node of the tree of prefixes."""

    __slots__ = ("at", "children", "ends", "goes_on", "within")

    def __init__(self) -> None:
        self.children: dict[bytes, _Segment[T]] = {}
        self.at = _Place[T]()
        """Prefixes that end with this segment: they match here and below."""
        self.within = _Place[T]()
        """Prefixes that end with the slash behind it: below only."""
        self.ends: _Shapes[T] = ()
        """What applies to a path that ends here."""
        self.goes_on: _Shapes[T] = ()
        """What applies to a path that goes on, where no child knows more."""

    def settle(self, above: _Shapes[T]) -> None:
        self.ends = _chain(self.at.shapes(), above)
        self.goes_on = _chain(self.within.shapes(), self.ends)


class _Host(Generic[T]):
    """The routes with one condition on the host."""

    __slots__ = ("_any", "_depth", "_exact", "_paths", "_patterns", "_regexes", "_root")

    def __init__(self) -> None:
        self._any = _Place[T]()
        self._paths: dict[bytes, _Place[T]] = {}
        self._patterns: dict[bytes, _Place[T]] = {}
        self._root = _Segment[T]()
        self._depth = 0
        # Made by ``settle``.
        self._exact: dict[bytes, _Shapes[T]] = {}
        self._regexes: tuple[RegexSet, tuple[_Shapes[T], ...]] | None = None

    def add(self, match: Match, route: T) -> None:
        if match.path is not None:
            place = self._paths.setdefault(match.path, _Place())
        elif match.path_regex is not None:
            place = self._patterns.setdefault(match.path_regex, _Place())
        elif match.path_prefix is not None:
            place = self._place_of(match.path_prefix)
        else:
            place = self._any
        place.add(match, route)

    def _place_of(self, prefix: bytes) -> _Place[T]:
        *segments, last = prefix.split(b"/")[1:]
        if last:
            segments.append(last)
        self._depth = max(self._depth, len(segments))
        node = self._root
        for segment in segments:
            node = node.children.setdefault(segment, _Segment())
        return node.at if last else node.within

    def settle(self) -> None:
        """Make what matching uses; called once, when every route is there. Raises ``RegexError``."""
        self._exact = {path: place.shapes() for path, place in self._paths.items()}
        if self._patterns:
            patterns = sorted(self._patterns, key=len, reverse=True)  # stable: then as they were given
            self._regexes = RegexSet(patterns), tuple(self._patterns[each].shapes() for each in patterns)
        self._root.settle(self._any.shapes())
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            for child in node.children.values():
                child.settle(node.goes_on)
                nodes.append(child)

    def shapes(self, path: bytes) -> _Shapes[T]:
        """What applies to a path, from the most specific to the least."""
        if path[:1] != b"/":
            return self._root.ends  # ``*``: the root's own end is where routes for any path are
        first = self._exact.get(path, ())
        if first and first[-1].only is not None:
            return first
        if self._regexes is not None:
            regexes, places = self._regexes
            for number in regexes.matching(path):
                first += places[number]
        node = self._root
        # No deeper than the tree: a path of ten thousand slashes costs what its first segments cost.
        segments = path.split(b"/", self._depth + 1)
        del segments[0]
        for segment in segments:
            child = node.children.get(segment)
            if child is None:
                return first + node.goes_on if first else node.goes_on
            node = child
        return first + node.ends if first else node.ends


class RouteTable(Generic[T]):
    """See the module's text. ``T`` is what a route leads to: anything but None."""

    __slots__ = ("_any", "_exact", "_seen", "_wildcards")

    def __init__(self, entries: Sequence[tuple[Match, T]]) -> None:
        """``entries``: in the order of the file. Raises ``RegexError``."""
        self._any = _Host[T]()
        self._exact: dict[bytes, _Host[T]] = {}
        self._wildcards: dict[bytes, _Host[T]] = {}
        for match, route in entries:
            if match.host is None:
                host = self._any
            elif match.is_wildcard:
                host = self._wildcards.setdefault(match.host, _Host())
            else:
                host = self._exact.setdefault(match.host, _Host())
            host.add(match, route)
        for host in (self._any, *self._exact.values(), *self._wildcards.values()):
            host.settle()
        self._seen: dict[bytes, tuple[_Host[T], ...]] = {}

    def find(self, head: RequestHead, path: bytes) -> T | None:
        """The most specific route, or None.

        ``head`` is as the client sent it, before anything was added to it; ``path`` is the normalised copy of
        its path, without the query, or ``*``.
        """
        hosts = self._seen.get(head.authority)
        if hosts is None:
            hosts = self._hosts_of(head.authority)
        facts: _Facts | None = None
        for host in hosts:
            for shape in host.shapes(path):
                # fast paths: nothing more is asked for, or the method
                if shape.only is not None:
                    return shape.only
                if shape.methods is not None:
                    route = shape.methods.get(head.method)
                else:
                    if facts is None:
                        facts = _Facts(head)
                    route = shape.find(facts)
                if route is not None:
                    return route
        return None

    def decided(self, authority: bytes, path: bytes) -> T | None:
        """The route that every request for this host and path takes, whatever else is in it; None if that
        depends, or if there is none."""
        for host in self._seen.get(authority) or self._hosts_of(authority):
            shapes = host.shapes(path)
            if shapes:
                return shapes[0].only
        return None

    def _hosts_of(self, authority: bytes) -> tuple[_Host[T], ...]:
        """The exact host, wildcards from the longest suffix, and those for any host."""
        name = host_of(authority)
        hosts: list[_Host[T]] = []
        if name:
            if name in self._exact:
                hosts.append(self._exact[name])
            _, dot, suffix = name.partition(b".")
            while dot and self._wildcards:
                if suffix in self._wildcards:
                    hosts.append(self._wildcards[suffix])
                _, dot, suffix = suffix.partition(b".")
        hosts.append(self._any)
        found = tuple(hosts)
        if len(authority) <= 2 * _MAX_HOST_BYTES:
            if len(self._seen) >= _SEEN_HOSTS:
                self._seen.clear()
            self._seen[authority] = found
        return found
