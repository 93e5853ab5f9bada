"""From series to the text that Prometheus reads: format 0.0.4, or OpenMetrics 1.0 for who asks for it.

Names, help and types come from the catalogue. Both formats have the same sample lines, and a series keeps
its own until it changes: a scrape makes the text of those only that have changed since the last one. It is
made in pieces, so that its maker can do something else in between.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final

from expressgateway.control.ledger import Series, Table
from expressgateway.observe.counters import BUCKETS_S, Family

PLAIN: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_PIECE: Final = 32  # series; a histogram is 17 lines
_BOUNDS: Final = (*map(repr, BUCKETS_S), "+Inf")


def expose(tables: Mapping[str, Table], accept: str = "") -> tuple[bytes, str]:
    """The whole text and its content type."""
    is_open = wants_openmetrics(accept)
    return b"".join(pieces(tables, is_open=is_open)), content_type(is_open=is_open)


def wants_openmetrics(accept: str) -> bool:
    return "application/openmetrics-text" in accept


def content_type(*, is_open: bool) -> str:
    return OPENMETRICS if is_open else PLAIN


def pieces(tables: Mapping[str, Table], *, is_open: bool) -> Iterator[bytes]:
    """The text, a little at a time. Series may change, come and go between two pieces."""
    for name, table in tables.items():
        ordered = table.ordered()
        if not ordered:
            continue
        family = table.description
        writer = _Writer(name, family)
        yield _head(name, family, is_open=is_open)
        for start in range(0, len(ordered), _PIECE):
            yield "".join(
                [series.text or writer.write(series) for series in ordered[start : start + _PIECE]]
            ).encode()
    if is_open:
        yield b"# EOF\n"


def _head(name: str, family: Family, *, is_open: bool) -> bytes:
    text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
    if is_open:
        text = text.replace('"', '\\"')
    elif family.kind == "counter":
        name += "_total"  # OpenMetrics names the family, the older format its one series
    return f"# HELP {name} {text}\n# TYPE {name} {family.kind}\n".encode()


class _Writer:
    """Writes the lines of one family's series."""

    __slots__ = ("_family", "_is_histogram", "_name", "_template")

    def __init__(self, name: str, family: Family) -> None:
        self._family = family
        self._is_histogram = family.kind == "histogram"
        self._name = f"{name}_total" if family.kind == "counter" else name
        comma = "," if family.labels else ""
        self._template = (
            "".join(f'{name}_bucket{{%s{comma}le="{bound}"}} %s\n' for bound in _BOUNDS)
            + f"{name}_count{_braces('%s', family)} %s\n{name}_sum{_braces('%s', family)} %s\n"
            if self._is_histogram
            else ""
        )

    def write(self, series: Series) -> str:
        """The lines, which the series keeps."""
        labels = ",".join(
            [
                f'{name}="{_escaped(value)}"'
                for name, value in zip(self._family.labels, series.labels, strict=True)
            ]
        )
        value = series.value
        if isinstance(value, list):
            cells: list[object] = []
            total: float = 0
            for total in accumulate(value[:-1]):  # each bucket holds all smaller ones, too
                cells += (labels, total)
            both = (labels,) if self._family.labels else ()
            series.text = self._template % (*cells, *both, total, *both, value[-1])
        else:
            series.text = f"{self._name}{_braces(labels, self._family)} {float(value)}\n"
        return series.text


def _braces(labels: str, family: Family) -> str:
    return f"{{{labels}}}" if family.labels else ""


def _escaped(value: str) -> str:
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return value
