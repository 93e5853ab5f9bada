"""The table of flows: who a datagram belongs to, and who has to go when there is no room.

A *flow* is one QUIC connection as far as it can be seen from outside. It is found by the connection IDs that
were seen in long headers - the one its client chose first, and those its backend chose - and by its *place*:
the client's address (on a wildcard bind together with ours). Connection IDs that a backend gives out later
are encrypted; packets that carry those go by their place.

Finding is O(1): a short header does not tell the length of its connection ID, so it is looked up at each
length that backends use, the longest first; there are at most ``MAX_CID_BYTES`` of them.

A flow is *proven* once its client has used a connection ID that the backend chose: it received what was sent
to its address. Flows that are not make room first, so that a flood of forged addresses takes its room from
itself; after them those that were quiet the longest, once that is ``EVICTABLE_S``. A flow that is not proven
does not take a place from one that is.

Knows no sockets and no clock; ``now`` comes in.
"""

import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

from expressgateway.net.batches import Address
from expressgateway.wire.quic import MAX_CID_BYTES

MAX_CIDS: Final = 8  # known of one flow; beyond, the oldest but the client's own is forgotten
MIN_CID_BYTES: Final = 4  # shorter ones are not looked up: too many packets would match by chance
EVICTABLE_S: Final = 5.0  # how long a proven flow must have been quiet to make room for another

_UNLIKELY_BYTES: Final = 8  # from here on nobody matches by chance

Place = Address | tuple[Address, bytes]


class Entry:
    """What the table knows of a flow."""

    __slots__ = ("chose", "cids", "epoch", "is_proven", "place", "seen_at", "source")

    def __init__(self, place: Place, source: str, now: float) -> None:
        self.place = place
        self.source = source
        """Under what the client is counted: `source_of`."""
        self.seen_at = now
        """When there was a datagram in either direction, to the grain of who tells."""
        self.epoch = -1
        """Of the listener, when a datagram of the client came."""
        self.is_proven = False
        self.cids: list[bytes] = []  # at most MAX_CIDS
        self.chose: bytes | None = None
        """The one among them that is the client's own."""


E = TypeVar("E", bound=Entry)


