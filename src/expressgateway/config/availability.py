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


NOT_YET: Final = (
    Later("listeners.http.compression"),
    Later("listeners.routes.filters"),
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
