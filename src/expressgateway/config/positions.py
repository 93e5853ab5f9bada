"""Where each key and value of a TOML file stands.

`tomllib` yields values without positions; the tree-sitter grammar yields positions without TOML's table
semantics. `Positions` joins the two: it replays table headers, arrays of tables and dotted keys over the
syntax tree, and files a `Span` under each location. Nothing here decides whether a file is valid.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import tree_sitter_toml
from tree_sitter import Language, Node, Parser

from expressgateway.config.values import Loc

_TOML: Final = Language(tree_sitter_toml.language())

_MAX_DEPTH: Final = 64
"""Nesting below this is not indexed; errors there are placed at the last level that is."""


@dataclass(frozen=True, slots=True)
class Span:
    """Part of one line; both numbers count characters from 1."""

    line: int
    column: int
    length: int


class Positions:
    """An index from locations to spans, of one file."""

    def __init__(self, text: str) -> None:
        self._lines = [line.encode() for line in text.split("\n")]
        self._keys: dict[Loc, Span] = {}
        self._values: dict[Loc, Span] = {}
        self._lengths: dict[Loc, int] = {}
        """Tables seen so far in each array of tables."""
        root = Parser(_TOML).parse(text.encode()).root_node
        table: Loc = ()
        for node in root.named_children:
            if node.type == "pair":
                self._add_pair(node, (), 0)
            elif node.type in ("table", "table_array_element"):
                table = self._add_header(node)
                for child in node.named_children:
                    if child.type == "pair":
                        self._add_pair(child, table, 0)

    def key(self, loc: Loc) -> Span:
        """Where the key of `loc` is written; else as `value`."""
        return self._keys.get(loc) or self.value(loc)

    def value(self, loc: Loc) -> Span:
        """Where the value of `loc` is written; for a missing key, the table it is missing from."""
        while loc:
            if span := self._values.get(loc):
                return span
            loc = loc[:-1]
        return Span(1, 1, 1)

    def _span(self, node: Node) -> Span:
        row, start = node.start_point.row, node.start_point.column
        line = self._lines[row]
        end = node.end_point.column if node.end_point.row == row else len(line.rstrip(b"\r"))
        # tree-sitter counts bytes, people count characters
        column = len(line[:start].decode(errors="replace")) + 1
        return Span(row + 1, column, max(1, len(line[start:end].decode(errors="replace"))))

    def _add_header(self, node: Node) -> Loc:
        parts = list(_key_parts(node.named_children[0])) if node.named_children else []
        row = node.start_point.row
        line = self._lines[row].rstrip(b"\r")
        closing = b"]]" if node.type == "table_array_element" else b"]"
        key_end = node.named_children[0].end_point.column if node.named_children else node.start_point.column
        end = line.find(closing, key_end)
        header = Span(
            row + 1,
            len(line[: node.start_point.column].decode(errors="replace")) + 1,
            len(line[node.start_point.column : end + len(closing)].decode(errors="replace"))
            if end >= 0
            else 1,
        )
        loc: Loc = ()
        for number, (name, _) in enumerate(parts):
            loc = (*loc, name)
            self._keys.setdefault(loc, header)
            self._values.setdefault(loc, header)
            if number == len(parts) - 1 and node.type == "table_array_element":
                self._lengths[loc] = self._lengths.get(loc, 0) + 1
            if length := self._lengths.get(loc):
                loc = (*loc, length - 1)
                self._keys.setdefault(loc, header)
                self._values.setdefault(loc, header)
        self._keys[loc] = self._values[loc] = header
        return loc

    def _add_pair(self, node: Node, table: Loc, depth: int) -> None:
        if len(node.named_children) < 2 or depth > _MAX_DEPTH:
            return
        key, value = node.named_children[0], node.named_children[-1]
        loc = table
        for name, part in _key_parts(key):
            loc = (*loc, name)
            self._keys.setdefault(loc, self._span(part))
            self._values.setdefault(loc, self._span(part))
        self._values[loc] = self._span(value)
        self._add_inside(value, loc, depth + 1)

    def _add_inside(self, value: Node, loc: Loc, depth: int) -> None:
        if depth > _MAX_DEPTH:
            return
        if value.type == "inline_table":
            for pair in value.named_children:
                if pair.type == "pair":
                    self._add_pair(pair, loc, depth)
        elif value.type == "array":
            for index, item in enumerate(c for c in value.named_children if c.type != "comment"):
                here = (*loc, index)
                self._keys[here] = self._values[here] = self._span(item)
                self._add_inside(item, here, depth + 1)


def _key_parts(node: Node) -> Iterator[tuple[str, Node]]:
    """The names of a bare, quoted or dotted key, in order."""
    pending = [node]
    while pending:
        part = pending.pop()
        if part.type == "dotted_key":
            pending.extend(reversed(part.named_children))
        else:
            text = (part.text or b"").decode(errors="replace")
            yield (_unquoted(text) if part.type == "quoted_key" else text), part


def _unquoted(text: str) -> str:
    try:
        return next(iter(tomllib.loads(f"{text} = 0")))
    except (tomllib.TOMLDecodeError, StopIteration):
        return text
