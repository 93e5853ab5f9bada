"""What a reload or a run-time change would change, part by part, and how it gets to running workers.

A *part* is a listener, a named pool, or another block. It is *kept* if nothing in it changed, *swapped* if
the new values reach running workers in a snapshot, and *rolled* if a socket or a process was made from what
changed: a listener is then opened, closed, or another one on the same socket, and workers are replaced by
others on the same sockets. Files count with their contents, so a renewed certificate swaps its listener.
Deciding happens here, without effects; doing is the supervisor's.

What runs may differ from what the file said by run-time changes: it is then a `Changed`. A reload makes the
file the truth again, and the plan names the changes that are *dropped* by it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from expressgateway.config.listeners import POOL_KEYS, Listener
from expressgateway.config.load import Loaded
from expressgateway.config.schema import PASSTHROUGH, Backend, Config
from expressgateway.config.values import Block

_LISTENER_ROLLED: Final = frozenset({"name", "address", "protocol"})
_LISTENER_KIND: Final = "quic.raw_proxy"  # as a whole, when it is there on one side only
_LISTENER_POOL: Final = frozenset({"pool", *POOL_KEYS})
_WORKERS_ROLLED: Final = frozenset({"user", "group"})
_BLOCK_ROLLED: Final = frozenset(
    {
        "runtime.workers",
        "runtime.user",
        "runtime.group",
        "runtime.xdp_enabled",
        "runtime.xdp_interface",
        "runtime.xdp_mode",
        "runtime.xdp_max_flows",
        "runtime.xdp_pin_path",
        "observability.metrics_bind",
    }
)
_BLOCKS: Final = ("runtime", "observability", "admin", "security")


@dataclass(frozen=True, slots=True)
class Changed(Loaded):
    """What runs after run-time changes."""

    filed: Config = field(kw_only=True)
    """What was last read from the file."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the configuration, with the keys that changed in it."""

    kind: str
    """``listener``, ``pool`` or ``block``."""
    name: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        changed = f" ({', '.join(self.keys)})" if self.keys else ""
        return f"{self.kind} {self.name}{changed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The difference of two configurations."""

    kept: tuple[Part, ...]
    swapped: tuple[Part, ...]
    rolled: tuple[Part, ...]
    rolls_workers: bool = False
    """Whether every worker is replaced."""
    dropped: tuple[str, ...] = ()
    """A sentence for each pool whose run-time changes the file does not have."""

    @property
    def is_empty(self) -> bool:
        return not self.swapped and not self.rolled

    def lines(self) -> tuple[str, ...]:
        """What becomes of the parts, for people."""
        named = (("rolled", self.rolled), ("swapped", self.swapped), ("kept", self.kept))
        told = [
            f"{what}: {', '.join(map(str, parts)) or 'nothing'}"
            for what, parts in named
            if parts or what != "rolled"
        ]
        return (*told, *self.dropped)

    def sentence(self) -> str:
        return "; ".join(self.lines())


NOTHING_ROLLED: Final = Plan((), (), ())
"""Of a change that is known to swap only, and whose parts are told of otherwise."""


def plan(old: Loaded, new: Loaded) -> Plan:
    """Compare what runs with what is to run."""
    kept: list[Part] = []
    swapped: list[Part] = []
    rolled: list[Part] = []

    def decide(part: Part, *, is_rolled: bool = False) -> None:
        (rolled if is_rolled else swapped if part.keys else kept).append(part)

    pairs, added = _paired(old.config.listeners, new.config.listeners)
    for before, after in pairs:
        if after is None:
            decide(Part("listener", before.name, ("removed",)), is_rolled=True)
            continue
        keys = tuple(_changes(before, after))
        if {before.pool, after.pool} == {before.name, None} and (before.backends or after.backends):
            # One has backends of its own and the other has not: that is all there is to tell.
            keys = tuple(key for key in keys if _top(key) not in _LISTENER_POOL)
        decide(
            Part("listener", after.name, (*keys, *_renewed(after, old, new))),
            is_rolled=any(_top(key) in _LISTENER_ROLLED or key == _LISTENER_KIND for key in keys),
        )
    for listener in added:
        decide(Part("listener", listener.name, ("added",)), is_rolled=True)

    # A pool that stands for a listener's own backends (see `with_backends`) is told of as the listener's.
    own = {listener.name for one in (old, new) for listener in one.config.listeners if listener.backends}
    pools = {pool.name: pool for pool in old.config.pools if pool.name not in own}
    for pool in new.config.pools:
        if pool.name in own:
            continue
        before_pool = pools.pop(pool.name, None)
        keys = ("added",) if before_pool is None else tuple(_changes(before_pool, pool))
        decide(Part("pool", pool.name, (*keys, *_renewed(pool, old, new))))
    swapped += [Part("pool", name, ("removed",)) for name in pools]

    rolls_workers = False
    for name in _BLOCKS:
        keys = tuple(_changes(getattr(old.config, name), getattr(new.config, name)))
        if name == "runtime":
            if old.config.runtime.worker_count == new.config.runtime.worker_count:
                keys = tuple(key for key in keys if key != "workers")
            rolls_workers = not _WORKERS_ROLLED.isdisjoint(keys)
        decide(Part("block", name, keys), is_rolled=any(f"{name}.{key}" in _BLOCK_ROLLED for key in keys))
    _decide_passthrough(old, new, decide)

    dropped: tuple[str, ...] = ()
    if isinstance(old, Changed) and not isinstance(new, Changed):
        dropped = _dropped(old, new.config)
    return Plan(tuple(kept), tuple(swapped), tuple(rolled), rolls_workers, dropped)


