"""What a route matches: its conditions, the name they give it, and which routes could not be told apart.

Introduces `Match`, and *ties*: routes of one listener that are equally specific and that one request could
match both. Which of several routes is the more specific is explained in docs/routes.md.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Final
from urllib.parse import quote

from pydantic import Field

from expressgateway import regex
from expressgateway.config.values import (
    TOKEN,
    BadValueError,
    Block,
    Custom,
    Fault,
    HeaderName,
    Matches,
    before,
    expect_string,
    shown,
)

MAX_PATH_CHARS: Final = 2048
MAX_NAME_CHARS: Final = 128
_MAX_REGEX_CHARS: Final = 4096

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "content-length",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    }
)
"""Fields that belong to one connection or frame one message: routes neither see nor change them."""

_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_LABEL: Final = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_UNRESERVED: Final = re.compile(r"[A-Za-z0-9._~-]")


# -- hosts


def parse_host(text: str, *, what: str) -> str:
    """A host without port in its one spelling: lower case, IPv6 in brackets. Raises `BadValueError`."""
    host = text.lower()
    if host.startswith("["):
        try:
            return (
                f"[{IPv6Address(host[1:].removesuffix(']'))}]" if host.endswith("]") else _refuse(text, what)
            )
        except ValueError:
            return _refuse(text, what)
    host = host.removesuffix(".")
    if len(host) > 253 or not _NAME.fullmatch(host):
        return _refuse(text, what)
    if host.rpartition(".")[2].isdigit():
        try:
            IPv4Address(host)
        except ValueError:
            return _refuse(text, what)
    return host


def _refuse(text: str, what: str) -> str:
    hint = ""
    if "://" in text or "/" in text:
        hint = "leave out the scheme and the path: a host is a name or an address"
    elif not text.isascii():
        hint = "write an international name in its ASCII form, which begins with xn--"
    elif text.count(":") > 1 and "[" not in text:
        hint = "an IPv6 address stands in brackets"
    elif re.search(r"\A[^\[]*:[0-9]*\Z|\]:", text):
        hint = "leave out the port, or what stands for it"
    elif "*" in text:
        hint = '"*." stands in front, for one or more labels; to match every host leave out the key'
    raise BadValueError(f"expected {what}, found {shown(text)}", hint)


def _parse_host_pattern(value: object) -> str:
    what = 'a host, or "*.example.com"'
    text = expect_string(value, what)
    if not text.startswith("*."):
        return parse_host(text, what=what)
    suffix = text[2:].lower().removesuffix(".")
    if len(suffix) > 251 or not _NAME.fullmatch(suffix):
        return _refuse(text, what)
    return f"*.{suffix}"


HostPattern = Annotated[str, Custom("host, or `*.example.com`", _parse_host_pattern)]


# -- paths


def _check_path(value: object) -> str:
    """A path as it may stand in a request, without its query."""
    what = 'a path that begins with "/"'
    text = expect_string(value, what)
    if not re.fullmatch(r"/[!-~]*", text):
        hint = ""
        if not text.isascii() or " " in text:
            hint = "write other characters as they are sent: percent-encoded UTF-8, as in %C3%A9 or %20"
        raise BadValueError(f"expected {what}, found {shown(text)}", hint)
    if len(text) > MAX_PATH_CHARS:
        raise BadValueError(f"expected a path of at most {MAX_PATH_CHARS} characters, found {len(text)}")
    if mark := re.search(r"[?#]", text):
        hint = "the query is not part of the path" if mark[0] == "?" else "a fragment is never sent"
        raise BadValueError(f"expected a path without {mark[0]}, found {shown(text)}", hint)
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", text):
        raise BadValueError(f"{shown(text)} has a percent sign that escapes no character", "write it as %25")
    return text


def _parse_path(value: object) -> str:
    """The same as it is compared: only what must be encoded is, and there are no dot segments."""
    text = re.sub(r"%([0-9A-Fa-f]{2})", _unescape, _check_path(value))
    if {".", ".."} & set(text.split("/")):
        raise BadValueError(
            f"{shown(text)} would never match: dot segments are resolved before routes are looked at",
            "write the path without . and .. segments",
        )
    return text


def _unescape(match: re.Match[str]) -> str:
    char = chr(int(match[1], 16))
    return char if _UNRESERVED.fullmatch(char) else match[0].upper()


SentPath = Annotated[str, Custom('path that begins with "/"', _check_path)]
"""A path that the gateway sends."""
MatchedPath = Annotated[str, Custom('path that begins with "/"', _parse_path)]
"""A path that requests are compared with: written in normalised form."""


def _parse_regex(value: object) -> str:
    text = expect_string(value, "a regular expression")
    if not text:
        raise BadValueError(
            "an empty regular expression matches no path", "to match every path leave out the key"
        )
    if len(text) > _MAX_REGEX_CHARS:
        raise BadValueError(
            f"expected a regular expression of at most {_MAX_REGEX_CHARS} characters, found {len(text)}"
        )
    if not text.isascii():
        raise BadValueError(
            f"{shown(text)} would never match: a path has ASCII characters only",
            "write other characters as they are sent: percent-encoded UTF-8, as in %C3%A9",
        )
    try:
        regex.check(text.encode("ascii"))
    except regex.RegexError as error:
        raise BadValueError(
            f"the regular expression cannot be used: {error}",
            "expressions are those of RE2, which run in linear time: no look-around, no back-references, no "
            "possessive or atomic groups, no repetition above 1000",
        ) from None
    return text


Regex = Annotated[str, Custom("regular expression (RE2)", _parse_regex)]


# -- the rest


def _parse_method(value: object) -> str:
    what = 'a method such as "GET"'
    text = expect_string(value, what)
    hint = f"methods are case-sensitive: write {shown(text.upper())}" if text.upper() in _METHODS else ""
    if re.fullmatch(TOKEN, text) is None or (hint and text not in _METHODS):
        raise BadValueError(f"expected {what}, found {shown(text)}", hint)
    return text


def no_twins(value: object) -> object:
    """Refuse a table of fields in which two keys are the same field."""
    if isinstance(value, Mapping):
        seen: dict[str, str] = {}
        for name in value:
            if isinstance(name, str) and (first := seen.setdefault(name.lower(), name)) != name:
                raise BadValueError(
                    f"{shown(first)} and {shown(name)} are the same field",
                    "field names have no case: keep one",
                )
    return value


MatchedValue = Annotated[str, Matches("a field value of visible characters", r"(?:[!-~](?:[ -~]*[!-~])?)?")]


class Match(Block):
    """What an exchange must look like; every condition given must hold."""

    host: HostPattern | None = Field(
        default=None,
        description="Host of the request, whatever its port; `*.` in front stands for one or more labels.",
    )
    path: MatchedPath | None = Field(default=None, description="The whole path, without the query.")
    path_prefix: MatchedPath | None = Field(
        default=None,
        description="Beginning of the path, at a segment's end: `/api` matches `/api` and `/api/x`, `/api/` "
        "only what is below.",
    )
    path_regex: Regex | None = Field(default=None, description="Regular expression for the whole path.")
    method: Annotated[str, Custom("method", _parse_method)] | None = Field(
        default=None, description="Method, in capitals as it is sent."
    )
    headers: Annotated[dict[HeaderName, MatchedValue], before(no_twins)] = Field(
        default_factory=dict,
        description="Header fields and their exact values; several lines of one field are one value, joined "
        "by a comma and a blank.",
    )
    query: dict[str, str] = Field(
        default_factory=dict, description="Query parameters and their exact first values, decoded."
    )

    def faults(self) -> Iterator[Fault]:
        given = [key for key in ("path", "path_prefix", "path_regex") if getattr(self, key) is not None]
        for key in given[1:]:
            yield Fault((key,), f"{given[0]} and {key} exclude each other", "keep one of them")
        for name in self.headers:
            if name == "host":
                yield Fault(("headers", name), "the Host field is matched by the key host")
            elif name in HOP_BY_HOP:
                yield Fault(
                    ("headers", name),
                    f"{name} belongs to the client's connection, not to the request: it would never match",
                )

    def text(self) -> str:
        """The conditions in one line, of at most 128 characters: different for different conditions."""
        path = ""
        if self.path is not None:
            # As it is, unless it would read like a prefix.
            path = f"={self.path}" if self.path.endswith("/*") else self.path
        elif self.path_prefix is not None:
            path = "/*" if self.path_prefix == "/" else f"{self.path_prefix}/*"
        elif self.path_regex is not None:
            path = f"~{quote(self.path_regex, safe=_VISIBLE)}"
        words = [self.method] if self.method is not None else []
        if self.host is not None or path or not (self.method or self.headers or self.query):
            words.append(f"{self.host or ''}{path}" or "*")
        words += [f"{name}:{quote(value, safe=_VISIBLE)}" for name, value in sorted(self.headers.items())]
        words += [
            f"?{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(self.query.items())
        ]
        text = " ".join(words)
        if len(text) > MAX_NAME_CHARS:
            digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:12]
            text = f"{text[: MAX_NAME_CHARS - 13]}~{digest}"
        return text


_VISIBLE: Final = (
    "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # all but the percent sign, and quote leaves the rest as it is
)


# -- ties

_Condition = tuple[str, str]


class _Group:
    """Matches that ask for the same fields and parameters, to be looked up by some of them."""

    def __init__(self) -> None:
        self._members: list[tuple[int, Mapping[_Condition, str]]] = []
        self._by: dict[tuple[_Condition, ...], dict[tuple[str, ...], int]] = {}

    def add(self, index: int, conditions: Mapping[_Condition, str]) -> None:
        self._members.append((index, conditions))
        for keys, found in self._by.items():
            found.setdefault(tuple(conditions[key] for key in keys), index)

    def first_with(self, keys: tuple[_Condition, ...], conditions: Mapping[_Condition, str]) -> int | None:
        """The first member whose values for `keys` are those of `conditions`."""
        found = self._by.get(keys)
        if found is None:
            found = self._by[keys] = {}
            for index, member in self._members:
                found.setdefault(tuple(member[key] for key in keys), index)
        return found.get(tuple(conditions[key] for key in keys))


def ties(matches: Sequence[Match]) -> Iterator[tuple[int, int]]:
    """The number of each match that ties with an earlier one, and that one's.

    Two of one rank are told apart only by a field or a parameter that both ask for, with different values.
    """
    ranks: dict[object, dict[frozenset[_Condition], _Group]] = {}
    for index, match in enumerate(matches):
        conditions = {("header", name): value for name, value in match.headers.items()}
        conditions |= {("query", name): value for name, value in match.query.items()}
        rank = (
            (match.host, match.path, match.path_prefix, match.path_regex),
            (match.method, len(match.headers), len(match.query)),
        )
        groups = ranks.setdefault(rank, {})
        asked = frozenset(conditions)
        for other, group in groups.items():
            first = group.first_with(tuple(sorted(asked & other)), conditions)
            if first is not None:
                yield index, first
                break
        groups.setdefault(asked, _Group()).add(index, conditions)
