"""The XDP data plane in the supervisor, with a plane that only remembers what it was told."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from expressgateway.config.schema import PASSTHROUGH, Config
from expressgateway.control import xdp as subject
from expressgateway.control.failures import StartError
from expressgateway.control.xdp import Xdp
from expressgateway.control.xdp_samples import samples_of
from expressgateway.control.xdp_shown import shown_flow, shown_xdp
from expressgateway.control.xdp_wanted import Known, wanted_of
from expressgateway.l4.xdp.faults import XdpError
from expressgateway.l4.xdp.layout import REASON_COUNT, Reason
from expressgateway.l4.xdp.seen import BackendSeen, Counted, FlowSeen, VipSeen
from expressgateway.l4.xdp.wanted import TCP, UDP, ServerIds, Wanted
from expressgateway.observe.counters import SUPERVISOR_FAMILIES
from expressgateway.upstream.backend import BackendSettings

REASONS = tuple(number if number in (3, 8) else 0 for number in range(REASON_COUNT))


def config(**runtime: object) -> Config:
    maglev: dict[str, object] = {"policy": "maglev", "table_size": 251}
    return Config.model_validate(
        {
            "listeners": [
                {
                    "name": "web",
                    "address": "203.0.113.1:80",
                    "protocol": "tcp",
                    "xdp": True,
                    "drain_timeout_ms": 3000,
                    "backends": [{"address": "10.0.0.1:8080", "id": "b1"}],
                    "load_balancing": {**maglev, "slow_start_ms": 5000},
                },
                {
                    "name": "names",
                    "address": "[2001:db8::1]:53",
                    "protocol": "udp",
                    "xdp": True,
                    "xdp_forwarding": "dsr",
                    "pool": "shared",
                },
                {"name": "plain", "address": "0.0.0.0:81", "protocol": "tcp", "pool": "shared"},
            ],
            "pools": [
                {
                    "name": "shared",
                    "backends": [{"address": "[2001:db8::2]:53"}],
                    "load_balancing": {**maglev, "hash_key": "client_ip"},
                }
            ],
            "passthrough": {
                "bind_addr": "203.0.113.1:443",
                "backends": [{"address": "10.0.0.3:443", "id": "0a"}],
                "cid_routing": {"config_id": 2, "server_id_length": 1},
                "xdp": True,
            },
            "runtime": {"xdp_enabled": True, "xdp_interface": ["e0", "e1"], **runtime},
        }
    )


def settings(id_: str, weight: int = 1) -> BackendSettings:
    return BackendSettings(id_, "10.0.0.1", 8080, "tcp", weight, None, None)


def known(pool: str) -> Known:
    if pool != "web":
        return Known()
    found = tuple(
        (settings(id_, weight), (f"10.0.0.{at}", 8080), id_)
        for at, (id_, weight) in enumerate([("b1", 1), ("b2", 3), ("b3", 0), ("b4", 1), ("b5", 1)], 1)
    )
    return Known(found, {"panic": False, "down": ["b2"], "draining": ["b4"], "ramps": {"b5": 77.0}})


class TestWanted:
    def test_listeners_are_vips(self) -> None:
        web, names, mode_a = wanted_of(config(), known).vips
        assert (web.name, web.place, web.pool, web.forwarding) == (
            "web",
            (ip_address("203.0.113.1"), 80, TCP),
            "web",
            "nat",
        )
        assert (web.is_by_address, web.drain_s) == (False, 3.0)
        assert (names.place, names.pool, names.forwarding) == (
            (ip_address("2001:db8::1"), 53, UDP),
            "shared",
            "dsr",
        )
        assert names.is_by_address
        assert (mode_a.name, mode_a.place) == (PASSTHROUGH, (ip_address("203.0.113.1"), 443, UDP))
        assert mode_a.server_ids == ServerIds(2, 1)

    def test_backends_stand_as_workers_are_told(self) -> None:
        pool = wanted_of(config(), known).pools["web"]
        assert (pool.table_size, pool.slow_start_s, pool.drain_s) == (251, 5.0, 3.0)
        assert [
            (each.id, each.weight, each.is_alive, each.is_open, each.ramp_from_s) for each in pool.backends
        ] == [
            ("b1", 1, True, True, 0.0),
            ("b2", 3, False, False, 0.0),
            ("b3", 0, True, False, 0.0),
            ("b4", 1, True, False, 0.0),
            ("b5", 1, True, True, 77.0),
        ]

    def test_rules(self) -> None:
        rules = wanted_of(
            config(
                xdp_source_ports="20000-20999",
                xdp_denied=["192.0.2.0/24"],
                xdp_new_flow_cap_per_sec_per_cpu=0,
                xdp_closing_timeout_seconds=3,
            ),
            known,
        ).rules
        assert (rules.first_port, rules.last_port, rules.closing_s) == (20000, 20999, 3)
        assert rules.denied == {ip_network("192.0.2.0/24")}
        assert rules.new_flows_per_second == 0

    def test_nothing_where_it_is_off(self) -> None:
        off = wanted_of(config(xdp_enabled=False), known)
        assert (off.vips, off.pools) == ((), {})


class FakeAttachments:
    def __init__(self) -> None:
        self.attached: list[tuple[tuple[str, ...], str]] = []

    def attach(self, names: tuple[str, ...], mode: str) -> None:
        self.attached.append((tuple(names), mode))


class FakePlane:
    """What `DataPlane` is to the supervisor."""

    def __init__(self) -> None:
        self.attachments = FakeAttachments()
        self.pin_path = Path("/sys/fs/bpf/fake")
        self.is_adopted = False
        self.is_ramping = False
        self.wanted = Wanted()
        self.applied: list[Wanted] = []
        self.calls: list[str] = []
        self.refuses = ""
        self.open = 0
        self.removed = 5
        self.evicted = 2
        self.changes = False

    def apply(self, wanted: Wanted) -> None:
        if self.refuses:
            raise XdpError(self.refuses)
        self.applied.append(wanted)
        self.wanted = wanted

    def watch(self) -> bool:
        self.calls.append("watch")
        was, self.changes = self.changes, False
        return was

    def keep_neighbours(self) -> bool:
        self.calls.append("keep_neighbours")
        return False

    def expire(self) -> None:
        self.calls.append("expire")

    def sweep(self) -> None:
        self.calls.append("sweep")

    def counts(self) -> Counted:
        vip = VipSeen(10, 1000, 8, 8000, 4, 1, 2, 3, REASONS)
        return Counted({"web": vip}, {("web", "b1"): BackendSeen(10, 1000, 8, 8000, 4)})

    def seen_flows(self, limit: int) -> list[FlowSeen]:
        return [FLOW] * limit

    def status(self) -> dict[str, Any]:
        return {
            "program_id": 7,
            "pin_path": str(self.pin_path),
            "is_adopted": False,
            "max_flows": 1024,
            "flows": self.open,
            "flows_ipv4": self.open,
            "flows_ipv6": 0,
            "flows_opening": 0,
            "next_hops": 1,
            "interfaces": [
                {"name": "e0", "ifindex": 3, "mode": "native", "is_attached": True, "fault": ""},
                {
                    "name": "e1",
                    "ifindex": 0,
                    "mode": "",
                    "is_attached": False,
                    "fault": "the interface is gone",
                },
            ],
            "left_out": [{"pool": "web", "backend": "b5", "cause": "there is no route to it"}],
        }

    def detach(self) -> None:
        self.calls.append("detach")

    def close(self) -> None:
        self.calls.append("close")


FLOW = FlowSeen(
    "web", "tcp", "192.0.2.7:1", "203.0.113.1:80", "nat", "web", "b1", "10.0.0.9:10000", "open", 0.5
)


class Scene:
    """An `Xdp` whose planes can be looked at."""

    def __init__(self, *, takes_over: bool = False) -> None:
        self.planes: list[FakePlane] = []
        self.opened: list[tuple[Any, ...]] = []
        self.refuses = ""
        self.xdp = Xdp(known, takes_over=takes_over, open_plane=self._open)

    def _open(self, *arguments: object, **named: object) -> Any:
        self.opened.append((*arguments, *named.values()))
        if self.refuses:
            raise XdpError(self.refuses)
        self.planes.append(FakePlane())
        return self.planes[-1]

    @property
    def plane(self) -> FakePlane:
        return self.planes[-1]

    def is_on(self) -> bool:
        return self.xdp.is_on

    async def start(self, config: Config) -> None:
        await self.xdp.prepare(config)
        await self.xdp.adopt(config, is_first=True)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The devices there are, and the sysctls that are off."""
    found: dict[str, list[str]] = {"devices": ["e0", "e1", "e2"], "off": []}
    monkeypatch.setattr(subject, "ifindex_of", lambda name: int(name in found["devices"]))
    monkeypatch.setattr(subject, "forwarding_off", lambda names, versions: found["off"])
    return found


