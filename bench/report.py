"""What the bench says: tables, the verdicts against the budgets, the JSON record and the page in docs/.

A table is Markdown that also reads in a terminal. The two ratio columns are medians of the ratios of each
round, since neighbours in time share the machine's mood; they may differ a little from the quotient of the
medians.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.cells import OVER_H1, Cell, Outcome
from bench.idle import IdleFigures
from bench.peers import GATEWAY, PROXIES, find_stream_module, program_version
from bench.scaling import compare
from bench.stats import round_ratios, summarise
from bench.streams import StreamFigures

PLACEHOLDER: Final = """\
# Performance

<!-- Prose goes here, by hand: what moved the numbers, and how to read them. Only what stands between the
generated markers below is overwritten, by `python -m bench --write` and `python -m bench soak --write`. -->
"""


@dataclass(frozen=True)
class Budget:
    """A promise: the gateway's CPU cost in a cell is at most `limit` times that of a reference."""

    cell: str
    reference: str
    limit: float


BUDGETS: Final = (
    Budget("h1", "nginx", 2.0),
    Budget("h1", "envoy", 0.6),
    Budget("tls", "nginx", 2.0),
    Budget("h2", "nginx", 2.0),
    Budget("tcp", "haproxy", 1.5),
    Budget("tcp-bulk", "haproxy", 0.8),
    Budget("tcp-bulk", "haproxy-64k", 0.8),
)
THROUGHPUT_CELLS: Final = ("h2-download", "h2-upload")
THROUGHPUT_BUDGET: Final = 0.7
IDLE_BUDGET_BYTES: Final = 16 * 1024
SCALING_BUDGET: Final = 1.7


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right; the last may be long text."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *others])} |"

    ruler = (
        "| " + " | ".join("-" * w if not at else "-" * (w - 1) + ":" for at, w in enumerate(widths)) + " |"
    )
    return "\n".join([line(header), ruler, *map(line, rows)])


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds:.0f} us" if microseconds < 10_000 else f"{microseconds / 1e3:.0f} ms"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def cost_ratio(outcomes: Mapping[str, Outcome], over: str, under: str, *, bulk: bool) -> float | None:
    """CPU cost of one variant over that of another, round by round; None when either has no result."""
    costs: list[list[float]] = []
    for variant in (over, under):
        outcome = outcomes.get(variant)
        if outcome is None or outcome.failure is not None or not outcome.samples:
            return None
        costs.append([s.cpu_s / (s.bytes if bulk else s.requests) for s in outcome.samples])
    return round_ratios(*costs)


def throughput_ratio(outcomes: Mapping[str, Outcome], over: str, under: str) -> float | None:
    """Bytes per second of one variant over those of another, round by round; None when either has none."""
    rates: list[list[float]] = []
    for variant in (over, under):
        outcome = outcomes.get(variant)
        if outcome is None or outcome.failure is not None or not outcome.samples:
            return None
        rates.append([sample.bytes / sample.seconds for sample in outcome.samples])
    return round_ratios(*rates)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def load_table(outcomes: Mapping[str, Outcome], *, bulk: bool) -> str:
    """One row a variant; a failure says so where its numbers would be."""
    cost_name = "CPU ms/GB" if bulk else "CPU us/request"
    rate_name = "MB/s" if bulk else "requests/s"
    header = ["proxy", rate_name, cost_name, "x nginx", "gateway / it", "spread", "p50", "p99", "memory MiB"]
    rows: list[list[str]] = []
    failures: list[str] = []
    for variant, outcome in outcomes.items():
        if outcome.failure is not None or not outcome.samples:
            rows.append([variant, "failed", *["-"] * (len(header) - 2)])
            failures.append(f"- **{variant} failed**: {outcome.failure}")
            continue
        figures = summarise(outcome.samples, bulk=bulk)
        rate = figures.mb_per_s if bulk else figures.requests_per_s
        cost = figures.cpu_ms_per_gb if bulk else figures.cpu_us_per_request
        rows.append(
            [
                variant,
                f"{rate:.0f}",
                f"{cost:.0f}" if bulk else f"{cost:.1f}",
                _ratio(cost_ratio(outcomes, variant, "nginx", bulk=bulk)),
                _ratio(cost_ratio(outcomes, GATEWAY, variant, bulk=bulk)),
                f"{figures.spread:.0%}",
                _time(figures.p50_us),
                _time(figures.p99_us),
                _mib(figures.memory_bytes),
            ]
        )
    return "\n\n".join([table(header, rows), *(["\n".join(failures)] if failures else [])])


