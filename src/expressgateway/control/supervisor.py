"""The supervisor: from the configuration file to a running gateway, through reloads, to its orderly end.

Phases: BOOTING (nothing is accepted), SERVING, SETTLING (unready, still accepting), DRAINING, STOPPED.
Signals are noted when they come and acted upon one after the other, so that none is lost: a reload that is
asked for during a reload follows it, a stop waits for the reload under way. Only the second stop is
immediate.

This process never sees a client's bytes, and it keeps its rights: see docs/decisions/0011.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import Loaded, load
from expressgateway.config.values import Address
from expressgateway.control import drain, signals
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import AdminServer
from expressgateway.control.certificates import Certificates
from expressgateway.control.changes import Change, ChangeError, changed
from expressgateway.control.deployment import Deployment, Heritage
from expressgateway.control.failures import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, StartError
from expressgateway.control.front import Front
from expressgateway.control.notify import Notifier
from expressgateway.control.phase import Phase
from expressgateway.control.plan import NOTHING_ROLLED, Changed, Plan, plan
from expressgateway.control.privileges import raise_file_limit
from expressgateway.control.reload import (
    APPLIED,
    FAILED,
    INVALID,
    REFUSED,
    UNCHANGED,
    FromFile,
    Outcome,
    Queue,
    Reloads,
    Renewal,
    Upgrades,
    Wish,
    aside,
)
from expressgateway.control.socket_book import SocketBook, from_systemd
from expressgateway.control.sockets import bind_admin, is_bound_to
from expressgateway.control.upgrade import Predecessor, Successor, UpgradeError, command
from expressgateway.control.worker_process import WORKER_COMMAND
from expressgateway.control.workers import PATIENT, Timing
from expressgateway.observe import logs
from expressgateway.observe.counters import Tally

log = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_STATUS_LINE_S: Final = 1.0
_FILE_PATIENCE_S: Final = 60.0  # for a configuration to be read and checked: policies of others are tried
MAX_MADE: Final = 10_000
"""Run-time changes that an upgrade takes over, the last ones; more have been forgotten by a reload long
since."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the file."""

    insecure_key_permissions: bool = False
    worker_command: Sequence[str] = WORKER_COMMAND
    timing: Timing = PATIENT
    upgrade_command: Sequence[str] = ()
    """What an upgrade starts; empty: what this process was started with."""


def run(path: Path, options: Options = Options()) -> int:
    """Run the gateway until a signal ends it: its exit code (docs/decisions/0012)."""
    logs.configure("supervisor")
    try:
        loaded = load(path, insecure_key_permissions=options.insecure_key_permissions)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    try:
        return asyncio.run(Supervisor(loaded, options).run())
    except Exception:
        log.exception("the supervisor failed: this is a defect; its workers are ended")
        return EXIT_FAILURE


