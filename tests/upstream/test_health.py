"""A pool's health as conversations: what is heard, when, and what is said of it. Time is moved by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.upstream.health import Member, PoolHealth
from expressgateway.upstream.health_backend import (
    ADMIN_STATES,
    STATES,
    USABLE,
    BackendHealth,
    HealthSettings,
    LastProbe,
    Moment,
    OutlierSettings,
)

PROBED = HealthSettings(
    type="tcp",
    path="/",
    host=None,
    expect_status=frozenset({200}),
    expect_body=None,
    interval_s=5,
    timeout_s=2,
    rise=3,
    fall=2,
    jitter=0.2,
)
JUDGED = OutlierSettings(
    consecutive_failures=5,
    failure_percent=0,
    window_s=10,
    ejection_s=30,
    max_ejection_s=300,
    max_ejection_percent=50,
    panic_threshold_percent=0,
)
WALL = 1_700_000_000.0


class Talk:
    """One pool, its clock, and everything it has said."""

    def __init__(
        self,
        *ids: str,
        health: HealthSettings | None = PROBED,
        outlier: OutlierSettings | None = None,
        slow_start_s: float = 0,
    ) -> None:
        self.now = 1000.0
        self.pool = PoolHealth("web")
        self.health = health
        self.outlier = outlier
        self.slow_start_s = slow_start_s
        self.adopt(*ids)

    @property
    def moment(self) -> Moment:
        return Moment(self.now, WALL + self.now)

    def adopt(self, *ids: str, weight: int = 1, endpoint: object = None) -> None:
        members = [Member(id_, ("127.0.0.1", 80), weight, endpoint) for id_ in ids]
        self.pool.adopt(members, self.health, self.outlier, self.slow_start_s, self.moment)

    def probes(self, id_: str, results: str, detail: str = "connection refused") -> None:
        """One second between two: `+` a success, `-` a failure."""
        for char in results:
            self.pool.probed(id_, LastProbe(char == "+", self.moment.wall, 1.5, detail), self.moment)
            self.now += 1

    def fails(self, id_: str, times: int = 1, cause: str = "connection refused") -> None:
        self.pool.took(id_, 0, times, times, cause, self.moment)

    def succeeds(self, id_: str, times: int = 1) -> None:
        self.pool.took(id_, times, 0, 0, "", self.moment)

    def wait(self, seconds: float) -> None:
        """Time passes, and the pool is told exactly when it asked to be."""
        end = self.now + seconds
        while (due := self.pool.next_due()) is not None and due <= end:
            self.now = due
            self.pool.tick(self.moment)
            after = self.pool.next_due()
            assert after is None or after > due
        self.now = end

    def said(self) -> list[str]:
        return [event.text for event in self.pool.take_events()]

    def member(self, id_: str) -> BackendHealth:
        return next(member for member in self.pool.members if member.id == id_)

    def state(self, id_: str) -> str:
        return self.member(id_).state

    @property
    def down(self) -> list[str]:
        down: list[str] = self.pool.message()["down"]
        return down

    @property
    def ramps(self) -> dict[str, float]:
        ramps: dict[str, float] = self.pool.message()["ramps"]
        return ramps


class TestTakingOver:
    def test_what_another_process_is_told_and_believes(self) -> None:
        before = Talk("a", "b", "c")
        before.probes("a", "--")
        before.probes("b", "--")
        before.probes("c", "+")
        before.pool.set_admin("b", "draining", "an operator", before.moment)
        kept = list(before.pool.kept())
        assert [(id_, state) for id_, state, _ in kept] == [
            ("a", "unhealthy"),
            ("b", "unhealthy"),
            ("b", "draining"),
        ]
        after = Talk("a", "c")
        after.pool.believe("a", kept[0][2], after.moment)
        after.pool.believe("b", kept[1][2], after.moment)
        assert after.down == ["a"]
        after.probes("a", "+++")
        assert (after.state("a"), after.down) == ("healthy", [])

    def test_what_probes_have_said_since_is_not_gainsaid(self) -> None:
        talk = Talk("a")
        talk.probes("a", "+")
        talk.pool.believe("a", "refused", talk.moment)
        assert talk.state("a") == "healthy"

    def test_nobody_would_find_out_without_probes(self) -> None:
        talk = Talk("a", health=None)
        talk.pool.believe("a", "refused", talk.moment)
        assert talk.down == []


class TestProbes:
    def test_unknown_gets_traffic_until_it_is_judged(self) -> None:
        talk = Talk("a")
        assert talk.state("a") == "unknown"
        assert talk.down == []
        talk.probes("a", "-")
        assert talk.state("a") == "unknown"
        assert talk.said() == []

    def test_the_first_success_decides(self) -> None:
        talk = Talk("a")
        talk.probes("a", "-+")
        assert talk.said() == ["backend web/a becomes healthy: its first probe succeeded"]

    def test_fall_failures_in_a_row_decide(self) -> None:
        talk = Talk("a", "b")
        talk.probes("a", "--")
        assert talk.said() == [
            "backend web/a becomes unhealthy: 2 probes failed in a row, the last one: connection refused"
        ]
        assert talk.down == ["a"]

    def test_one_is_enough_if_fall_is_one(self) -> None:
        talk = Talk("a", "b", health=replace(PROBED, fall=1))
        talk.probes("a", "-", "status 503")
        assert talk.said() == ["backend web/a becomes unhealthy: 1 probe failed with status 503"]

    def test_rise_successes_in_a_row_bring_it_back(self) -> None:
        talk = Talk("a", "b")
        talk.probes("a", "+--")
        talk.said()
        talk.probes("a", "++-++")
        assert talk.state("a") == "unhealthy"
        talk.probes("a", "+")
        assert talk.said() == ["backend web/a becomes healthy: 3 probes succeeded in a row"]
        assert talk.down == []

    def test_flapping_every_second_changes_nothing(self) -> None:
        talk = Talk("a", "b")
        talk.probes("a", "+-" * 100)
        assert len(talk.said()) == 1
        assert talk.state("a") == "healthy"
        talk.probes("a", "--" + "+-" * 100)
        assert len(talk.said()) == 1
        assert talk.state("a") == "unhealthy"

    def test_since_cause_and_last_probe_are_kept(self) -> None:
        talk = Talk("a", "b")
        talk.probes("a", "+--+-", "status 500")
        told = talk.member("a").describe()
        assert (told["state"], told["since"]) == ("unhealthy", WALL + 1002)
        assert told["cause"] == "2 probes failed in a row, the last one: status 500"
        assert told["last_probe"] == {
            "ok": False,
            "at": WALL + 1004,
            "took_ms": 1.5,
            "detail": "status 500",
        }
        assert told["address"] == "127.0.0.1:80"
        assert talk.member("a").probes == [3, 2]

    def test_a_late_result_of_who_is_gone_is_ignored(self) -> None:
        talk = Talk("a")
        talk.adopt("b")
        talk.probes("a", "--")
        assert talk.said() == []


class TestEjection:
    def test_failures_in_a_row(self) -> None:
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        for _ in range(4):
            talk.fails("a")
        assert talk.down == []
        talk.fails("a")
        assert talk.said() == [
            "backend web/a becomes ejected: 5 failures in a row, the last one: connection refused; "
            "for 30 seconds"
        ]
        assert talk.down == ["a"]
        talk.wait(29.9)
        assert talk.state("a") == "ejected"
        talk.wait(0.2)
        assert talk.said() == ["backend web/a becomes unknown: its ejection of 30 seconds is over"]
        assert talk.down == []

    def test_a_success_between_starts_anew(self) -> None:
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        talk.fails("a", 4)
        talk.succeeds("a")
        talk.fails("a", 4)
        talk.pool.took("a", 3, 9, 4, "timeout", talk.moment)  # of nine, four since the last good one
        assert talk.state("a") == "unknown"
        talk.fails("a")
        assert talk.state("a") == "ejected"

    def test_streaks_of_several_workers_add_up(self) -> None:
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        talk.fails("a", 3)
        talk.fails("a", 2)
        assert talk.member("a").ejections == {"consecutive_failures": 1, "failure_percent": 0}

    def test_healthy_again_after_it_if_probes_said_so(self) -> None:
        talk = Talk("a", "b", outlier=JUDGED)
        talk.probes("a", "+")
        talk.fails("a", 5)
        talk.wait(31)
        assert talk.state("a") == "healthy"

    def test_doubles_up_to_the_cap(self) -> None:
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        lengths = []
        for _ in range(7):
            talk.fails("a", 5)
            lengths.append(talk.member("a").ejection_s)
            talk.wait(talk.member("a").ejection_s + 1)
            assert talk.state("a") == "unknown"
        assert lengths == [30, 60, 120, 240, 300, 300, 300]

    def test_quiet_times_take_doublings_back(self) -> None:
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        for _ in range(3):
            talk.fails("a", 5)
            talk.wait(talk.member("a").ejection_s)
        assert talk.member("a").ejection_s == 120
        talk.wait(121)  # one such time
        talk.fails("a", 5)
        assert talk.member("a").ejection_s == 120
        talk.wait(120 + 1_000_000)
        talk.fails("a", 5)
        assert talk.member("a").ejection_s == 30

    def test_at_most_a_share_of_the_pool(self) -> None:
        talk = Talk("a", "b", "c", "d", "e", health=None, outlier=JUDGED)
        for id_ in "abcde":
            talk.fails(id_, 50)
        assert talk.down == ["a", "b"]
        talk.wait(30)
        talk.said()
        talk.fails("e")  # what it did was not forgotten, and there is room now
        assert talk.state("e") == "ejected"

    @pytest.mark.parametrize(
        ("count", "percent", "expected"), [(1, 50, 0), (1, 100, 1), (2, 50, 1), (3, 10, 1), (3, 0, 0)]
    )
    def test_rounding(self, count: int, percent: int, expected: int) -> None:
        ids = "abc"[:count]
        talk = Talk(*ids, health=None, outlier=replace(JUDGED, max_ejection_percent=percent))
        for id_ in ids:
            talk.fails(id_, 5)
        assert len(talk.down) == expected

    def test_late_outcomes_change_nothing(self) -> None:
        """Exchanges that were under way when it was ejected fail after that."""
        talk = Talk("a", "b", health=None, outlier=JUDGED)
        talk.fails("a", 5)
        talk.fails("a", 50)
        talk.wait(31)
        talk.fails("a", 4)
        assert talk.state("a") == "unknown"

    def test_failures_of_the_unhealthy_are_no_news(self) -> None:
        talk = Talk("a", "b", outlier=JUDGED)
        talk.probes("a", "--")
        talk.fails("a", 50)
        talk.probes("a", "+++")
        assert talk.state("a") == "healthy"
        talk.fails("a", 4)
        assert talk.state("a") == "healthy"

    def test_without_an_outlier_table_outcomes_do_not_matter(self) -> None:
        talk = Talk("a", "b")
        talk.fails("a", 1000)
        assert talk.state("a") == "unknown"

    def test_zero_is_off(self) -> None:
        talk = Talk("a", "b", health=None, outlier=replace(JUDGED, consecutive_failures=0))
        talk.fails("a", 1000)
        assert talk.state("a") == "unknown"


RATED = replace(JUDGED, consecutive_failures=0, failure_percent=50)


class TestFailurePercent:
    def test_share_within_the_window(self) -> None:
        talk = Talk("a", "b", health=None, outlier=RATED)
        talk.pool.took("a", 6, 5, 1, "timeout", talk.moment)
        assert talk.state("a") == "unknown"
        talk.pool.took("a", 0, 1, 1, "timeout", talk.moment)
        assert talk.said() == [
            "backend web/a becomes ejected: 6 of 12 exchanges within 10 seconds failed, "
            "the last one: timeout; for 30 seconds"
        ]
        assert talk.member("a").ejections["failure_percent"] == 1

    def test_few_exchanges_say_nothing(self) -> None:
        talk = Talk("a", "b", health=None, outlier=RATED)
        talk.fails("a", 9)
        assert talk.state("a") == "unknown"
        talk.fails("a")
        assert talk.state("a") == "ejected"

    def test_what_left_the_window_does_not_count(self) -> None:
        talk = Talk("a", "b", health=None, outlier=RATED)
        talk.fails("a", 9)
        talk.now += 12.5
        talk.fails("a", 9)
        assert talk.state("a") == "unknown"
        talk.now += 5
        talk.fails("a", 1)
        assert talk.state("a") == "ejected"

    def test_good_ones_weigh_as_much_as_bad_ones(self) -> None:
        talk = Talk("a", "b", health=None, outlier=RATED)
        for _ in range(100):
            talk.succeeds("a", 3)
            talk.fails("a", 2)
            talk.now += 0.5
        assert talk.state("a") == "unknown"


class TestPanic:
    def test_in_and_out_once(self) -> None:
        talk = Talk("a", "b", "c", "d")
        for id_ in "ab":
            talk.probes(id_, "--")
        assert not talk.pool.is_panicking  # half is not less than half
        assert talk.down == ["a", "b"]
        talk.said()
        talk.probes("c", "--")
        talk.probes("d", "--")
        assert [text for text in talk.said() if "pool" in text] == [
            "pool web panics and uses all its backends: 1 of 4 backends in service are fit, "
            "less than 50 percent"
        ]
        assert talk.pool.message()["panic"] is True
        assert talk.down == []
        assert talk.state("a") == "unhealthy"
        assert talk.pool.describe()["panic_since"] == WALL + talk.pool.panic_since.mono  # type: ignore[union-attr]
        talk.probes("a", "+++")
        talk.said()
        talk.probes("b", "+++")
        assert talk.said()[1:] == ["pool web no longer panics: 2 of 4 backends in service are fit"]
        assert talk.down == ["c", "d"]

    def test_threshold_of_the_outlier_table(self) -> None:
        talk = Talk("a", "b", outlier=replace(JUDGED, panic_threshold_percent=0))
        for id_ in "ab":
            talk.probes(id_, "--")
        assert not talk.pool.is_panicking
        assert talk.down == ["a", "b"]

    def test_disabled_and_weightless_do_not_count(self) -> None:
        talk = Talk("a", "b", "c")
        talk.pool.set_admin("b", "disabled", "by hand", talk.moment)
        talk.pool.set_admin("c", "draining", "by hand", talk.moment)
        talk.probes("a", "--")
        assert talk.pool.is_panicking  # none of one
        assert talk.pool.message() == {"panic": True, "down": ["b"], "draining": ["c"], "ramps": {}}
        talk.adopt("a", "b", "c", weight=0)
        assert not talk.pool.is_panicking  # none of none

    def test_nobody_is_in_slow_start_then(self) -> None:
        """Else the one that has just recovered would get less than those known to be dead."""
        talk = Talk("a", "b", "c", slow_start_s=60)
        for id_ in "abc":
            talk.probes(id_, "--")
        talk.probes("a", "+++")
        assert talk.pool.is_panicking
        assert talk.ramps == {}
        talk.probes("b", "+++")
        assert set(talk.ramps) == {"a", "b"}

    def test_none_without_judges(self) -> None:
        talk = Talk("a", health=None)
        assert talk.pool.message() == {"panic": False, "down": [], "draining": [], "ramps": {}}


class TestAdmin:
    def test_priority(self) -> None:
        talk = Talk("a", "b", outlier=JUDGED)
        talk.fails("a", 5)
        assert talk.state("a") == "ejected"
        talk.probes("a", "--")
        assert talk.state("a") == "unhealthy"
        talk.pool.set_admin("a", "draining", "drained by an operator", talk.moment)
        assert talk.state("a") == "draining"
        talk.pool.set_admin("a", "disabled", "disabled by an operator", talk.moment)
        assert talk.state("a") == "disabled"
        talk.said()
        talk.pool.set_admin("a", "ready", "enabled by an operator", talk.moment)
        assert talk.said() == [
            "backend web/a becomes unhealthy: enabled by an operator; 2 probes failed in a row, "
            "the last one: connection refused"
        ]

    def test_what_workers_are_told(self) -> None:
        talk = Talk("a", "b", "c", "d")
        talk.pool.set_admin("a", "draining", "x", talk.moment)
        talk.pool.set_admin("b", "disabled", "x", talk.moment)
        assert talk.pool.message() == {"panic": False, "down": ["b"], "draining": ["a"], "ramps": {}}
        talk.probes("a", "--")  # its sessions are better off elsewhere
        assert talk.pool.message() == {"panic": False, "down": ["a", "b"], "draining": [], "ramps": {}}

    def test_twice_is_once(self) -> None:
        talk = Talk("a")
        for _ in range(2):
            talk.pool.set_admin("a", "disabled", "x", talk.moment)
        assert len(talk.said()) == 1

    def test_errors(self) -> None:
        talk = Talk("a")
        with pytest.raises(LookupError, match="the pool web has no backend b"):
            talk.pool.set_admin("b", "ready", "x", talk.moment)
        with pytest.raises(ValueError, match="expected one of ready, draining, disabled"):
            talk.pool.set_admin("a", "healthy", "x", talk.moment)


class TestSlowStart:
    def test_not_at_the_first_start(self) -> None:
        talk = Talk("a", "b", slow_start_s=60)
        talk.probes("a", "+")
        assert talk.ramps == {}

    def test_nor_when_names_are_first_answered(self) -> None:
        talk = Talk(slow_start_s=60)
        talk.adopt("a", "b")
        assert talk.ramps == {}

    def test_who_joins(self) -> None:
        talk = Talk("a", slow_start_s=60)
        talk.now += 100
        talk.adopt("a", "b")
        assert talk.ramps == {"b": 1100}
        talk.wait(59)
        talk.adopt("b", "a")  # a reload in between
        assert talk.ramps == {"b": 1100}
        talk.wait(1)
        assert talk.ramps == {}

    @pytest.mark.parametrize("how", ["probes", "ejection", "disabled", "draining"])
    def test_who_comes_back(self, how: str) -> None:
        talk = Talk("a", "b", outlier=JUDGED, slow_start_s=60)
        talk.probes("a", "+")
        if how == "probes":
            talk.probes("a", "--+++")
            talk.now -= 1  # the probe's moment
        elif how == "ejection":
            talk.fails("a", 5)
            talk.wait(30)
        else:
            talk.pool.set_admin("a", how, "x", talk.moment)
            talk.pool.set_admin("a", "ready", "x", talk.moment)
        assert talk.ramps == {"a": talk.now}

    def test_who_goes_again_begins_again(self) -> None:
        talk = Talk("a", "b", slow_start_s=60)
        talk.probes("a", "--+++--")
        assert talk.ramps == {}
        assert talk.pool.next_due() is None
        talk.probes("a", "+++")
        assert talk.ramps == {"a": talk.now - 1}

    def test_off(self) -> None:
        talk = Talk("a", slow_start_s=0)
        talk.adopt("a", "b")
        talk.probes("b", "--+++")
        assert talk.ramps == {}


class TestChanges:
    def test_state_survives_a_reload(self) -> None:
        talk = Talk("a", "b", "c", "d", outlier=JUDGED)
        talk.probes("a", "--")
        talk.fails("b", 5)
        talk.fails("d", 4)
        talk.pool.set_admin("c", "draining", "x", talk.moment)
        talk.said()
        before = [talk.member(id_).describe() for id_ in "abc"]
        talk.health = replace(PROBED, rise=1, path="/other")
        talk.adopt("d", "c", "b", "a")
        assert [talk.member(id_).describe() for id_ in "abc"] == before
        assert talk.said() == []
        talk.fails("d", 1)  # also what has not led to anything yet
        assert talk.member("d").streak == 5  # no room for a second ejection
        talk.probes("a", "+")
        assert talk.state("a") == "healthy"  # the new settings count

    def test_who_is_gone_is_forgotten(self) -> None:
        talk = Talk("a#1", "a#2", outlier=JUDGED, slow_start_s=60)
        talk.probes("a#1", "--")
        talk.fails("a#2", 5)
        talk.adopt("a#3")
        assert talk.pool.message() == {"panic": False, "down": [], "draining": [], "ramps": {"a#3": talk.now}}
        talk.adopt("a#3", "a#1", "a#2")
        assert talk.state("a#1") == talk.state("a#2") == "unknown"
        assert talk.down == []

    def test_another_endpoint_behind_the_id(self) -> None:
        talk = Talk("a", "b", outlier=JUDGED)
        talk.probes("a", "--")
        talk.pool.set_admin("b", "disabled", "x", talk.moment)
        talk.said()
        talk.adopt("a", "b", endpoint="another")
        assert talk.said() == ["backend web/a becomes unknown: its settings changed"]
        assert talk.state("b") == "disabled"
        assert talk.member("a").probes == [2, 0]  # counters never go back

    def test_a_weight_is_no_other_endpoint(self) -> None:
        talk = Talk("a", "b")
        talk.probes("a", "--")
        talk.adopt("a", "b", weight=7)
        assert talk.state("a") == "unhealthy"
        assert talk.member("a").describe()["weight"] == 7

    def test_without_judges_everybody_is_let_go(self) -> None:
        talk = Talk("a", "b", "c", outlier=JUDGED)
        talk.probes("a", "--")
        talk.fails("b", 5)
        talk.health = talk.outlier = None
        talk.adopt("a", "b", "c")
        assert talk.down == []
        assert talk.pool.next_due() is None
        assert {talk.state(id_) for id_ in "abc"} == {"unknown"}

    def test_an_emptied_pool(self) -> None:
        talk = Talk("a", "b")
        for id_ in "ab":
            talk.probes(id_, "--")
        talk.adopt()
        assert talk.pool.message() == {"panic": False, "down": [], "draining": [], "ramps": {}}


IDS = ("a", "b", "c")
STEPS = st.one_of(
    st.tuples(st.just("probe"), st.sampled_from(IDS), st.booleans()),
    st.tuples(st.just("took"), st.sampled_from(IDS), st.integers(0, 12), st.integers(0, 12)),
    st.tuples(st.just("admin"), st.sampled_from(IDS), st.sampled_from(ADMIN_STATES)),
    st.tuples(st.just("adopt"), st.sets(st.sampled_from(IDS)), st.booleans(), st.booleans()),
    st.tuples(st.just("wait"), st.floats(0, 100)),
)


@given(st.lists(STEPS, max_size=40))
def test_whatever_happens_the_sets_agree_with_the_facts(steps: list[tuple[object, ...]]) -> None:
    judged = replace(JUDGED, failure_percent=60, panic_threshold_percent=40)
    talk = Talk(*IDS, outlier=judged, slow_start_s=20)
    for step in steps:
        match step:
            case ("probe", str(id_), bool(ok)):
                talk.probes(id_, "+" if ok else "-")
            case ("took", str(id_), int(good), int(bad)):
                talk.pool.took(id_, good, bad, bad, "x", talk.moment)
            case ("admin", str(id_), str(admin)):
                if id_ in {member.id for member in talk.pool.members}:
                    talk.pool.set_admin(id_, admin, "x", talk.moment)
            case ("adopt", set(ids), bool(is_probed), bool(is_judged)):
                talk.health = PROBED if is_probed else None
                talk.outlier = judged if is_judged else None
                talk.adopt(*sorted(map(str, ids)))
            case ("wait", float(seconds)):
                talk.wait(seconds)
        told = talk.pool.message()
        members = list(talk.pool.members)
        serving = [member for member in members if member.is_in_service]
        fit = [member for member in serving if member.is_fit]
        threshold = 40 if talk.outlier else 50 if talk.health else 0
        assert talk.pool.is_panicking == (len(fit) * 100 < threshold * len(serving))
        down = {m.id for m in members if m.admin == "disabled" or not (m.is_fit or told["panic"])}
        assert told["down"] == sorted(down)
        assert set(told["draining"]) == {m.id for m in members if m.admin == "draining"} - down
        assert set(told["ramps"]) <= {m.id for m in members if m.state in USABLE}
        for member in members:
            assert member.state in STATES
            assert member.state == member.shown()[0]


def test_an_operators_word_on_an_address_survives_an_answer_without_it() -> None:
    """Names with rotating answers: a backend that was taken out must not come back by itself."""
    now = Moment(1000.0, 1.0)
    pool = PoolHealth("web")
    both = [Member(f"n#10.0.0.{at}", (f"10.0.0.{at}", 80), 1, at) for at in (1, 2)]
    pool.adopt(both, None, None, 0.0, now)
    pool.set_admin("n#10.0.0.1", "disabled", "repair", now)
    pool.adopt(both[1:], None, None, 0.0, now)
    pool.adopt(both, None, None, 0.0, now)
    assert {member.id: member.state for member in pool.members} == {
        "n#10.0.0.1": "disabled",
        "n#10.0.0.2": "unknown",
    }
    assert pool.message()["down"] == ["n#10.0.0.1"]
