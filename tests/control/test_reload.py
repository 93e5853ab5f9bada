"""The account of reloads."""

from expressgateway.control.reload import APPLIED, FAILED, UNCHANGED, Outcome, Reloads


def test_only_applied_ones_make_a_version() -> None:
    times = iter([100.0, 200.0])
    reloads = Reloads(wall=lambda: next(times))
    assert (reloads.version, reloads.applied_at, reloads.is_due) == (1, 100.0, False)
    for result, version, at in ((UNCHANGED, 1, 100.0), (FAILED, 1, 100.0), (APPLIED, 2, 200.0)):
        reloads.requested += 1
        assert reloads.is_due
        reloads.finish(reloads.requested, Outcome(result))
        assert (reloads.version, reloads.applied_at, reloads.is_due) == (version, at, False)
    assert reloads.counts[APPLIED] == reloads.counts[FAILED] == reloads.counts[UNCHANGED] == 1


def test_one_asked_for_meanwhile_is_still_due() -> None:
    reloads = Reloads()
    reloads.requested = 1
    reloads.requested = 2
    reloads.finish(1, Outcome(FAILED, ("why",)))
    assert reloads.is_due
    assert reloads.status() == {
        "requested": 2,
        "finished": 1,
        "last_result": "failed",
        "last_report": ["why"],
    }


def test_success() -> None:
    assert Outcome(APPLIED).is_success
    assert Outcome(UNCHANGED).is_success
    assert not Outcome(FAILED).is_success
