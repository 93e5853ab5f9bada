"""An outage by script: `python -m bench.outage` breaks one of three backends in every way while wrk asks.

Real processes: three backends, the gateway with one worker, wrk. Each *phase* is one run of wrk into which
one fault, or its end, falls; what it cost is read from wrk, from the gateway's metrics, which are sampled
four times a second, and from its log. ``--changes N`` then changes backends N times at run time under the
same load. Exit codes: 0 when no request failed where none may fail, 1 otherwise, 2 usage.
"""

import argparse
import contextlib
import datetime
import itertools
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import outage_report, report
from bench.outage_changes import Changed, change_backends
from bench.outage_world import (
    NAMES,
    VICTIM,
    Load,
    Metrics,
    Settings,
    World,
    by_label,
    result,
    total,
    world,
    wrk,
)
from bench.peers import UnavailableError
from expressgateway.upstream.selection import POLICIES

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "resilience.md"
RESULTS: Final = ROOT / "bench" / "results"
SAMPLE_S: Final = 0.25
FAULT_AT_S: Final = 1.0
"""After the start of a phase's load."""
FULL_SHARE: Final = 0.9
"""Of an equal share, over a second: what counts as having it all again."""
CHANGES_POLICIES: Final = ("round_robin", "least_requests", "maglev")
PAUSE_MS: Final = 20
"""Of each connection before its next request, at most."""
SECOND: Final = "b3"


@dataclass(frozen=True)
class Phase:
    """One run of the load, and what happens in it."""

    name: str
    seconds: int
    act: Callable[[World], None] | None = None
    """The fault, or its end."""
    pool: str = "web"
    may_fail: bool = False
    """Requests may fail: the configuration of its pool lets them."""
    is_return: bool = False
    """The backend comes back."""
    then: Callable[[World], None] | None = None
    """To be done when the load has ended."""


def _mode(mode: str) -> Callable[[World], None]:
    return lambda here: here.victim.mode(mode)


def _both(method: str) -> Callable[[World], None]:
    """The victim and one more, so that most of the pool is out."""

    def act(here: World) -> None:
        for name in (VICTIM, SECOND):
            getattr(here.backends[name], method)()

    return act


PHASES: Final = (
    Phase("steady", 3),
    Phase("b2 killed (SIGKILL)", 5, lambda here: here.victim.kill()),
    Phase("b2 started again", 9, lambda here: here.victim.start(), is_return=True),
    Phase("b2 hung (SIGSTOP)", 5, lambda here: here.victim.stop()),
    Phase("b2 going on (SIGCONT)", 9, lambda here: here.victim.resume(), is_return=True),
    Phase("b2 slowed to 2 s", 6, _mode("slow")),
    Phase("b2 quick again", 11, _mode("ok"), is_return=True),
    Phase("b2 500, neither retried nor counted", 4, _mode("error"), "plain", True, then=_mode("ok")),
    Phase("b2 500, retried only", 4, _mode("error"), "retried", True, then=_mode("ok")),
    Phase("b2 500, retried and counted", 6, _mode("error")),
    Phase("b2 well again", 11, _mode("ok"), is_return=True),
    Phase("b2 and b3 killed", 5, _both("kill")),
    Phase("b2 and b3 started again", 9, _both("start"), is_return=True),
    Phase("b2 and b3 hung", 5, _both("stop")),
    Phase("b2 and b3 going on", 9, _both("resume"), is_return=True),
    Phase("b2 and b3 hung, panic threshold 30", 5, _both("stop"), "calm"),
    Phase("b2 and b3 going on again", 9, _both("resume"), "calm", is_return=True),
)


@dataclass(frozen=True)
class Seen:
    """One line of the gateway's log, about the backend or its pool."""

    after_s: float
    """Since the fault."""
    state: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What a phase cost."""

    name: str
    pool: str
    load: Load
    answered_5xx: int
    """By the gateway's count, its backends' answers and its own."""
    reasons: Mapping[str, int]
    """Exchanges that it ended by itself, by reason; clients that left are not among them."""
    retries: Mapping[str, int]
    budget_refused: int
    by_backend: Mapping[str, int]
    events: Sequence[Seen]
    away_s: float | None
    """From the fault until the backend was ejected or found unhealthy."""
    back_s: float | None
    """From the end of the fault until it was used again."""
    full_s: float | None
    """From then on until it had its full share."""
    shares: Sequence[tuple[float, float]]
    """Of the backend, at seconds since the fault."""
    may_fail: bool
    is_return: bool

    @property
    def is_clean(self) -> bool:
        return not self.load.failures and not self.answered_5xx and not self.reasons


class Sampler(threading.Thread):
    """Takes the gateway's metrics every `SAMPLE_S` until it is told to stop."""

    def __init__(self, here: World) -> None:
        super().__init__(daemon=True)
        self._world = here
        self._over = threading.Event()
        self.samples: list[tuple[float, Metrics]] = []
        self.failure = ""

    def run(self) -> None:
        due = time.monotonic()
        try:
            while True:
                self.samples.append((time.monotonic(), self._world.metrics()))
                due += SAMPLE_S
                if self._over.wait(max(0.0, due - time.monotonic())):
                    return
        except (OSError, ValueError) as error:
            self.failure = f"the gateway's metrics: {error}"

    def end(self) -> None:
        self._over.set()
        self.join()