class FlowTable(Generic[E]):
    """At most ``max_flows`` flows, and ``max_per_source`` of one source."""

    __slots__ = (
        "_counts",
        "_fresh",
        "_proven",
        "_sources",
        "by_cid",
        "by_place",
        "ceiling",
        "lengths",
        "longest",
        "max_flows",
        "max_per_source",
        "on_forgotten",
        "on_learned",
    )

    def __init__(self, max_flows: int, max_per_source: int, longest: int = MAX_CID_BYTES) -> None:
        """``longest``: connection IDs of more bytes are not looked up."""
        self.max_flows = max_flows
        self.ceiling: int | None = None
        """A lower cap for the time being: the machine has nothing left for more."""
        self.max_per_source = max_per_source
        self.longest = longest
        self.by_cid: dict[bytes, E] = {}  # at most MAX_CIDS a flow
        self.by_place: dict[Place, E] = {}  # at most one a flow
        self.lengths: tuple[int, ...] = ()
        """Of the connection IDs that backends chose, the longest first."""
        self.on_learned: Callable[[bytes], object] = _to_nobody
        """Told of every connection ID that a backend chose, and ``on_forgotten`` when it is known no more."""
        self.on_forgotten: Callable[[bytes], object] = _to_nobody
        self._counts = [0] * (MAX_CID_BYTES + 1)  # of those, by length
        # Quietest first, to the grain of `touch`.
        self._fresh: OrderedDict[E, None] = OrderedDict()
        self._proven: OrderedDict[E, None] = OrderedDict()
        self._sources: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._fresh) + len(self._proven)

    def __iter__(self) -> Iterator[E]:
        yield from self._fresh
        yield from self._proven

    # -- finding ---------------------------------------------------------------------------------------

    def by_short(self, packet: bytes, place: Place) -> E | None:
        """The flow of a short header packet."""
        by_cid = self.by_cid
        for length in self.lengths:
            flow = by_cid.get(packet[1 : 1 + length])
            if flow is not None:
                if flow.place != place:
                    return self._elsewhere(flow, packet[1 : 1 + length], place)
                return flow
        return self.by_place.get(place)

    def by_long(self, cid: bytes, place: Place) -> E | None:
        """The flow of a long header packet to ``cid``. Not by its place: it may begin another connection."""
        flow = self.by_cid.get(cid)
        if flow is not None and flow.place != place:
            return self._elsewhere(flow, cid, place)
        return flow

    def _elsewhere(self, flow: E, cid: bytes, place: Place) -> E:
        """A flow was found by its connection ID in a packet from another place: the client has moved, unless
        whose place this is has that connection ID, too, or might well have."""
        other = self.by_place.get(place)
        if other is None or other is flow:
            return flow
        if cid in other.cids or (len(cid) < _UNLIKELY_BYTES and other.source != flow.source):
            return other
        return flow

    # -- room ------------------------------------------------------------------------------------------

    def refusal(self, source: str) -> str | None:
        """Why no flow of this source can be added, whatever makes room; ``None``: it can."""
        return "ip_flow_cap" if self._sources.get(source, 0) >= self.max_per_source else None

    def to_evict(self, now: float) -> E | None:
        """Whom to remove before one more is added. Of use only when ``is_full``."""
        for flow in self._fresh:
            return flow
        for flow in self._proven:
            return flow if now - flow.seen_at >= EVICTABLE_S else None
        return None

    @property
    def is_full(self) -> bool:
        size = len(self._fresh) + len(self._proven)
        return size >= self.max_flows or (self.ceiling is not None and size >= self.ceiling)

    def idle(self, now: float, idle_s: float, most: int) -> list[E]:
        """Flows that have been quiet for so long; looks at no others."""
        found: list[E] = []
        for queue in (self._fresh, self._proven):
            for flow in queue:
                if now - flow.seen_at < idle_s or len(found) >= most:
                    break
                found.append(flow)
        return found

    # -- change ----------------------------------------------------------------------------------------

    def add(self, flow: E) -> None:
        self._fresh[flow] = None
        self._sources[flow.source] = self._sources.get(flow.source, 0) + 1
        self._settle(flow)

    def remove(self, flow: E) -> bool:
        """Idempotent; False: it was not there."""
        queue = self._proven if flow.is_proven else self._fresh
        if flow not in queue:
            return False
        del queue[flow]
        for cid in flow.cids:
            self._forget(flow, cid)
        flow.cids.clear()
        if self.by_place.get(flow.place) is flow:
            del self.by_place[flow.place]
        self._leave(flow.source)
        return True

    def choose(self, flow: E, cid: bytes) -> None:
        """``cid`` is what the client chose for its first packet."""
        if MIN_CID_BYTES <= len(cid) <= self.longest:
            flow.chose = cid
            flow.cids.append(cid)
            self.by_cid.setdefault(cid, flow)

    def learn(self, flow: E, cid: bytes) -> None:
        """``cid`` is one that the backend chose. Of little cost if it is known."""
        if cid in flow.cids or not MIN_CID_BYTES <= len(cid) <= self.longest:
            return
        if len(flow.cids) >= MAX_CIDS:
            oldest = next(each for each in flow.cids if each is not flow.chose)
            flow.cids.remove(oldest)
            self._forget(flow, oldest)
        flow.cids.append(cid)
        if self.by_cid.setdefault(cid, flow) is flow:
            self.on_learned(cid)
        self._counts[len(cid)] += 1
        if self._counts[len(cid)] == 1:
            self._order()

    def _forget(self, flow: E, cid: bytes) -> None:
        if self.by_cid.get(cid) is flow:
            del self.by_cid[cid]
            if cid is not flow.chose:
                self.on_forgotten(cid)
        if cid is not flow.chose:
            self._counts[len(cid)] -= 1
            if not self._counts[len(cid)]:
                self._order()

    def _order(self) -> None:
        self.lengths = tuple(length for length in range(MAX_CID_BYTES, 0, -1) if self._counts[length])

    def prove(self, flow: E) -> None:
        """The client used what the backend chose. Its place is this flow's from here on."""
        if not flow.is_proven:
            flow.is_proven = True
            del self._fresh[flow]
            self._proven[flow] = None
            self._settle(flow)

    def move(self, flow: E, place: Place, source: str) -> bool:
        """The client is at another place now. False: its new source has too many flows; nothing changed."""
        if source != flow.source:
            if self._sources.get(source, 0) >= self.max_per_source:
                return False
            self._leave(flow.source)
            self._sources[source] = self._sources.get(source, 0) + 1
            flow.source = source
        if self.by_place.get(flow.place) is flow:
            del self.by_place[flow.place]
        flow.place = place
        self._settle(flow)
        return True

    def touch(self, flow: E, now: float) -> None:
        """There was a datagram. Once per grain of time is enough."""
        flow.seen_at = now
        if not flow.is_proven:
            self._fresh.move_to_end(flow)
        else:
            self._proven.move_to_end(flow)
            if flow.chose is not None:
                # It has used the backend's for a while: nothing under way is for its own any more.
                self._forget(flow, flow.chose)
                flow.cids.remove(flow.chose)
                flow.chose = None
        if flow.place not in self.by_place:
            self.by_place[flow.place] = flow

    def _settle(self, flow: E) -> None:
        other = self.by_place.get(flow.place)
        if other is None or flow.is_proven or not other.is_proven:
            self.by_place[flow.place] = flow

    def _leave(self, source: str) -> None:
        left = self._sources[source] - 1
        if left:
            self._sources[source] = left
        else:
            del self._sources[source]


def _to_nobody(_: bytes) -> None:
    """There are no other workers."""


def source_of(ip: str) -> str:
    """What a cap per address counts by: an IPv4 address, or the /64 of an IPv6 one, the least that one
    customer gets."""
    if ":" not in ip:
        return ip
    return socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])[:8].hex()
