"""Every policy is put to the test; and the test finds every broken promise it is there for."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, Final

import pytest

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection import (
    POLICIES,
    Balancing,
    Ewma,
    LeastRequests,
    Maglev,
    PowerOfTwo,
    RingHash,
    SessionAffinity,
    Uniform,
    WeightedRandom,
    WeightedRoundRobin,
    make_selection,
)
from expressgateway.upstream.selection.conformance import (
    ConformanceError,
    backends,
    check_selection_policy,
    ready,
)

KINDS: Final[dict[str, dict[str, Any]]] = {
    "round_robin": {},
    "weighted_round_robin": {},
    "random": {"kind": "chance", "follows_weights": False},
    "weighted_random": {"kind": "chance"},
    "least_connections": {"kind": "least"},
    "least_requests": {"kind": "least"},
    "power_of_two": {"kind": "sampled"},
    "ewma": {"kind": "sampled"},
    "maglev": {"kind": "keyed"},
    "session_affinity": {"kind": "keyed"},
    # What 160 points by chance allow: docs/decisions/0014-ring-distribution.md
    "ring_hash": {"kind": "keyed", "stay": 1.0, "tolerance": 0.25},
}


@pytest.fixture(autouse=True)
def _the_same_chance() -> None:
    random.seed(11)


def test_no_policy_is_left_out() -> None:
    assert KINDS.keys() == POLICIES.keys()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_conformance(policy: str) -> None:
    balancing = Balancing(policy=policy, table_size=5003)
    check_selection_policy(partial(make_selection, balancing), picks=20_000, **KINDS[policy])


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_conformance_in_full(policy: str) -> None:
    """With the tables and the number of picks of a gateway's defaults."""
    check_selection_policy(partial(make_selection, Balancing(policy=policy)), **KINDS[policy])


def test_conformance_of_sessions_with_a_cookie() -> None:
    balancing = Balancing(policy="session_affinity", table_size=1009, has_cookie=True, secret=b"s" * 32)
    check_selection_policy(partial(make_selection, balancing), kind="keyed", picks=5_000)


@pytest.mark.parametrize("policy", ["random", "weighted_random", "maglev"])
@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1, 1), (5, 1, 1), (10, 20, 30), (1, 2, 3, 4)], ids=str)
def test_shares_within_two_per_cent(policy: str, weights: tuple[int, ...]) -> None:
    """Without the allowance that the conformance function makes for chance."""
    picks = 300_000 if policy == "maglev" else 1_000_000
    set_ = backends(*weights)
    selection = ready(make_selection(Balancing(policy=policy), set_))
    pick = selection.pick
    if policy == "maglev":
        counts = Counter(pick(b"%d" % at) for at in range(picks))
    else:
        counts = Counter(pick(None) for _ in range(picks))
    for each, weight in zip(set_, weights, strict=True):
        share = picks / len(weights) if policy == "random" else picks * weight / sum(weights)
        assert abs(counts[each] / share - 1) < 0.02