def run_phase(here: World, phase: Phase) -> Outcome:
    """Raises UnavailableError when something does not run, which is no result."""
    before = here.metrics()
    sampler = Sampler(here)
    with wrk(here.ports[phase.pool], here.directory, phase.seconds, pause_ms=PAUSE_MS) as process:
        sampler.start()
        time.sleep(FAULT_AT_S)
        at, wall = time.monotonic(), datetime.datetime.now(datetime.UTC).timestamp()
        if phase.act is not None:
            phase.act(here)
        load = result(process, phase.seconds + 20)
    sampler.end()
    if phase.then is not None:
        phase.then(here)
    if sampler.failure:
        raise UnavailableError(sampler.failure)
    after = here.metrics()
    events = [
        Seen(event["at"] - wall, str(event.get("state", "")), str(event["message"]))
        for event in here.events()
        if event.get("pool") == phase.pool
        and event.get("backend", VICTIM) == VICTIM
        and 0 <= event["at"] - wall <= phase.seconds - FAULT_AT_S + 0.5
    ]
    shares = [(then - at, share) for then, share in shares_of(sampler.samples, phase.pool)]
    back_s = _first(events, ("healthy", "unknown")) if phase.is_return else None
    since = since_of(before, after)
    reasons = {
        reason: count
        for reason, count in since("http_gateway_errors_total", "reason", listener=phase.pool).items()
        if reason != "client_closed"
    }
    classes = since("http_requests_total", "status_class", listener=phase.pool)
    return Outcome(
        name=phase.name,
        pool=phase.pool,
        load=load,
        answered_5xx=classes.get("5xx", 0),
        reasons=reasons,
        retries=since("backend_retries_total", "reason", pool=phase.pool),
        budget_refused=sum(since("pool_retries_refused_total", "pool", pool=phase.pool).values()),
        by_backend=since("backend_requests_total", "backend", pool=phase.pool),
        events=events,
        away_s=None if phase.is_return else _first(events, ("ejected", "unhealthy")),
        back_s=back_s,
        full_s=full_after(shares, back_s) if back_s is not None else None,
        shares=shares,
        may_fail=phase.may_fail,
        is_return=phase.is_return,
    )


def _first(events: Sequence[Seen], states: Sequence[str]) -> float | None:
    return next((event.after_s for event in events if event.state in states), None)


def since_of(before: Metrics, after: Metrics) -> Callable[..., dict[str, int]]:
    """What a family has grown by, by one label; nothing that has not."""

    def since(family: str, label: str, **labels: str) -> dict[str, int]:
        old = by_label(before, family, label, **labels)
        new = by_label(after, family, label, **labels)
        grown = {key: round(value - old.get(key, 0.0)) for key, value in new.items()}
        return {key: count for key, count in grown.items() if count}

    return since


def shares_of(samples: Sequence[tuple[float, Metrics]], pool: str) -> list[tuple[float, float]]:
    """The victim's share of all answers between each two samples, at the later one's time."""
    shares: list[tuple[float, float]] = []
    counts = [
        (at, answers(metrics, pool, VICTIM), sum(answers(metrics, pool, name) for name in NAMES))
        for at, metrics in samples
    ]
    for (_, own, everyone), (at, own_now, everyone_now) in itertools.pairwise(counts):
        if everyone_now > everyone:
            shares.append((at, (own_now - own) / (everyone_now - everyone)))
    return shares


def answers(metrics: Metrics, pool: str, name: str) -> float:
    """Attempts that ended with an answer."""
    labels = {"pool": pool, "backend": name}
    family = "backend_requests_total"
    return total(metrics, family, **labels) - total(metrics, family, status_class="none", **labels)


def full_after(shares: Sequence[tuple[float, float]], back_s: float) -> float | None:
    """From being used again to `FULL_SHARE` of an equal share, over a second."""
    later = [(at, share) for at, share in shares if at > back_s]
    width = round(1 / SAMPLE_S)
    for index in range(len(later) - width + 1):
        window = later[index : index + width]
        if sum(share for _, share in window) / width >= FULL_SHARE / len(NAMES):
            return window[0][0] - back_s
    return None


