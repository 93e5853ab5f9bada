"""What the contract knows and this version does not do yet.

Introduces `Later`: one row for each key or value that is refused with "not available in this version". The
schema describes these keys completely; they are refused here, on the file as it was written, because a key
that is accepted and ignored would be a lie. To make something available, delete its row.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from expressgateway.config.values import Loc, dotted, shown


@dataclass(frozen=True, slots=True)
class Later:
    """A key that is not available, or only with one value."""

    key: str
    """Dotted path without indices."""
    value: object = None
    """None: the key as such. A string may hold wildcards (`*:*`)."""

    def covers(self, value: object) -> bool:
        if self.value is None:
            return True
        if isinstance(self.value, str):
            return isinstance(value, str) and fnmatchcase(value, self.value)
        return value is self.value


def _for_pools(*rows: Later) -> tuple[Later, ...]:
    """The same rows for named pools and for a listener's unnamed one."""
    return tuple(Later(f"{home}.{row.key}", row.value) for home in ("listeners", "pools") for row in rows)


NOT_YET: Final = (
    Later("listeners.protocol", "quic"),
    Later("listeners.quic"),
    Later("listeners.h2_security"),
    Later("listeners.grpc"),
    Later("listeners.h2c", True),
    Later("listeners.routes"),
    Later("listeners.http.compression"),
    Later("listeners.websocket.h2_extended_connect", True),
    Later("listeners.websocket.h3_extended_connect", True),
    *_for_pools(
        Later("backends.protocol", "h2"),
        Later("backends.protocol", "h3"),
        Later("health"),
        Later("outlier"),
        Later("retry"),
        Later("circuit_breaker"),
        Later("load_balancing.policy", "random"),
        Later("load_balancing.policy", "weighted_random"),
        Later("load_balancing.policy", "least_connections"),
        Later("load_balancing.policy", "least_requests"),
        Later("load_balancing.policy", "power_of_two"),
        Later("load_balancing.policy", "maglev"),
        Later("load_balancing.policy", "ring_hash"),
        Later("load_balancing.policy", "ewma"),
        Later("load_balancing.policy", "session_affinity"),
        Later("load_balancing.policy", "*:*"),
        Later("load_balancing.hash_key"),
        Later("load_balancing.slow_start_ms"),
        Later("load_balancing.table_size"),
        Later("load_balancing.virtual_nodes"),
        Later("load_balancing.decay_ms"),
        Later("load_balancing.cookie"),
    ),
    Later("runtime.xdp_enabled", True),
    Later("runtime.xdp_interface"),
    Later("runtime.xdp_mode"),
    Later("runtime.xdp_new_flow_cap_per_sec_per_cpu"),
    Later("runtime.max_requests_per_h3_connection"),
    Later("observability.access_log"),
    Later("observability.tracing"),
    Later("passthrough"),
)

_ROWS: Final[Mapping[str, tuple[Later, ...]]] = {
    key: tuple(row for row in NOT_YET if row.key == key) for key in {row.key for row in NOT_YET}
}


def is_available(key: str, value: object = None) -> bool:
    """Whether `key` (dotted, without indices) may be used; with a value, whether that value may."""
    return not any(row.covers(value) if row.value is not None else True for row in _ROWS.get(key, ()))


def on_offer(key: str, choices: Iterable[str]) -> tuple[str, ...]:
    """Those of `choices` that `key` may have in this version."""
    return tuple(choice for choice in choices if is_available(key, choice))


def refusals(document: Mapping[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Every key of a parsed file that is not available yet, with the sentence that says so."""
    yield from _walk(document, (), "")


def _walk(value: object, loc: Loc, key: str) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            here = (*loc, name)
            path = f"{key}.{name}" if key else name
            row = next((row for row in _ROWS.get(path, ()) if row.covers(inner)), None)
            if row is None:
                yield from _walk(inner, here, path)
            else:
                setting = "" if row.value is None else f" = {shown(inner)}"
                yield here, f"not available in this version: {dotted(here)}{setting}"
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*loc, index), key)