def idle_table(results: Mapping[str, IdleFigures | str]) -> str:
    """Memory of idle connections, one row a proxy."""
    header = ["proxy", "connections", "before MiB", "with all open MiB", "KiB/connection"]
    rows: list[list[str]] = []
    failures: list[str] = []
    for variant, result in results.items():
        if isinstance(result, str):
            rows.append([variant, "failed", "-", "-", "-"])
            failures.append(f"- **{variant} failed**: {result}")
            continue
        per_connection = f"{result.per_connection_bytes / 1024:.1f}"
        counts = [str(result.connections), _mib(result.base_bytes), _mib(result.full_bytes), per_connection]
        rows.append([variant, *counts])
    return "\n\n".join([table(header, rows), *(["\n".join(failures)] if failures else [])])


def streams_table(results: Mapping[str, StreamFigures | str]) -> str:
    """Memory of streams that are held open, one row a proxy."""
    header = ["proxy", "connections", "streams", "before MiB", "with all open MiB", "bytes/stream"]
    rows: list[list[str]] = []
    failures: list[str] = []
    for variant, result in results.items():
        if isinstance(result, str):
            rows.append([variant, "failed", *["-"] * 4])
            failures.append(f"- **{variant} failed**: {result}")
            continue
        counts = [str(result.connections), str(result.streams)]
        memory = [_mib(result.base_bytes), _mib(result.full_bytes), f"{result.per_stream_bytes:.0f}"]
        rows.append([variant, *counts, *memory])
    return "\n\n".join([table(header, rows), *(["\n".join(failures)] if failures else [])])


def scaling_table(outcomes: Mapping[str, Outcome], *, shared: bool) -> str:
    """One and two workers, and what follows from them."""
    header = ["proxy", "requests/s", "CPU us/request", "busiest process", "p99"]
    rows: list[list[str]] = []
    words: list[str] = []
    for variant, outcome in outcomes.items():
        if outcome.failure is not None or not outcome.samples:
            rows.append([variant, "failed", "-", "-", "-"])
            words.append(f"- **{variant} failed**: {outcome.failure}")
            continue
        figures = summarise(outcome.samples, bulk=False)
        share = f"{figures.busiest_share:.0%} of CPU"
        numbers = [f"{figures.requests_per_s:.0f}", f"{figures.cpu_us_per_request:.1f}", share]
        rows.append([variant, *numbers, _time(figures.p99_us)])
    for name in ("nginx", GATEWAY):
        pair = [outcomes.get(f"{name} x{workers}") for workers in (1, 2)]
        if all(one is not None and one.samples and one.failure is None for one in pair):
            one, two = (summarise(each.samples, bulk=False) for each in pair if each is not None)
            scaling = compare(one, two)
            measured = f"{scaling.throughput:.2f} x the throughput of one was measured"
            projected = f"{scaling.projection:.2f} x is projected from CPU per request and the share of each"
            words.append(f"- {name}, two workers: {measured}; {projected}.")
    if shared:
        words.append(
            "- Load, backend and workers shared the same two cores here, so the machine bounds the measured "
            "throughput, not the proxy. The projection is what two workers carry if each has a core."
        )
    return "\n\n".join([table(header, rows), "\n".join(words)])


