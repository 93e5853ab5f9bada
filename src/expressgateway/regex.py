"""Regular expressions that run in linear time, whoever wrote the text: the one door to RE2.

Introduces `RegexSet`, many expressions tried at once. Expressions and texts are bytes, and an expression must
describe the whole text. The library is loaded with the first expression. Knows nothing of paths and routes.
"""

from collections.abc import Sequence
from typing import Any, Final

_ONE_BYTES: Final = 256 << 10  # memory of one expression, program and cache; a bigger program is refused
_SET_BYTES: Final = 8 << 20  # of all expressions of a set together; beyond it they are tried one by one
_ANYTHING: Final = rb"(?s).*"


class RegexError(ValueError):
    """An expression that RE2 does not accept. The message is RE2's."""


def check(pattern: bytes) -> None:
    """Raise ``RegexError`` unless the expression can be used."""
    _compile(pattern)


class RegexSet:
    """Expressions in the order in which they are preferred."""

    __slots__ = ("_patterns", "_set", "_singles")

    def __init__(self, patterns: Sequence[bytes]) -> None:
        """Raises ``RegexError``."""
        self._patterns = tuple(patterns)
        self._singles: tuple[Any, ...] | None = None
        self._set = _compile_set(self._patterns)
        if self._set is None:
            self._one_by_one()

    def matching(self, text: bytes) -> list[int]:
        """The numbers of the expressions that match the whole text, in ascending order."""
        if self._set is not None:
            found: list[int] = self._set.Match(text)
            # A set that runs out of memory says that nothing matched. Its last expression matches anything,
            # so then it is missing, too.
            if found:
                found.sort()
                found.pop()
                return found
        return [number for number, single in enumerate(self._one_by_one()) if single.fullmatch(text)]

    def _one_by_one(self) -> tuple[Any, ...]:
        if self._singles is None:
            self._singles = tuple(map(_compile, self._patterns))
        return self._singles


def _compile(pattern: bytes) -> Any:  # noqa: ANN401 - the library has no types
    re2 = _library()
    try:
        return re2.compile(pattern, _options(re2, _ONE_BYTES))
    except re2.error as error:
        raise RegexError(_text_of(error)) from None


def _compile_set(patterns: Sequence[bytes]) -> Any:  # noqa: ANN401 - as above
    """None if they do not fit together. Raises ``RegexError`` for one that is wrong by itself."""
    re2 = _library()
    compiled = re2.Set.FullMatchSet(_options(re2, _SET_BYTES))
    try:
        for pattern in (*patterns, _ANYTHING):
            compiled.Add(pattern)
    except re2.error as error:
        raise RegexError(_text_of(error)) from None
    try:
        compiled.Compile()
    except re2.error:
        return None
    return compiled


def _options(re2: Any, max_bytes: int) -> Any:  # noqa: ANN401 - as above
    options = re2.Options()
    options.max_mem = max_bytes
    options.encoding = re2.Options.Encoding.LATIN1  # a byte is a character
    options.never_capture = True
    options.log_errors = False  # it would write to stderr
    return options


def _text_of(error: Exception) -> str:
    text = error.args[0] if error.args else ""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _library() -> Any:  # noqa: ANN401 - as above
    import re2  # type: ignore[import-untyped]  # google-re2 comes without stubs

    return re2
