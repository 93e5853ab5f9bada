"""Certificates and keys read anew: which of them can be used, and what is to run then.

A *unit* is what is renewed together or not at all: a certificate with its key, and whatever else shares a
file with them. A unit that cannot be used keeps what runs, and every other one is renewed. OCSP responses
belong to their certificate's unit and never keep it back: one that does not fit is not stapled.

Nothing here has effects but that files are read, and nothing else of the configuration is looked at.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from expressgateway.config.diagnose import Problem
from expressgateway.config.load import Loaded
from expressgateway.config.material import Material, Pair, Reader, bundles, certificates, pairs
from expressgateway.config.schema import Config
from expressgateway.config.values import Loc, quoted

Bundle = tuple[Path, Loc]
_MAX_ROUNDS: Final = 8
"""In which certificates with the same names are looked for; each finds all that clash."""
_Member = Pair | Bundle


class User(NamedTuple):
    """Who uses a certificate or a bundle: a listener, or a backend of a pool."""

    listener: str = ""
    pool: str = ""
    backend: str = ""

    def __str__(self) -> str:
        return f"listener {self.listener}" if self.listener else f"backend {self.backend} of pool {self.pool}"


def user_of(config: Config, loc: Loc) -> User:
    """Whose key a location is, which stands in a listener or in a backend."""
    kind, index = loc[0], int(loc[1])
    home = config.listeners[index] if kind == "listeners" else config.pools[index]
    if loc[2] == "backends":
        return User(pool=home.name, backend=home.backends[int(loc[3])].id)
    return User(listener=home.name)


@dataclass(frozen=True, slots=True)
class Unit:
    """Files that are renewed together."""

    pairs: tuple[Pair, ...]
    bundles: tuple[Bundle, ...]
    users: tuple[User, ...]
    """Without repetition, in the order of the file."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of every file, without repetition."""
        found = [
            path for pair in self.pairs for path in (pair.chain, pair.key, pair.ocsp) if path is not None
        ]
        found += [path for path, _ in self.bundles]
        return tuple(dict.fromkeys(map(str, found)))

    @property
    def name(self) -> str:
        """What it is called in the log: its first file."""
        return self.paths[0]

    def __str__(self) -> str:
        return f"{quoted(self.name)} ({', '.join(map(str, self.users))})"


def units(config: Config) -> tuple[Unit, ...]:
    """Everything that is renewed, in the order of the configuration."""
    of: dict[str, list[_Member]] = {}
    groups: list[list[_Member]] = []
    members: Iterator[_Member] = chain(pairs(config), bundles(config))
    for member in members:
        paths = [str(path) for path in _files_of(member)]
        known = [of[path] for path in paths if path in of]
        group = known[0] if known else []
        if not known:
            groups.append(group)
        for other in known[1:]:
            if other is not group:
                group.extend(other)
                other_paths = [path for path, owner in of.items() if owner is other]
                of.update(dict.fromkeys(other_paths, group))
                groups[:] = [each for each in groups if each is not other]
        group.append(member)
        of.update(dict.fromkeys(paths, group))
    return tuple(_unit(config, group) for group in groups)


def _files_of(member: _Member) -> Iterator[Path]:
    if isinstance(member, Pair):
        yield member.chain
        yield member.key
        if member.ocsp is not None:
            yield member.ocsp
    else:
        yield member[0]


def _unit(config: Config, group: Iterable[_Member]) -> Unit:
    own = tuple(each for each in group if isinstance(each, Pair))
    others = tuple(each for each in group if not isinstance(each, Pair))
    locs = [pair.chain_loc for pair in own] + [loc for _, loc in others]
    return Unit(own, others, tuple(dict.fromkeys(user_of(config, loc) for loc in locs)))


