"""Changes of backends while the gateway runs, as the admin API asks for them.

A *change* turns what runs into another `Loaded`, which then goes the way of a reload: planned, sent to the
workers, taken back if one of them cannot have it. An added backend is held to the rules of the file; two of
them do not hold here, because who works at run time may be on the way to somewhere: a pool may be empty, and
all its weights may be 0. Nothing is written back. Whether a backend is drained or disabled is no part of the
configuration and not known here. This module has no effects, but that it reads the files an added backend
names.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from expressgateway.config.availability import refusals
from expressgateway.config.diagnose import Diagnostic, problem_of
from expressgateway.config.load import Loaded
from expressgateway.config.material import Material, gather
from expressgateway.config.pools import as_http, nearest
from expressgateway.config.schema import PASSTHROUGH, Backend, Config, Listener, Pool
from expressgateway.config.values import Fault, Loc, dotted, shown
from expressgateway.control.plan import Changed, backends_of, files_named

_MAX_LISTED: Final = 10
"""Names told to who asked for one that does not exist."""

_SOURCE: Final = "run-time change"
"""What stands in a diagnostic where the name of the file would."""

_PLACE: Final[Loc] = ("pools", 0, "backends", 0)
"""Where the schema's sentences believe an added backend to stand."""


@dataclass(frozen=True, slots=True)
class AddBackend:
    """One more backend at the end of a pool."""

    pool: str
    table: Mapping[str, object]
    """As a ``[[backends]]`` table of the file; relative paths are taken from the file's directory."""

    def __str__(self) -> str:
        name = self.table.get("id", self.table.get("address"))
        return f"pool {self.pool}: {name} is added"


@dataclass(frozen=True, slots=True)
class RemoveBackend:
    """Its exchanges may end; it gets no more."""

    pool: str
    id: str

    def __str__(self) -> str:
        return f"pool {self.pool}: {self.id} is removed"


@dataclass(frozen=True, slots=True)
class SetWeight:
    """0: no new work, sessions that are bound to it go on."""

    pool: str
    id: str
    weight: object
    """As it was given; `changed` checks it."""

    def __str__(self) -> str:
        return f"pool {self.pool}: the weight of {self.id} is {self.weight}"


Change = AddBackend | RemoveBackend | SetWeight


class ChangeError(Exception):
    """The change cannot be made. `str()` is the sentence, `status` the HTTP status that says the same."""

    def __init__(self, status: int, sentence: str, details: Iterable[str] = ()) -> None:
        super().__init__(sentence)
        self.status = status
        self.details = tuple(details)
        """A sentence for each thing that is wrong, if there are several."""


def changed(loaded: Loaded, change: Change, *, insecure_key_permissions: bool = False) -> Changed:
    """What is to run after the change; its warnings are those of this change alone.

    Raises `ChangeError`: 404 no such pool or backend, 409 the id is taken, 422 the values are not valid.
    """
    config = loaded.config
    known = backends_of(config)
    if change.pool not in known:
        raise ChangeError(
            404, f"there is no pool {shown(change.pool)}: {_others('pools', change.pool, known)}"
        )
    backends = known[change.pool]
    material = loaded.material
    warnings: tuple[Diagnostic, ...] = ()
    match change:
        case AddBackend():
            backend = _valid(loaded, change)
            after = config.with_backends(change.pool, (*backends, backend))
            _check_rules(config, after, change.pool, backend)
            material, warnings = _read_files(loaded, backend, insecure_key_permissions)
        case RemoveBackend():
            gone = _find(change.pool, change.id, backends)
            rest = tuple(backend for backend in backends if backend is not gone)
            after = config.with_backends(change.pool, rest)
            if list(files_named(gone.model_dump(mode="json"))):
                material = _still_named(material, after)
        case SetWeight():
            found = _find(change.pool, change.id, backends)
            weighted = found.model_copy(update={"weight": _valid_weight(change.weight)})
            after = config.with_backends(
                change.pool, tuple(weighted if each is found else each for each in backends)
            )
    filed = loaded.filed if isinstance(loaded, Changed) else config
    return Changed(after, loaded.path, warnings, material, filed=filed)


# -- who is meant


def _find(pool: str, id_: str, backends: tuple[Backend, ...]) -> Backend:
    found = next((backend for backend in backends if backend.id == id_), None)
    if found is not None:
        return found
    ids = [backend.id for backend in backends]
    name, _, _ = id_.rpartition("#")
    if name in ids:
        raise ChangeError(
            404,
            f"{shown(id_)} is an address that backend {shown(name)} of pool {pool} resolves to: weight and "
            f"removal are for {shown(name)} as a whole; a state can be set on each address",
        )
    raise ChangeError(404, f"pool {pool} has no backend {shown(id_)}: {_others('backends', id_, ids)}")