@pytest.mark.slow
def test_the_example_of_the_documentation() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "policies.md"
    (example,) = re.findall(r"```python\n(.*?class .*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    check_selection_policy(names["Rendezvous"], kind="keyed", stay=1.0, picks=4_000)


# -- broken policies are found out -------------------------------------------------------------------------


class _Turns(WeightedRoundRobin):
    """A base for bad policies that keeps its kind when it is rebuilt."""

    def rebuilt(self, backends: Sequence[Backend]) -> "_Turns":
        return type(self)(backends)


class _First(_Turns):
    def pick(self, key: bytes | None) -> Backend | None:
        return self._backends[0] if self._backends else None


class _Bunched(_Turns):
    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._queue: list[Backend] = []

    def pick(self, key: bytes | None) -> Backend | None:
        if not self._queue:
            divisor = gcd(*self._weights) or 1
            self._queue = [each for each in self._backends for _ in range(each.weight // divisor)]
        return self._queue.pop(0) if self._queue else None


class _LooksAtHealth(_Turns):
    def pick(self, key: bytes | None) -> Backend | None:
        for _ in self._backends:
            picked = super().pick(key)
            if picked is None or picked.is_available:
                return picked
        return super().pick(key)


class _NoOthers(_Turns):
    def others(self, picked: Backend) -> Iterator[Backend]:
        return iter(())


class _Repeats(_Turns):
    def others(self, picked: Backend) -> Iterator[Backend]:
        yield from super().others(picked)
        yield from super().others(picked)


class _TakesZero(_Turns):
    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._all = list(backends)
        self._count = 0

    def pick(self, key: bytes | None) -> Backend | None:
        self._count += 1
        picked = super().pick(key)
        return self._all[self._count % len(self._all)] if picked and self._count % 17 == 0 else picked


class _KeepsWhoLeft(_Turns):
    def rebuilt(self, backends: Sequence[Backend]) -> "_Turns":
        return self if backends else type(self)(())


class _NamesAGhost(_Turns):
    def pick(self, key: bytes | None) -> Backend | None:
        return super().pick(key) if self._backends else Backend.__new__(Backend)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (_First, "must not look at health|had .* of .* turns"),
        (_Bunched, "turns off after"),
        (WeightedRandom, "health did|turns in round 1"),
        (_LooksAtHealth, "when a backend's health did"),
        (_NoOthers, "are not all the others"),
        (_Repeats, "came twice"),
        (_TakesZero, "of weight 0 was picked"),
        (
            _KeepsWhoLeft,
            "that left was picked|gives nothing when it is filled|its share is|pick gave nothing",
        ),
        (_NamesAGhost, "from no backends must give nothing"),
    ],
)
def test_bad_turns(policy: type[_Turns], sentence: str) -> None:
    with pytest.raises(ConformanceError, match=sentence):
        check_selection_policy(policy, picks=2_000)


def test_chance_that_does_not_follow_the_weights() -> None:
    with pytest.raises(ConformanceError, match="its share is"):
        check_selection_policy(Uniform, kind="chance", picks=5_000)
    with pytest.raises(ConformanceError, match="its share is"):
        check_selection_policy(WeightedRandom, kind="chance", follows_weights=False, picks=5_000)


class _LowestIndex(LeastRequests):
    """Ties by index."""

    def pick(self, key: bytes | None) -> Backend | None:
        return min(self._backends, key=lambda each: each.in_flight / each.weight, default=None)


class _IgnoresFalls(LeastRequests):
    def _on_load(self, backend: Backend) -> None:
        pass


class _LosesTheHook(LeastRequests):
    def rebuilt(self, backends: Sequence[Backend]) -> "_LosesTheHook":
        new = type(self)(backends)
        for each in backends:
            each.on_load = None
        return new


class _ForgetsLoad(PowerOfTwo):
    """Counts its own picks instead of the backends' load."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._counts: Counter[Backend] = Counter()

    def pick(self, key: bytes | None) -> Backend | None:
        picked = min(self._backends, key=lambda each: self._counts[each] / each.weight, default=None)
        if picked is not None:
            self._counts[picked] += 1
        return picked

    def rebuilt(self, backends: Sequence[Backend]) -> "_ForgetsLoad":
        return type(self)(backends)


@pytest.mark.usefixtures("ordered")
@pytest.mark.parametrize(
    ("policy", "kind", "sentence"),
    [
        (_LowestIndex, "least", "chosen among at random"),
        (_IgnoresFalls, "least", "its share is|is idle"),
        (_LosesTheHook, "least", "whose load has fallen is not picked"),
        (PowerOfTwo, "least", "was picked with 3 in flight"),
        (_ForgetsLoad, "sampled", "was picked with 3 in flight"),
        (WeightedRandom, "sampled", "was picked with 3 in flight|its share is"),
    ],
)
def test_bad_at_load(policy: Any, kind: Any, sentence: str) -> None:
    with pytest.raises(ConformanceError, match=sentence):
        check_selection_policy(policy, kind=kind, picks=5_000)


class _Keyed(Maglev):
    """A base for bad policies with a small table that is built at once."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends, 1009)

    def rebuilt(self, backends: Sequence[Backend]) -> "_Keyed":
        return type(self)(backends)


class _Modulo(_Keyed):
    def pick(self, key: bytes | None) -> Backend | None:
        if key is None or not self._ranked:
            return super().pick(key)
        return self._ranked[sum(key) * 7919 % 10007 % len(self._ranked)]


class _ByOrder(_Keyed):
    def __init__(self, backends: Sequence[Backend]) -> None:
        super().__init__(backends)
        self._named = [each for each in backends if each.weight]


class _OneForAllWithoutKey(_Keyed):
    def pick(self, key: bytes | None) -> Backend | None:
        return super().pick(key or b"")


class _Wanders(_Keyed):
    """Moves a key now and then."""

    def pick(self, key: bytes | None) -> Backend | None:
        return super().pick(None if random.random() < 0.01 else key)


class _Sticks(_Keyed):
    """Never gives a key back to one that returns."""

    def __init__(self, backends: Sequence[Backend], salt: bytes = b"") -> None:
        super().__init__(backends)
        self._salt = salt

    def pick(self, key: bytes | None) -> Backend | None:
        return super().pick(key and key + self._salt)

    def rebuilt(self, backends: Sequence[Backend]) -> "_Sticks":
        same = [each.id for each in self._ranked] == sorted(each.id for each in backends if each.weight)
        return type(self)(backends, self._salt if same else self._salt + b"!")


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (_Modulo, "keys stayed, not|its share is"),
        (_ByOrder, "another order|in another order"),
        (_OneForAllWithoutKey, "without a key|look at health|under load"),
        (_Wanders, "picked for differently|health did|built alike"),
        (_Sticks, "keys stayed, not"),
        (partial(Maglev, table_size=1009), "keys stayed, not 100"),
        (partial(RingHash, virtual_nodes=2), "its share is"),
    ],
)
def test_bad_at_keys(policy: Any, sentence: str) -> None:
    stay = 1.0 if isinstance(policy, partial) else 0.97
    with pytest.raises(ConformanceError, match=sentence):
        check_selection_policy(policy, kind="keyed", stay=stay, picks=5_000, tolerance=0.1)


