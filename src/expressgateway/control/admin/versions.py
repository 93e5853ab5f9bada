"""Which state a client has seen: entity tags, and the two ways in which a write can say what it is based on.

A tag names this process, the version of the configuration in force, and how many changes were made through
the API beside it, such as states. It changes with everything that a write can change, and with nothing else:
counters and health do not touch it, so that a client can read, think, and write on a busy gateway.
"""

import re
import secrets
from collections.abc import Callable
from typing import Final

from expressgateway.control.admin.answers import StaleError
from expressgateway.control.changes import ChangeError

_TAG: Final = re.compile(r'\s*(W/)?"([!#-~\x80-\xff]*)"\s*(?:,|$)')


class Versions:
    """`version` gives the version of the configuration in force."""

    __slots__ = ("_edits", "_run", "_version")

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version
        self._run = secrets.token_hex(4)  # versions begin anew with every start
        self._edits = 0

    @property
    def current(self) -> int:
        return self._version()

    @property
    def etag(self) -> str:
        return f'"{self._run}-{self.current}-{self._edits}"'

    def edited(self) -> None:
        """Something was changed that is no part of the configuration."""
        self._edits += 1

    def precondition(self, if_match: str | None, version: int | None) -> Callable[[], None]:
        """What is to be asked right before the write is made: raises `StaleError` if the client saw another
        state. Raises `ChangeError` (400) for a field that holds no entity tags."""
        tags = None if if_match is None or if_match.strip() == "*" else _strong(if_match)

        def check() -> None:
            if tags is not None and self.etag not in tags:
                raise StaleError(
                    412,
                    "it has been changed since: If-Match does not name what is there now; read it again",
                    self.current,
                    self.etag,
                )
            if version is not None and version != self.current:
                raise StaleError(
                    409,
                    f"version {version} is not in force, {self.current} is: read it again",
                    self.current,
                    self.etag,
                )

        return check


def _strong(field: str) -> list[str]:
    """The entity tags of an If-Match that can match: weak ones never do (RFC 9110 13.1.1)."""
    found = []
    at = 0
    while at < len(field):
        match = _TAG.match(field, at)
        if match is None:
            raise ChangeError(400, 'If-Match: expected "*" or entity tags, as ETag has them')
        if not match[1]:
            found.append(f'"{match[2]}"')
        at = match.end()
    return found
