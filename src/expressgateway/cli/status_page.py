"""A picture of the gateway as lines of text. Pure: from what the admin listener tells to what is printed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from expressgateway.cli.admin_client import printable, table_lines

_DASH: Final = "-"
_RED, _YELLOW, _BOLD, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"
_LEVELS: Final = {"bad": ("!!", _RED), "warn": (" !", _YELLOW), "info": ("  ", "")}

Row = Mapping[str, Any]


def page(picture: Row, columns: int | None = None, *, colours: bool = False) -> list[str]:
    """Everything, cut at `columns`. Colours only stress what words say."""
    lines = []
    for text, colour in _lines(picture):
        shown = printable(text)[:columns]
        lines.append(f"{colour}{shown}{_PLAIN}" if colours and colour and shown else shown)
    return lines


def line(picture: Row) -> str:
    """The most of it in one line, for a log."""
    totals = picture["totals"]
    bad = sum(one["level"] == "bad" for one in picture["attention"])
    parts = (
        time.strftime("%H:%M:%S", time.localtime(picture["at"])),
        picture["gateway"]["state"],
        *_sums(totals),
        f"{bad} to look at" if bad else "all well",
    )
    return printable("  ".join(parts))


def _sums(totals: Row) -> Iterator[str]:
    yield f"{_rate(totals['rps'])} requests/s"
    for name in ("p50", "p90", "p99"):
        yield f"{name} {_span(totals[name])}"
    yield f"{_rate(totals['errors_ps'])} errors/s"
    yield f"{totals['open']} open"
    yield f"in {_bandwidth(totals['in_bps'])}"
    yield f"out {_bandwidth(totals['out_bps'])}"


def _lines(picture: Row) -> Iterator[tuple[str, str]]:
    gateway, config, reload = picture["gateway"], picture["config"], picture["reload"]
    up = _lasting(gateway["uptime_s"])
    yield f"{gateway['state']}, pid {gateway['pid']}, version {gateway['version']}, up {up}", _BOLD
    last = f", last reload {reload['last_result']}" if reload["last_result"] else ""
    under_way = ", a reload is under way" if reload["finished"] < reload["requested"] else ""
    yield f"configuration {config['version']} from {config['path']}{last}{under_way}", ""
    yield "", ""
    yield "   ".join(_sums(picture["totals"])), _BOLD
    for one in picture["attention"]:
        sign, colour = _LEVELS.get(one["level"], ("  ", ""))
        yield f"{sign} {one['text']}", colour
    if (drain := picture["drain"]) is not None:
        yield _draining(drain), _YELLOW
    for part in (_listeners, _routes):
        yield "", ""
        yield from ((text, "") for text in part(picture))
    if (xdp := picture.get("xdp")) is not None:
        yield "", ""
        yield from ((text, "") for text in _xdp(xdp))
    for pool in picture["pools"]:
        yield "", ""
        yield from ((text, "") for text in _pool(pool, picture["at"]))
    if more := picture["more_pools"]:
        yield f"... {more} more pools", ""
    yield "", ""
    yield from ((text, "") for text in _workers(picture))
    for family, title in (("errors", "ERROR"), ("security", "STOPPED"), ("refused", "REFUSED")):
        if rows := picture[family]:
            yield "", ""
            yield from ((text, "") for text in _reasons(title, rows))


def _xdp(xdp: Row) -> Iterator[str]:
    where = ", ".join(
        f"{one['name']} {one['mode'] if one['is_attached'] else '(not attached)'}"
        for one in xdp["interfaces"]
    )
    yield f"in the kernel: {xdp['state']}; {where or 'nowhere'}; {xdp['flows']} flows"
    yield from table_lines(
        (
            "LISTENER",
            "FORWARDING",
            "BACKENDS",
            "FLOWS/S",
            "PACKETS IN/S",
            "OUT/S",
            "PASSED ON/S",
            "DROPPED/S",
        ),
        [
            (
                one["name"],
                one["forwarding"],
                one["backends"],
                *(_rate(one[key]) for key in ("flows_ps", "in_pps", "out_pps", "passed_ps", "dropped_ps")),
            )
            for one in xdp["listeners"]
        ],
    )


def _draining(drain: Row) -> str:
    phase = "finish" if "finish" in drain["phases"] else "settle"
    took, limit = drain["phases"][phase], drain["limits"][phase]
    still = ", ".join(f"{name} {count}" for name, count in drain["open"].items()) or "nothing"
    return f" ! {phase}: {took:.0f} of at most {limit:.0f} seconds; open: {still}"


def _latency(row: Row) -> tuple[str, str, str]:
    return _span(row["p50"]), _span(row["p90"]), _span(row["p99"])


def _listeners(picture: Row) -> Iterator[str]:
    yield from _table(
        ("LISTENER", "ADDRESS", "PROTOCOL", "OPEN", "NEW/S", "REQUESTS/S", "P50", "P90", "P99", "IN", "OUT"),
        picture["listeners"],
        lambda row: (
            row["name"],
            row["bound"],
            row["protocol"],
            row["open"],
            _rate(row["connections_ps"]),
            _rate(row["rps"]),
            *_latency(row),
            _bandwidth(row["in_bps"]),
            _bandwidth(row["out_bps"]),
        ),
    )
    if more := picture["more_listeners"]:
        yield f"... {more} more listeners"


def _routes(picture: Row) -> Iterator[str]:
    yield from _table(
        ("ROUTE", "LISTENER", "REQUESTS/S", "ERRORS/S", "P50", "P90", "P99"),
        picture["routes"],
        lambda row: (
            row["route"],
            row["listener"],
            _rate(row["rps"]),
            _rate(row["errors_ps"]),
            *_latency(row),
        ),
    )
    if more := picture["more_routes"]:
        yield f"... {more} more routes"


def _pool(pool: Row, now: float) -> Iterator[str]:
    states = ", ".join(f"{count} {state}" for state, count in pool["states"].items()) or "no backends"
    yield (
        f"pool {pool['name']}, {pool['policy']}: {states}; {_rate(pool['retries_ps'])} retries/s, "
        f"{pool['ejections']} ejections"
    )
    if pool["backends"]:
        yield from _table(
            ("BACKEND", "STATE", "FOR", "WEIGHT", "IN FLIGHT", "REQUESTS/S", "ERRORS/S", "CAUSE"),
            pool["backends"],
            lambda row: (
                row["id"],
                "slow start" if row["slow_start"] and row["state"] != "draining" else row["state"],
                _lasting(now - row["since"]),
                row["weight"],
                row["in_flight"],
                _rate(row["rps"]),
                _rate(row["errors_ps"]),
                row["cause"],
            ),
        )
    if more := pool["more"]:
        yield f"... {more} more backends; those that are not well come first"


def _workers(picture: Row) -> Iterator[str]:
    yield from _table(
        ("WORKER", "PID", "STATE", "CPU", "MEMORY", "LOOP LAG", "RESTARTS"),
        picture["workers"],
        lambda row: (
            row["index"],
            row["pid"] or _DASH,
            row["state"],
            _DASH if row["cpu_percent"] is None else f"{row['cpu_percent']:.0f} %",
            _size(row["rss_bytes"]),
            _span(row["lag_ms"]),
            row["restarts"],
        ),
    )


def _reasons(title: str, rows: Sequence[Row]) -> Iterator[str]:
    yield from _table(
        (title, "LISTENER", "PER SECOND", "IN ALL"),
        rows,
        lambda row: (row["reason"], row["listener"], _rate(row["ps"]), row["total"]),
    )


def _table(
    header: tuple[str, ...], rows: Sequence[Row], cells: Callable[[Row], tuple[object, ...]]
) -> list[str]:
    return table_lines(header, [cells(row) for row in rows])


# -- numbers as the dashboard shows them


def _rate(value: float | None) -> str:
    if value is None:
        return _DASH
    if value == 0:
        return "0"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _span(ms: float | None) -> str:
    if ms is None:
        return _DASH
    if ms >= 10_000:
        return ">= 10 s"
    if ms >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"


def _size(count: float | None) -> str:
    if count is None:
        return _DASH
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _bandwidth(count: float | None) -> str:
    return _DASH if count is None else f"{_size(count)}/s"


def _lasting(seconds: float) -> str:
    whole = max(0, int(seconds))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= 2 * length:
            return f"{whole // length} {unit}"
    return f"{whole} s"
