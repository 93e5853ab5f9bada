"""A configuration written down again, as the TOML that says all of it.

Values a block inherited or left to their defaults are spelt out; secrets are not. Keys this version does not
have are left out, so that the result is itself a valid file (once secrets are put back).

Secret are the keys that are called so below, what credentials are written in a URL, and values of fields and
parameters whose names sound like credentials. Paths of files that hold secrets are not.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from expressgateway.config.availability import is_available
from expressgateway.config.schema import Config

REDACTED: Final = "(redacted)"

_SECRETS: Final = frozenset({"admin.api_token_hash", "passthrough.cid_routing.key"})

_FREE: Final = frozenset({"headers", "set", "add", "query"})
"""Tables whose keys are the operator's own words."""
_CREDENTIAL: Final = re.compile(
    r"auth|cookie|token|secret|passw|credential|session|signature|(?:^|[-_]|api)key$", re.IGNORECASE
)
_USER_INFO: Final = re.compile(r"(?<=://)[^/?#@]*@")


def redacted(config: Config) -> dict[str, Any]:
    """The effective configuration as JSON has it, without its secrets."""
    shown = {key: _redacted(value, (key,)) for key, value in config.model_dump(mode="json").items()}
    for listener, shown_listener in zip(config.listeners, shown["listeners"], strict=True):
        for route, shown_route in zip(listener.routes, shown_listener.get("routes", ()), strict=True):
            if route.name == route.match.text():
                # It was made of what the route matches.
                public = {key: shown_route["match"][key] for key in ("headers", "query")}
                shown_route["name"] = route.match.model_copy(update=public).text()
    return shown


def _redacted(value: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401 - what JSON holds
    if isinstance(value, Mapping):
        return {key: _redacted(inner, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redacted(inner, path) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if ".".join(path) in _SECRETS or (path[-2:-1] and path[-2] in _FREE and _CREDENTIAL.search(path[-1])):
        return REDACTED
    return _USER_INFO.sub(f"{REDACTED}@", value)


def toml(config: Config) -> str:
    """The effective configuration as TOML, without comments and secrets."""
    return toml_of(redacted(config))


def toml_of(document: Mapping[str, Any]) -> str:
    """TOML of what `redacted` gave."""
    return "\n".join(_table(document, ())).strip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table: plain keys first, since a sub-table's header ends them."""
    inner: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = ".".join((*path, key))
        if not is_available(name, value) or value in ({}, []):
            continue
        if isinstance(value, Mapping) or (isinstance(value, list) and isinstance(value[0], Mapping)):
            inner.append((key, value))
        else:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in inner:
        here = (*path, key)
        header = ".".join(_key(part) for part in here)
        for item in value if isinstance(value, list) else [value]:
            yield ""
            yield f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            yield from _table(item, here)


def _key(key: str) -> str:
    is_bare = key and all(char.isascii() and (char.isalnum() or char in "_-") for char in key)
    return key if is_bare else _value(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, str):
        # JSON's string is TOML's, but for DEL, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    return str(value)
