"""What a reload would change, part by part, and whether running workers can take it.

A *part* is a listener, a named pool, or another block. It is *kept* if nothing in it changed, *swapped* if
the new values reach running workers in a snapshot, and *refused* if a socket or a process was made from what
changed. One refusal refuses the reload as a whole. Files count with their contents, so a renewed certificate
swaps its listener. Deciding happens here, without effects; doing is the supervisor's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from expressgateway.config.listeners import Listener
from expressgateway.config.load import Loaded
from expressgateway.config.schema import Config
from expressgateway.config.values import Block

NEEDS_RESTART: Final = "needs a restart in this version"

_LISTENER_REFUSED: Final = frozenset({"name", "address", "protocol", "proxy_protocol", "quic"})
_BLOCK_REFUSED: Final = frozenset(
    {
        "runtime.workers",
        "runtime.user",
        "runtime.group",
        "runtime.xdp_enabled",
        "runtime.xdp_interface",
        "runtime.xdp_mode",
        "runtime.xdp_new_flow_cap_per_sec_per_cpu",
        "observability.metrics_bind",
    }
)
_BLOCKS: Final = ("runtime", "observability", "admin", "security")


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

    config: Config
    """The new one, its listeners in the order of the running one: workers know their sockets by position."""
    kept: tuple[Part, ...]
    swapped: tuple[Part, ...]
    refused: tuple[str, ...]
    """A sentence for each key, such as ``listeners[0].address: needs a restart in this version``."""

    @property
    def is_empty(self) -> bool:
        return not self.swapped and not self.refused

    def sentence(self) -> str:
        swapped = ", ".join(map(str, self.swapped)) or "nothing"
        return f"swapped: {swapped}; kept: {', '.join(map(str, self.kept)) or 'nothing'}"


def plan(old: Loaded, new: Loaded) -> Plan:
    """Compare what runs with what is to run."""
    kept: list[Part] = []
    swapped: list[Part] = []
    refused: list[str] = []

    def decide(part: Part) -> None:
        (swapped if part.keys else kept).append(part)

    pairs, added = _paired(old.config.listeners, new.config.listeners)
    ordered: list[Listener] = []
    for before, after, index in pairs:
        if after is None:
            refused.append(f"listener {before.name} is removed: {NEEDS_RESTART}")
            continue
        ordered.append(after)
        keys = tuple(_changes(before, after))
        refused += [
            f"listeners[{index}].{key}: {NEEDS_RESTART}" for key in keys if _top(key) in _LISTENER_REFUSED
        ]
        decide(Part("listener", after.name, (*keys, *_renewed(after, old, new))))
    refused += [f"listeners[{index}] is added: {NEEDS_RESTART}" for index in added]

    pools = {pool.name: pool for pool in old.config.pools}
    for pool in new.config.pools:
        before_pool = pools.pop(pool.name, None)
        keys = ("added",) if before_pool is None else tuple(_changes(before_pool, pool))
        decide(Part("pool", pool.name, (*keys, *_renewed(pool, old, new))))
    swapped += [Part("pool", name, ("removed",)) for name in pools]

    for name in _BLOCKS:
        keys = tuple(_changes(getattr(old.config, name), getattr(new.config, name)))
        if name == "runtime" and old.config.runtime.worker_count == new.config.runtime.worker_count:
            keys = tuple(key for key in keys if key != "workers")
        refused += [f"{name}.{key}: {NEEDS_RESTART}" for key in keys if f"{name}.{key}" in _BLOCK_REFUSED]
        decide(Part("block", name, keys))
    if old.config.passthrough != new.config.passthrough:
        refused.append(f"passthrough: {NEEDS_RESTART}")

    config = new.config
    if not refused:
        config = config.model_copy(update={"listeners": tuple(ordered)})
    return Plan(config, tuple(kept), tuple(swapped), tuple(refused))


def _paired(
    old: Sequence[Listener], new: Sequence[Listener]
) -> tuple[list[tuple[Listener, Listener | None, int]], list[int]]:
    """Each old listener with its new self and that one's index, and the indices of new ones left over.

    A listener is itself by its name; one that was renamed is known by its address.
    """
    left = dict(enumerate(new))
    matches: dict[int, int] = {}
    for same in (_same_name, _same_address):
        for at, listener in enumerate(old):
            if at not in matches:
                found = next((index for index, other in left.items() if same(listener, other)), None)
                if found is not None:
                    matches[at] = found
                    del left[found]
    pairs: list[tuple[Listener, Listener | None, int]] = []
    for at, listener in enumerate(old):
        index = matches.get(at, -1)
        pairs.append((listener, new[index] if at in matches else None, index))
    return pairs, list(left)


def _same_name(one: Listener, other: Listener) -> bool:
    return one.name == other.name


def _same_address(one: Listener, other: Listener) -> bool:
    return (one.is_datagram, one.address) == (other.is_datagram, other.address)


def _top(key: str) -> str:
    return key.partition(".")[0]


def _changes(old: Block, new: Block) -> Iterator[str]:
    """Dotted keys whose values differ; arrays count as one value."""
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
    for key, path in _files(part.model_dump(mode="json"), ""):
        before, after = old.material.files.get(path), new.material.files.get(path)
        if before is not None and after is not None and before != after:
            yield f"{key} (content)"


def _files(value: Any, key: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - what JSON holds
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _files(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _files(inner, f"{key}[{index}]")
    elif isinstance(value, str) and key.endswith("_path"):
        yield key, value
