"""The matching copy of a path: a table, and what holds for any path."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expressgateway.proxy.paths import PathError, normalise

TABLE = [
    (b"/", b"/"),
    (b"*", b"*"),
    (b"/a/b", b"/a/b"),
    (b"/a/b?c=/../d", b"/a/b"),
    (b"/a/./b", b"/a/b"),
    (b"/a/../b", b"/b"),
    (b"/a/b/..", b"/a/"),
    (b"/a/b/.", b"/a/b/"),
    (b"/.", b"/"),
    (b"/a/%2e%2E/b", b"/b"),
    (b"/a/.%2e/b", b"/b"),
    (b"/a/%2e/b", b"/a/b"),
    (b"/%61%7E%2d%5F", b"/a~-_"),
    (b"/a%2fb", b"/a%2Fb"),
    (b"/a%2f..%2fb", b"/a%2F..%2Fb"),
    (b"/a/..%2fb", b"/a/..%2Fb"),
    (b"/a%5cb", b"/a%5Cb"),
    (b"/a%20b", b"/a%20b"),
    (b"/%252e%252e/a", b"/%252e%252e/a"),
    (b"/%25", b"/%25"),
    (b"/a//b", b"/a//b"),
    (b"/a//../b", b"/a/b"),
    (b"//a", b"//a"),
    (b"/..a/...", b"/..a/..."),
    (b"/a/.b/..c", b"/a/.b/..c"),
    (b"/a;x/../b", b"/b"),
    (b"/a/..;/b", b"/a/..;/b"),
]


@pytest.mark.parametrize(("path", "expected"), TABLE)
def test_table(path: bytes, expected: bytes) -> None:
    assert normalise(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        b"/..",
        b"/../",
        b"/a/../..",
        b"/%2e%2e",
        b"/a/%2e%2e/%2E./b",
        b"/./..",
        b"/%",
        b"/%2",
        b"/%2g",
        b"/a%",
        b"/%00",
        b"/a%00b",
    ],
)
def test_refused(path: bytes) -> None:
    with pytest.raises(PathError):
        normalise(path)


paths = st.lists(
    st.sampled_from(
        [b"/", b"a", b".", b"..", b"%2e", b"%2E", b"%2f", b"%25", b"%61", b"%", b";", b"%c3%a9", b"\\"]
    ),
    max_size=20,
).map(lambda parts: b"/" + b"".join(parts))


@given(paths)
@example(b"/a/%2e%2e")
@example(b"/%2e%2e%2f")
@example(b"/%252e%252e/")
def test_any_path(path: bytes) -> None:
    try:
        copy = normalise(path)
    except PathError:
        return
    assert copy.startswith(b"/")
    assert normalise(copy) == copy, "idempotent"
    segments = copy.split(b"/")
    assert b"." not in segments
    assert b".." not in segments
    assert b"%2e" not in copy.lower()
    assert (
        copy.count(b"%2F") == path.lower().count(b"%2f") - copy.count(b"%252F")
        or b".." in path
        or b"%2e" in path.lower()
    )


@given(st.binary(max_size=60).map(lambda tail: b"/" + tail))
def test_never_raises_anything_else(path: bytes) -> None:
    try:
        normalise(path)
    except PathError:
        pass
