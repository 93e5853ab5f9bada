"""How the API's table is written: one `Operation` for each path and method, and how a request finds its own.

The same entries make the OpenAPI document (`openapi`), so what is described is what is dispatched.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from expressgateway.control.admin.gateway import Resources
from expressgateway.control.admin.http import READS, Request, Response
from expressgateway.control.admin.versions import Versions
from expressgateway.control.reload import Check

ROOT: Final = "/api/v1"


@dataclass(frozen=True, slots=True)
class Call:
    """A request that found its operation."""

    gateway: Resources
    versions: Versions
    request: Request
    names: Mapping[str, str]
    """What stood for ``{...}`` in the path, decoded."""
    body: dict[str, Any]
    """Empty for reads. ``version`` is not in it any more."""
    check: Check


Handler = Callable[[Call], Awaitable[Response]]
"""Raises `ChangeError` for what is not done."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What one method does to one path."""

    method: str
    path: str
    """Below `ROOT`; ``{name}`` stands for one segment, percent-encoded."""
    name: str
    """Of the operation, for programs that are made from the document."""
    summary: str
    handler: Handler
    answers: Mapping[int, Any]
    """By status of success, the type of what is answered; None: any object."""
    body: Any = None
    """The type of what is asked; None: there is no body. A `TypedDict` has all the keys there are; those of
    anything else are the handler's business."""
    needs_body: bool = True
    """Whether nothing at all is other than ``{}``."""
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Parameters that the path may have behind it, with their schemas."""
    refusals: tuple[int, ...] = ()
    """Statuses of its own, beside those that any operation of its kind has."""
    has_etag: bool = False
    while_unready: bool = False
    """A write that is also made while the gateway starts or stops."""

    @property
    def is_write(self) -> bool:
        return self.method not in READS


class Routes:
    """Finds operations."""

    __slots__ = ("_by_pattern",)

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._by_pattern: dict[tuple[str, ...], dict[str, Operation]] = {}
        for operation in operations:
            self._by_pattern.setdefault(_pattern(operation.path), {})[operation.method] = operation

    def find(self, path: str) -> tuple[Mapping[str, Operation], dict[str, str]] | None:
        """By method, what can be asked of a path, and the names in it; None: there is nothing."""
        if not path.startswith(f"{ROOT}/"):
            return None
        try:
            # Decoded after it was split: a name may hold a slash.
            parts = [unquote_to_bytes(part).decode() for part in path.removeprefix(f"{ROOT}/").split("/")]
        except UnicodeDecodeError:
            return None
        if not all(parts):
            return None
        for pattern, operations in self._by_pattern.items():
            if len(pattern) == len(parts) and all(
                one in ("{}", part) for one, part in zip(pattern, parts, strict=True)
            ):
                template = next(iter(operations.values())).path
                return operations, dict(zip(names_in(template), _at_names(pattern, parts), strict=True))
        return None


def names_in(path: str) -> list[str]:
    """The names of a path's variable segments, in order."""
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def _pattern(path: str) -> tuple[str, ...]:
    return tuple("{}" if part.startswith("{") else part for part in path.removeprefix("/").split("/"))


def _at_names(pattern: tuple[str, ...], parts: Sequence[str]) -> list[str]:
    return [part for one, part in zip(pattern, parts, strict=True) if one == "{}"]
