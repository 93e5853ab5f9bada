"""The program and its maps in the kernel, and their names on the BPF file system.

Introduces `Kernel`. What is pinned below a directory outlives us: maps in one named after their layout, so
that another version of the program takes over those that it understands and leaves the others; links beside
it, for a link may hold any program. `load` *adopts* what is there: a new program, the old maps, the flows
kept.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import Final, Protocol

from expressgateway.l4.xdp import bpffs, layout
from expressgateway.l4.xdp.faults import XdpError, refused
from expressgateway.l4.xdp.libbpf import INNER_MAP, BpfError, Map, Object, Program, available, create_array

OBJECT: Final = Path(__file__).parent / "bpf" / "balancer.bpf.o"

FLOWS: Final = ("flows4", "flows6")
OPENING: Final = ("opening4", "opening6")
"""Where flows begin; see `layout.h`."""
MAPS: Final = "layout"
"""Begins the name of a directory of maps; their layout's number ends it."""
NAMES: Final = "names"
"""A map of ours that the program does not know: by number, whose it is (see `numbers`)."""
NAME_BYTES: Final = 16
ENTRIES_OF_FLOW: Final = 2
"""In `nat`, one for each direction."""
_OPENING_SHARE: Final = 4
"""Tables for flows that begin are that much smaller than those for the others."""

_SCRATCH: Final = "works"
"""What the program writes on, for the while of a packet: each program has its own, of its own shape."""
_STATE: Final = ("vips", "tables", "backends", NAMES)
"""Maps that only make sense together: either all of them are taken over, or none."""


class Table(Protocol):
    """A map, as far as the data plane needs it; a dictionary can be one in tests."""

    def get(self, key: bytes) -> bytes | None: ...
    def get_percpu(self, key: bytes) -> list[bytes]: ...
    def set(self, key: bytes, value: bytes, flags: int = 0) -> None: ...
    def delete(self, key: bytes) -> bool: ...


class Kernel:
    """What is loaded."""

    def __init__(
        self, maps: dict[str, Map], balance: Program, sweep: Program, pins: Path, *, is_adopted: bool
    ) -> None:
        self.maps = maps
        self.balance = balance
        self._sweep = sweep
        self.pins = pins
        self.is_adopted = is_adopted
        """Whether maps of a process before this one are in use: with its flows."""

    def sweep(self) -> layout.Sweep:
        """Remove flows that have ended. Takes as long as there are flows; may raise `BpfError`."""
        _, context = self._sweep.run(bytes(layout.Sweep()))
        return layout.Sweep.from_buffer_copy(context)

    def make_table(self, size: int) -> Map:
        """One to be put into `tables`; the caller closes it."""
        return create_array("table", 4, size, INNER_MAP)

    def close(self) -> None:
        """Give the descriptors up; what is pinned stays."""
        for each in self.maps.values():
            each.close()
        self.balance.close()
        self._sweep.close()


def maps_directory(pin_path: Path) -> Path:
    return pin_path / f"{MAPS}{layout.LAYOUT_VERSION}"


def load(pin_path: Path, max_flows: int, source: Path = OBJECT) -> Kernel:
    """Load the program, with the maps that are pinned where that is possible. Raises `XdpError`."""
    if (why := available()) is not None:
        raise XdpError(f"{why}; or turn runtime.xdp_enabled off")
    bpffs.prepare(pin_path)
    pins = maps_directory(pin_path)
    pins.mkdir(mode=0o700, exist_ok=True)
    try:
        return _load(pins, max_flows, source)
    except BpfError as error:
        raise refused(error) from None
    except layout.LayoutError as error:
        raise XdpError(f"{error}: the package is damaged, install it again") from None


def _load(pins: Path, max_flows: int, source: Path) -> Kernel:
    kept = _pinned(pins)
    entries = ENTRIES_OF_FLOW * max_flows
    with Object.open(source) as thing:
        layout.check(thing)
        sizes = dict.fromkeys(FLOWS, entries) | dict.fromkeys(OPENING, entries // _OPENING_SHARE)
        for name, size in sizes.items():
            if name in kept and kept[name].max_entries != size:
                kept.pop(name).close()
            if name not in kept:
                thing.resize(name, size)
        for name, each in kept.items():
            if name != NAMES:
                thing.reuse(name, each)
        thing.load()
        maps, programs = thing.maps, thing.programs
    for name, each in maps.items():
        if name not in kept and name != _SCRATCH:
            _pin(each, pins / bpffs.file_name(name))
    if NAMES in kept:
        maps[NAMES] = kept.pop(NAMES)
    else:
        maps[NAMES] = create_array(NAMES, NAME_BYTES, layout.MAX_BACKENDS)
        _pin(maps[NAMES], pins / NAMES)
    is_adopted = bool(kept)
    for each in kept.values():  # the object has descriptors of its own
        each.close()
    return Kernel(maps, programs["balance"], programs["sweep"], pins, is_adopted=is_adopted)


def _pinned(pins: Path) -> dict[str, Map]:
    found: dict[str, Map] = {}
    for path in pins.iterdir():
        with contextlib.suppress(BpfError):
            found[bpffs.named(path.name)] = Map.pinned(path)
    if not all(name in found for name in _STATE):
        for each in found.values():
            each.close()
        found.clear()
    return found


def _pin(each: Map, path: Path) -> None:
    try:
        each.pin(path)
    except BpfError as error:
        if error.errno != errno.EEXIST:
            raise
        os.unlink(path)
        each.pin(path)
