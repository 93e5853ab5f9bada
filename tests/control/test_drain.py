"""The drain's times and words."""

from typing import Any

from expressgateway.config.schema import Config
from expressgateway.control.drain import FINISH, MARGIN_S, SETTLE, Progress, budget_s, settle_s


def config(*drain_ms: int) -> Config:
    listeners: list[dict[str, Any]] = [
        {
            "address": f"127.0.0.1:{8000 + number}",
            "protocol": "tcp",
            "drain_timeout_ms": each,
            "backends": [{"address": "127.0.0.1:9"}],
        }
        for number, each in enumerate(drain_ms)
    ]
    runtime = {"readiness_settle_ms": 1500, "drain_jitter_ms": 0}
    return Config.model_validate({"listeners": listeners, "runtime": runtime})


def test_budget_is_the_longest_listener_with_a_margin() -> None:
    assert budget_s(config(1000, 30_000, 500)) == 30 + MARGIN_S
    assert settle_s(config(1000)) == 1.5


def test_progress_by_phase() -> None:
    progress = Progress()
    assert progress.seconds(5) == {}
    progress.enter(SETTLE, 10)
    assert progress.seconds(11) == {"settle": 1}
    progress.enter(FINISH, 12)
    assert progress.seconds(15) == {"settle": 2, "finish": 3}
    progress.leave(16)
    assert progress.seconds(99) == {"settle": 2, "finish": 4}


def test_status_line() -> None:
    progress = Progress()
    progress.enter(SETTLE, 0)
    sentence = progress.sentence({"web": 1, "idle": 0}, 11, 1)
    assert sentence == "unready and still accepting: 1 connection open (web 1), at most 10 seconds left"
    progress.enter(FINISH, 11)
    sentence = progress.sentence({"web": 2, "tcp": 1}, 12, 30)
    assert sentence == "draining: 3 connections open (tcp 1, web 2), at most 0 seconds left"