@dataclass(frozen=True, slots=True)
class Kept:
    """A unit that cannot be renewed."""

    unit: Unit
    reason: str
    """A sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """A unit whose files hold something else now that can be used."""

    unit: Unit
    files: Mapping[str, bytes] = field(repr=False)
    """What differs from what runs."""

    @property
    def is_staple(self) -> bool:
        """Whether no more than an OCSP response is new."""
        return self.files.keys() <= {str(pair.ocsp) for pair in self.unit.pairs}

    @property
    def digest(self) -> bytes:
        """Tells one content from another."""
        parts = (f"{path}\0{hashlib.sha256(data).hexdigest()}" for path, data in sorted(self.files.items()))
        return hashlib.sha256("\n".join(parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class Renewal:
    """What came of reading everything anew."""

    fresh: tuple[Fresh, ...] = ()
    kept: tuple[Kept, ...] = ()
    warnings: tuple[str, ...] = ()


def read_again(loaded: Loaded, *, insecure_key_permissions: bool = False) -> Renewal:
    """Read and check the files of every unit of what runs."""
    running = loaded.material.files
    fresh: list[Fresh] = []
    kept: list[Kept] = []
    warnings: list[str] = []
    for unit in units(loaded.config):
        try:
            files, fault, said = _read(unit, running, insecure_key_permissions)
        except Exception as error:  # noqa: BLE001 - the safety net: no file ends the gateway
            files, fault, said = {}, f"it cannot be read: unexpected {type(error).__name__}: {error}", []
        warnings += said
        if fault:
            kept.append(Kept(unit, fault))
        if files:
            fresh.append(Fresh(unit, files))
    fresh, clashing = _without_clashes(loaded.config, running, fresh)
    return Renewal(tuple(fresh), (*kept, *clashing), tuple(dict.fromkeys(warnings)))


def with_files(loaded: Loaded, fresh: Iterable[Fresh]) -> Material:
    """What is to run: what runs, with these files."""
    return Material({**loaded.material.files, **_merged(fresh)})


def _merged(fresh: Iterable[Fresh]) -> dict[str, bytes]:
    return {path: data for each in fresh for path, data in each.files.items()}


def _read(
    unit: Unit, running: Mapping[str, bytes], insecure: bool
) -> tuple[dict[str, bytes], str, list[str]]:
    """What differs and can be used, why the rest cannot, and what to warn of."""
    reader = Reader(insecure)
    for pair in unit.pairs:
        reader.read(pair.chain, pair.chain_loc)
        reader.read(pair.key, pair.key_loc)
    for path, loc in unit.bundles:
        reader.read(path, loc)
    errors = _errors(reader.problems)
    if not errors and any(running.get(path) != data for path, data in reader.files.items()):
        for pair in unit.pairs:
            reader.check_pair(pair)
        for path, loc in unit.bundles:
            reader.check_bundle(path, loc)
        errors = _errors(reader.problems) or _expired(unit, running, reader.files)
    if errors:
        # An OCSP response may be new all the same, for the certificate that stays.
        kept = [str(path) for pair in unit.pairs for path in (pair.chain, pair.key)]
        reader = Reader(insecure, {path: running[path] for path in kept if path in running})
    before = len(reader.problems)
    for pair in unit.pairs:
        reader.check_staple(pair)
    files = {path: data for path, data in reader.files.items() if running.get(path) != data}
    warned = reader.problems if files else reader.problems[before:]
    return files, "; ".join(errors), [_text(each) for each in warned if each.severity == "warning"]


def _errors(problems: Iterable[Problem]) -> list[str]:
    return list(dict.fromkeys(_text(each) for each in problems if each.severity == "error"))


def _text(problem: Problem) -> str:
    return f"{problem.message} ({problem.hint})" if problem.hint else problem.message


def _expired(unit: Unit, running: Mapping[str, bytes], files: Mapping[str, bytes]) -> list[str]:
    """A certificate that no client takes any more is no successor for one that they take."""
    now = datetime.now(UTC)
    found: list[str] = []
    for pair in unit.pairs:
        before, after = (certificates(each.get(str(pair.chain), b""))[:1] for each in (running, files))
        if before and after and after[0].not_valid_after_utc <= now < before[0].not_valid_after_utc:
            ended = after[0].not_valid_after_utc.date().isoformat()
            found.append(
                f"the certificate {quoted(pair.chain)} expired on {ended}, the one that runs has not"
            )
    return list(dict.fromkeys(found))


def _without_clashes(
    config: Config, running: Mapping[str, bytes], fresh: list[Fresh]
) -> tuple[list[Fresh], list[Kept]]:
    """Those after which every listener can still choose by SNI, and those that are kept back for it."""
    kept: list[Kept] = []
    for _ in range(_MAX_ROUNDS):
        listeners = {pair.listener for each in fresh for pair in each.unit.pairs} - {None}
        reader = Reader(files={**running, **_merged(fresh)})
        for pair in pairs(config):
            if pair.listener in listeners:
                reader.know(pair)
        clashes = reader.check_choices()
        if not clashes:
            return fresh, kept
        reason = {}
        owners = {pair.chain_loc: index for index, each in enumerate(fresh) for pair in each.unit.pairs}
        for (later, earlier), problem in zip(clashes, reader.problems, strict=True):
            # Of two that are new the later one; a certificate that has not changed is not to blame.
            index = owners.get(later.chain_loc, owners.get(earlier.chain_loc))
            if index is not None:
                reason[index] = _text(problem)
        kept += [Kept(fresh[index].unit, why) for index, why in reason.items()]
        fresh = [each for index, each in enumerate(fresh) if index not in reason]
        # What runs instead may clash with another: once more.
    kept += [Kept(each.unit, "other certificates of its listener have the same names") for each in fresh]
    return [], kept
