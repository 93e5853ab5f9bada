"""What the operator is told about a wrong file.

Introduces `Problem` (what is wrong, at a location of the document), `Diagnostic` (the same at a place in the
file, with the line itself) and `Source` (the file, which turns one into the other). The sentences for errors
that pydantic finds are written here; rules write their own.
"""

import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal
from unicodedata import category, east_asian_width

from pydantic_core import ErrorDetails

from expressgateway.config.availability import is_available, on_offer
from expressgateway.config.pools import nearest
from expressgateway.config.positions import Positions, Span
from expressgateway.config.schema import Config
from expressgateway.config.values import Block, Loc, dotted, shown

Severity = Literal["error", "warning"]

_INVISIBLE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories."""

_SECRET: Final = re.compile(r"[0-9A-Fa-f]{24,}|(?<=://)[^/\s\"']+(?=@)")
"""What may be a key, a hash, or a name with its password. Diagnostics are logged; secrets never are."""

_MAX_SHOWN_LINE: Final = 240
"""Longer lines are cut around the place in question."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a location of the document."""

    loc: Loc
    message: str
    hint: str = ""
    at_key: bool = False
    """Point at the key rather than at its value."""
    severity: Severity = "error"
    meant: Loc | None = None
    """The key that a misspelt one was probably meant to be."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A sentence about one place of a file."""

    file: str
    line: int
    """From 1; 0 if the file as a whole is meant."""
    column: int
    """Characters from 1."""
    source_line: str
    key: str
    message: str
    hint: str = ""
    severity: Severity = "error"
    length: int = 1
    """Characters underlined."""

    def __post_init__(self) -> None:
        for name in ("source_line", "message"):
            text = getattr(self, name)
            object.__setattr__(self, name, _SECRET.sub(lambda found: "*" * len(found[0]), text))

    def text(self) -> str:
        """The diagnostic as lines for a terminal, without a newline at the end."""
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        subject = f"{self.key}: " if self.key and self.key not in self.message else ""
        lines = [f"{place}: {self.severity}: {subject}{self.message}"]
        if self.line:
            line, before = _cut(self.source_line, self.column - 1)
            number = str(self.line)
            pad = "".join(
                char if char == "\t" else " " * (2 if east_asian_width(char) in "WF" else 1)
                for char in before
            )
            room = max(1, len(line) - len(before))
            lines.append(f" {number} | {line}".rstrip())
            lines.append(f" {' ' * len(number)} | {pad}{'^' * min(self.length, room)}")
        if self.hint:
            lines.append(f"  = hint: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | int]:
        """The diagnostic for `--json`."""
        return {
            "file": self.file,
            "line": self.line,
            "column": self.column,
            "source_line": self.source_line,
            "key": self.key,
            "message": self.message,
            "hint": self.hint,
            "severity": self.severity,
        }


def _cut(line: str, offset: int) -> tuple[str, str]:
    """The part of a line worth showing, and what of it stands before `offset`; control characters blotted."""
    start = max(0, offset - _MAX_SHOWN_LINE // 2) if len(line) > _MAX_SHOWN_LINE else 0
    # what a terminal would obey, or would not show, is shown as a blot
    clean = "".join(
        "\ufffd" if char != "\t" and category(char) in _INVISIBLE else char
        for char in line[start : start + _MAX_SHOWN_LINE]
    )
    return clean, clean[: offset - start]


class Source:
    """One configuration file, as text with positions."""

    __slots__ = ("_lines", "_positions", "name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self._lines = [line.removesuffix("\r") for line in text.split("\n")]
        self._positions: Positions | None = None

    def diagnostic(self, problem: Problem) -> Diagnostic:
        if self._positions is None:  # a valid file without warnings never pays for it
            self._positions = Positions(self.text)
        find = self._positions.key if problem.at_key else self._positions.value
        return self._at(
            find(problem.loc), dotted(problem.loc), problem.message, problem.hint, problem.severity
        )

    def syntax_error(self, message: str, line: int, column: int, hint: str = "") -> Diagnostic:
        return self._at(Span(line, column, 1), "", message, hint, "error")

    def end(self) -> tuple[int, int]:
        """Line and column just after the last character that is not blank."""
        lines = self.text.rstrip().split("\n")
        return len(lines), len(lines[-1]) + 1

    def indent(self, line: int) -> int:
        """Blanks at the beginning of a line."""
        text = self._lines[line - 1]
        return len(text) - len(text.lstrip())

    def _at(self, span: Span, key: str, message: str, hint: str, severity: Severity) -> Diagnostic:
        line = self._lines[span.line - 1] if span.line <= len(self._lines) else ""
        return Diagnostic(self.name, span.line, span.column, line, key, message, hint, severity, span.length)


class ConfigError(Exception):
    """The configuration cannot be used. `str()` is the whole report."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        super().__init__(report(diagnostics))
        self.diagnostics = diagnostics
        """Errors and warnings, in the order of the file."""


def report(diagnostics: tuple[Diagnostic, ...]) -> str:
    """The text of several diagnostics, an empty line between them."""
    return "\n\n".join(diagnostic.text() for diagnostic in diagnostics)


def in_order(diagnostics: Iterator[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Sorted by place, each said once."""
    unique = dict.fromkeys(diagnostics)
    return tuple(sorted(unique, key=lambda d: (d.line, d.column, d.key, d.message)))


# -- syntax


@dataclass(frozen=True, slots=True)
class _Slip:
    """A way in which text fails to be TOML: how tomllib's sentence begins, and ours."""

    begins: str
    message: str = ""
    """Empty: tomllib's own sentence."""
    hint: str = ""
    at_line_start: bool = False
    """tomllib points past a statement that is wrong as a whole."""


_STRING_OPEN: Final = "the string is not closed on its line"
_CLOSE_STRING: Final = "close it with a quote; a text of several lines stands in three quotes"

_SLIPS: Final = (
    _Slip("Cannot overwrite a value", "the key stands twice in its table", "remove one of the two", True),
    _Slip(
        "Cannot declare",
        "the table is declared twice",
        "keep one header; of tables that may be repeated every header is written [[table]]",
        True,
    ),
    _Slip(
        "Cannot mutate immutable namespace",
        "the table is complete where it was written inline",
        "add the key there, between its braces",
        True,
    ),
    _Slip("Cannot redefine namespace", "the key is a table already", "remove one of the two", True),
    _Slip("Expected '=' after a key", "expected = after the key", "write key = value"),
    _Slip(
        "Invalid initial character for a key",
        "",
        "a key is made of letters, digits, - and _, or stands in quotes",
    ),
    _Slip("Invalid value", "expected a value", "strings stand in quotes; booleans are true and false"),
    _Slip("Unterminated string", _STRING_OPEN, _CLOSE_STRING),
    _Slip("Illegal character '\\n'", _STRING_OPEN, _CLOSE_STRING),
    _Slip("Illegal character '\\r'", _STRING_OPEN, _CLOSE_STRING),
    _Slip("Unclosed array", "the array is not closed", "close it with ]"),
    _Slip("Unclosed inline table", "the inline table is not closed", "close it with }"),
    _Slip("Expected ']]'", "the header is not closed", "write [[table]]"),
    _Slip("Expected ']'", "the header is not closed", "write [table]"),
    _Slip("Unescaped '\\'", "", "write a backslash as two, or put the string in single quotes"),
    _Slip(
        "Expected newline or end of document",
        "expected the end of the line",
        "a value that is no number and no boolean stands in quotes",
    ),
    _Slip("Invalid statement", "", "a line is a key = value, a [table] or a # comment"),
    _Slip("Invalid date or datetime", "the date does not exist"),
)

_WHERE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def syntax_diagnostic(source: Source, error: tomllib.TOMLDecodeError) -> Diagnostic:
    """The diagnostic for text that is not TOML."""
    text = str(error)
    line, column = source.end()
    if (where := _WHERE.search(text)) is not None:
        text = text[: where.start()]
        if where.group(1):
            line, column = int(where.group(1)), int(where.group(2))
    slip = next((slip for slip in _SLIPS if text.startswith(slip.begins)), _Slip(""))
    if slip.at_line_start:
        column = source.indent(line) + 1
    message = slip.message or f"{text[:1].lower()}{text[1:]}"
    return source.syntax_error(f"not valid TOML: {message}", line, column, slip.hint)


# -- the schema, as a map of keys


@cache
def blocks() -> Mapping[str, type[Block]]:
    """Every block by its dotted path, the root as the empty string."""
    found: dict[str, type[Block]] = {}

    def add(path: str, block: type[Block]) -> None:
        found[path] = block
        for name, field in block.model_fields.items():
            if inner := block_in(field.annotation):
                add(f"{path}.{name}" if path else name, inner)

    add("", Config)
    return found


def block_in(annotation: Any) -> type[Block] | None:  # noqa: ANN401 - annotations have no common type
    """The block that a field's annotation holds, through optionals and arrays."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    if typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union, typing.Annotated):
        return next((block for arg in typing.get_args(annotation) if (block := block_in(arg))), None)
    return None


@cache
def _homes(key: str) -> tuple[str, ...]:
    return tuple(path for path, block in blocks().items() if key in block.model_fields)


def _header(path: str) -> str:
    """A block's path as its table header is written."""
    if not path:
        return "the top of the file"
    arrays = ("listeners", "pools", "backends", "routes", "certificates", "split")
    is_array = path.rpartition(".")[2] in arrays
    return f"[[{path}]]" if is_array else f"[{path}]"


def _unknown_key(loc: Loc) -> Problem:
    *inside, key = loc
    name = str(key)
    path = ".".join(part for part in inside if isinstance(part, str))
    block = blocks().get(path)
    known = tuple(block.model_fields) if block else ()
    homes = [home for home in _homes(name) if home != path]
    where = f" in {_header(path)}" if path else ""
    meant: Loc | None = None
    if 0 < len(homes) <= 3:
        hint = f"{name} belongs in {' or '.join(_header(home) for home in homes)}"
    elif hint := nearest(name, known):
        meant = (*inside, hint.split('"')[1])
    elif known:
        listed = [key for key in known if is_available(f"{path}.{key}" if path else key)]
        hint = f"the keys here are {', '.join(listed)}"
    return Problem(loc, f"unknown key {shown(name)}{where}", hint, at_key=True, meant=meant)


# -- pydantic's errors in our words

_QUOTED: Final = re.compile(r"'([^']*)'")


def problem_of(error: ErrorDetails) -> Problem:
    """The `Problem` for one line of a pydantic `ValidationError`."""
    loc: Loc = tuple(error["loc"])
    if loc[-1:] == ("[key]",):  # pydantic's mark for the key of a free table, as opposed to its value
        return replace(problem_of({**error, "loc": loc[:-1]}), at_key=True)
    context = error.get("ctx", {})
    found = shown(error["input"])
    match error["type"]:
        case "fault" | "bad_value":
            return Problem(loc, str(context["message"]), str(context["hint"]))
        case "extra_forbidden":
            return _unknown_key(loc)
        case "missing":
            return Problem(loc, "this key is required", _missing_hint(loc))
        case "literal_error":
            path = ".".join(part for part in loc if isinstance(part, str))
            choices = on_offer(path, _QUOTED.findall(str(context["expected"])))
            hint = nearest(error["input"], choices) if isinstance(error["input"], str) else ""
            return Problem(loc, f"expected one of {', '.join(choices)}, found {found}", hint)
        case "bool_type":
            hint = "write it without quotes" if error["input"] in ("true", "false") else ""
            return Problem(loc, f"expected true or false, found {found}", hint)
        case "string_type":
            return Problem(loc, f"expected a string, found {found}", "write it in quotes")
        case "tuple_type":
            return Problem(loc, f"expected an array, found {found}", _array_hint(loc))
        case "model_type" | "model_attributes_type" | "dict_type":
            return Problem(loc, f"expected a table, found {found}", _table_hint(loc, error["input"]))
        case "too_short":
            return Problem(loc, "expected at least one entry, found an empty array")
        case other:
            text = error["msg"]
            return Problem(loc, f"{text[:1].lower()}{text[1:]} ({other}), found {found}")


def _missing_hint(loc: Loc) -> str:
    path = ".".join(part for part in loc[:-1] if isinstance(part, str))
    block = blocks().get(path)
    field = block.model_fields.get(str(loc[-1])) if block else None
    return field.description or "" if field else ""


def _array_hint(loc: Loc) -> str:
    path = ".".join(part for part in loc if isinstance(part, str))
    return (
        f"repeated tables are written [[{path}]]" if path in blocks() else "write [ ... ], even for one value"
    )


def _table_hint(loc: Loc, value: object) -> str:
    path = ".".join(part for part in loc if isinstance(part, str))
    if path not in blocks():
        return "write { key = value }"
    if isinstance(value, list | tuple):
        return f"this table stands once: write [{path}]"
    return f"write {_header(path)} and its keys below"
