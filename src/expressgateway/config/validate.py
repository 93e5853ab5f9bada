"""Every problem of a document at once.

pydantic stops at the first level that is wrong: a table with one bad key is never handed to the rules above
it. So the document is validated again without its bad keys until what is left is sound, and only then are the
rules asked - with the fallout of earlier problems left out. Introduces `Verdict`. Refuses to know files and
positions.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from expressgateway.config.availability import refusals
from expressgateway.config.diagnose import Problem, problem_of
from expressgateway.config.schema import Config
from expressgateway.config.values import Block, Loc

_MAX_ROUNDS: Final = 16
"""Each round leaves out what was wrong; the schema nests less deeply than this."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What validation found."""

    problems: tuple[Problem, ...]
    config: Config | None
    """The sound part of the document; the configuration itself if there are no problems."""
    remainder: "Remainder"
    blamed: frozenset[Loc]

    def is_blamed(self, loc: Loc) -> bool:
        """Whether something at, above or below `loc` has been complained about."""
        return _related(loc, self.blamed)


class Remainder:
    """A document without some of its keys, and where its array items stood before."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._dropped: set[Loc] = set()
        self._kept: dict[Loc, list[int]] = {}

    def drop(self, loc: Loc) -> bool:
        """Leaves out what stands at `loc` (in the original document), or the table it is missing from."""
        value: Any = self._document
        for depth, part in enumerate(loc):
            try:
                value = value[part] if not isinstance(value, str) else None
            except (KeyError, IndexError, TypeError):
                loc = loc[:depth]
                break
        while loc in self._dropped:
            loc = loc[:-1]  # gone already and missed since: the table cannot do without it
        if loc:
            self._dropped.add(loc)
        return bool(loc)

    def has_gaps(self, loc: Loc) -> bool:
        """Whether what stands at `loc`, or an item of the array there, was left out."""
        return _under(loc, self._dropped) or loc in self._kept

    def tree(self) -> dict[str, Any]:
        self._kept.clear()
        tree: dict[str, Any] = self._without(self._document, ())
        return tree

    def _without(self, value: Any, loc: Loc) -> Any:  # noqa: ANN401 - whatever TOML holds
        if isinstance(value, Mapping):
            return {
                key: self._without(inner, (*loc, key))
                for key, inner in value.items()
                if (*loc, key) not in self._dropped
            }
        if isinstance(value, list):
            kept = [index for index in range(len(value)) if (*loc, index) not in self._dropped]
            if len(kept) != len(value):
                self._kept[loc] = kept
            return [self._without(value[index], (*loc, index)) for index in kept]
        return value

    def original(self, loc: Loc) -> Loc:
        """`loc` of the tree, in the original document."""
        before: Loc = ()
        for part in loc:
            if isinstance(part, int) and (kept := self._kept.get(before)) is not None:
                part = kept[part]
            before = (*before, part)
        return before


def validate(document: Mapping[str, Any], directory: Path | None = None) -> Verdict:
    """Checks a parsed file against the contract; never raises.

    Relative paths are taken from `directory`; None leaves them as they are.
    """
    remainder = Remainder(document)
    problems: list[Problem] = []
    blamed: set[Loc] = set()
    """Locations already complained about: nothing else is said about them."""
    for loc, message in refusals(document):
        problems.append(Problem(loc, message, "remove it: this version cannot do it yet", at_key=True))
        blamed.add(loc)
        remainder.drop(loc)
    context = {"directory": directory, "rules_later": True}
    config = None
    for _ in range(_MAX_ROUNDS):
        try:
            config = Config.model_validate(remainder.tree(), context=context)
            break
        except ValidationError as error:
            found = [_moved(problem_of(line), remainder) for line in error.errors()]
            # an array whose only item is wrong is not also too short
            found = [p for p in found if not any(_is_inside(q.loc, p.loc) for q in found)]
        meant = {problem.meant for problem in found if problem.meant is not None}
        fresh = [p for p in found if p.loc not in meant and not _related(p.loc, blamed)]
        problems.extend(fresh)
        for problem in found:
            blamed.add(problem.loc)
            if problem.meant is not None:
                blamed.add(problem.meant)
        progress = [remainder.drop(loc) for loc in {problem.loc for problem in found}]
        if not any(progress):
            break
    if config is not None:
        faults = list(_rule_problems(config, remainder, blamed))
        problems.extend(faults)
        blamed.update(problem.loc for problem in faults)
    return Verdict(tuple(problems), config, remainder, frozenset(blamed))


def _moved(problem: Problem, remainder: Remainder) -> Problem:
    loc = remainder.original(problem.loc)
    meant = None if problem.meant is None else (*loc[:-1], problem.meant[-1])
    return Problem(loc, problem.message, problem.hint, problem.at_key, problem.severity, meant)


def _related(loc: Loc, blamed: AbstractSet[Loc]) -> bool:
    """Whether something at, above or below `loc` has been complained about."""
    return any(loc[: len(other)] == other or other[: len(loc)] == loc for other in blamed)


def _is_inside(loc: Loc, other: Loc) -> bool:
    return len(loc) > len(other) and loc[: len(other)] == other


def _under(loc: Loc, blamed: AbstractSet[Loc]) -> bool:
    return any(loc[: len(other)] == other for other in blamed)


def _rule_problems(config: Config, remainder: Remainder, blamed: set[Loc]) -> Iterator[Problem]:
    for block, loc in _blocks(config, ()):
        for fault in block.faults():
            place, *depends = (remainder.original((*loc, *at)) for at in (fault.loc, *fault.depends))
            if _related(place, blamed) or any(_under(at, blamed) or remainder.has_gaps(at) for at in depends):
                continue
            other = remainder.original((*loc, *fault.other))
            yield Problem(place, fault.sentence(other), fault.hint)


def _blocks(value: object, loc: Loc) -> Iterator[tuple[Block, Loc]]:
    if isinstance(value, Block):
        yield value, loc
        for name in type(value).model_fields:
            yield from _blocks(getattr(value, name), (*loc, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _blocks(item, (*loc, index))
