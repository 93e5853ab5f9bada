"""What a pick costs, policy by policy, and how long tables take: ``python -m bench.picks``.

Prints a Markdown table. A *pick* is one call of ``pick`` with a client's address as its key; *loaded* is the
same with what an exchange tells of its load (``begin``, ``end``). Nothing else of a gateway runs. Each figure
is the best of several runs: the machine's other work only ever adds to it.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from expressgateway.upstream.backend import Backend
from expressgateway.upstream.selection import (
    POLICIES,
    Balancing,
    Gradual,
    Measuring,
    Selection,
    make_selection,
)
from expressgateway.upstream.selection.conformance import backends, ready

SIZES: Final = (10, 100, 1000)
PICKS: Final = 2000
RUNS: Final = 7
SLICE_STEPS: Final = 250
"""Steps of a table that are taken at once here."""
MAX_WARM_UP: Final = 20_000
"""Picks, so that rounds that are remembered are known."""


@dataclass(frozen=True)
class Costs:
    """Of one policy, over a set of one size."""

    pick_ns: float
    loaded_ns: float


@dataclass(frozen=True)
class Growth:
    """Of one table."""

    whole_ms: float
    first_ms: float
    """To make the selection, without any step."""
    longest_ms: float
    """Of all slices."""


def weights_of(size: int, is_weighted: bool) -> list[int]:
    """All 1; or 1 to 100, again and again."""
    return [at % 100 + 1 if is_weighted else 1 for at in range(size)]


def measure_pick(policy: str, size: int, is_weighted: bool, picks: int = PICKS, runs: int = RUNS) -> Costs:
    set_ = backends(*weights_of(size, is_weighted))
    selection = ready(make_selection(Balancing(policy=policy), set_))
    if isinstance(selection, Measuring):
        for each in set_:
            selection.observe(each, 0.01, 1.0)
    keys = [b"192.0.%d.%d" % divmod(at, 256) for at in range(picks)]
    for _ in range(min(MAX_WARM_UP, 10 * picks) // picks):
        _picks(selection, keys)
    return Costs(
        _best_ns(lambda: _picks(selection, keys), picks, runs),
        _best_ns(lambda: _exchanges(selection, keys), picks, runs),
    )


def _picks(selection: Selection, keys: Sequence[bytes]) -> None:
    pick = selection.pick
    for key in keys:
        pick(key)


def _exchanges(selection: Selection, keys: Sequence[bytes]) -> None:
    """As many under way as there are keys in one of ten."""
    under_way: list[Backend] = []
    held = max(1, len(keys) // 10)
    for at, key in enumerate(keys):
        picked = selection.pick(key)
        if picked is not None:
            picked.begin()
            under_way.append(picked)
        if at >= held:
            under_way[at - held].end()
    for each in under_way[-held:]:
        each.end()


def _best_ns(run: Callable[[], None], number: int, runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best / number * 1e9


def measure_growth(policy: str, size: int, is_weighted: bool) -> Growth:
    """A table's first build, in CPU time: what others take of the machine is nobody's slice. As in a worker,
    what was there before is none of the collector's business."""
    set_ = backends(*weights_of(size, is_weighted))
    gc.collect()
    gc.freeze()
    before = time.thread_time()
    selection = make_selection(Balancing(policy=policy), set_)
    first = whole = time.thread_time() - before
    longest = 0.0
    if isinstance(selection, Gradual):
        done = False
        while not done:
            before = time.thread_time()
            done = selection.advance(SLICE_STEPS)
            took = time.thread_time() - before
            whole += took
            longest = max(longest, took)
    gc.unfreeze()
    return Growth(whole * 1e3, first * 1e3, longest * 1e3)


def pick_table(sizes: Sequence[int], picks: int, runs: int) -> list[str]:
    """ns per pick; in brackets with begin and end."""
    heads = [f"{size} {kind}" for size in sizes for kind in ("equal", "weighted")]
    lines = [f"| policy | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for policy in POLICIES:
        cells = []
        for size in sizes:
            for is_weighted in (False, True):
                costs = measure_pick(policy, size, is_weighted, picks, runs)
                cells.append(f"{costs.pick_ns:.0f} ({costs.loaded_ns:.0f})")
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return lines


def growth_table(size: int) -> list[str]:
    lines = [
        f"| table of {size} | whole, CPU ms | to begin, ms | longest slice of {SLICE_STEPS} steps, ms |",
        "| --- | --- | --- | --- |",
    ]
    for policy in ("maglev", "ring_hash", "session_affinity"):
        for is_weighted in (False, True):
            growth = measure_growth(policy, size, is_weighted)
            lines.append(
                f"| `{policy}`, {'weighted' if is_weighted else 'equal'} | {growth.whole_ms:.1f} "
                f"| {growth.first_ms:.2f} | {growth.longest_ms:.2f} |"
            )
    return lines


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.picks", description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="backends in the set")
    parser.add_argument("--picks", type=int, default=PICKS, help=f"in a run ({PICKS})")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of which the best counts ({RUNS})")
    options = parser.parse_args(given)
    sizes = [int(size) for size in options.sizes.split(",")]
    print("ns per pick (with `begin` and `end` of an exchange):\n")
    print("\n".join(pick_table(sizes, options.picks, options.runs)))
    print()
    print("\n".join(growth_table(max(sizes))))


if __name__ == "__main__":
    main()
