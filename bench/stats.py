"""Samples of one run each, and the numbers a table shows of several. Knows no program and no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Sample:
    """One run of one cell through one proxy."""

    requests: int
    seconds: float
    cpu_s: float
    bytes: int = 0
    p50_us: float | None = None
    p99_us: float | None = None
    memory_bytes: int = 0
    """PSS of the proxy right after the run."""
    busiest_share: float = 1.0
    """Of the CPU time, the share of the busiest process: 0.5 is two workers evenly loaded."""


@dataclass(frozen=True)
class Figures:
    """Medians over the runs of one proxy in one cell."""

    runs: int
    requests_per_s: float
    mb_per_s: float
    cpu_us_per_request: float
    cpu_ms_per_gb: float
    """A GB is 1e9 bytes; 0 where the cell is not bulk."""
    p50_us: float | None
    p99_us: float | None
    memory_bytes: int
    spread: float
    """(highest - lowest) / median of the CPU cost: how far one run can be trusted."""
    busiest_share: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile of values already in order. Raises ValueError for none."""
    if not ordered:
        raise ValueError("no values")
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]


def _median_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def summarise(samples: Sequence[Sample], *, bulk: bool) -> Figures:
    """Medians; `bulk` says whether CPU per GB (1e9 bytes) means anything. Raises ValueError for none."""
    if not samples:
        raise ValueError("no samples")
    costs = [sample.cpu_s / sample.requests * 1e6 for sample in samples]
    middle = median(costs)
    per_gb = median([sample.cpu_s * 1e3 / (sample.bytes / 1e9) for sample in samples]) if bulk else 0.0
    return Figures(
        runs=len(samples),
        requests_per_s=median([sample.requests / sample.seconds for sample in samples]),
        mb_per_s=median([sample.bytes / sample.seconds / 1e6 for sample in samples]),
        cpu_us_per_request=middle,
        cpu_ms_per_gb=per_gb,
        p50_us=_median_of_known([sample.p50_us for sample in samples]),
        p99_us=_median_of_known([sample.p99_us for sample in samples]),
        memory_bytes=int(median([sample.memory_bytes for sample in samples])),
        spread=(max(costs) - min(costs)) / middle if middle else 0.0,
        busiest_share=median([sample.busiest_share for sample in samples]),
    )


def round_ratios(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios round by round: neighbours in time share the machine's mood.

    Raises ValueError when the two do not have the same number of rounds, or none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} rounds against {len(theirs)}")
    return median([mine / other for mine, other in zip(ours, theirs, strict=True)])
