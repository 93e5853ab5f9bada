"""What a worker tells of its clients' connections, when an operator asks.

However many there are, it takes a millisecond or two: at most ``MOST_COUNTED`` are looked at, and of each of
those only what it holds already. The listed ones are the oldest of each listener; listeners share what is
asked for, and one with few connections leaves its room to the others.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final, Protocol

from expressgateway.net.facts import Told
from expressgateway.observe.counters import ListenerCounters

MOST_LISTED: Final = 1000
"""Whatever the supervisor asks for."""
MOST_COUNTED: Final = 4000
"""Connections whose protocol is looked at, in all listeners together."""


class Holder(Protocol):
    """A listener."""

    @property
    def counters(self) -> ListenerCounters: ...

    @property
    def open(self) -> int: ...

    def told(self) -> Iterable[Told]:
        """Its connections; the oldest first, as far as it keeps them in that order."""
        ...


def told(listeners: Iterable[Holder], limit: int, now: float) -> dict[str, Any]:
    """The answer to ``connections`` (`control.channel`), without its id. ``now``: by the monotonic clock."""
    holders = sorted(listeners, key=lambda holder: holder.open)
    to_list = max(0, min(limit, MOST_LISTED))
    to_count = MOST_COUNTED
    counts: dict[str, dict[str, int]] = {}
    listed: list[list[object]] = []
    looked_at = 0
    for place, holder in enumerate(holders):
        left = len(holders) - place
        name = holder.counters.name
        here = Counter[str]()
        share = to_list // left
        for number, each in enumerate(islice(holder.told(), to_count // left)):
            found = each.facts()
            here[found.protocol] += 1
            if number < share:
                age_s = round(max(0.0, now - found.began), 3)
                listed.append(
                    [name, found.protocol, found.ip, found.port, age_s, found.requests, found.state.value]
                )
                to_list -= 1
        seen = here.total()
        to_count -= seen
        looked_at += seen
        counts[name] = dict(here)
    return {"counts": counts, "looked_at": looked_at, "listed": listed}
