"""A gateway without processes, whose backends can be changed through a real admin listener."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expressgateway.config.load import Loaded
from expressgateway.config.render import redacted
from expressgateway.config.schema import Config
from expressgateway.control.admin import shapes
from expressgateway.control.admin.endpoints import Endpoints
from expressgateway.control.admin.http import AdminServer
from expressgateway.control.admin.live import Facts
from expressgateway.control.admin.view import Seen, pools_shown
from expressgateway.control.changes import Change, changed
from expressgateway.control.ledger import Merged
from expressgateway.control.plan import backends_of, plan, runtime_changes
from expressgateway.control.reload import APPLIED, UNCHANGED, Check, Outcome, Reloads
from expressgateway.observe.counters import Tally

ODD = "a/b%é?"
"""Name of a pool, as people might have them."""

DOCUMENT: dict[str, Any] = {
    "listeners": [
        {
            "name": "web",
            "address": "127.0.0.1:8080",
            "protocol": "h1",
            "backends": [
                {"address": "127.0.0.1:9000", "id": "b1"},
                {"address": "name.test:9001", "id": "n1"},
                {"address": "gone.test:9001", "id": "g1"},
            ],
        },
        {"name": "relay", "address": "127.0.0.1:8081", "protocol": "tcp", "pool": ODD},
    ],
    "pools": [{"name": ODD, "backends": [{"address": "127.0.0.1:9002"}]}],
}
TRAFFIC: shapes.XdpTraffic = {
    "in_packets": 10,
    "in_bytes": 1000,
    "out_packets": 8,
    "out_bytes": 8000,
    "flows": 4,
}
FLOW: shapes.XdpFlow = {
    "listener": "web",
    "protocol": "tcp",
    "client": "198.51.100.7:40000",
    "vip": "192.0.2.1:80",
    "forwarding": "nat",
    "pool": "web",
    "backend": "b1",
    "source": "10.0.0.254:12345",
    "state": "open",
    "idle_s": 0.25,
}
ADDRESSES = {"name.test": ("10.0.0.1", "10.0.0.2")}


class FakeGateway:
    """What the supervisor does for the admin listener, without workers."""

    def __init__(self) -> None:
        self.loaded = Loaded(Config.model_validate(DOCUMENT), Path("/etc/x.toml"))
        self.reloads = Reloads()
        self.states: dict[tuple[str, str], tuple[str, str]] = {}
        self.merged: Merged = {}
        self.token_hash: str | None = None
        self.is_started = True
        self.reason: str | None = None
        self.fault: Outcome | None = None
        """How the next changes end."""
        self.changes: list[Change] = []
        self.level = "info"
        self.drained_by: list[str] = []
        self.renewed = Outcome(UNCHANGED, ("nothing is newer",))
        self.before_change: Callable[[], None] = lambda: None
        """What happens while a change waits for its turn."""
        self.asked: list[int] = []
        """For how many flows."""
        self.is_detached = False

    def unready(self) -> str | None:
        return self.reason

    def status(self) -> shapes.Status:
        return {
            "pid": 1,
            "version": "0",
            "state": "serving",
            "uptime_s": 1.5,
            "config": self._running(),
            "reload": {"requested": 0, "finished": 0, "last_result": None, "last_report": []},
            "upgrade": {"requested": 0, "finished": 0, "last_failure": None},
            "listeners": [],
            "workers": [],
        }

    def _running(self) -> shapes.Running:
        reloads = self.reloads
        return {"path": str(self.loaded.path), "version": reloads.version, "applied_at": reloads.applied_at}

    def config(self) -> shapes.EffectiveConfig:
        return {**self._running(), "changes": {}, "config": redacted(self.loaded.config)}

    def listeners(self) -> list[shapes.Listener]:
        return []

    def workers(self) -> list[shapes.Worker]:
        return []

    def certificates(self) -> list[dict[str, Any]]:
        return [{"listener": "web", "subject": "CN=localhost"}]

    async def connections(self, limit: int) -> shapes.Connections:
        return {"open": 0, "looked_at": 0, "silent_workers": [], "listeners": [], "listed": []}

    async def xdp(self) -> shapes.Xdp:
        return {
            "state": "attached",
            "fault": "",
            "pin_path": "/sys/fs/bpf/expressgateway",
            "program_id": 7,
            "is_adopted": False,
            "flows": 1,
            "flows_ipv4": 1,
            "flows_ipv6": 0,
            "flows_opening": 0,
            "max_flows": 65536,
            "flows_ended": 3,
            "evictions": 0,
            "next_hops": 2,
            "interfaces": [
                {"name": "eth0", "ifindex": 2, "mode": "native", "is_attached": True, "fault": ""},
                {
                    "name": "eth1",
                    "ifindex": 0,
                    "mode": "",
                    "is_attached": False,
                    "fault": "the interface is gone",
                },
            ],
            "listeners": [
                {
                    "name": "web",
                    "address": "192.0.2.1:80",
                    "protocol": "tcp",
                    "forwarding": "nat",
                    "pool": "web",
                    "backends": 1,
                    "stateless_packets": 0,
                    "passed": {"no_flow": 2},
                    "dropped": {"denied": 5},
                    **TRAFFIC,
                }
            ],
            "backends": [{"pool": "web", "id": "b1", **TRAFFIC}],
            "left_out": [{"pool": "web", "backend": "b2", "cause": "there is no route to it"}],
            "nobodys": {"fragment": 1},
        }

    async def xdp_flows(self, limit: int) -> shapes.XdpFlows:
        self.asked.append(limit)
        return {"flows": [FLOW] * min(limit, 2), "total": 9}

    async def detach_xdp(self) -> bool:
        self.is_detached = not self.is_detached
        return self.is_detached

    def log_level(self) -> str:
        return self.level

    def set_log_level(self, level: str) -> None:
        self.level = level

    async def reload(self, check: Check | None = None) -> Outcome:
        if check is not None:
            check()
        outcome = self.fault or Outcome(UNCHANGED, ("kept: all; dropped: nothing",))
        self.reloads.requested += 1
        return self.reloads.finish(self.reloads.requested, outcome)

    async def renew(self) -> Outcome:
        return self.renewed

    def begin_drain(self, cause: str) -> None:
        self.drained_by.append(cause)

    def facts(self) -> Facts:
        return Facts(self.status(), self.loaded.config)

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        return b"", accept

    def pools(self) -> list[dict[str, Any]]:
        seen = {
            name: [one for backend in backends for one in self._seen(name, backend.id, backend.address)]
            for name, backends in backends_of(self.loaded.config).items()
        }
        return pools_shown(self.loaded.config, seen, self.merged, changes=runtime_changes(self.loaded))

    def _seen(self, pool: str, id_: str, address: Any) -> Iterator[Seen]:
        ips = ADDRESSES.get(address.host, ()) if address.ip is None else (address.host,)
        for ip in ips:
            each = id_ if address.ip is not None else f"{id_}#{ip}"
            state, cause = self.states.get((pool, each), ("unknown", ""))
            yield Seen(each, id_, f"{ip}:{address.port}", state, 1000.0, cause)

    async def change(self, change: Change, check: Check | None = None) -> Outcome:
        self.before_change()
        if check is not None:
            check()
        self.changes.append(change)
        loaded = await asyncio.to_thread(changed, self.loaded, change)
        if self.fault is not None:
            return self.reloads.finish_change(self.fault)
        difference = plan(self.loaded, loaded)
        if difference.is_empty:
            return self.reloads.finish_change(Outcome(UNCHANGED, difference.lines()))
        self.loaded = loaded
        return self.reloads.finish_change(Outcome(APPLIED, difference.lines()))

    def set_state(self, pool: str, backend: str, state: str, cause: str) -> None:
        self.states[pool, backend] = state, cause


@contextmanager
def listening(gateway: FakeGateway) -> Iterator[int]:
    """The port of its admin listener, which runs in a thread of its own."""
    sock = socket.create_server(("127.0.0.1", 0))
    rejects = Tally()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        server = AdminServer(sock, Endpoints(gateway, rejects).answer, rejects)
        await server.start()
        started.set()
        await stop.wait()
        await server.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        started.wait(30)
        yield sock.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        sock.close()