class _Decide(Protocol):
    def __call__(self, part: Part, *, is_rolled: bool = False) -> None: ...


def _decide_passthrough(old: Loaded, new: Loaded, decide: _Decide) -> None:
    before, after = old.config.passthrough, new.config.passthrough
    if before is None and after is None:
        return
    if before is None or after is None:
        decide(Part("block", PASSTHROUGH, ("added" if before is None else "removed",)), is_rolled=True)
        return
    keys = tuple(_changes(before, after))
    decide(Part("block", PASSTHROUGH, (*keys, *_renewed(after, old, new))), is_rolled="bind_addr" in keys)


# -- run-time changes


def backends_of(config: Config) -> dict[str, tuple[Backend, ...]]:
    """The backends of every pool by its name; a listener's own go by the listener's."""
    pools = {listener.name: listener.backends for listener in config.listeners if listener.backends}
    if config.passthrough is not None:
        pools[PASSTHROUGH] = config.passthrough.backends
    return pools | {pool.name: pool.backends for pool in config.pools}


def runtime_changes(loaded: Loaded) -> dict[str, tuple[str, ...]]:
    """By pool, what runs and is not in the file, such as ``weight of b1`` or ``added b9``."""
    if not isinstance(loaded, Changed):
        return {}
    running, filed = backends_of(loaded.config), backends_of(loaded.filed)
    found: dict[str, tuple[str, ...]] = {}
    for name, backends in running.items():
        if words := tuple(_differences(filed.get(name, ()), backends).values()):
            found[name] = words
    return found


def _dropped(old: Changed, new: Config) -> tuple[str, ...]:
    running, filed, wanted = backends_of(old.config), backends_of(old.filed), backends_of(new)
    sentences = []
    for name, backends in running.items():
        gone = _differences(wanted.get(name, ()), backends)
        words = [word for id_, word in _differences(filed.get(name, ()), backends).items() if id_ in gone]
        if words:
            sentences.append(f"run-time changes to pool {name} are dropped: {', '.join(words)}")
    return tuple(sentences)


def _differences(before: Sequence[Backend], after: Sequence[Backend]) -> dict[str, str]:
    """By id, what was done to come from one set to the other."""
    old = {backend.id: backend for backend in before}
    found: dict[str, str] = {}
    for backend in after:
        was = old.pop(backend.id, None)
        if was is None:
            found[backend.id] = f"added {backend.id}"
        elif keys := set(_changes(was, backend)):
            found[backend.id] = f"{'weight of' if keys == {'weight'} else 'changed'} {backend.id}"
    return found | {id_: f"removed {id_}" for id_ in old}


# -- comparing


def _paired(
    old: Sequence[Listener], new: Sequence[Listener]
) -> tuple[list[tuple[Listener, Listener | None]], list[Listener]]:
    """Each old listener with its new self, and new ones left over.

    A listener is itself by its name; one that was renamed is known by its address.
    """
    left = dict(enumerate(new))
    matches: dict[int, Listener] = {}
    for same in (_same_name, _same_address):
        for at, listener in enumerate(old):
            if at not in matches:
                found = next((index for index, other in left.items() if same(listener, other)), None)
                if found is not None:
                    matches[at] = left.pop(found)
    return [(listener, matches.get(at)) for at, listener in enumerate(old)], list(left.values())


def _same_name(one: Listener, other: Listener) -> bool:
    return one.name == other.name


def _same_address(one: Listener, other: Listener) -> bool:
    return (one.is_datagram, one.address) == (other.is_datagram, other.address)


def _top(key: str) -> str:
    return key.partition(".")[0]


def _changes(old: Block, new: Block) -> Iterator[str]:
    """Dotted keys whose values differ; arrays count as one value."""
    if old is new:
        return  # what a run-time change leaves alone; a listener with its routes takes long to compare
    yield from _differing(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _differing(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[str]:
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        here = f"{path}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differing(before, after, f"{here}.")
        elif before != after:
            yield here


def _renewed(part: Block, old: Loaded, new: Loaded) -> Iterator[str]:
    """Keys under which a file is named as before but holds something else."""
    if old.material.files == new.material.files:
        return
    for key, path in files_named(part.model_dump(mode="json")):
        before, after = old.material.files.get(path), new.material.files.get(path)
        if before is not None and after is not None and before != after:
            yield f"{key} (content)"


def files_named(value: Any, key: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401 - what JSON holds
    """Every file that a dumped block names, with the key that names it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from files_named(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from files_named(inner, f"{key}[{index}]")
    elif isinstance(value, str) and key.endswith("_path"):
        yield key, value