def settle(here: World, timeout_s: float = 40.0) -> None:
    """Until everybody is healthy, in every pool. Raises UnavailableError."""
    ends = time.monotonic() + timeout_s
    wanted = len(here.ports) * len(NAMES)
    while total(here.metrics(), "backend_state", state="healthy") < wanted:
        if time.monotonic() > ends:
            raise UnavailableError("the backends do not come back")
        time.sleep(0.1)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="expressgateway-outage-") as name:
        yield Path(name)


def run_outage(settings: Settings, phases: Sequence[Phase] = PHASES) -> list[Outcome]:
    """All phases in one world."""
    outcomes: list[Outcome] = []
    with scratch() as directory, world(directory, settings) as here:
        settle(here)
        for phase in phases:
            outcome = run_phase(here, phase)
            outcomes.append(outcome)
            say(outage_report.line(outcome))
            if phase.is_return:
                settle(here)
    return outcomes


def run_changes(settings: Settings, count: int) -> Changed:
    """`count` changes of a pool under load."""
    with scratch() as directory, world(directory, settings) as here:
        settle(here)
        before = here.metrics()
        with wrk(here.ports["web"], here.directory, 600, pause_ms=PAUSE_MS) as process:
            time.sleep(0.5)
            done = change_backends(here, "web", count)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)  # it ends, and tells
            load = result(process, 20)
        since = since_of(before, here.metrics())
        classes = since("http_requests_total", "status_class", listener="web")
        return Changed(settings.policy, done, load, classes.get("5xx", 0))


def say(text: str) -> None:
    print(text, flush=True)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    known = ", ".join(POLICIES)
    parser = argparse.ArgumentParser(prog="python -m bench.outage", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--policy",
        default="round_robin",
        help=f"of the pool; several, by commas, are tried in turn, the first one shown in full: {known}",
    )
    parser.add_argument("--changes", type=int, default=1000, help="changes at run time; 0: none (1000)")
    parser.add_argument("--only-changes", action="store_true", help="no outage")
    parser.add_argument("--write", action="store_true", help="also write the results into docs/resilience.md")
    options = parser.parse_args(given)
    options.policies = list(dict.fromkeys(name.strip() for name in options.policy.split(",")))
    if unknown := [name for name in options.policies if name not in POLICIES]:
        parser.error(f"no such policy: {', '.join(unknown)}; there are {known}")
    if options.changes < 0 or (options.only_changes and not options.changes):
        parser.error("changes is at least 0, and at least 1 with --only-changes")
    return options


def facts(settings: Settings, command: str) -> dict[str, str]:
    """What stands above the tables."""
    now = datetime.datetime.now(datetime.UTC)
    versions = report.versions(["gateway"])
    return {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "command": f"`{command}`",
        **report.machine(),
        **{name: versions[name] for name in ("gateway", "wrk")},
        "load": outage_report.load_sentence(PAUSE_MS),
        "pool": outage_report.pool_sentence(settings),
    }


def main(given: Sequence[str]) -> int:
    """Returns the exit code."""
    options = arguments(given)
    settings = Settings(policy=options.policies[0])
    about = facts(settings, shlex.join(["python", "-m", "bench.outage", *given]))
    say(report.facts_list(about) + "\n")
    outages: dict[str, list[Outcome]] = {}
    changes: list[Changed] = []
    signal.signal(signal.SIGTERM, _leave)
    try:
        if not options.only_changes:
            for policy in options.policies:
                say(f"{policy}:")
                outages[policy] = run_outage(Settings(policy=policy))
        if options.changes:
            for policy in dict.fromkeys((*options.policies, *CHANGES_POLICIES)):
                changes.append(run_changes(Settings(policy=policy, pools=("web",)), options.changes))
                say(outage_report.changes_line(changes[-1]))
    except UnavailableError as error:
        print(f"outage: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("outage: stopped; everything it had started is down", file=sys.stderr)
        return 130
    sections = ["## Measured", report.facts_list(about)]
    if outages:
        sections += outage_report.sections(outages[settings.policy])
    if len(outages) > 1:
        sections += outage_report.policies_sections(outages)
    if changes:
        sections += outage_report.changes_sections(changes)
    text = "\n\n".join(sections)
    say(f"\n{text}")
    record: dict[str, Any] = {"facts": about, "outages": outages, "changes": changes}
    name = f"outage-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    say(f"\nsamples: {report.write_record(RESULTS, name, record).relative_to(ROOT)}")
    if options.write:
        report.write_section(PAGE, "outage", text)
        say(f"written: {PAGE.relative_to(ROOT)}")
    failed = any(not each.is_clean and not each.may_fail for run in outages.values() for each in run)
    return 1 if failed or any(not each.is_clean for each in changes) else 0


def _leave(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
