"""What the admin listener is told of a supervisor, and has it do: `admin.endpoints.Gateway`."""

import asyncio
import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from expressgateway import __version__
from expressgateway.control import shown
from expressgateway.control.admin import shapes
from expressgateway.control.admin.exposition import expose
from expressgateway.control.admin.http import REJECTS
from expressgateway.control.admin.live import Facts
from expressgateway.control.admin.scrapes import Scrapes
from expressgateway.control.changes import Change, ChangeError
from expressgateway.control.phase import Phase
from expressgateway.control.reload import Check, FromFile, Outcome, Renewal
from expressgateway.control.xdp_samples import samples_of
from expressgateway.control.xdp_shown import shown_flow, shown_xdp
from expressgateway.l4.xdp.faults import XdpError
from expressgateway.observe import logs
from expressgateway.observe.counters import Sample

if TYPE_CHECKING:
    from expressgateway.control.supervisor import Supervisor


class Front:
    """See the module's text. It keeps nothing but what a scrape needs."""

    def __init__(self, supervisor: "Supervisor") -> None:
        self._of = supervisor
        self._scrapes: Scrapes | None = None

    @property
    def token_hash(self) -> str | None:
        token_hash: str | None = self._of.running.config.admin.api_token_hash
        return token_hash

    @property
    def is_started(self) -> bool:
        return self._of.phase is not Phase.BOOTING

    def unready(self) -> str | None:
        if self._of.phase is not Phase.SERVING:
            return str(self._of.phase.value)
        if self._of.is_stopping:
            return "stopping"
        if self._of.deployment is None or not self._of.deployment.fleet.serving:
            return "no worker serves"
        return None

    def status(self) -> shapes.Status:
        age_s = time.monotonic() - self._of.began
        return shown.status(
            self._of.phase.value,
            age_s,
            self._of.running,
            self._of.reloads,
            self._of.upgrades,
            self._of.deployment,
        )

    def facts(self) -> Facts:
        deployment = self._of.deployment
        drained = self._of.progress.seconds(time.monotonic())
        if deployment is None:
            return Facts(self.status(), self._of.running.config, drain=drained)
        board = deployment.upstreams.board
        xdp = deployment.xdp
        own = (*self._of.certificates.samples(), *samples_of(xdp))
        shown_now = shown_xdp(xdp, deployment.config) if xdp.is_on or xdp.is_detached else None
        return Facts(self.status(), deployment.config, deployment.fleet, board, drained, own, shown_now)

    def config(self) -> shapes.EffectiveConfig:
        return shown.config(self._of.running, self._of.reloads)

    def listeners(self) -> list[shapes.Listener]:
        return shown.listeners(self._of.deployment)

    def workers(self) -> list[shapes.Worker]:
        return shown.workers(self._of.deployment)

    def certificates(self) -> list[dict[str, Any]]:
        return self._of.certificates.describe()

    async def connections(self, limit: int) -> shapes.Connections:
        return await shown.connections(self._of.deployment, limit)

    async def xdp(self) -> shapes.Xdp:
        deployment = self._of.deployment
        if deployment is None:
            raise ChangeError(503, "the gateway is starting")
        await deployment.xdp.refresh()
        return shown_xdp(deployment.xdp, deployment.config)

    async def xdp_flows(self, limit: int) -> shapes.XdpFlows:
        deployment = self._of.deployment
        if deployment is None:
            raise ChangeError(503, "the gateway is starting")
        try:
            listed = await deployment.xdp.seen_flows(limit)
        except XdpError as error:
            raise ChangeError(503, f"the flows cannot be read now: {error}") from None
        except TimeoutError:
            raise ChangeError(503, "the flows cannot be read in time") from None
        total = max(deployment.xdp.flows, len(listed))
        return {"flows": [shown_flow(flow) for flow in listed], "total": total}

    async def detach_xdp(self) -> bool:
        deployment = self._of.deployment
        return deployment is not None and await deployment.xdp.detach()

    def pools(self) -> list[dict[str, Any]]:
        return shown.pools(self._of.deployment)

    async def change(self, change: Change, check: Check | None = None) -> Outcome:
        return await self._of.changes.ask(change, check)

    async def reload(self, check: Check | None = None) -> Outcome:
        return await self._of.changes.ask(FromFile(), check)

    async def renew(self) -> Outcome:
        return await self._of.changes.ask(Renewal())

    def begin_drain(self, cause: str) -> None:
        self._of.stop(cause)

    def log_level(self) -> str:
        return logs.level()

    def set_log_level(self, level: str) -> None:
        logs.set_level(level)
        if self._of.deployment is not None:
            self._of.deployment.set_log_level(level)

    def set_state(self, pool: str, backend: str, state: str, cause: str) -> None:
        if self._of.deployment is None:
            raise ChangeError(503, "the gateway is starting")
        try:
            self._of.deployment.upstreams.board.set_state(pool, backend, state, cause)
        except LookupError as error:
            raise ChangeError(404, str(error)) from None

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        if self._scrapes is None:
            if self._of.deployment is None:
                return expose({}, accept)
            self._scrapes = Scrapes(self._of.deployment.fleet.ledger, self._collect, self._samples)
        return await self._scrapes.answer(accept)

    async def _collect(self) -> None:
        deployment = self._of.deployment
        if deployment is not None:
            await asyncio.gather(deployment.fleet.collect(), deployment.xdp.refresh())

    def _samples(self) -> Iterator[Sample]:
        """Read piece by piece: whatever is walked over is a copy."""
        if self._of.deployment is not None:
            yield from self._of.deployment.samples()
        yield "connections_limit", (), self._of.running.config.runtime.max_inflight_connections
        reloads = self._of.reloads
        for result, count in list(reloads.counts.items()):
            yield "config_reload", (result,), count
        yield "config_version", (), reloads.version
        yield "config_applied_timestamp_seconds", (), reloads.applied_at
        yield "config_last_reload_successful", (), int(reloads.last is None or reloads.last.is_success)
        for result, count in list(reloads.changes.items()):
            yield "config_changes", (result,), count
        yield from self._of.certificates.samples()
        yield "upgrade_failures", (), self._of.upgrades.failures
        yield "build_info", (__version__, platform.python_version()), 1
        for reason in REJECTS:  # also those that never happened: an alert needs a number to compare with
            yield "admin_rejects", (reason,), self._of.admin_rejects.get(reason, 0)
        yield "admin_streams", (), self._of.admin.streams if self._of.admin is not None else 0
        for phase, seconds in self._of.progress.seconds(time.monotonic()).items():
            yield "shutdown_drain_seconds", (phase,), seconds
