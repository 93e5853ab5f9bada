"""Ticket keys per listener, over time and reloads."""

from typing import Any

import pytest

from expressgateway.config.schema import Config
from expressgateway.control.channel import Message, unpack_bytes
from expressgateway.control.failures import StartError
from expressgateway.control.ticket_keys import TicketKeys


def config(interval: int = 100, overlap: int = 50, names: tuple[str, ...] = ("secure",)) -> Config:
    listeners: list[dict[str, Any]] = [
        {
            "name": name,
            "address": f"127.0.0.1:{8000 + number}",
            "protocol": "tls",
            "backends": [{"address": "127.0.0.1:9"}],
            "tls": {
                "cert_path": "/a.pem",
                "key_path": "/a.key",
                "ticket_rotation_interval_seconds": interval,
                "ticket_rotation_overlap_seconds": overlap,
            },
        }
        for number, name in enumerate(names)
    ]
    plain = {"address": "127.0.0.1:80", "protocol": "tcp", "backends": [{"address": "127.0.0.1:9"}]}
    return Config.model_validate({"listeners": [*listeners, plain]})


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def secrets(message: Message) -> bytes:
    return unpack_bytes(message["keys"])


def test_keys_for_tls_listeners_only() -> None:
    keys = TicketKeys(Clock())
    keys.adopt(keys.planned(config(names=("a", "b"))))
    one, other = keys.messages()
    assert (one["type"], one["listener"], other["listener"]) == ("tickets", "a", "b")
    assert secrets(one) != secrets(other)
    assert keys.messages() == [one, other]  # a worker that comes later gets the same


def test_rotation_is_told_once() -> None:
    clock = Clock()
    keys = TicketKeys(clock)
    keys.adopt(keys.planned(config()))
    (first,) = keys.messages()
    assert keys.changed() == []
    assert keys.next_change_s() == 100
    clock.now += 100
    keys.messages()  # a worker replaced right now must not hide the change from the others
    (second,) = keys.changed()
    assert secrets(second).endswith(secrets(first))
    assert len(secrets(second)) == 2 * len(secrets(first))
    assert keys.changed() == []
    assert keys.next_change_s() == 50
    clock.now += 50
    (third,) = keys.changed()
    assert secrets(third) == secrets(second)[:80]


def test_kept_over_a_reload() -> None:
    keys = TicketKeys(Clock())
    keys.adopt(keys.planned(config()))
    before = keys.messages()
    keys.adopt(keys.planned(config(interval=7)))
    assert keys.messages() == before
    assert keys.next_change_s() == 7


def test_plan_that_is_not_adopted_changes_nothing() -> None:
    clock = Clock()
    keys = TicketKeys(clock)
    keys.adopt(keys.planned(config()))
    keys.planned(config(interval=1))
    assert keys.next_change_s() == 100


def test_no_tls_listener() -> None:
    keys = TicketKeys(Clock())
    keys.adopt(keys.planned(config(names=())))
    assert keys.messages() == keys.changed() == []
    assert keys.next_change_s() == float("inf")


def test_times_that_need_too_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expressgateway.config.tls.MAX_TICKET_KEYS", 10**6)  # which refuses them as well
    with pytest.raises(StartError, match="'secure': the ticket rotation overlap may be at most 62"):
        TicketKeys(Clock()).planned(config(interval=1, overlap=3600))