def verdicts(
    cells: Mapping[str, Mapping[str, Outcome]],
    bulk_cells: frozenset[str],
    idle: Mapping[str, IdleFigures | str] | None,
    scaling: Mapping[str, Outcome] | None,
) -> str:
    """Each budget with what was measured; "not measured" where either side is missing."""
    header = ["budget", "limit", "measured", "verdict"]
    rows: list[list[str]] = []
    for budget in BUDGETS:
        outcomes = cells.get(budget.cell, {})
        ratio = cost_ratio(outcomes, GATEWAY, budget.reference, bulk=budget.cell in bulk_cells)
        verdict = "not measured" if ratio is None else "kept" if ratio <= budget.limit else "MISSED"
        what = f"{budget.cell}: CPU against {budget.reference}"
        rows.append([what, f"<= {budget.limit} x", _ratio(ratio), verdict])
    for name in THROUGHPUT_CELLS:
        ratio = throughput_ratio(cells.get(name, {}), GATEWAY, OVER_H1)
        verdict = "not measured" if ratio is None else "kept" if ratio >= THROUGHPUT_BUDGET else "MISSED"
        what = f"{name}: throughput against HTTP/1.1 over TLS"
        rows.append([what, f">= {THROUGHPUT_BUDGET} x", _ratio(ratio), verdict])
    figures = idle.get(GATEWAY) if idle else None
    if isinstance(figures, IdleFigures):
        kept = figures.per_connection_bytes <= IDLE_BUDGET_BYTES
        measured = f"{figures.per_connection_bytes / 1024:.1f} KiB"
        rows.append(["idle: memory a connection", "<= 16 KiB", measured, "kept" if kept else "MISSED"])
    else:
        rows.append(["idle: memory a connection", "<= 16 KiB", "-", "not measured"])
    one, two = ((scaling or {}).get(f"{GATEWAY} x{workers}") for workers in (1, 2))
    if one and two and one.samples and two.samples and not (one.failure or two.failure):
        result = compare(summarise(one.samples, bulk=False), summarise(two.samples, bulk=False))
        kept = result.projection >= SCALING_BUDGET
        what = "scaling: two workers (projection)"
        rows.append(
            [what, f">= {SCALING_BUDGET} x", f"{result.projection:.2f}", "kept" if kept else "MISSED"]
        )
    else:
        rows.append(["scaling: two workers", f">= {SCALING_BUDGET} x", "-", "not measured"])
    return table(header, rows)


def machine() -> dict[str, str]:
    """What a number must name to mean anything."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }


def versions(proxies: Sequence[str]) -> dict[str, str]:
    """Versions of the proxies and of the load generators."""
    found = {name: program_version(name) for name in (*proxies, "wrk", "h2load")}
    if "nginx" in proxies and find_stream_module() is None:
        found["nginx"] += " (without its stream module: no TCP)"
    return found


def facts_list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def write_section(page: Path, marker: str, text: str) -> None:
    """Replaces what stands between the two comments of a marker, or appends it with them."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    before = page.read_text("utf-8") if page.exists() else PLACEHOLDER
    section = f"{begin}\n{text.strip()}\n{end}"
    head, found, rest = before.partition(begin)
    _old, closed, tail = rest.partition(end)
    if found and closed:
        after = head + section + tail
    else:
        after = before.rstrip("\n") + "\n\n" + section + "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(after, "utf-8")


def as_record(value: object) -> Any:  # noqa: ANN401 - whatever json.dumps takes
    """Dataclasses to dictionaries, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_record(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_record(each) for each in value]
    return value


def write_record(directory: Path, name: str, record: Mapping[str, object]) -> Path:
    """The JSON result of one bench, samples included."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(as_record(record), indent=1) + "\n", "utf-8")
    return path


def cell_heading(cell: Cell) -> str:
    return f"### {cell.name}: {cell.title}"


def known_proxies(text: str) -> list[str]:
    """The proxies named in a comma-separated list, in our order. Raises ValueError for one we do not know."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in PROXIES]:
        raise ValueError(f"no such proxy: {', '.join(unknown)}; there are {', '.join(PROXIES)}")
    return [name for name in PROXIES if name in wanted]
