"""The door to RE2: what is accepted, what is found, and that a set never loses a match."""

import sys
import time
from subprocess import run

import pytest

from expressgateway import regex
from expressgateway.regex import RegexError, RegexSet, check

PATTERNS = (rb"/a/[0-9]+", rb"/a/.*", rb"/b", rb"^/b$", rb"/(a|b)/x")


class TestSet:
    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            (b"/a/1", [0, 1]),
            (b"/a/x", [1, 4]),
            (b"/b", [2, 3]),
            (b"/b/", []),
            (b"x/b", []),
            (b"/b\n", []),
            (b"", []),
            (b"/a/\xff", [1]),
        ],
    )
    def test_gives_all_that_match_the_whole_text_in_order(self, text: bytes, numbers: list[int]) -> None:
        together = RegexSet(PATTERNS)
        alone = RegexSet(PATTERNS)
        alone._set = None
        assert together.matching(text) == alone.matching(text) == numbers

    def test_that_ran_out_of_memory_is_noticed(self) -> None:
        class Exhausted:
            def Match(self, _: bytes) -> list[int]:  # noqa: N802 - as the library calls it
                return []

        regexes = RegexSet(PATTERNS)
        regexes._set = Exhausted()
        assert regexes.matching(b"/b") == [2, 3]

    def test_that_is_too_big_is_tried_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(regex, "_SET_BYTES", 1 << 12)
        regexes = RegexSet(PATTERNS)
        assert regexes._set is None
        assert regexes.matching(b"/b") == [2, 3]

    def test_of_nothing(self) -> None:
        assert RegexSet(()).matching(b"/") == []


@pytest.mark.parametrize("pattern", [b"(", rb"(?=a)", rb"(?<!a)b", rb"(a)\1", b"a*+", b"(?:a{1000}){1000}"])
def test_what_is_no_expression_of_linear_time_is_refused(pattern: bytes) -> None:
    with pytest.raises(RegexError, match=r"."):
        check(pattern)
    with pytest.raises(RegexError):
        RegexSet((b"/a", pattern))


def test_programs_are_bounded() -> None:
    check(b"[a-z]{0,900}")
    with pytest.raises(RegexError, match="too large"):
        check(b"[a-z]{0,900}" * 20)


def test_what_explodes_elsewhere_does_not_here() -> None:
    regexes = RegexSet((rb"/(a+)+!", rb"/(a|a)*!", rb"/(.*)*x(.*)*!"))
    began = time.thread_time()
    assert regexes.matching(b"/" + b"a" * 8000) == []
    assert time.thread_time() - began < 1  # an engine that backtracks would not come back


def test_the_library_is_loaded_with_the_first_expression() -> None:
    program = (
        "import sys, expressgateway.proxy.routing as r; assert 're2' not in sys.modules;"
        "r.RouteTable([(r.Match(path_regex=b'/a'), 1)]); assert 're2' in sys.modules"
    )
    assert run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
