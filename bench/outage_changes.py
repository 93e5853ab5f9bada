"""Changes of a pool at run time, one after the other, through the admin API: which, and how they ended.

They are drawn by chance from a fixed seed, and never leave the pool without a backend that may be used.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.outage_world import NAMES, Load, World

KINDS: Final = ("weight", "drain", "disable", "enable", "add", "remove")
MOST: Final = 8  # backends at a time
SEED: Final = 20


@dataclass
class Known:
    """A backend of the pool, as the changes so far have made it."""

    weight: int = 1
    is_ready: bool = True

    @property
    def is_used(self) -> bool:
        return self.is_ready and self.weight > 0


@dataclass(frozen=True)
class Change:
    """One that was made: its kind, what it took, the status it was answered with."""

    kind: str
    seconds: float
    status: int


@dataclass(frozen=True)
class Changed:
    """All changes of one run, and what became of the load meanwhile."""

    policy: str
    changes: Sequence[Change]
    load: Load
    answered_5xx: int

    @property
    def refused(self) -> int:
        return sum(not 200 <= change.status < 300 for change in self.changes)

    @property
    def counts(self) -> Mapping[str, int]:
        return {kind: sum(change.kind == kind for change in self.changes) for kind in KINDS}

    @property
    def is_clean(self) -> bool:
        return not self.refused and not self.load.failures and not self.answered_5xx


class Draw:
    """What to do next with a pool, so that somebody is always left to work."""

    def __init__(self, addresses: Mapping[str, str], seed: int = SEED) -> None:
        self._random = random.Random(seed)
        self._addresses = list(addresses.values())
        self.known = {name: Known() for name in addresses}
        self._added = 0

    def _others_used(self, name: str) -> bool:
        return any(each.is_used for other, each in self.known.items() if other != name)

    def next(self) -> tuple[str, str, str, object]:
        """Kind, method, path below the pool's backends, body."""
        chance = self._random
        while True:
            kind = chance.choice(KINDS)
            name = chance.choice(list(self.known))
            each = self.known[name]
            match kind:
                case "weight":
                    weight = chance.randrange(11)
                    if weight != each.weight and (weight or self._others_used(name)):
                        each.weight = weight
                        return kind, "PATCH", name, {"weight": weight}
                case "drain" | "disable":
                    if each.is_ready and self._others_used(name):
                        each.is_ready = False
                        return kind, "PATCH", name, {"state": "draining" if kind == "drain" else "disabled"}
                case "enable":
                    if not each.is_ready:
                        each.is_ready = True
                        return kind, "PATCH", name, {"state": "ready"}
                case "remove":
                    if len(self.known) > 2 and self._others_used(name):
                        del self.known[name]
                        return kind, "DELETE", name, None
                case _:
                    if len(self.known) < MOST:
                        self._added += 1
                        new = f"x{self._added}"
                        self.known[new] = Known(weight=chance.randrange(1, 6))
                        address = chance.choice(self._addresses)
                        body = {"id": new, "address": address, "weight": self.known[new].weight}
                        return kind, "POST", "", body


def change_backends(here: World, pool: str, count: int) -> list[Change]:
    """Raises OSError when the admin listener does not answer."""
    draw = Draw({name: here.backends[name].address for name in NAMES})
    changes: list[Change] = []
    for _ in range(count):
        kind, method, name, body = draw.next()
        began = time.monotonic()
        path = f"pools/{pool}/backends" + (f"/{name}" if name else "")
        status, _answer = here.api(method, path, body)
        changes.append(Change(kind, time.monotonic() - began, status))
    return changes
