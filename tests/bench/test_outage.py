"""The scripted outage: what it configures, what it makes of figures, and a short one for real."""

import re
import subprocess
from pathlib import Path

import pytest
from bench.outage import (
    PAGE,
    Outcome,
    Phase,
    Seen,
    arguments,
    full_after,
    run_phase,
    settle,
    shares_of,
    since_of,
)
from bench.outage_changes import KINDS, MOST, Change, Changed, Draw
from bench.outage_report import changes_sections, line, policies_sections, sections, share_steps
from bench.outage_world import (
    NAMES,
    POOLS,
    FaultyBackend,
    Load,
    Settings,
    ask,
    by_label,
    config,
    parse_load,
    parse_metrics,
    total,
    world,
)
from bench.peers import UnavailableError

from expressgateway.config.load import load
from expressgateway.upstream.selection import POLICIES
from tests.e2e.harness import need
from tests.ports import free_port

ADDRESSES = dict(zip(NAMES, ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"), strict=True))
FINE = Load(1000, 2.0, 1000.0, 2000.0, 3000.0, {})


def outcome(name: str, **given: object) -> Outcome:
    values: dict[str, object] = {
        "pool": "web",
        "load": FINE,
        "answered_5xx": 0,
        "reasons": {},
        "retries": {},
        "budget_refused": 0,
        "by_backend": {},
        "events": [],
        "away_s": None,
        "back_s": None,
        "full_s": None,
        "shares": [],
        "may_fail": False,
        "is_return": False,
    }
    return Outcome(name=name, **(values | given))  # type: ignore[arg-type]  # by name, from a test's hand


class TestConfiguration:
    @pytest.mark.parametrize("policy", sorted(POLICIES))
    def test_the_gateway_accepts_it(self, tmp_path: Path, policy: str) -> None:
        ports = dict(zip(POOLS, (free_port() for _ in POOLS), strict=True))
        path = tmp_path / "gateway.toml"
        path.write_text(config(Settings(policy=policy), ADDRESSES, ports, 9), "ascii")
        pools = {pool.name: pool for pool in load(path).config.pools}
        assert list(pools) == list(POOLS)
        for name, rules in POOLS.items():
            pool = pools[name]
            assert pool.outlier is not None
            assert pool.retry is not None
            assert pool.outlier.count_5xx is rules.is_5xx_counted
            assert pool.outlier.panic_threshold_percent == rules.panic_percent
            assert ("5xx" in pool.retry.on) is rules.is_5xx_retried
            assert [backend.id for backend in pool.backends] == list(NAMES)

    def test_the_recommended_settings_are_accepted(self, tmp_path: Path) -> None:
        (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        path = tmp_path / "gateway.toml"
        listener = '[[listeners]]\naddress = "127.0.0.1:9"\nprotocol = "h1"\npool = "api"\n'
        path.write_text(listener + text, "ascii")
        assert [pool.name for pool in load(path).config.pools] == ["api"]

    def test_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert arguments(["--policy", "maglev", "--changes", "0"]).policies == ["maglev"]
        for wrong in (["--changes", "-1"], ["--only-changes", "--changes", "0"], ["--policy", "maglev,none"]):
            with pytest.raises(SystemExit) as caught:
                arguments(wrong)
            assert caught.value.code == 2
        assert "changes is at least 0" in capsys.readouterr().err


class TestFigures:
    TEXT = (
        "# HELP x y\n"
        'backend_requests_total{backend="b2",pool="web",status_class="2xx"} 10.0\n'
        'backend_requests_total{backend="b2",pool="web",status_class="none"} 5.0\n'
        'backend_requests_total{backend="b1",pool="web",status_class="2xx"} 30.0\n'
        'backend_requests_total{backend="b1",pool="other",status_class="2xx"} 9.0\n'
        "up 1.0\n"
    )

    def test_metrics(self) -> None:
        metrics = parse_metrics(self.TEXT)
        assert total(metrics, "up") == 1
        assert total(metrics, "backend_requests_total", pool="web") == 45
        assert by_label(metrics, "backend_requests_total", "backend", pool="web") == {"b1": 30, "b2": 15}
        since = since_of(metrics, parse_metrics(self.TEXT.replace("30.0", "37.0")))
        assert since("backend_requests_total", "backend") == {"b1": 7}

    def test_attempts_without_an_answer_are_no_share(self) -> None:
        before = parse_metrics(self.TEXT)
        after = parse_metrics(
            self.TEXT.replace("30.0", "39.0").replace("10.0", "11.0").replace("5.0", "99.0")
        )
        assert shares_of([(1.0, before), (1.25, after), (1.5, after)], "web") == [(1.25, 0.1)]

    def test_full_share(self) -> None:
        shares = [(at / 4, min(1.0, at / 20) / 3) for at in range(40)]
        full_s = full_after(shares, 1.0)
        assert full_s is not None
        assert 18 / 4 - 1 - 0.5 <= full_s <= 18 / 4 - 1
        assert full_after(shares[:16], 1.0) is None
        assert full_after([], 0.0) is None

    def test_steps_of_shares(self) -> None:
        steps = share_steps([(0.9, 1.0), (1.25, 0.1), (1.45, 0.3), (1.75, 0.5)], back_s=1.0)
        assert steps == pytest.approx([0.2, 0.5])

    def test_wrk(self) -> None:
        said = (
            'x\nRESULT {"requests":7,"microseconds":2000000,"p50":1.5,"p99":9,"max":12,'
            '"status":2,"connect":0,"read":1,"write":0,"timeout":0}\n'
        )
        read = parse_load(said)
        assert (read.requests, read.seconds, read.errors, read.failures) == (
            7,
            2.0,
            {"status": 2, "read": 1},
            3,
        )
        with pytest.raises(UnavailableError, match="no result"):
            parse_load("wrk: unable to connect")

    def test_what_is_clean(self) -> None:
        failed = Load(1, 1.0, 1.0, 1.0, 1.0, {"timeout": 1})
        assert outcome("x").is_clean
        for given in ({"load": failed}, {"answered_5xx": 1}, {"reasons": {"backend_reset": 1}}):
            assert not outcome("x", **given).is_clean
        fine = [Change("add", 0.1, 201)]
        assert Changed("p", fine, FINE, 0).is_clean
        for changed in (
            Changed("p", [Change("add", 0.1, 422)], FINE, 0),
            Changed("p", fine, failed, 0),
            Changed("p", fine, FINE, 1),
        ):
            assert not changed.is_clean

    def test_report(self) -> None:
        lost = Load(100, 2.0, 1000.0, 20_000.0, 3e6, {"status": 3})
        events = [Seen(0.31, "ejected", "backend web/b2 becomes ejected: why")]
        outcomes = [
            outcome("hung", load=lost, answered_5xx=3, retries={"timeout": 4}, away_s=0.31, events=events),
            outcome("again", is_return=True, back_s=0.5, full_s=3.0, shares=[(0.75, 0.1), (1.25, 0.2)]),
        ]
        text = "\n".join(sections(outcomes))
        assert "| hung  |  3 failed, p99 20 ms, away 0.31 s |" in "\n".join(
            policies_sections({"maglev": outcomes})
        )
        for part in ("3 (3 status)", "4 timeout", "0.31 s", "3000 ms", "becomes ejected: why", "10%", "20%"):
            assert part in text
        assert "3 failed" in line(outcomes[0])
        changes = "\n".join(changes_sections([Changed("maglev", [Change("add", 0.002, 201)], FINE, 0)]))
        assert "| maglev |" in changes
        assert "2.0 ms" in changes


class TestDraw:
    @pytest.mark.parametrize("seed", range(5))
    def test_somebody_always_works(self, seed: int) -> None:
        draw = Draw(ADDRESSES, seed)
        kinds = set()
        for _ in range(500):
            before = set(draw.known)
            kind, method, name, body = draw.next()
            kinds.add(kind)
            assert any(each.is_used for each in draw.known.values())
            assert 2 <= len(draw.known) <= MOST
            assert method == {"add": "POST", "remove": "DELETE"}.get(kind, "PATCH")
            assert name in before or (kind == "add" and not name)
            assert (body is None) is (kind == "remove")
        assert kinds == set(KINDS)

    def test_the_same_seed_draws_the_same(self) -> None:
        one, other = Draw(ADDRESSES), Draw(ADDRESSES)
        assert [one.next() for _ in range(50)] == [other.next() for _ in range(50)]


class TestBackend:
    def test_modes_and_count(self) -> None:
        backend = FaultyBackend("b1", free_port())
        try:
            backend.start()
            assert ask(backend.port, "GET", "/work") == (200, "b1")
            backend.mode("error")
            assert ask(backend.port, "GET", "/work")[0] == 500
            assert ask(backend.port, "GET", "/health")[0] == 200
            backend.mode("nonsense")
            assert ask(backend.port, "GET", "/work")[0] == 500
            backend.mode("ok")
            assert ask(backend.port, "GET", "/work") == (200, "b1")
            assert backend.served() == 4
            backend.stop()
            with pytest.raises(TimeoutError):
                ask(backend.port, "GET", "/work", timeout_s=0.2)
            backend.resume()
            assert ask(backend.port, "GET", "/work") == (200, "b1")
            backend.kill()
            with pytest.raises(ConnectionError):
                ask(backend.port, "GET", "/work")
            backend.start()
            assert backend.served() == 0
        finally:
            backend.kill()


@pytest.mark.slow
@need("wrk")
def test_a_short_outage(tmp_path: Path) -> None:
    """One backend is killed under wrk; everything has ended afterwards."""
    processes: list[subprocess.Popen[bytes] | None] = []
    with world(tmp_path, Settings(interval_ms=100, pools=("web",))) as here:
        settle(here)
        seen = run_phase(here, Phase("killed", 2, lambda world: world.victim.kill()))
        processes = [here.process, *(backend.process for backend in here.backends.values())]
    assert seen.is_clean, seen
    assert seen.load.requests > 100
    assert seen.away_s is not None
    assert seen.away_s < 1.0
    assert seen.retries
    assert all(process is not None and process.poll() is not None for process in processes)