class Supervisor:
    """One run of the gateway. What the admin listener sees of it is its `Front`."""

    def __init__(self, loaded: Loaded, options: Options = Options()) -> None:
        self._loaded = loaded  # until there is a deployment
        self._options = options
        self.phase = Phase.BOOTING
        self.began = time.monotonic()
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        """A second stop: leave at once."""
        self._is_stop_asked = False
        """The stop was not a signal's, so a signal that follows is the first one."""
        self._wake = asyncio.Event()
        self.reloads = Reloads()
        self.upgrades = Upgrades()
        self._made: list[Change] = []  # run-time changes since the file was read: at most MAX_MADE
        self.progress = drain.Progress()
        self.admin: AdminServer | None = None
        self._admin_socket: socket.socket | None = None
        self.admin_rejects = Tally()
        self.deployment: Deployment | None = None
        self.changes = Queue(self._wake.set)
        self._before: Predecessor | None = None
        """The supervisor that this one takes over from."""
        self._successor: Successor | None = None
        """The process that has taken over."""
        self._front = Front(self)
        self._notifier = Notifier.of(os.environ, os.getpid())
        self.certificates = Certificates(
            lambda: self.running, self._wake.set, insecure_key_permissions=options.insecure_key_permissions
        )

    # -- life

    async def run(self) -> int:
        """From start to end; the exit code."""
        self._install_signals()
        try:
            async with asyncio.TaskGroup() as tasks:
                code = await self._live(tasks)
                await self._end_workers()
        finally:
            # Also when something failed: no worker outlives its supervisor unnoticed.
            await self._end_workers()
            await self._close()
            await signals.ignore(_SIGNALS)
        return code

    async def _live(self, tasks: asyncio.TaskGroup) -> int:
        try:
            booted = await _unless(self._stop, self._boot(tasks))
        except StartError as error:
            sys.stderr.write(f"expressgateway: {error}\n")
            return EXIT_FAILURE
        deployment = self.deployment
        if not booted or deployment is None:
            log.info("stopped while starting")
            return EXIT_OK
        background = [
            tasks.create_task(deployment.rotate_keys(), name="ticket keys"),
            tasks.create_task(self._notifier.watch(), name="signs of life"),
            tasks.create_task(self.certificates.watch(), name="certificates"),
            tasks.create_task(deployment.xdp.run(), name="xdp"),
        ]
        try:
            if self._before is not None:
                await _unless(self._now, self._take_over(deployment, self._before))
            successor = await self._serve(deployment)
            self.changes.close("the gateway is stopping")
            if not self._now.is_set():
                last = self._drain(deployment) if successor is None else self._leave(deployment, successor)
                await _unless(self._now, last)
            if successor is None or successor.xdp_pins != deployment.xdp.pin_path:
                await deployment.xdp.end()
        finally:
            for task in background:
                task.cancel()
        self.phase = Phase.STOPPED
        if self._now.is_set():
            log.warning("stopped at once, as asked by a second signal; %s", _left(self._open()))
        else:
            log.info("stopped")
        return EXIT_OK

    async def _serve(self, deployment: Deployment) -> Successor | None:
        """Until the end is asked for, or another supervisor has taken over."""
        while not self._stop.is_set():
            if self.reloads.is_due:
                await _unless(self._now, self._reload(deployment))
            elif self.certificates.is_due:
                await _unless(self._now, self.certificates.renew(self._renew))
            elif self.changes.is_due:
                await _unless(self._now, self.changes.make_next(self._fulfil))
            elif self.upgrades.is_due:
                await _unless(self._now, self._upgrade(deployment))
                if self._successor is not None:
                    return self._successor
            else:
                self._wake.clear()
                await self._wake.wait()
        return None

    async def _boot(self, tasks: asyncio.TaskGroup) -> None:
        for warning in self._loaded.warnings:
            log.warning("%s", warning.text())
        raise_file_limit()
        before = await Predecessor.find(os.environ)
        loaded = self._loaded if before is None else self._replayed(before.changes)
        heritage = Heritage(book=SocketBook(from_systemd(os.environ, os.getpid())))
        if before is not None:
            heritage = before.heritage
            self._notifier.remember(before.kept)
        command = tuple(self._options.worker_command)
        deployment = Deployment(loaded, tasks, command, self._options.timing, heritage)
        self.deployment = deployment
        where = loaded.config.observability.metrics_bind
        if where is not None:
            self._admin_socket = _inherited_admin(before, where) or bind_admin(where)
        if before is None:
            await self._start_admin()
            await deployment.start()
        else:
            await deployment.start(lambda: before.wait_for_go(deployment))
        self.phase = Phase.SERVING
        self._keep_sockets(deployment)
        listeners = {bound.name: str(bound.address) for bound in deployment.book.bounds}
        count = len(deployment.fleet.slots)
        log.info(
            "ready in %.2f seconds with %d worker%s",
            _age_s(),
            count,
            "" if count == 1 else "s",
            extra={
                "fields": {"listeners": listeners, "admin": str(where) if where else None, "pid": os.getpid()}
            },
        )
        self._before = before
        if before is None:
            self._tell_ready(deployment)

    async def _take_over(self, deployment: Deployment, before: Predecessor) -> None:
        """We serve: the rest of an upgrade. A stop waits for it, like for a reload."""
        await before.wait_until_left()
        await deployment.have_alone()
        await self._start_admin()
        log.info("taken over from the gateway before")
        self._tell_ready(deployment)

    def _tell_ready(self, deployment: Deployment) -> None:
        count = len(deployment.fleet.slots)
        self._notifier.ready(f"serving with {count} worker{'' if count == 1 else 's'}")

    def _replayed(self, changes: Sequence[Change]) -> Loaded:
        """What the file says, with the run-time changes that were made to it before the upgrade."""
        loaded = self._loaded
        for change in changes:
            try:
                loaded = changed(
                    loaded, change, insecure_key_permissions=self._options.insecure_key_permissions
                )
            except ChangeError as error:
                log.warning("a run-time change is not taken over: %s (%s)", change, error)
            else:
                self._made.append(change)
        return loaded

    async def _start_admin(self) -> None:
        if self._admin_socket is not None:
            admin = AdminServer(
                self._admin_socket, Endpoints(self._front, self.admin_rejects).answer, self.admin_rejects
            )
            await admin.start()
            self.admin = admin

    def _keep_sockets(self, deployment: Deployment) -> None:
        """Leave copies of the sockets with systemd, if it is to keep them."""
        self._notifier.keep(deployment.book.keepsakes())

    async def _end_workers(self) -> None:
        if self.deployment is not None:
            await self.deployment.end()

    async def _close(self) -> None:
        if self.admin is not None:
            await self.admin.close()
        elif self._admin_socket is not None:
            self._admin_socket.close()
        if self.deployment is not None:
            await self.deployment.close()
        self._notifier.close()

    # -- signals

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._on_stop, "SIGINT")
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        loop.add_signal_handler(signal.SIGUSR1, self.certificates.ask)
        loop.add_signal_handler(signal.SIGUSR2, self._on_upgrade)

    def _on_stop(self, name: str) -> None:
        if self._stop.is_set() and not self._is_stop_asked:
            self._now.set()
        else:
            log.info("%s: stopping; once more stops at once", name)
            self._stop.set()
        self._is_stop_asked = False
        self._wake.set()

    def _on_reload(self) -> None:
        self.reloads.requested += 1
        if self._stop.is_set():
            log.warning("SIGHUP: nothing is reloaded, the gateway is stopping")
        self._wake.set()

    def _on_upgrade(self) -> None:
        self.upgrades.requested += 1
        if self._stop.is_set():
            log.warning("SIGUSR2: nothing is upgraded, the gateway is stopping")
        self._wake.set()

    # -- reload

    async def _fulfil(self, wish: Wish) -> Outcome:
        """What waited in the queue. Raises `ChangeError`."""
        if self.deployment is None:
            raise ChangeError(503, "the gateway is starting")
        if isinstance(wish, FromFile):
            self.reloads.requested += 1
            return await self._reload(self.deployment)
        if isinstance(wish, Renewal):
            self.certificates.ask()
            outcome = await self.certificates.renew(self._renew)
            return replace(outcome, version=self.reloads.version)
        return await self._change(self.deployment, wish)

    async def _reload(self, deployment: Deployment) -> Outcome:
        asked = self.reloads.requested
        began = time.monotonic()
        self._notifier.reloading()
        outcome = await self._reloaded(deployment)
        deployment.reopen_log()
        outcome = self.reloads.finish(asked, outcome)
        fields = {"result": outcome.result, "version": self.reloads.version}
        level = logging.INFO if outcome.is_success else logging.ERROR
        took_ms = (time.monotonic() - began) * 1000
        what = "; ".join(outcome.report)
        log.log(level, "reload %s in %.0f ms: %s", outcome.result, took_ms, what, extra={"fields": fields})
        self._notifier.ready(f"serving; the last reload: {outcome.result}")
        return outcome

    async def _reloaded(self, deployment: Deployment) -> Outcome:
        path = deployment.loaded.path
        try:
            # Not on this thread: while files are read and keys are checked, probes are still answered.
            insecure = self._options.insecure_key_permissions
            loaded = await aside(lambda: load(path, insecure_key_permissions=insecure), _FILE_PATIENCE_S)
        except ConfigError as error:
            return Outcome(INVALID, tuple(one.text() for one in error.diagnostics))
        except TimeoutError:
            return Outcome(INVALID, (f"{path} and the files it names cannot be read in time",))
        for warning in loaded.warnings:
            log.warning("%s", warning.text())
        difference = plan(deployment.loaded, loaded)
        if difference.is_empty and not deployment.xdp.is_detached:
            self._made.clear()
            if isinstance(deployment.loaded, Changed):  # the file says now what had been changed while it ran
                deployment.loaded = loaded
            return Outcome(UNCHANGED, difference.lines())
        outcome = await self._apply(deployment, loaded, difference)
        if outcome.is_success:
            self._made.clear()
        return outcome

    async def _change(self, deployment: Deployment, change: Change) -> Outcome:
        """Make a run-time change. Raises `ChangeError`."""
        insecure = self._options.insecure_key_permissions
        running = deployment.loaded
        try:
            loaded = await aside(lambda: changed(running, change, insecure_key_permissions=insecure))
        except TimeoutError:
            raise ChangeError(422, "the files it names cannot be read in time") from None
        for warning in loaded.warnings:
            log.warning("%s", warning.text())
        difference = plan(running, loaded)
        if difference.is_empty:
            outcome = Outcome(UNCHANGED, difference.lines())
        else:
            outcome = await self._apply(deployment, loaded, difference, (change.pool,))
        outcome = self.reloads.finish_change(outcome)
        if outcome.is_success:
            self._made.append(change)
            del self._made[:-MAX_MADE]
        level = logging.INFO if outcome.is_success else logging.ERROR
        log.log(level, "run-time change %s: %s (%s)", outcome.result, change, "; ".join(outcome.report))
        return outcome

    async def _renew(self, loaded: Loaded, report: str) -> Outcome:
        """Have everybody use what differs from what runs in its files alone, or nobody."""
        if self.deployment is None:
            return Outcome(REFUSED, ("the gateway is starting",))
        outcome = await self._apply(self.deployment, loaded, NOTHING_ROLLED, ())
        if outcome.is_success:
            outcome = Outcome(outcome.result, (report,))
        return self.reloads.finish_renewal(outcome)

    async def _apply(
        self, deployment: Deployment, loaded: Loaded, difference: Plan, pools: tuple[str, ...] | None = None
    ) -> Outcome:
        """Have everybody use a configuration, or nobody. `pools`: what alone differs, beside files."""
        admin = None
        was, where = (one.observability.metrics_bind for one in (deployment.loaded.config, loaded.config))
        try:
            if where is not None and where != was:
                admin = bind_admin(where)
            fault = await deployment.apply(loaded, difference, pools)
        except StartError as error:
            fault = str(error)
            result = REFUSED
        else:
            result = FAILED
        if fault is not None:
            if admin is not None:
                admin.close()
            if result == FAILED:
                fault = f"a worker cannot apply it, all are back at the old one: {fault}"
            return Outcome(result, (fault,))
        if where != was:
            before, self.admin, self._admin_socket = self.admin, None, admin
            await self._start_admin()
            if before is not None:
                await before.finish()
        self._keep_sockets(deployment)
        return Outcome(APPLIED, difference.lines())

    # -- upgrade

    async def _upgrade(self, deployment: Deployment) -> None:
        """Have another process take over, the `_successor`; or nothing changes."""
        asked = self.upgrades.requested
        log.info("upgrade: another process is started")
        successor = None
        deployment.fleet.hold()
        await deployment.xdp.hold()
        try:
            successor = await Successor.start(self._options.upgrade_command or command())
            await successor.give(deployment, self._admin_socket, self._made, self._notifier.kept)
            await deployment.fleet.meet(successor.seats)
            await successor.go()
        except UpgradeError as error:
            if successor is not None:
                await successor.end()
            await deployment.fleet.part()
            await deployment.xdp.resume()
            self.upgrades.fail(asked, str(error))
            log.error("upgrade failed, this process goes on: %s", error)
        except asyncio.CancelledError:
            if successor is not None:
                await successor.end()
            raise
        else:
            self._successor = successor
            log.info(
                "upgrade: process %d serves", successor.pid, extra={"fields": {"successor": successor.pid}}
            )
        finally:
            deployment.fleet.release()

    async def _leave(self, deployment: Deployment, successor: Successor) -> None:
        """Another process serves: let what is open here end."""
        self._notifier.follow(successor.pid)
        self.phase = Phase.DRAINING
        if self.admin is not None:
            await self.admin.finish()
            self.admin = self._admin_socket = None
        budget_s = drain.budget_s(deployment.config)
        deployment.book.close()
        with self._telling(deployment):
            self.progress.enter(drain.FINISH, time.monotonic())
            on_left = partial(self._on_left, successor)
            await deployment.make_way(successor.xdp_pins, budget_s, on_left)
            self.progress.leave(time.monotonic())
        self._tell_drained(deployment)

    def _on_left(self, successor: Successor) -> None:
        """Our workers have stopped reading the sockets."""
        successor.left()
        if self.is_stopping:
            # It came during the upgrade, to whom was the gateway then: it is the gateway that is to end.
            with contextlib.suppress(ProcessLookupError):
                os.kill(successor.pid, signal.SIGTERM)

    # -- drain

    async def _drain(self, deployment: Deployment) -> None:
        self._notifier.stopping()
        self.phase = Phase.SETTLING
        with self._telling(deployment):
            self.progress.enter(drain.SETTLE, time.monotonic())
            await asyncio.sleep(drain.settle_s(deployment.config))
            self.phase = Phase.DRAINING
            self.progress.enter(drain.FINISH, time.monotonic())
            budget_s = drain.budget_s(deployment.config)
            await deployment.drain(budget_s, keeps_sockets=self._notifier.keeps_sockets)
            self.progress.leave(time.monotonic())
        self._tell_drained(deployment)

    @contextlib.contextmanager
    def _telling(self, deployment: Deployment) -> Iterator[None]:
        lines = asyncio.get_running_loop().create_task(self._status_lines(deployment), name="status lines")
        try:
            yield
        finally:
            lines.cancel()

    def _tell_drained(self, deployment: Deployment) -> None:
        aborted = deployment.fleet.aborted
        took = sum(self.progress.seconds(time.monotonic()).values())
        cut = sum(aborted.values())
        log.log(
            logging.WARNING if cut else logging.INFO,
            "drained in %.1f seconds, %d connection%s cut off",
            took,
            cut,
            "" if cut == 1 else "s",
            extra={"fields": {"aborted": aborted}},
        )

    async def _status_lines(self, deployment: Deployment) -> None:
        config = deployment.config
        while True:
            settling = self.phase is Phase.SETTLING
            limit_s = drain.settle_s(config) if settling else drain.budget_s(config)
            open_ = self._open()
            sentence = self.progress.sentence(open_, limit_s, time.monotonic())
            log.info("%s", sentence, extra={"fields": {"open": open_}})
            self._notifier.status(sentence)
            await asyncio.sleep(_STATUS_LINE_S)

    def _open(self) -> dict[str, int]:
        return self.deployment.open() if self.deployment is not None else {}

    @property
    def running(self) -> Loaded:
        """The configuration in force, or the one that is to be."""
        return self.deployment.loaded if self.deployment is not None else self._loaded

    def stop(self, cause: str) -> None:
        """Drain and end, as a first signal has it; a signal that follows counts as the first."""
        if not self.is_stopping:
            log.info("%s: stopping", cause)
            self._is_stop_asked = True
            self._stop.set()
            self._wake.set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()


def _inherited_admin(before: Predecessor | None, where: Address) -> socket.socket | None:
    """The admin listener's socket of the process before, if it is bound there."""
    if before is None or before.admin is None:
        return None
    if is_bound_to(before.admin, where):
        return before.admin
    before.admin.close()
    return None


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Do `work`; False if `event` came first, and the work was cancelled."""
    loop = asyncio.get_running_loop()
    doing = loop.create_task(work)
    watching = loop.create_task(event.wait())
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        return False
    finally:
        watching.cancel()
        doing.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


def _left(open_: dict[str, int]) -> str:
    count = sum(open_.values())
    return f"{count} connection{'' if count == 1 else 's'} cut off"


def _age_s() -> float:
    """Seconds since this process was started, imports included."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return time.process_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