def _others(kind: str, name: str, known: Iterable[str]) -> str:
    """What to say of those that exist."""
    names = list(known)
    if hint := nearest(name, names):
        return hint
    if not names:
        return f"there are no {kind}"
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"the {kind} are {', '.join(names[:_MAX_LISTED])}{more}"


# -- what is given


def _valid(loaded: Loaded, change: AddBackend) -> Backend:
    """The backend by itself, as its pool's listeners understand it."""
    table = dict(change.table)
    # TOML has no null; taken for "absent" it would hide a client's mistake
    wrong = [f"{key}: expected a value, found null" for key, value in table.items() if value is None]
    for loc, message in list(refusals({"pools": {"backends": table}})):
        wrong.append(message.replace("pools.backends.", ""))
        table.pop(str(loc[-1]), None)
    try:
        backend = Backend.model_validate(
            {key: value for key, value in table.items() if value is not None},
            context={"directory": loaded.path.absolute().parent},
        )
    except ValidationError as error:
        problems = [problem_of({**line, "loc": (*_PLACE, *line["loc"])}) for line in error.errors()]
        meant = {problem.meant for problem in problems}
        wrong += [_sentence(p.loc, p.message, p.hint) for p in problems if p.loc not in meant]
    if wrong:
        raise _invalid("the backend is not valid", wrong)
    users = _users(loaded.config, change.pool)
    return as_http((backend,))[0] if any(listener.is_http for listener in users) else backend


def _valid_weight(weight: object) -> int:
    try:
        return Backend.model_validate({"address": "any:1", "weight": weight}).weight
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise _invalid(
            "the weight is not valid", [_sentence(problem.loc, problem.message, problem.hint)]
        ) from None


def _users(config: Config, pool: str) -> Iterator[Listener]:
    """The listeners that send work to a pool, the one whose own it is included."""
    yield from (listener for listener in config.listeners if listener.name == pool and listener.backends)
    yield from (listener for _, listener in config.users_of(pool))


# -- rules


def _check_rules(before: Config, after: Config, pool: str, added: Backend) -> None:
    """Whether the file's rules hold as far as they held before. Raises `ChangeError`."""
    backends = backends_of(before)[pool]
    if any(backend.id == added.id for backend in backends):
        advice = "give it another id" if added.is_set("id") else "give it an id of its own"
        raise ChangeError(409, f"pool {pool} has a backend {shown(added.id)} already: {advice}")
    old = {(fault.loc, fault.message) for fault in _faults(before, pool)}
    wrong = [
        _sentence(fault.loc, fault.sentence(fault.other), fault.hint)
        for fault in _faults(after, pool)
        # that all weights are 0 is allowed at run time
        if (fault.loc, fault.message) not in old and not (added.weight == 0 and fault.loc[-1] == "weight")
    ]
    if wrong:
        raise _invalid(f"pool {pool} cannot have this backend", list(dict.fromkeys(wrong)))


def _faults(config: Config, pool: str) -> Iterator[Fault]:
    """Every broken rule that the backends of a pool could have a part in."""
    yield from config.faults()
    for listener in config.listeners:
        if listener.name == pool:
            yield from listener.faults()
    for each in config.pools:
        if each.name == pool:
            yield from each.faults()
    if config.passthrough is not None and pool == PASSTHROUGH:
        yield from config.passthrough.faults()


def _sentence(loc: Loc, message: str, hint: str) -> str:
    if "backends" in loc:
        loc = loc[loc.index("backends") + 2 :]
    key = dotted(loc)
    subject = f"{key}: " if key and key not in message else ""
    text = f"{subject}{message}{f' ({hint})' if hint else ''}"
    # A hint may repeat what was given as it is, and the text ends in logs and on terminals.
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _invalid(what: str, sentences: list[str]) -> ChangeError:
    return ChangeError(422, f"{what}: {'; '.join(sentences)}", sentences)


# -- files


def _read_files(
    loaded: Loaded, backend: Backend, insecure_key_permissions: bool
) -> tuple[Material, tuple[Diagnostic, ...]]:
    """All contents with those of the files the backend names, read now, and what to warn of.

    A file that is in use already is read again, and so renewed for everyone; the plan tells of it.
    """
    alone = Config.model_construct(listeners=(), pools=(Pool.model_construct(backends=(backend,)),))
    material, problems = gather(alone, insecure_key_permissions=insecure_key_permissions)
    wrong = [_sentence(p.loc, p.message, p.hint) for p in problems if p.severity == "error"]
    if wrong:
        raise _invalid("the backend's files cannot be used", wrong)
    warnings = tuple(
        Diagnostic(_SOURCE, 0, 0, "", str(p.loc[-1]), p.message, p.hint, p.severity) for p in problems
    )
    return Material({**loaded.material.files, **material.files}), warnings


def _still_named(material: Material, config: Config) -> Material:
    """Without the contents of files that nothing names any more."""
    named = {path for _, path in files_named(config.model_dump(mode="json"))}
    return Material({path: data for path, data in material.files.items() if path in named})