def play(scene: Callable[[Scene], Awaitable[None]], **more: bool) -> Scene:
    made: list[Scene] = []

    async def main() -> None:
        made.append(Scene(**more))
        try:
            async with asyncio.timeout(20):
                await scene(made[0])
        finally:
            await made[0].xdp.close()

    asyncio.run(main())
    return made[0]


class TestConfigurations:
    def test_a_start_attaches_and_then_writes(self) -> None:
        async def scene(it: Scene) -> None:
            await it.xdp.prepare(config())
            assert it.opened == [(("e0", "e1"), "auto", Path("/sys/fs/bpf/expressgateway"), 65536, False)]
            assert it.plane.applied == []
            await it.xdp.adopt(config(), is_first=True)
            assert it.plane.applied == [wanted_of(config(), known)]

        play(scene)

    def test_without_it_there_is_nothing(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config(xdp_enabled=False))
            assert not it.is_on()
            assert list(samples_of(it.xdp)) == []
            assert shown_xdp(it.xdp, config(xdp_enabled=False))["state"] == "off"
            it.xdp.poke()
            await it.xdp.refresh()
            assert await it.xdp.seen_flows(1) == ()
            assert not await it.xdp.detach()

        assert play(scene).opened == []

    def test_what_cannot_be_had_is_a_start_error(self, kernel: dict[str, list[str]]) -> None:
        async def scene(it: Scene) -> None:
            it.refuses = "the gateway lacks CAP_BPF"
            with pytest.raises(StartError, match=r"^XDP: the gateway lacks CAP_BPF$"):
                await it.xdp.prepare(config())
            it.refuses = ""
            with pytest.raises(StartError, match="there is no network interface e9"):
                await it.xdp.prepare(config(xdp_interface=["e0", "e9"]))
            kernel["off"] = ["net.ipv4.conf.e0.forwarding"]
            with pytest.raises(StartError, match=r"sysctl -w net\.ipv4\.conf\.e0\.forwarding=1"):
                await it.xdp.prepare(config())
            assert not it.is_on()

        play(scene)

    def test_what_cannot_be_written_at_first_is_one_too(self) -> None:
        async def scene(it: Scene) -> None:
            await it.xdp.prepare(config())
            it.plane.refuses = "no room"
            with pytest.raises(StartError, match="no room"):
                await it.xdp.adopt(config(), is_first=True)

        play(scene)

    def test_what_fails_before_it_was_used_is_taken_away_again(self) -> None:
        async def scene(it: Scene) -> None:
            await it.xdp.prepare(config())

        assert play(scene).plane.calls == ["detach"]

    def test_what_serves_is_left_to_the_next_process(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())

        assert play(scene).plane.calls == ["close"]

    def test_other_interfaces(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp.prepare(config(xdp_interface="e2", xdp_mode="skb"))
            assert it.plane.attachments.attached == [(("e2",), "skb")]
            await it.xdp.restore(config())
            assert it.plane.attachments.attached[-1] == (("e0", "e1"), "auto")
            assert it.plane.wanted == wanted_of(config(), known)

        assert len(play(scene).planes) == 1

    def test_one_that_has_gone_is_no_reason_to_refuse_another_change(
        self, kernel: dict[str, list[str]]
    ) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            kernel["devices"] = []
            kernel["off"] = ["net.ipv4.conf.e0.forwarding"]
            await it.xdp.prepare(config(), is_read=False)
            with pytest.raises(StartError, match="forwarding"):
                await it.xdp.prepare(config())

        play(scene)

    def test_room_for_more_flows_is_another_program(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp.prepare(config(xdp_max_flows=2048))
            assert it.planes[0].calls == ["detach"]
            await it.xdp.adopt(config(xdp_max_flows=2048))
            assert it.plane.applied == [wanted_of(config(), known)]
            it.refuses = "no memory"
            with pytest.raises(XdpError, match="no memory"):
                it.xdp._prepare(config(xdp_max_flows=4096), True)

        play(scene)

    def test_turned_off_its_flows_may_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.open = 3
            await it.xdp.refresh()
            off = config(xdp_enabled=False)
            await it.xdp.prepare(off)
            await it.xdp.adopt(off)
            assert it.plane.wanted.vips == ()
            assert shown_xdp(it.xdp, off)["state"] == "leaving"
            await it.xdp._tick(1)
            assert it.is_on()
            it.plane.open = 0
            await it.xdp._tick(2)
            assert not it.is_on()
            assert it.plane.calls[-1] == "detach"

        play(scene)

    def test_turned_off_and_on_it_stays(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.open = 3
            for runtime in ({"xdp_enabled": False}, {}):
                await it.xdp.prepare(config(**runtime))
                await it.xdp.adopt(config(**runtime))
            await it.xdp._tick(1)
            assert shown_xdp(it.xdp, config())["state"] == "partly attached"

        assert len(play(scene).planes) == 1


class TestLife:
    def test_a_change_of_health_is_written_soon(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            running = asyncio.get_running_loop().create_task(it.xdp.run())
            for expected in (2, 3):
                it.xdp.poke()
                while len(it.plane.applied) < expected:  # noqa: ASYNC110 - it is told on another thread
                    await asyncio.sleep(0.01)
            running.cancel()

        began = time.monotonic()
        play(scene)
        assert time.monotonic() - began < 1

    def test_a_tick_looks_after_everything(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp._tick(1)
            assert it.plane.calls == ["watch", "expire", "keep_neighbours"]
            await it.xdp._tick(2)
            assert it.plane.calls[3:] == ["watch", "expire", "sweep"]
            assert not it.xdp._dirty
            it.plane.changes = True
            await it.xdp._tick(3)
            assert it.xdp._dirty

        play(scene)

    def test_what_goes_wrong_is_said_once_and_tried_again(self, caplog: pytest.LogCaptureFixture) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.refuses = "the kernel has no memory"
            for _ in range(3):
                await it.xdp._apply()
            assert it.xdp.fault == "the kernel has no memory"
            assert it.xdp._dirty
            it.plane.refuses = ""
            await it.xdp._apply()
            assert (it.xdp.fault, it.xdp._dirty) == ("", False)

        play(scene)
        assert caplog.messages.count("XDP: the kernel has no memory") == 1

    def test_the_drain_ends_with_the_last_flow(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.open = 1
            await it.xdp.stop_accepting()
            assert it.plane.wanted.is_closing
            draining = asyncio.get_running_loop().create_task(it.xdp.drain(10))
            await asyncio.sleep(0.05)
            assert not draining.done()
            it.plane.open = 0
            await draining
            await it.xdp.end()
            assert it.plane.calls[-1] == "detach"

        play(scene)

    def test_or_when_its_time_is_over(self, caplog: pytest.LogCaptureFixture) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.open = 2
            await it.xdp.drain(0.05)

        play(scene)
        assert "2 flows were still open in the kernel" in caplog.messages

    def test_held_for_another_supervisor_it_writes_nothing(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp.hold()
            await it.xdp._apply()
            await it.xdp._tick(1)
            await it.xdp.refresh()
            assert (len(it.plane.applied), it.plane.calls) == (1, [])
            await it.xdp.resume()
            # what the other one has written is read anew
            assert it.opened[-1][-1] is True
            assert it.planes[0].calls == ["close"]
            assert len(it.planes[1].applied) == 1

        play(scene)

    def test_where_the_other_one_has_none_ours_ends_with_us(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp.hold()
            await it.xdp.part()
            assert it.plane.wanted.is_closing

        play(scene)

    def test_taken_away_by_an_operator_until_the_file_is_read(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            assert await it.xdp.detach()
            assert it.plane.calls == ["detach"]
            assert shown_xdp(it.xdp, config())["state"] == "detached"
            await it.xdp.prepare(config(), is_read=False)
            await it.xdp.adopt(config())
            assert not it.is_on()
            await it.start(config())
            assert it.is_on()
            assert not it.xdp.is_detached

        assert len(play(scene).planes) == 2


class TestSeen:
    def test_every_metric_is_in_the_catalogue_and_every_one_of_the_catalogue_is_there(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            it.plane.open = 7
            await it.xdp.refresh()
            samples = list(samples_of(it.xdp))
            names = {name for name, _, _ in samples}
            assert names == {name for name in SUPERVISOR_FAMILIES if name.startswith("xdp_")}
            for name, labels, _ in samples:
                assert len(labels) == len(SUPERVISOR_FAMILIES[name].labels), name
            values = {(name, *labels): value for name, labels, value in samples}
            assert values["xdp_attached", "e0", "native"] == 1
            assert values["xdp_attached", "e1", "none"] == 0
            assert values["xdp_flow_entries", "ipv4"] == 7
            assert values["xdp_flow_evictions",] == 2
            assert values["xdp_packets", "web", "out"] == 8
            assert values["xdp_not_forwarded_packets", "web", "pass", "no_flow"] == Reason.PASS_NO_FLOW
            assert values["xdp_not_forwarded_packets", "web", "drop", "denied"] == Reason.DROP_DENIED
            assert values["xdp_backend_bytes", "web", "b1", "out"] == 8000

        play(scene)

    def test_what_the_admin_listener_shows(self) -> None:
        async def scene(it: Scene) -> None:
            await it.start(config())
            await it.xdp.refresh()
            shown = shown_xdp(it.xdp, config())
            assert (shown["state"], shown["evictions"]) == ("partly attached", 2)
            web, names, mode_a = shown["listeners"]
            assert (web["address"], web["protocol"], web["pool"]) == ("203.0.113.1:80", "tcp", "web")
            assert web["backends"] == 1  # b5 is open as well, and left out
            assert (web["passed"], web["dropped"]) == ({"no_flow": 3}, {"denied": 8})
            assert (names["forwarding"], names["flows"]) == ("dsr", 0)
            assert (mode_a["name"], mode_a["protocol"]) == (PASSTHROUGH, "quic")
            flows = await it.xdp.seen_flows(2)
            assert [shown_flow(flow)["client"] for flow in flows] == ["192.0.2.7:1"] * 2

        play(scene)
