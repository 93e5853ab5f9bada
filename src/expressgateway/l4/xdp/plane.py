"""The data plane, as the supervisor has it: what is wanted goes in, what is happening comes out.

`DataPlane` keeps the kernel's maps as a `Wanted` says, by writing what differs. Nothing here waits for
packets; everything may take a while (a table of 65537 entries is made in a tenth of a second, system calls
beside it), so all of it is called on a thread of its own, one call after the other.

What a change means for packets: a table is made aside and takes the old one's place in one step. A backend
gets its number before a table names it, and keeps it - and its flows - for its pool's drain timeout after
none does. A VIP's entry is written last, and removed first.
"""

import logging
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from expressgateway.l4.xdp import bpffs
from expressgateway.l4.xdp.attachments import Attachments
from expressgateway.l4.xdp.denied import Denied
from expressgateway.l4.xdp.devices import ifindex_of, routers, source_towards
from expressgateway.l4.xdp.faults import XdpError, check_capabilities, no_interface, refused
from expressgateway.l4.xdp.kernel import FLOWS, MAPS, OPENING, Kernel, load
from expressgateway.l4.xdp.layout import (
    MAX_VIPS,
    Forwarding,
    Port,
    ServerId,
    Settings,
    Vip,
    VipCount,
    VipFlag,
    VipKey,
    address_of,
    octets,
)
from expressgateway.l4.xdp.libbpf import BpfError, possible_cpus
from expressgateway.l4.xdp.neighbours import Neighbours
from expressgateway.l4.xdp.numbers import Numbers
from expressgateway.l4.xdp.seen import Counted, FlowSeen, counted, flows_in
from expressgateway.l4.xdp.tables import Tables
from expressgateway.l4.xdp.wanted import (
    DSR,
    DSR_ENCAPSULATED,
    NAT,
    IpAddress,
    Rules,
    Wanted,
    WantedPool,
    WantedVip,
)

log = logging.getLogger(__name__)

SEED: Final = 0x65787077
"""Of the hash that spreads flows: the same on every gateway, so that several behind one router agree."""

_FORWARDING: Final = {
    NAT: Forwarding.FORWARD_NAT,
    DSR: Forwarding.FORWARD_DSR,
    DSR_ENCAPSULATED: Forwarding.FORWARD_DSR_ENCAPSULATED,
}
_CLOSING_S: Final = 1.0
"""What has ended is forgotten after this time while the gateway stops: it waits for what has not."""
_DRAIN_S: Final = 10.0
"""For what a process before us left and nobody wants."""
_U32: Final = struct.Struct("=I")
_ZERO: Final = _U32.pack(0)


class _VipHeld:
    """A VIP that is in the kernel."""

    __slots__ = ("drain_s", "entry", "leaves_at_s", "name", "number", "table", "wanted")

    def __init__(self, number: int) -> None:
        self.number = number
        self.entry = b""
        self.table: array[int] | None = None
        self.wanted: WantedVip | None = None
        self.name = ""
        self.drain_s = _DRAIN_S
        self.leaves_at_s: float | None = None


