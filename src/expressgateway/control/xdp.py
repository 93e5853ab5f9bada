"""The XDP data plane in the supervisor: it follows the configuration, discovery and health as workers do.

`Xdp` owns the `DataPlane` and the one thread that everything about it is done on. What it can be asked for
comes in two steps, as for workers: `prepare` does what may be refused (loading, attaching), `adopt` what
then follows. In between and afterwards it wakes up when somebody's health or address has changed, and once
a second, to look after interfaces, neighbours and flows.

The program outlives this process where that is not stopped in order: a new one takes it over, with its
flows.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from expressgateway.config.blocks import Runtime
from expressgateway.config.schema import Config
from expressgateway.control.failures import StartError
from expressgateway.control.xdp_wanted import Ask, pools_of, versions_of, wanted_of
from expressgateway.l4.xdp.devices import forwarding_off, ifindex_of
from expressgateway.l4.xdp.faults import XdpError, no_forwarding, no_interface
from expressgateway.l4.xdp.seen import Counted, FlowSeen
from expressgateway.l4.xdp.wanted import Wanted, WantedVip

if TYPE_CHECKING:
    from expressgateway.l4.xdp.plane import DataPlane

log = logging.getLogger(__name__)

TICK_S: Final = 1.0
_SWEEP_TICKS: Final = 2
_NEIGHBOUR_TICKS: Final = 3
_DRAIN_LOOK_S: Final = 0.25
_PATIENCE_S: Final = 5.0  # for what somebody waits for at the admin listener

_T = TypeVar("_T")

Open = Callable[..., "DataPlane"]
"""`DataPlane.open`, or what stands for it in tests."""


def _open(*arguments: Any, **named: Any) -> "DataPlane":  # noqa: ANN401 - as it has them
    # Imported where it is wanted: it takes a while, and most gateways do without.
    from expressgateway.l4.xdp.plane import DataPlane

    return DataPlane.open(*arguments, **named)


class Xdp:
    """See the module's text. To be used on the loop's thread."""

    def __init__(self, ask: Ask, *, takes_over: bool = False, open_plane: Open = _open) -> None:
        """`ask`: what is known of a pool; `takes_over`: from a supervisor that still runs."""
        self._ask = ask
        self._takes_over = takes_over
        self._open = open_plane
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xdp")
        self._wake = asyncio.Event()
        self._plane: DataPlane | None = None
        self._runtime: Runtime | None = None
        """What the plane was made of."""
        self._config: Config | None = None
        """In force; None: not yet."""
        self._is_held = False
        self._is_closing = False
        self.is_detached = False
        """An operator has taken it away, until the next configuration that is read from the file."""
        self._retires_at = 0.0
        """It is turned off, and goes when its flows do, or then; 0: it is not."""
        self._said = ""
        self._dirty = False
        # As it was seen last
        self.counted = Counted()
        self.evicted = 0
        self.removed = 0
        self.fault = ""
        """Why the kernel does not do what is wanted, as a sentence; empty: it does."""
        self._status: dict[str, Any] | None = None

    @property
    def is_on(self) -> bool:
        return self._plane is not None

    @property
    def is_leaving(self) -> bool:
        """Turned off, while flows may end."""
        return bool(self._retires_at)

    @property
    def vips(self) -> tuple[WantedVip, ...]:
        return self._plane.wanted.vips if self._plane is not None else ()

    def open_backends(self, vip: WantedVip) -> int:
        """How many get new flows of a VIP."""
        pool = self._plane.wanted.pools.get(vip.pool) if self._plane is not None else None
        left_out = {(one["pool"], one["backend"]) for one in (self._status or {}).get("left_out", ())}
        return sum(
            each.is_open and each.is_alive and vip.fits(each) and (pool.name, each.id) not in left_out
            for each in (pool.backends if pool is not None else ())
            if pool is not None
        )

    @property
    def pin_path(self) -> str | None:
        return str(self._plane.pin_path) if self._plane is not None else None

    @property
    def status(self) -> dict[str, Any] | None:
        """Of the plane, as it was last seen; None: there is none."""
        return self._status if self._plane is not None else None

    @property
    def flows(self) -> int:
        return int(self._status["flows"]) if self._plane is not None and self._status is not None else 0

    async def _call(self, work: Callable[..., _T], *arguments: object) -> _T:
        """On the thread, after what was asked of it before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    # -- configurations

    async def prepare(self, config: Config, *, is_read: bool = True) -> None:
        """Do what may be refused of a configuration. Raises `StartError`; then all is as it was.

        `is_read`: it comes from the file, and so an operator's word that the program be detached is over."""
        if self.is_detached and not is_read:
            return
        if not config.runtime.xdp_enabled:
            self.is_detached = False
            return
        try:
            await self._call(self._prepare, config, is_read)
        except XdpError as error:
            raise StartError(f"XDP: {error}") from None
        self.is_detached = False
        self._status = await self._call(self._look)

    def _prepare(self, config: Config, is_read: bool) -> None:
        runtime = config.runtime
        plane, before = self._plane, self._runtime
        interfaces = runtime.xdp_interface or ()
        known = (before.xdp_interface or ()) if before is not None else ()
        for name in interfaces:
            # One that has gone while we run is waited for, and no reason to refuse another change.
            if name not in known and not ifindex_of(name):
                raise no_interface(name)
        if is_read and (wanting := forwarding_off(list(interfaces), versions_of(config))):
            raise no_forwarding(wanting)
        if plane is None or before is None:
            self._plane = self._opened(runtime)
        elif (before.xdp_pin_path, before.xdp_max_flows) != (runtime.xdp_pin_path, runtime.xdp_max_flows):
            self._renew(plane, before, runtime)
        elif (before.xdp_interface, before.xdp_mode) != (runtime.xdp_interface, runtime.xdp_mode):
            plane.attachments.attach(interfaces, runtime.xdp_mode)
        self._runtime = runtime

    def _opened(self, runtime: Runtime) -> "DataPlane":
        return self._open(
            runtime.xdp_interface or (),
            runtime.xdp_mode,
            Path(runtime.xdp_pin_path),
            runtime.xdp_max_flows,
            takes_over=self._takes_over,
        )

    def _renew(self, plane: "DataPlane", before: Runtime, runtime: Runtime) -> None:
        """Maps of another size, or in another place: flows are lost."""
        wanted = plane.wanted
        plane.detach()
        self._plane = None
        try:
            self._plane = self._opened(runtime)
        except XdpError:
            self._plane = self._opened(before)
            self._plane.apply(wanted)
            raise

    async def adopt(self, config: Config, *, is_first: bool = False) -> None:
        """This configuration is in force. `is_first`: raises `StartError` if the kernel cannot have it."""
        before, self._config = self._config, config
        if self._plane is None:
            return
        if config.runtime.xdp_enabled:
            self._retires_at = 0.0
        elif not self._retires_at:
            drains_s = [vip.drain_s for vip in self._plane.wanted.vips] if before is not None else []
            self._retires_at = time.monotonic() + max(drains_s, default=0.0)
            log.info("XDP is turned off: flows go on for %.0f seconds at most", max(drains_s, default=0.0))
        await self._apply()
        self._takes_over = False
        if is_first and self.fault:
            raise StartError(f"XDP: {self.fault}")

    async def restore(self, config: Config) -> None:
        """The configuration that `prepare` was for is not taken into use: this one still is in force."""
        try:
            await self.prepare(config, is_read=False)
        except StartError as error:
            self._say(str(error))
        await self.adopt(config)

    def _wanted(self) -> Callable[[], Wanted]:
        """What is wanted now, to be worked out on the thread: with a thousand backends it takes a while."""
        config, is_closing = self._config, self._is_closing
        if config is None:
            return Wanted
        known = {name: self._ask(name) for name in pools_of(config)}
        return lambda: wanted_of(config, known.__getitem__, is_closing=is_closing)

    async def _apply(self) -> None:
        """What is wanted now. What goes wrong is said, and tried again."""
        plane = self._plane
        if plane is None or self._is_held:
            return
        self._dirty = False
        wanted = self._wanted()
        try:
            await self._call(lambda: plane.apply(wanted()))
        except XdpError as error:
            self._dirty = True
            self._say(str(error))
        else:
            self._say("")
        self._status = await self._call(self._look)

    def _look(self) -> dict[str, Any] | None:
        return self._plane.status() if self._plane is not None else None

    def _say(self, fault: str) -> None:
        self.fault = fault
        if fault and fault != self._said:
            log.error("XDP: %s", fault)
        self._said = fault

    # -- while it runs

    def poke(self) -> None:
        """Somebody's health or address may have changed."""
        if self._plane is not None:
            self._dirty = True
            self._wake.set()

    async def run(self) -> None:
        """Look after it, for ever."""
        ticks = 0
        ticked = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(max(0.0, ticked + TICK_S - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                ticked = time.monotonic()
                ticks += 1
                await self._tick(ticks)
            self._wake.clear()
            if self._dirty:
                await self._apply()

    async def _tick(self, ticks: int) -> None:
        plane = self._plane
        if plane is None or self._is_held:
            return
        try:
            self._dirty |= await self._call(self._work, plane, ticks)
        except XdpError as error:
            self._say(str(error))
        if self._retires_at and (not self.flows or time.monotonic() >= self._retires_at):
            await self.end()
            log.info("XDP is off")

    def _work(self, plane: "DataPlane", ticks: int) -> bool:
        """Whether what is wanted is to be written again."""
        if plane is not self._plane:
            return False
        is_due = plane.watch() or plane.is_ramping
        plane.expire()
        if ticks % _NEIGHBOUR_TICKS == 1:
            is_due |= plane.keep_neighbours()
        self._count(plane, sweeps=ticks % _SWEEP_TICKS == 0)
        return is_due

    def _count(self, plane: "DataPlane", *, sweeps: bool) -> None:
        if plane is not self._plane:
            return  # it was given up meanwhile
        if sweeps:
            plane.sweep()
        self.counted = plane.counts()
        self.evicted = plane.evicted
        self.removed = plane.removed
        self._status = plane.status()

    async def refresh(self) -> None:
        """Bring what can be seen up to date, as far as that is done in time."""
        plane = self._plane
        if plane is None or self._is_held:
            return
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._call(lambda: self._count(plane, sweeps=True))
        except TimeoutError:
            pass
        except XdpError as error:
            self._say(str(error))

    async def seen_flows(self, limit: int) -> Sequence[FlowSeen]:
        """Some flows, as they are now. Raises `XdpError`, `TimeoutError`."""
        plane = self._plane
        if plane is None:
            return ()
        async with asyncio.timeout(_PATIENCE_S):
            return await self._call(plane.seen_flows, limit)

    # -- another supervisor

    async def hold(self) -> None:
        """Another supervisor is about to take the program over: write nothing until `resume`."""
        self._is_held = True
        await self._call(lambda: None)

    async def resume(self) -> None:
        """It did not. What it has written is read, and ours is written over it."""
        self._is_held = False
        before, runtime = self._plane, self._runtime
        if before is None or runtime is None:
            return
        self._takes_over = True
        try:
            self._plane = await self._call(self._opened, runtime)
        except XdpError as error:
            self._say(str(error))
        else:
            await self._call(before.close)
        self._takes_over = False
        await self._apply()

    async def part(self) -> None:
        """It did, and has no program, or another place for it: ours ends with us."""
        self._is_held = False
        await self.stop_accepting()

    # -- the end

    async def stop_accepting(self) -> None:
        """No new flows: they are left to the kernel's stack."""
        self._is_closing = True
        await self._apply()

    async def drain(self, budget_s: float) -> None:
        """After `stop_accepting`: until no flow is left, or the time is over."""
        ends = time.monotonic() + budget_s
        while self._plane is not None and time.monotonic() < ends:
            await self.refresh()
            if not self.flows:
                return
            await asyncio.sleep(min(_DRAIN_LOOK_S, max(0.0, ends - time.monotonic())))
        if self.flows:
            log.warning("%d flows were still open in the kernel", self.flows)

    async def detach(self) -> bool:
        """Take the program away until the file is read again. False: there is none."""
        if self._plane is None:
            return False
        self.is_detached = True
        await self.end()
        return True

    async def end(self) -> None:
        """Take the program away. Idempotent."""
        plane, self._plane, self._runtime = self._plane, None, None
        self._retires_at = 0.0
        if plane is not None:
            await self._call(plane.detach)
            log.info("detached", extra={"fields": {"pin_path": str(plane.pin_path)}})

    async def close(self) -> None:
        """Give up what this process holds. The program goes on, unless it was never taken into use."""
        plane, self._plane = self._plane, None
        if plane is not None:
            is_ours = self._config is None and not plane.is_adopted
            await self._call(plane.detach if is_ours else plane.close)
        self._thread.shutdown(wait=False)
