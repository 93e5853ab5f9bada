"""The picture of the gateway: what is in it, and what bounds it."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

import pytest

from expressgateway.config.schema import Config
from expressgateway.control.admin.feed import event
from expressgateway.control.admin.live import HISTORY, Facts, Live, attention
from expressgateway.control.admin.pool_pictures import MAX_BACKENDS, MAX_ROWS
from expressgateway.control.health import HealthBoard
from expressgateway.control.ledger import Contribution, Ledger
from expressgateway.observe.counters import Sample
from expressgateway.worker.reports import Changes
from tests.control.test_health import targets

WALL = 1_700_000_000.0


def config(pools: int = 1, backends: int = 2) -> Config:
    return Config.model_validate(
        {
            "listeners": [
                {"name": f"web{n}", "address": f"127.0.0.1:{8000 + n}", "protocol": "h1", "pool": f"shop{n}"}
                for n in range(pools)
            ],
            "pools": [
                {
                    "name": f"shop{n}",
                    "backends": [
                        {"id": f"b{each}", "address": f"127.0.0.1:{9000 + each}"} for each in range(backends)
                    ],
                }
                for n in range(pools)
            ],
            "observability": {"max_label_cardinality": 1_000_000},
        }
    )


def status(**more: Any) -> dict[str, Any]:
    return {
        "pid": 7,
        "version": "1.2",
        "state": "serving",
        "uptime_s": 5.0,
        "config": {"path": "/gateway.toml", "version": 3, "applied_at": WALL},
        "reload": {"requested": 1, "finished": 1, "last_result": "applied", "last_report": ["swapped"]},
        "listeners": [{"name": "web0", "protocol": "h1", "bound": "127.0.0.1:8000", "open": 4}],
        "workers": [{"index": 0, "pid": 8, "state": "serving", "restarts": 0, "deaths_in_a_row": 0}],
    } | more


class Crew:
    def __init__(self) -> None:
        self.ledger = Ledger()
        self.aborted: dict[str, int] = {}
        self.cpu_s = 0.0
        self._workers: dict[int, tuple[Changes, Contribution]] = {}

    def record(self, index: int, samples: list[Sample]) -> None:
        """What a worker counts now."""
        changes, contribution = self._workers.setdefault(index, (Changes(), self.ledger.join()))
        changes.look((self, None, lambda: samples))
        changes.finish()
        contribution.take(changes.take())

    def samples(self) -> Iterable[Sample]:
        yield "worker_rss_bytes", ("0",), 64_000_000
        yield "worker_cpu_seconds", ("0",), self.cpu_s


class World:
    """A gateway whose counters go on by the second; to be made within a loop."""

    def __init__(self, pools: int = 1, backends: int = 2) -> None:
        self.config = config(pools, backends)
        self.crew = Crew()
        self.board = HealthBoard(lambda _: None, wall=lambda: WALL)
        self.ids = [f"b{n}" for n in range(backends)]
        self.board.adopt({f"shop{n}": targets(*self.ids) for n in range(pools)})
        self.status = status()
        self.drain: dict[str, float] = {}
        self.own: tuple[Sample, ...] = ()
        self.now = 100.0
        self.live = Live(self.facts, mono=lambda: self.now, wall=lambda: WALL + self.now)

    def facts(self) -> Facts:
        return Facts(self.status, self.config, self.crew, self.board, self.drain, self.own)

    def count(self, samples: list[Sample], seconds: float = 1.0) -> None:
        self.now += seconds
        self.crew.record(0, samples)
        self.crew.ledger.recorded_at = self.now

    async def picture(self) -> Any:
        return await self.live.picture()


def served(requests: int, failures: int = 0) -> list[Sample]:
    durations: list[float] = [0.0] * 16
    durations[3] = requests  # 2.5 to 5 ms
    return [
        ("http_requests", ("web0", "all", "1.1", "2xx"), requests),
        ("http_requests", ("web0", "all", "1.1", "5xx"), failures),
        ("http_request_duration_seconds", ("web0", "all", "1.1"), durations),
        ("http_response_bytes", ("web0",), requests * 1000),
        ("relay_bytes", ("web0", "from_client"), requests * 10),
        ("connections", ("web0",), requests // 10),
        ("http_gateway_errors", ("web0", "backend_reset"), failures),
        ("security_events", ("web0", "rapid_reset"), 3),
        ("backend_requests", ("shop0", "b0", "2xx"), requests),
        ("backend_requests", ("shop0", "b1", "none"), failures),
        ("backend_inflight", ("shop0", "b0"), 2),
        ("worker_loop_lag_seconds", ("0",), 0.002),
    ]


CERTIFICATE: Sample = ("certificate_expiry_timestamp_seconds", ("web0", "a.example"), WALL + 3 * 86400)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_rates_need_two_looks() -> None:
    async def main() -> None:
        world = World()
        world.own = (CERTIFICATE,)
        world.count(served(100))
        first = await world.picture()
        assert first["measured_s"] is None
        assert first["totals"]["rps"] is None
        assert first["totals"]["p50"] is None
        assert first["totals"]["open"] == 4
        assert first["pools"][0]["backends"][0]["in_flight"] == 2
        world.crew.cpu_s = 0.25
        world.count(served(300, 20))
        second = await world.picture()
        assert second["measured_s"] == 1.0
        world.board.close()

        totals = second["totals"]
        assert (totals["rps"], totals["errors_ps"], totals["classes"]) == (
            220.0,
            20.0,
            {"2xx": 200.0, "5xx": 20.0},
        )
        assert (totals["p50"], totals["p90"]) == (3.75, 4.75)
        assert (totals["in_bps"], totals["out_bps"], totals["connections_ps"]) == (2000.0, 200_000.0, 20.0)
        (listener,) = second["listeners"]
        assert (listener["name"], listener["rps"], listener["p99"]) == ("web0", 220.0, 4.975)
        (route,) = second["routes"]
        assert (route["route"], route["rps"], route["errors_ps"]) == ("all", 220.0, 20.0)
        assert second["errors"] == [{"listener": "web0", "reason": "backend_reset", "total": 20, "ps": 20.0}]
        assert second["security"] == [{"listener": "web0", "reason": "rapid_reset", "total": 3, "ps": 0.0}]
        (pool,) = second["pools"]
        assert (pool["rps"], pool["errors_ps"], pool["in_flight"]) == (220.0, 20.0, 2)
        assert [(each["rps"], each["errors_ps"]) for each in pool["backends"]] == [(200.0, 0), (20.0, 20.0)]
        (worker,) = second["workers"]
        assert (worker["cpu_percent"], worker["rss_bytes"], worker["lag_ms"]) == (25.0, 64_000_000, 2.0)
        assert second["certificates"][0]["subject"] == "a.example"
        texts = [one["text"] for one in second["attention"]]
        assert texts == [
            "More than 5% of the requests end in an error",
            "The certificate of web0 (a.example) expires in 2 days",
        ]

    run(main())


def test_counters_that_stand_still_for_long_are_no_rate() -> None:
    async def main() -> None:
        world = World()
        for requests in (100, 200):
            world.count(served(requests))
            picture = await world.picture()
        assert picture["totals"]["rps"] == 100.0
        world.now += 60  # no worker has said anything since
        assert (await world.picture())["totals"]["rps"] is None
        world.board.close()

    run(main())


def test_the_past_is_told_first() -> None:
    async def main() -> None:
        world = World()
        for requests in range(HISTORY + 5):
            world.count(served(requests))
            await world.picture()
        events = world.live.feed.watch()
        told = await anext(events)
        await events.aclose()
        world.board.close()
        assert told.startswith(b"event: history\ndata: [[")
        assert told.count(b"],[") == HISTORY - 1

    run(main())


def test_an_event_is_one_line_whatever_a_cause_says() -> None:
    assert event("state", {"cause": "a\n\ndata: b"}).count(b"\n") == 3


def test_those_that_are_not_well_come_first_with_their_cause() -> None:
    async def main() -> None:
        world = World(backends=100)
        world.board.outcomes({"pools": {"shop0": {"b77": [0, 5, 5, "connection refused"]}}})
        world.board.set_state("shop0", "b88", "draining", "an operator")
        world.count([])
        (pool,) = (picture := await world.picture())["pools"]
        world.board.close()
        assert [each["id"] for each in pool["backends"][:3]] == ["b77", "b88", "b0"]
        assert pool["backends"][0]["state"] == "ejected"
        assert "connection refused" in pool["backends"][0]["cause"]
        assert pool["states"] == {"unknown": 98, "ejected": 1, "draining": 1}
        assert pool["ejections"] == 1
        assert (len(pool["backends"]), pool["more"]) == (MAX_BACKENDS, 100 - MAX_BACKENDS)
        levels = [(one["level"], one["text"].partition(":")[0]) for one in picture["attention"]]
        assert levels == [("bad", "shop0 / b77 is ejected"), ("info", "shop0 / b88 is draining")]

    run(main())


def test_rows_are_bounded_over_all_pools() -> None:
    async def main() -> None:
        world = World(pools=15, backends=50)
        world.count([])
        pools = (await world.picture())["pools"]
        world.board.close()
        assert len(pools) == 15
        assert sum(len(pool["backends"]) for pool in pools) == MAX_ROWS
        assert all(len(pool["backends"]) + pool["more"] == 50 for pool in pools)

    run(main())


def test_others_run_while_a_thousand_backends_are_looked_at() -> None:
    async def main() -> None:
        world = World(pools=10, backends=100)
        for index in range(8):
            world.crew.record(
                index,
                [
                    ("backend_requests", (f"shop{pool}", id_, status_class), index)
                    for pool in range(10)
                    for id_ in world.ids
                    for status_class in ("2xx", "4xx", "5xx")
                ],
            )
        turns = 0
        work = asyncio.get_running_loop().create_task(world.picture())
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
        world.board.close()
        assert turns > 6

    run(main())


def test_a_drain_and_its_workers() -> None:
    async def main() -> None:
        world = World()
        world.status = status(
            state="draining",
            workers=[{"index": 0, "pid": None, "state": "dead", "restarts": 0, "deaths_in_a_row": 0}],
        )
        world.drain = {"settle": 1.0, "finish": 2.5}
        world.crew.aborted = {"web0": 1}
        world.count([])
        picture = await world.picture()
        world.board.close()
        assert picture["drain"]["phases"] == {"settle": 1.0, "finish": 2.5}
        assert picture["drain"]["open"] == {"web0": 4}
        assert picture["drain"]["aborted"] == {"web0": 1}
        assert picture["workers"][0]["state"] == "ended"
        assert picture["attention"] == [
            {"level": "warn", "text": "The gateway is stopping: accepting nothing more"}
        ]

    run(main())


def test_before_there_are_workers() -> None:
    async def main() -> None:
        live = Live(lambda: Facts(status(state="booting", workers=[], listeners=[]), config()))
        picture = await live.picture()
        assert picture["pools"] == []
        assert picture["attention"] == [{"level": "warn", "text": "The gateway is booting"}]

    run(main())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"reload": {"last_result": "refused", "last_report": ["the port is taken"]}},
            "The last reload was refused: the port is taken",
        ),
        (
            {"workers": [{"index": 1, "state": "starting", "deaths_in_a_row": 1}]},
            "Worker 1 is starting",
        ),
        (
            {"workers": [{"index": 1, "state": "serving", "deaths_in_a_row": 2}]},
            "Worker 1 does not stay alive",
        ),
        (
            {"pools": [{"name": "a", "panic": True, "backends": []}]},
            "Pool a: too few backends are well, so all",
        ),
        (
            {"pools": [{"name": "a", "panic": False, "backends": [], "warning": "pool a has no backends"}]},
            "Pool a has no backends",
        ),
        (
            {"certificates": [{"listener": "web", "subject": "x", "expires_at": 9.0}]},
            "The certificate of web (x) has expired",
        ),
    ],
)
def test_what_somebody_should_look_at(change: dict[str, Any], text: str) -> None:
    calm: dict[str, Any] = {
        "at": 10.0,
        "gateway": {"state": "serving"},
        "reload": {"last_result": None, "last_report": []},
        "totals": {"rps": None, "errors_ps": None},
        "workers": [],
        "pools": [],
        "certificates": [],
        "drain": None,
    }
    assert attention(calm) == []
    (one,) = attention(calm | change)
    assert one["level"] == "bad"
    assert one["text"].startswith(text)
