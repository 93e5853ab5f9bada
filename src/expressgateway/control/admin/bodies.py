"""What a write says, read and checked as far as that needs no gateway: a JSON object of known keys."""

import json
from collections.abc import Iterable
from typing import Any

from expressgateway.config.pools import nearest
from expressgateway.config.values import listed, shown
from expressgateway.control.changes import ChangeError


class BadBodyError(Exception):
    """The body is no JSON object of known keys; `str()` is the sentence."""


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds. Raises `BadBodyError`."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise BadBodyError("the body is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadBodyError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadBodyError("the body must be a JSON object, as in {...}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no value")


def check_keys(body: Iterable[str], known: tuple[str, ...]) -> None:
    """Raises `BadBodyError` that names every key that is not known."""
    unknown = [
        f"unknown key {shown(key)} ({nearest(key, known) or f'the keys are {listed(known)}'})"
        for key in body
        if key not in known
    ]
    if unknown:
        raise BadBodyError("; ".join(unknown))


def take_version(body: dict[str, Any]) -> int | None:
    """The configuration version that the client has seen, taken out of the body; None: it does not say.

    Raises `ChangeError` (422).
    """
    if "version" not in body:
        return None
    version = body.pop("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ChangeError(422, f"version: expected a whole number, found {shown(version)}")
    return version


def one_of(key: str, value: object, known: tuple[str, ...]) -> str:
    """A value that must be one of a few words. Raises `ChangeError` (422)."""
    if isinstance(value, str) and value in known:
        return value
    hint = nearest(value, known) if isinstance(value, str) else ""
    wanted = f"expected one of {', '.join(known)}, found {shown(value)}"
    raise ChangeError(422, f"{key}: {wanted}{hint and f' ({hint})'}")
