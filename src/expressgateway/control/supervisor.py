"""The supervisor: from the configuration file to a running gateway, through reloads, to its orderly end.

Phases: BOOTING (nothing is accepted), SERVING, SETTLING (unready, still accepting), DRAINING, STOPPED.
Signals are noted when they come and acted upon one after the other, so that none is lost: a reload that is
asked for during a reload follows it, a stop waits for the reload under way. Only the second stop is
immediate.

This process never sees a client's bytes, and it keeps its rights: see docs/decisions/0011.
"""

import asyncio
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from expressgateway import __version__
from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import Loaded, load
from expressgateway.control import drain
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import REJECTS, AdminServer
from expressgateway.control.census import CensusTable
from expressgateway.control.channel import FrameError, encode, pack_bytes
from expressgateway.control.failures import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, StartError
from expressgateway.control.plan import plan
from expressgateway.control.privileges import raise_file_limit, worker_identity
from expressgateway.control.reload import APPLIED, FAILED, INVALID, REFUSED, UNCHANGED, Outcome, Reloads
from expressgateway.control.sockets import Bound, bind_admin, bind_listeners
from expressgateway.control.ticket_keys import TicketKeys
from expressgateway.control.worker_process import WORKER_COMMAND, Launch, Snapshot
from expressgateway.control.workers import PATIENT, Fleet, Timing
from expressgateway.observe import logs
from expressgateway.observe.counters import Sample, Tally

log = logging.getLogger(__name__)

_STATUS_LINE_S: Final = 1.0
_MAX_KEY_SLEEP_S: Final = 3600.0  # nobody trusts a timer of weeks; a look now and then costs nothing


