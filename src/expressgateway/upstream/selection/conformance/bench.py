"""What the checks work with: backends, selections that are ready, and three ways of picking.

Load policies are *driven*: each pick begins an exchange and opens a connection, and the oldest of a number
of them ends, so that load follows the picks as it does in a gateway.
"""

from collections import deque
from collections.abc import Callable, Sequence
from math import gcd
from typing import Final, Literal

from expressgateway.upstream.backend import Backend, BackendSettings
from expressgateway.upstream.selection import Gradual, Measuring, Selection

Make = Callable[[Sequence[Backend]], Selection]
Kind = Literal["turns", "chance", "least", "sampled", "keyed"]

_LATENCY_S: Final = 0.01  # of every backend that is driven
_MAX_STEPS: Final = 100_000_000  # of a table


class ConformanceError(AssertionError):
    """The policy broke a promise; the text says which, with the weights that showed it."""


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConformanceError(sentence)


def backend(id_: str, weight: int = 1) -> Backend:
    """A backend for a check, with no connections."""
    settings = BackendSettings(
        id=id_, host="127.0.0.1", port=1, protocol="tcp", weight=weight, tls=None, send_proxy=None
    )
    return Backend(settings, ("127.0.0.1", 1), id_)


def backends(*weights: int) -> list[Backend]:
    """``b0``, ``b1``... of these weights."""
    return [backend(f"b{at}", weight) for at, weight in enumerate(weights)]


def ready(selection: Selection) -> Selection:
    """The same, with its table in use if it builds one in steps."""
    if isinstance(selection, Gradual):
        taken = 0
        while not selection.advance(1000):
            taken += 1000
            require(taken < _MAX_STEPS, "a table is never ready, however often `advance` is called")
    return selection


def round_of(weights: Sequence[int]) -> int:
    """Picks in which every backend can have exactly its share."""
    return sum(weights) // gcd(*weights)


def must_pick(selection: Selection, key: bytes | None) -> Backend:
    picked = selection.pick(key)
    if picked is None:
        raise ConformanceError("a pick gave nothing although there are backends with weight")
    return picked


def keys(number: int) -> list[bytes]:
    return [b"key %d" % at for at in range(number)]


def take(selection: Selection, number: int) -> list[Backend]:
    """So many picks, each with another key, without any load."""
    return [must_pick(selection, key) for key in keys(number)]


class Drive:
    """A gateway with ``held`` exchanges under way, all of them equally long."""

    def __init__(self, held: int) -> None:
        self._held = held
        self._under_way: deque[Backend] = deque()
        self._now = 1.0

    def take(self, selection: Selection, number: int) -> list[Backend]:
        taken = []
        measuring = selection if isinstance(selection, Measuring) else None
        for _ in range(number):
            while len(self._under_way) >= self._held:
                done = self._under_way.popleft()
                if measuring is not None:
                    measuring.observe(done, _LATENCY_S, self._now)
                done.end()
                done.closed()
            picked = must_pick(selection, None)
            picked.opened()
            picked.begin()
            self._under_way.append(picked)
            taken.append(picked)
            self._now += _LATENCY_S / self._held
        return taken


def load(backend_: Backend, by: int) -> None:
    """So many more exchanges, each on a connection of its own; fewer if ``by`` is below 0."""
    for _ in range(by):
        backend_.opened()
        backend_.begin()
    for _ in range(-by):
        backend_.end()
        backend_.closed()