class _NeverReady(Maglev):
    def __init__(self, backends: Sequence[Backend], kept: Any = None) -> None:
        super().__init__(backends, 2503, kept)

    def rebuilt(self, backends: Sequence[Backend]) -> "_NeverReady":
        return type(self)(backends, self._kept())


class _NamesNobody(_NeverReady):
    """Has nothing to say until its table is ready."""

    def _stand_in(self, hash_: int) -> Backend | None:
        return None


class _Forgets(_NeverReady):
    """Says that it is ready, and goes on with the old table."""

    def advance(self, steps: int) -> bool:
        return True


class _Unsteady(_NeverReady):
    def advance(self, steps: int) -> bool:
        done = super().advance(steps)
        return done and steps > 1


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (_NamesNobody, "pick gave nothing"),
        (_Forgets, "that left was picked|is not that of the set|left another set|its share is|keys stayed"),
        (_Unsteady, "does not stay true"),
    ],
)
def test_bad_at_steps(policy: Any, sentence: str) -> None:
    with pytest.raises(ConformanceError, match=sentence):
        check_selection_policy(policy, kind="keyed", picks=2_000, tolerance=0.1)


class _Unmoved(Ewma):
    """Measures, and does not care."""

    def __init__(self, backends: Sequence[Backend], *_: object) -> None:
        super().__init__(backends, 10.0)

    def observe(self, backend: Backend, seconds: float, now: float) -> None:
        super().observe(backend, 0.01, now)


def test_bad_at_measuring() -> None:
    with pytest.raises(ConformanceError, match="100 times slower"):
        check_selection_policy(_Unmoved, kind="sampled", picks=2_000)


class _Sessions(SessionAffinity):
    def __init__(self, backends: Sequence[Backend], **settings: Any) -> None:
        super().__init__(backends, Maglev(backends, 1009), has_cookie=True, secret=b"s")

    def rebuilt(self, backends: Sequence[Backend]) -> "_Sessions":
        return type(self)(backends)


class _PlainToken(_Sessions):
    """The id itself."""

    def _make_token(self, id_: str) -> bytes:
        return id_.encode()


class _Random(_Sessions):
    """Every worker has a secret of its own."""

    def _make_token(self, id_: str) -> bytes:
        return random.randbytes(8)


class _Lenient(_Sessions):
    """Looks at the end of a token only."""

    def bound(self, key: bytes) -> Backend | None:
        return next((each for token, each in self._by_token.items() if token[1:] == key[1:]), None)


class _DropsWeightZero(_Sessions):
    def bound(self, key: bytes) -> Backend | None:
        found = super().bound(key)
        return found if found is not None and found.weight else None


class _KeepsThoseWhoLeft(_Sessions):
    everyone: dict[bytes, Backend] = {}  # noqa: RUF012 - of all selections, on purpose

    def bound(self, key: bytes) -> Backend | None:
        self.everyone.update((token, each) for token, each in self._by_token.items())
        return self.everyone.get(key)


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (_PlainToken, "an id is taken for a token"),
        (_Random, "another worker does not know"),
        (_Lenient, "that was changed is taken for a true one"),
        (_DropsWeightZero, "lost its session"),
        (_KeepsThoseWhoLeft, "that left"),
    ],
)
def test_bad_at_sessions(policy: Any, sentence: str) -> None:
    with pytest.raises(ConformanceError, match=sentence):
        check_selection_policy(policy, kind="keyed", picks=2_000, tolerance=0.1)