class Phase(Enum):
    BOOTING = "booting"
    SERVING = "serving"
    SETTLING = "settling"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the file."""

    insecure_key_permissions: bool = False
    worker_command: Sequence[str] = WORKER_COMMAND
    timing: Timing = PATIENT


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
    """One run of the gateway. It is also what the admin listener shows (`admin.endpoints.Gateway`)."""

    def __init__(self, loaded: Loaded, options: Options = Options()) -> None:
        self._loaded = loaded
        self._options = options
        self._phase = Phase.BOOTING
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        """A second stop: leave at once."""
        self._wake = asyncio.Event()
        self._reloads = Reloads()
        self._keys = TicketKeys()
        self._keys_adopted = asyncio.Event()
        """A reload may have brought their next change forward."""
        self._progress = drain.Progress()
        self._bound: list[Bound] = []
        self._admin: AdminServer | None = None
        self._admin_address = ""
        self._admin_rejects = Tally()
        self._census: CensusTable | None = None
        self._fleet: Fleet | None = None

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
        return code

    async def _live(self, tasks: asyncio.TaskGroup) -> int:
        try:
            booted = await _unless(self._stop, self._boot(tasks))
        except StartError as error:
            sys.stderr.write(f"expressgateway: {error}\n")
            return EXIT_FAILURE
        if not booted:
            log.info("stopped while starting")
            return EXIT_OK
        rotation = tasks.create_task(self._rotate_keys(), name="ticket keys")
        try:
            while not self._stop.is_set():
                if self._reloads.is_due:
                    await _unless(self._now, self._reload())
                else:
                    self._wake.clear()
                    await self._wake.wait()
            if not self._now.is_set():
                await _unless(self._now, self._drain())
        finally:
            rotation.cancel()
        self._phase = Phase.STOPPED
        if self._now.is_set():
            log.warning("stopped at once, as asked by a second signal; %s", _left(self._open()))
        else:
            log.info("stopped")
        return EXIT_OK

    async def _boot(self, tasks: asyncio.TaskGroup) -> None:
        config = self._loaded.config
        for warning in self._loaded.warnings:
            log.warning("%s", warning.text())
        raise_file_limit()
        identity = worker_identity(config.runtime)
        count = config.runtime.worker_count
        self._bound = bind_listeners(config.listeners, count)
        if config.observability.metrics_bind is not None:
            sock = bind_admin(config.observability.metrics_bind)
            self._admin_address = str(config.observability.metrics_bind)
            self._admin = AdminServer(sock, Endpoints(self, self._admin_rejects).answer, self._admin_rejects)
            await self._admin.start()
        self._keys.adopt(self._keys.planned(config))
        self._census = CensusTable(count)
        launch = Launch(self._bound, self._census, identity, self._options.worker_command)
        self._fleet = Fleet(launch, tasks, self._keys.messages, self._options.timing)
        try:
            snapshot = _snapshot(self._reloads.version, self._loaded)
        except FrameError as error:
            raise StartError(str(error)) from None
        await self._fleet.start(snapshot)
        self._phase = Phase.SERVING
        listeners = {bound.name: str(bound.address) for bound in self._bound}
        log.info(
            "ready in %.2f seconds with %d worker%s",
            _age_s(),
            count,
            "" if count == 1 else "s",
            extra={
                "fields": {"listeners": listeners, "admin": self._admin_address or None, "pid": os.getpid()}
            },
        )

    async def _end_workers(self) -> None:
        if self._fleet is not None:
            self._fleet.kill()
            await self._fleet.close()

    async def _close(self) -> None:
        if self._admin is not None:
            await self._admin.close()
        for bound in self._bound:
            bound.close()
        if self._census is not None:
            self._census.close()
            self._census = None

    # -- signals

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, "SIGTERM")
        loop.add_signal_handler(signal.SIGINT, self._on_stop, "SIGINT")
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        loop.add_signal_handler(
            signal.SIGUSR1, self._on_unavailable, "SIGUSR1", "SIGHUP also reads certificates"
        )
        loop.add_signal_handler(signal.SIGUSR2, self._on_unavailable, "SIGUSR2", "restart to upgrade")

    def _on_stop(self, name: str) -> None:
        if self._stop.is_set():
            self._now.set()
        else:
            log.info("%s: stopping; once more stops at once", name)
            self._stop.set()
        self._wake.set()

    def _on_reload(self) -> None:
        self._reloads.requested += 1
        if self._stop.is_set():
            log.warning("SIGHUP: nothing is reloaded, the gateway is stopping")
        self._wake.set()

    def _on_unavailable(self, name: str, instead: str) -> None:
        log.warning("%s is not available in this version; %s", name, instead)

    # -- reload

    async def _reload(self) -> None:
        asked = self._reloads.requested
        began = time.monotonic()
        outcome = await self._reloaded()
        self._reloads.finish(asked, outcome)
        fields = {"result": outcome.result, "version": self._reloads.version}
        level = logging.INFO if outcome.is_success else logging.ERROR
        took_ms = (time.monotonic() - began) * 1000
        what = "; ".join(outcome.report)
        log.log(level, "reload %s in %.0f ms: %s", outcome.result, took_ms, what, extra={"fields": fields})

    async def _reloaded(self) -> Outcome:
        path = self._loaded.path
        try:
            # Not on this thread: while files are read and keys are checked, probes are still answered.
            loaded = await asyncio.to_thread(
                load, path, insecure_key_permissions=self._options.insecure_key_permissions
            )
        except ConfigError as error:
            return Outcome(INVALID, tuple(one.text() for one in error.diagnostics))
        for warning in loaded.warnings:
            log.warning("%s", warning.text())
        difference = plan(self._loaded, loaded)
        if difference.refused:
            return Outcome(REFUSED, difference.refused)
        if difference.is_empty:
            return Outcome(UNCHANGED, (difference.sentence(),))
        loaded = Loaded(difference.config, path, loaded.warnings, loaded.material)
        if self._fleet is None:
            return Outcome(FAILED, ("there are no workers",))
        try:
            keys = self._keys.planned(loaded.config)
            fault = await self._fleet.apply(_snapshot(self._reloads.version + 1, loaded))
        except (StartError, FrameError) as error:
            return Outcome(REFUSED, (str(error),))
        if fault is not None:
            return Outcome(FAILED, (f"a worker cannot apply it, all are back at the old one: {fault}",))
        self._loaded = loaded
        self._keys.adopt(keys)
        self._keys_adopted.set()
        self._fleet.broadcast(self._keys.messages())
        return Outcome(APPLIED, (difference.sentence(),))

    async def _rotate_keys(self) -> None:
        while self._fleet is not None:
            self._keys_adopted.clear()
            try:
                async with asyncio.timeout(min(self._keys.next_change_s(), _MAX_KEY_SLEEP_S)):
                    await self._keys_adopted.wait()
            except TimeoutError:
                pass
            self._fleet.broadcast(self._keys.changed())

    # -- drain

    async def _drain(self) -> None:
        config = self._loaded.config
        self._phase = Phase.SETTLING
        lines = asyncio.get_running_loop().create_task(self._status_lines(), name="status lines")
        try:
            self._progress.enter(drain.SETTLE, time.monotonic())
            await asyncio.sleep(drain.settle_s(config))
            self._phase = Phase.DRAINING
            self._progress.enter(drain.FINISH, time.monotonic())
            if self._fleet is not None:
                await self._fleet.drain(drain.budget_s(config))
            self._progress.leave(time.monotonic())
        finally:
            lines.cancel()
        aborted = self._fleet.aborted if self._fleet is not None else {}
        took = sum(self._progress.seconds(time.monotonic()).values())
        cut = sum(aborted.values())
        log.log(
            logging.WARNING if cut else logging.INFO,
            "drained in %.1f seconds, %d connection%s cut off",
            took,
            cut,
            "" if cut == 1 else "s",
            extra={"fields": {"aborted": aborted}},
        )

    async def _status_lines(self) -> None:
        config = self._loaded.config
        while True:
            settling = self._phase is Phase.SETTLING
            limit_s = drain.settle_s(config) if settling else drain.budget_s(config)
            open_ = self._open()
            sentence = self._progress.sentence(open_, limit_s, time.monotonic())
            log.info("%s", sentence, extra={"fields": {"open": open_}})
            await asyncio.sleep(_STATUS_LINE_S)

    def _open(self) -> dict[str, int]:
        return self._fleet.open() if self._fleet is not None else {}

    # -- what the admin listener shows

    @property
    def token_hash(self) -> str | None:
        token_hash: str | None = self._loaded.config.admin.api_token_hash
        return token_hash

    @property
    def is_started(self) -> bool:
        return self._phase is not Phase.BOOTING

    def unready(self) -> str | None:
        if self._phase is not Phase.SERVING:
            return str(self._phase.value)
        if self._stop.is_set():
            return "stopping"
        if self._fleet is None or not self._fleet.serving:
            return "no worker serves"
        return None

    def status(self) -> dict[str, Any]:
        open_ = self._open()
        fleet = self._fleet
        return {
            "pid": os.getpid(),
            "version": __version__,
            "state": self._phase.value,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "config": {
                "path": str(self._loaded.path.absolute()),
                "version": self._reloads.version,
                "applied_at": self._reloads.applied_at,
            },
            "reload": self._reloads.status(),
            "listeners": [
                {
                    "name": bound.name,
                    "protocol": listener.protocol,
                    "bound": str(bound.address),
                    "open": open_.get(bound.name, 0),
                }
                for bound, listener in zip(self._bound, self._loaded.config.listeners, strict=False)
            ],
            "workers": [
                {
                    "index": slot.index,
                    "pid": slot.worker.pid if slot.worker is not None and slot.worker.is_alive else None,
                    "state": slot.worker.state.value if slot.worker is not None else "starting",
                    "restarts": slot.restarts,
                }
                for slot in (fleet.slots if fleet is not None else ())
            ],
        }

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        # Imported at the first scrape: it is a tenth of the time a start takes.
        from expressgateway.control.admin.exposition import expose

        if self._fleet is None:
            return expose({}, accept)
        await self._fleet.collect()
        return expose(self._fleet.ledger.merged([*self._fleet.samples(), *self._samples()]), accept)

    def _samples(self) -> Iterator[Sample]:
        reloads = self._reloads
        for result, count in reloads.counts.items():
            yield "config_reload", (result,), count
        yield "config_version", (), reloads.version
        yield "config_applied_timestamp_seconds", (), reloads.applied_at
        yield "config_last_reload_successful", (), int(reloads.last is None or reloads.last.is_success)
        yield "build_info", (__version__, platform.python_version()), 1
        for reason in REJECTS:  # also those that never happened: an alert needs a number to compare with
            yield "admin_rejects", (reason,), self._admin_rejects.get(reason, 0)
        for phase, seconds in self._progress.seconds(time.monotonic()).items():
            yield "shutdown_drain_seconds", (phase,), seconds
        if self._fleet is not None:
            for name, count in self._fleet.aborted.items():
                yield "shutdown_aborted_connections", (name,), count


def _snapshot(version: int, loaded: Loaded) -> Snapshot:
    """Raises `FrameError` if it is too large to be sent."""
    message = {
        "type": "configure",
        "version": version,
        "config": loaded.config.model_dump(mode="json"),
        "files": {path: pack_bytes(data) for path, data in loaded.material.files.items()},
    }
    return Snapshot(version, encode(message))


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
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
