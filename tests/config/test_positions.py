"""Positions: every value of a file is found where it is written, however it is written."""

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expressgateway.config.positions import Positions, Span
from expressgateway.config.values import Loc

FORMS = """\
top = 1
[[listeners]]
name = "a"
[listeners.tls]
cert = "b"
certs = [{ cert = "c", "key" = "d" }, { cert = 'e' }]
[[listeners.backends]]
address = "f"
[[listeners.backends]]
address = "g"
[[listeners]]
name = "h"
http.via.deep = "i"
"quoted key"."and.dots" = "j"
'literal' = "k"
[[listeners.backends]]
address = "l"
inline = { a = { b = [1, [2, 3]] } }
[ runtime . tls ]  # spaces
ciphers = \"\"\"m
n\"\"\"
list = [
    "o",  # a comment
    # another
    "p",
]
"ü" = "q"
["r"]
"\\u0061" = "s"
"""


def leaves(value: Any, loc: Loc = ()) -> list[tuple[Loc, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*loc, key))]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, (*loc, index))]
    return [(loc, value)]


def written(text: str, span: Span) -> str:
    return text.split("\n")[span.line - 1][span.column - 1 : span.column - 1 + span.length]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_every_form_of_toml(newline: str) -> None:
    text = FORMS.replace("\n", newline)
    positions = Positions(text)
    for loc, value in leaves(tomllib.loads(text)):
        at = written(text, positions.value(loc))
        if at == '"""m':
            continue
        assert tomllib.loads(f"x = {at}")["x"] == value, loc
        if isinstance(loc[-1], str):
            assert tomllib.loads(f"{written(text, positions.key(loc))} = 0") == {loc[-1]: 0}


def test_a_missing_key_is_placed_at_its_table() -> None:
    positions = Positions(FORMS)
    assert written(FORMS, positions.value(("listeners", 1, "address"))) == "[[listeners]]"
    assert positions.value(("listeners", 1, "address")).line == 11
    assert written(FORMS, positions.value(("listeners", 0, "tls", "key"))) == "[listeners.tls]"
    assert written(FORMS, positions.value(("listeners", 0, "tls", "certs", 1, "key"))) == "{ cert = 'e' }"
    assert written(FORMS, positions.value(("runtime", "workers"))) == "[ runtime . tls ]"
    assert positions.value(("nothing", "here")) == Span(1, 1, 1)


keys = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=6)
values = st.recursive(
    st.integers(-9, 9)
    | st.booleans()
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(inline(inner) for inner in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=3), max_size=3))
def test_any_document(document: dict[str, dict[str, Any]]) -> None:
    lines = []
    for table, content in document.items():
        lines.append(f"[{quoted(table)}]")
        lines.extend(f"{quoted(key)} = {inline(value)}" for key, value in content.items())
    text = "\n".join(lines)
    positions = Positions(text)
    for loc, value in leaves(tomllib.loads(text)):
        assert tomllib.loads(f"x = {written(text, positions.value(loc))}")["x"] == value
