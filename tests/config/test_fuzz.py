"""Whatever the file holds, loading ends in a configuration or in `ConfigError`."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from expressgateway.config.diagnose import ConfigError, Source, blocks
from expressgateway.config.load import load
from expressgateway.config.validate import validate

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.toml"))
KEYS = sorted({key for block in blocks().values() for key in block.model_fields})
SNIPPETS = [
    b"[[",
    b"]]",
    b"[",
    b"]",
    b"{",
    b"}",
    b"=",
    b'"',
    b'"""',
    b"\n",
    b"\r",
    b".",
    b",",
    b"#",
    b"\\u",
    b"\xff",
]


def load_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fuzz.toml"
        path.write_bytes(data)
        try:
            load(path)
        except ConfigError as error:
            for diagnostic in error.diagnostics:
                assert diagnostic.message
                assert diagnostic.text()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
@example(b"a = '\x00'")
@example(b"listeners = 1")
@example(b"[[listeners]]\nlisteners = []\n" * 3)
@example(b"[runtime]\r")
@example(b"a" + b".a" * 3000 + b" = 1")
def test_any_bytes(data: bytes) -> None:
    load_bytes(data)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(GOLDEN),
    st.integers(0, 2000),
    st.integers(0, 20),
    st.sampled_from(SNIPPETS) | st.binary(max_size=3),
)
def test_damaged_files(path: Path, start: int, length: int, patch: bytes) -> None:
    data = path.read_bytes()
    start %= len(data) + 1
    load_bytes(data[:start] + patch + data[start + length :])


scalars = (
    st.integers()
    | st.booleans()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["h1", "h1s", "tcp", "udp", "quic", "127.0.0.1:80", "[::1]:1", "round_robin", "auto", "/a"]
    )
)


def tables(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)


documents = st.fixed_dictionaries(
    {},
    optional={
        key: (st.lists if key in ("listeners", "pools") else lambda each, max_size: each)(
            st.dictionaries(st.sampled_from(KEYS), st.recursive(scalars, tables, max_leaves=6), max_size=8),
            max_size=3,
        )
        for key in ("listeners", "pools", "runtime", "observability", "admin", "security", "passthrough")
    },
)


@settings(max_examples=300, deadline=None)
@given(documents)
def test_any_values_under_known_keys(document: dict[str, Any]) -> None:
    verdict = validate(document, Path("/etc"))
    source = Source("x", "")
    for problem in verdict.problems:
        assert source.diagnostic(problem).text()
    if not verdict.problems:
        assert verdict.config is not None