class DataPlane:
    """See the module's text. Calls raise `XdpError`, or what is said there."""

    def __init__(
        self,
        kernel: Kernel,
        attachments: Attachments,
        lock: bpffs.Lock,
        pin_path: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kernel = kernel
        self._maps = kernel.maps
        self.attachments = attachments
        self._lock = lock
        self._is_alone = False
        self.pin_path = pin_path
        self._clock = clock
        cpus = possible_cpus()
        self._vip_zero = bytes(cpus * len(bytes(VipCount())))
        self._numbers = Numbers(
            self._maps["backends"], self._maps["names"], self._maps["backend_counts"], cpus
        )
        self._tables = Tables()
        self._denied = Denied(self._maps["denied4"], self._maps["denied6"])
        self._vips: dict[bytes, _VipHeld] = {}  # by key
        self._server_ids: dict[bytes, bytes] = {}
        self._ports: dict[bytes, bytes] = {}
        self._read()
        self.wanted = Wanted()
        self.left_out: dict[tuple[str, str], str] = {}
        """Backends that get nothing, by pool and id: why."""
        self._sources: dict[IpAddress, IpAddress | None] = {}
        self._neighbours = Neighbours()
        self.hops = 0
        """Next hops that are kept resolved."""
        # Of flows, since we are here
        self.flows = (0, 0)
        """To backends: of IPv4, of IPv6, by the last sweep."""
        self.opening = 0
        """Of them, those of which there has been no second packet."""
        self.removed = 0
        self.evicted = 0
        """Pushed out of their table: made, and neither there nor ended."""
        self._created_before: int | None = None

    @classmethod
    def open(
        cls,
        interfaces: Sequence[str],
        mode: str,
        pin_path: Path,
        max_flows: int,
        *,
        takes_over: bool = False,
    ) -> "DataPlane":
        """Load and attach the program, or take over what is pinned. `takes_over`: from a process that still
        runs. Raises `XdpError`; then nothing is attached that was not before."""
        check_capabilities()
        for name in interfaces:
            if not ifindex_of(name):
                raise no_interface(name)
        bpffs.prepare(pin_path)
        lock = bpffs.Lock(pin_path)
        if not lock.take() and not takes_over:
            lock.close()
            raise XdpError(
                f"another gateway has its XDP program below {pin_path}: give each its own "
                "runtime.xdp_pin_path"
            )
        try:
            kernel = load(pin_path, max_flows)
        except XdpError:
            lock.close()
            raise
        attachments = Attachments(pin_path, kernel.balance)
        try:
            attachments.attach(interfaces, mode)
            return cls(kernel, attachments, lock, pin_path)
        except (XdpError, BpfError) as error:
            is_clean = not kernel.is_adopted
            if is_clean:
                attachments.detach()
            attachments.close()
            kernel.close()
            lock.close()
            if is_clean:
                bpffs.remove(pin_path)
            raise error if isinstance(error, XdpError) else refused(error) from None

    @property
    def is_adopted(self) -> bool:
        """Whether flows of a process before this one go on."""
        return self._kernel.is_adopted

    @property
    def program_id(self) -> int:
        return self._kernel.balance.id

    def _read(self) -> None:
        """What a process before us has left: its VIPs leave, unless they are wanted."""
        vips = self._maps["vips"]
        for key in list(vips.keys()):
            entry = vips.get(key)
            if entry is not None:
                held = _VipHeld(Vip.from_buffer_copy(entry).number)
                held.entry = entry
                self._vips[key] = held
        for name, known in (("server_ids", self._server_ids), ("ports", self._ports)):
            for key in list(self._maps[name].keys()):
                known[key] = self._maps[name].get(key) or b""

    # -- what is wanted

    def apply(self, wanted: Wanted) -> None:
        """Have the kernel do this from now on. Raises `XdpError`: then a part of it may be done."""
        try:
            self._apply(wanted)
        except BpfError as error:
            raise refused(error) from None

    def _apply(self, wanted: Wanted) -> None:
        now_s = self._clock()
        known, self.left_out = self.left_out, {}
        self._set_rules(wanted)
        self._place()
        used = {vip.pool for vip in wanted.vips}
        self._look_up(
            each.address for name in used if name in wanted.pools for each in wanted.pools[name].backends
        )
        numbers = {name: self._take(wanted.pools[name]) for name in sorted(used & wanted.pools.keys())}
        keys = set()
        for vip in wanted.vips:
            pool = wanted.pools.get(vip.pool) or WantedPool(vip.pool, ())
            key = _key_of(vip)
            keys.add(key)
            self._set_vip(key, vip, pool, numbers.get(vip.pool, {}), is_closing=wanted.is_closing)
        self._tables.forget_others()
        self._set_server_ids(wanted, numbers)
        for key, held in self._vips.items():
            if key not in keys and held.leaves_at_s is None:
                self._maps["vips"].delete(key)
                held.leaves_at_s = now_s + held.drain_s
        for (pool_name, id_), why in self.left_out.items() - known.items():
            log.warning("backend %s of pool %s gets nothing from the kernel: %s", id_, pool_name, why)
        drains_s = {pool.name: pool.drain_s for pool in (*self.wanted.pools.values(), *wanted.pools.values())}
        self._numbers.leave_others(
            {number for each in numbers.values() for number in each.values()},
            drains_s,
            max(drains_s.values(), default=_DRAIN_S),
            now_s,
        )
        self.wanted = wanted
        self.expire()

    def _set_rules(self, wanted: Wanted) -> None:
        rules = wanted.rules
        self._denied.set(rules.denied)
        entry = bytes(_settings(rules, is_closing=wanted.is_closing))
        if self._maps["settings"].get(_ZERO) != entry:
            self._maps["settings"].set(_ZERO, entry)

    def _look_up(self, addresses: Iterator[IpAddress] | Sequence[IpAddress]) -> None:
        """Our address towards each, anew."""
        self._sources = {address: source_towards(address) for address in set(addresses)}

    def _take(self, pool: WantedPool) -> dict[str, int]:
        """The numbers of a pool's backends, by id."""
        found: dict[str, int] = {}
        for backend in pool.backends:
            source = self._sources.get(backend.address)
            # It keeps its number while there is no way to it: the way may come back.
            number = self._numbers.take(pool.name, backend, source)
            if number:
                found[backend.id] = number
            else:
                self.left_out[pool.name, backend.id] = "there are too many backends"
            if source is None:
                self.left_out[pool.name, backend.id] = "there is no route to it"
        return found

    def _set_vip(
        self, key: bytes, vip: WantedVip, pool: WantedPool, numbers: Mapping[str, int], *, is_closing: bool
    ) -> None:
        held = self._vips.get(key)
        if held is None:
            held = self._vips[key] = _VipHeld(self._free_vip())
            self._maps["vip_counts"].set(_U32.pack(held.number), self._vip_zero)
        held.wanted, held.name, held.drain_s, held.leaves_at_s = vip, vip.name, vip.drain_s, None
        number_of: dict[str, int] = {}
        for backend in pool.backends:
            if not vip.fits(backend):
                why = "other addresses" if backend.address.version != vip.address.version else "another port"
                self.left_out[pool.name, backend.id] = f"it has {why} than listener {vip.name}"
            elif backend.is_open and backend.is_alive and self._sources.get(backend.address) is not None:
                number_of[backend.id] = numbers.get(backend.id, 0)
        table = self._tables.numbers(pool.backends, number_of, pool.table_size, self._shares(pool))
        entry = bytes(
            Vip(
                held.number,
                0 if is_closing else len(table),
                _FORWARDING[vip.forwarding],
                (VipFlag.VIP_BY_ADDRESS if vip.is_by_address else 0)
                | (VipFlag.VIP_SERVER_IDS if vip.server_ids is not None else 0),
                vip.server_ids.config_id if vip.server_ids is not None else 0,
                vip.server_ids.length if vip.server_ids is not None else 0,
                0,
            )
        )
        had = Vip.from_buffer_copy(held.entry).table_size if held.entry else 0
        if had > len(table):  # no slot may lie beyond its table
            self._maps["vips"].set(key, entry)
        if held.table != table:
            self._put(held.number, table)
            held.table = table
        if held.entry != entry or self._maps["vips"].get(key) != entry:
            self._maps["vips"].set(key, entry)
            held.entry = entry

    def _shares(self, pool: WantedPool) -> dict[str, float]:
        if not pool.slow_start_s:
            return {}
        now_s = self._clock()
        return {
            each.id: (now_s - each.ramp_from_s) / pool.slow_start_s
            for each in pool.backends
            if each.ramp_from_s and now_s - each.ramp_from_s < pool.slow_start_s
        }

    def _free_vip(self) -> int:
        taken = {held.number for held in self._vips.values()}
        number = next((number for number in range(1, MAX_VIPS) if number not in taken), 0)
        if not number:
            raise XdpError(f"the program has room for {MAX_VIPS - 1} listeners, those that drain included")
        return number

    def _put(self, number: int, table: "array[int]") -> None:
        made = self._kernel.make_table(len(table))
        try:
            made.set_batch(array("I", range(len(table))).tobytes(), table.tobytes(), len(table))
            self._maps["tables"].set(_U32.pack(number), _U32.pack(made.fd))
        finally:
            made.close()

    def _set_server_ids(self, wanted: Wanted, numbers: Mapping[str, Mapping[str, int]]) -> None:
        entries: dict[bytes, bytes] = {}
        for vip in wanted.vips:
            if vip.server_ids is None:
                continue
            held = self._vips[_key_of(vip)]
            for id_, number in numbers.get(vip.pool, {}).items():
                raw = _server_id(id_, vip.server_ids.length)
                if raw is not None:
                    entries[bytes(ServerId(held.number, octets(raw)))] = _U32.pack(number)
        _differ(self._maps["server_ids"], self._server_ids, entries)

    def _place(self) -> None:
        """Where frames come in and leave: devices may have other addresses than a while ago."""
        entries: dict[bytes, bytes] = {}
        for place in self.attachments.places():
            entries[_U32.pack(place.route_ifindex)] = bytes(
                Port(place.ifindex, place.vlan, octets(place.mac))
            )
        _differ(self._maps["ports"], self._ports, entries)

    # -- time passes

    def expire(self) -> None:
        """What has left, and whose time is over, ends."""
        now_s = self._clock()
        for key, held in list(self._vips.items()):
            if held.leaves_at_s is not None and held.leaves_at_s <= now_s:
                del self._vips[key]
        self._numbers.expire(now_s)

    def sweep(self) -> None:
        """Remove flows that have ended, and count the others."""
        try:
            created = self._created()  # first: what begins meanwhile is not missing
            swept = self._kernel.sweep()
            self.flows = (swept.flows4, swept.flows6)
            self.opening = swept.opening
            self.removed += swept.removed
            if self._created_before is None:
                self._created_before = created - sum(self.flows)
                self.removed = 0
            missing = created - self._created_before - self.removed - sum(self.flows)
            self.evicted = max(self.evicted, missing)
        except BpfError as error:
            raise refused(error) from None

    def watch(self) -> bool:
        """Look after interfaces; True: one was attached to, or is gone."""
        try:
            is_changed = self.attachments.watch()
            self._place()
        except BpfError as error:
            raise refused(error) from None
        return is_changed

    def keep_neighbours(self) -> bool:
        """Have next hops resolved. True: our address towards a backend has changed, `apply` is due."""
        before = dict(self._sources)
        self._look_up(list(before))
        self.hops = self._neighbours.keep(before, routers())
        if not self._is_alone and self._lock.take():  # the process that we took over from is gone
            self._is_alone = True
            for path in self.pin_path.glob(f"{MAPS}*"):
                if path != self._kernel.pins:
                    bpffs.remove(path)  # of a program of another layout
        return before != self._sources

    @property
    def is_ramping(self) -> bool:
        """Whether tables change by themselves, for a backend in slow start."""
        return any(self._shares(pool) for pool in self.wanted.pools.values())

    # -- what can be seen

    def counts(self) -> Counted:
        """What the program has counted."""
        try:
            return counted(
                self._maps["vip_counts"],
                self._maps["backend_counts"],
                {held.number: held.name for held in self._vips.values() if held.name},
                {number: (pool, id_) for number, (pool, id_, _, _) in self._numbers.by_number().items()},
            )
        except BpfError as error:
            raise refused(error) from None

    def _created(self) -> int:
        counts = counted(
            self._maps["vip_counts"],
            None,
            {held.number: str(held.number) for held in self._vips.values()},
            {},
        )
        return sum(each.flows for each in counts.vips.values())

    def seen_flows(self, limit: int) -> list[FlowSeen]:
        """Some of the flows, as they are now."""
        vips = {held.number: held.name for held in self._vips.values()}
        backends = {number: (key[0], key[1]) for number, key in self._numbers.by_number().items()}
        found: list[FlowSeen] = []
        try:
            for name in (*FLOWS, *OPENING):
                for flow in flows_in(self._maps[name], vips, backends):
                    if len(found) >= limit:
                        return found
                    found.append(flow)
        except BpfError as error:
            raise refused(error) from None
        return found

    def status(self) -> dict[str, Any]:
        """For people; the shape is the admin API's."""
        return {
            "program_id": self.program_id,
            "pin_path": str(self.pin_path),
            "is_adopted": self.is_adopted,
            "max_flows": self._maps["flows4"].max_entries // 2,
            "flows": sum(self.flows),
            "flows_ipv4": self.flows[0],
            "flows_ipv6": self.flows[1],
            "flows_opening": self.opening,
            "next_hops": self.hops,
            "interfaces": [
                {
                    "name": one.name,
                    "ifindex": one.ifindex,
                    "mode": one.mode,
                    "is_attached": one.is_attached,
                    "fault": one.fault,
                }
                for one in self.attachments.each.values()
            ],
            "left_out": [
                {"pool": pool, "backend": id_, "cause": why} for (pool, id_), why in self.left_out.items()
            ],
        }

    # -- the end

    def detach(self) -> None:
        """Take the program away, and everything it knew. Its descriptors are given up."""
        self.attachments.detach()
        self.close()
        bpffs.remove(self.pin_path)

    def close(self) -> None:
        """Give descriptors up: the program goes on as it is, for whoever takes it over. Idempotent."""
        self.attachments.close()
        self._kernel.close()
        self._neighbours.close()
        self._lock.close()


def _settings(rules: Rules, *, is_closing: bool) -> Settings:
    closing_s = min(rules.closing_s, _CLOSING_S) if is_closing else rules.closing_s
    return Settings(
        int(rules.tcp_idle_s * 1e9),
        int(rules.udp_idle_s * 1e9),
        int(closing_s * 1e9),
        rules.new_flows_per_second,
        rules.first_port,
        rules.last_port,
        SEED,
        int(bool(rules.denied)),
    )


def _key_of(vip: WantedVip) -> bytes:
    return bytes(VipKey(address_of(vip.address), vip.port, vip.protocol, 0))


def _server_id(id_: str, length: int) -> bytes | None:
    """What an id says, padded as the map has it; an address that a name stands for has the name's."""
    try:
        raw = bytes.fromhex(id_.partition("#")[0])
    except ValueError:
        return None
    return raw.ljust(16, b"\0") if len(raw) == length else None


def _differ(table: Any, known: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> None:  # noqa: ANN401 - a map
    """Write what differs, additions first."""
    for key, value in wanted.items():
        if known.get(key) != value:
            table.set(key, value)
            known[key] = value
    for key in known.keys() - wanted.keys():
        table.delete(key)
        del known[key]
