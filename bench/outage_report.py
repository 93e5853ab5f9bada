"""What the outage says: a line while it runs, tables at its end. Does not know how figures are measured."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from bench.outage_changes import Changed
from bench.outage_world import CONNECTIONS, NAMES, VICTIM, Load, Settings
from bench.report import table
from bench.stats import percentile

if TYPE_CHECKING:
    from bench.outage import Outcome  # which imports this module

_STEP_S: Final = 0.5  # a column of the shares


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.0f} ms" if microseconds >= 10_000 else f"{microseconds / 1000:.1f} ms"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "-"


def line(outcome: "Outcome") -> str:
    """One phase, while others are still to come."""
    said = [f"{outcome.load.requests} requests", f"{outcome.load.failures} failed"]
    if outcome.load.errors:
        said.append(f"({_counts(outcome.load.errors)})")
    if outcome.answered_5xx or outcome.reasons:
        said.append(f"gateway: {outcome.answered_5xx} answers 5xx, {_counts(outcome.reasons)}")
    said.append(f"retries {_counts(outcome.retries)}")
    for what, value in (("away", outcome.away_s), ("back", outcome.back_s), ("full", outcome.full_s)):
        if value is not None:
            said.append(f"{what} {_seconds(value)}")
    return f"{outcome.name}: {'; '.join(said)}"


def load_sentence(pause_ms: int) -> str:
    return (
        f"wrk, {CONNECTIONS} keep-alive connections, each waiting 1 to {pause_ms} ms before its next request"
    )


def pool_sentence(settings: Settings) -> str:
    return (
        f"{len(NAMES)} backends, {settings.policy}; "
        f"health http every {settings.interval_ms} ms, fall 2, rise 2; "
        f"outlier {settings.consecutive_failures} in a row, "
        f"ejection {settings.ejection_ms} ms, at most {settings.max_ejection_ms} ms; "
        f"retry {settings.attempts} attempts, {settings.per_try_timeout_ms} ms each, budget 20 %; "
        f"slow start {settings.slow_start_ms} ms"
    )


def sections(outcomes: Sequence["Outcome"]) -> list[str]:
    """Of the outage, as Markdown."""
    return [
        "### What clients saw",
        _clients(outcomes),
        "### What the gateway did",
        _gateway(outcomes),
        f"### {VICTIM}'s share after it was used again",
        _shares(outcomes),
        "### What the log said",
        _log(outcomes),
    ]


def _clients(outcomes: Sequence["Outcome"]) -> str:
    rows = []
    for each in outcomes:
        load = each.load
        rate = f"{load.requests / load.seconds:.0f}"
        failed = str(load.failures) + (f" ({_counts(load.errors)})" if load.errors else "")
        latencies = [_ms(value) for value in (load.p50_us, load.p99_us, load.max_us)]
        rows.append([each.name, str(load.requests), rate, failed, *latencies])
    return table(["phase", "requests", "per second", "failed", "p50", "p99", "slowest"], rows)


def _gateway(outcomes: Sequence["Outcome"]) -> str:
    header = [
        "phase",
        "5xx or cut short",
        "retries",
        "no budget",
        "away after",
        "used after",
        "full share after",
    ]
    rows = []
    for each in outcomes:
        ended = [str(each.answered_5xx), *([_counts(each.reasons)] if each.reasons else [])]
        rows.append(
            [
                each.name,
                ", ".join(ended),
                _counts(each.retries),
                str(each.budget_refused),
                *(_seconds(value) for value in (each.away_s, each.back_s, each.full_s)),
            ]
        )
    return table(header, rows)


def share_steps(shares: Sequence[tuple[float, float]], back_s: float, step_s: float = _STEP_S) -> list[float]:
    """The mean share in each step since then."""
    steps: dict[int, list[float]] = {}
    for at, share in shares:
        if at > back_s:
            steps.setdefault(int((at - back_s) / step_s), []).append(share)
    return [sum(steps[index]) / len(steps[index]) for index in sorted(steps)]


def _shares(outcomes: Sequence["Outcome"]) -> str:
    found = {
        each.name: share_steps(each.shares, each.back_s)
        for each in outcomes
        if each.is_return and each.back_s is not None
    }
    columns = min((len(steps) for steps in found.values()), default=0)
    header = ["seconds", *(f"{(index + 1) * _STEP_S:.1f}" for index in range(columns))]
    rows = [[name, *(f"{share:.0%}" for share in steps[:columns])] for name, steps in found.items()]
    return table(header, rows) if rows else "It was never used again."


def _log(outcomes: Sequence["Outcome"]) -> str:
    lines = []
    for each in outcomes:
        if each.events:
            lines.append(f"- {each.name}")
            lines += [f"  - {event.after_s:.2f} s: {event.text}" for event in each.events]
    return "\n".join(lines)


def policies_sections(outages: Mapping[str, Sequence["Outcome"]]) -> list[str]:
    """The same outage under several policies, as Markdown."""
    first = next(iter(outages.values()))
    rows = [
        [each.name, *(_short(run[index]) for run in outages.values())] for index, each in enumerate(first)
    ]
    return ["### Other policies", table(["phase", *outages], rows)]


def _short(outcome: "Outcome") -> str:
    said = [f"{outcome.load.failures} failed", f"p99 {_ms(outcome.load.p99_us)}"]
    if outcome.is_return:
        said.append(f"full {_seconds(outcome.full_s)}")
    elif outcome.away_s is not None:
        said.append(f"away {_seconds(outcome.away_s)}")
    return ", ".join(said)


def changes_line(changed: Changed) -> str:
    """One run of changes."""
    return (
        f"{changed.policy}: {len(changed.changes)} changes, {changed.refused} refused; {_load(changed.load)}"
    )


def _load(load: Load) -> str:
    return f"{load.requests} requests, {load.failures} failed"


def changes_sections(runs: Sequence[Changed]) -> list[str]:
    """Of the changes at run time, as Markdown."""
    header = ["policy", "changes", "refused", "p50", "p99", "requests", "failed", "5xx", "p99 of requests"]
    rows = []
    for run in runs:
        took = sorted(change.seconds * 1e6 for change in run.changes)
        rows.append(
            [
                run.policy,
                str(len(run.changes)),
                str(run.refused),
                _ms(percentile(took, 50)),
                _ms(percentile(took, 99)),
                str(run.load.requests),
                str(run.load.failures),
                str(run.answered_5xx),
                _ms(run.load.p99_us),
            ]
        )
    kinds = f"Of each: {_counts(runs[0].counts)}." if runs else ""
    return [
        "### Changes at run time",
        f"{kinds} One after the other; all but states are answered when every worker has them.",
        table(header, rows),
    ]
