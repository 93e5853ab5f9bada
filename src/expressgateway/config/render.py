"""A configuration written down again, as the TOML that says all of it.

Values a block inherited or left to their defaults are spelt out; secrets are not. Keys this version does not
have are left out, so that the result is itself a valid file (once secrets are put back).
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from expressgateway.config.availability import is_available
from expressgateway.config.schema import Config

REDACTED: Final = "(redacted)"

_SECRETS: Final = frozenset({"admin.api_token_hash", "passthrough.cid_routing.key"})


def toml(config: Config) -> str:
    """The effective configuration as TOML, without comments, secrets redacted."""
    lines = list(_table(config.model_dump(mode="json"), ()))
    return "\n".join(lines).strip("\n") + "\n"


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
            yield f"{_key(key)} = {_value(REDACTED if name in _SECRETS else value)}"
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
