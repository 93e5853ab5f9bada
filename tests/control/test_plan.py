"""What a reload may change, and what it may not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expressgateway.config.load import Loaded
from expressgateway.config.material import Material
from expressgateway.config.schema import Config
from expressgateway.control.plan import Plan, plan

BASE: dict[str, Any] = {
    "listeners": [
        {
            "name": "web",
            "address": "127.0.0.1:8080",
            "protocol": "h1",
            "backends": [{"address": "127.0.0.1:9000"}],
        },
        {"name": "relay", "address": "127.0.0.1:8081", "protocol": "tcp", "pool": "api"},
        {
            "name": "secure",
            "address": "127.0.0.1:8443",
            "protocol": "tls",
            "backends": [{"address": "127.0.0.1:9000"}],
            "tls": {"cert_path": "/certs/a.pem", "key_path": "/certs/a.key"},
        },
    ],
    "pools": [{"name": "api", "backends": [{"address": "127.0.0.1:9001"}]}],
    "runtime": {"workers": 2, "user": "nobody", "trusted_proxies": ["10.0.0.0/8"]},
    "observability": {"metrics_bind": "127.0.0.1:9090"},
}
FILES = {"/certs/a.pem": b"one", "/certs/a.key": b"key"}


def loaded(data: dict[str, Any], files: dict[str, bytes] | None = None) -> Loaded:
    return Loaded(Config.model_validate(data), Path("x.toml"), (), Material(FILES | (files or {})))


def planned(change: Callable[[dict[str, Any]], object], files: dict[str, bytes] | None = None) -> Plan:
    data = copy.deepcopy(BASE)
    change(data)
    return plan(loaded(BASE), loaded(data, files))


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        *inside, last = path.split(".")
        at: Any = data
        for part in inside:
            at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
        at[int(last) if last.isdigit() else last] = value

    return change


def test_nothing_changed() -> None:
    found = planned(lambda data: None)
    assert found.is_empty
    assert [str(part) for part in found.kept] == [
        "listener web",
        "listener relay",
        "listener secure",
        "pool api",
        "block runtime",
        "block observability",
        "block admin",
        "block security",
    ]


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("listeners.0.backends", [{"address": "127.0.0.1:9009"}], "listener web (backends)"),
        ("listeners.0.backends.0.weight", 5, "listener web (backends)"),
        ("listeners.0.load_balancing.policy", "weighted_round_robin", "listener web (load_balancing.policy)"),
        ("listeners.0.http.idle_timeout_ms", 5, "listener web (http.idle_timeout_ms)"),
        ("listeners.0.alt_svc", {"h3_port": 443}, "listener web (alt_svc)"),
        (
            "listeners.0.websocket",
            {"idle_timeout_seconds": 5},
            "listener web (websocket)",
        ),
        ("listeners.2.tls.ticket_rotation_interval_seconds", 7200, "secure (tls.ticket_rotation_interval"),
        ("pools.0.backends.0.weight", 7, "pool api (backends)"),
        ("runtime.trusted_proxies", ["192.0.2.0/24"], "block runtime (trusted_proxies)"),
        ("runtime.watchdog.sweep_interval_ms", 200, "block runtime (watchdog.sweep_interval_ms)"),
        ("runtime.connect_timeout_ms", 200, "block runtime (connect_timeout_ms)"),
        ("runtime.per_ip_connection_cap", 5, "block runtime (per_ip_connection_cap)"),
        ("runtime.max_inflight_connections", 500, "block runtime (max_inflight_connections)"),
        ("runtime.max_keepalive_requests", 5, "block runtime (max_keepalive_requests)"),
        ("runtime.header_underscore_policy", "allow", "block runtime (header_underscore_policy)"),
        ("runtime.tls.min_version", "1.3", "block runtime (tls."),
        ("security.strict_te", True, "block security (strict_te)"),
        ("admin.api_token_hash", "a" * 64, "block admin (api_token_hash)"),
    ],
)
def test_swapped(path: str, value: object, part: str) -> None:
    found = planned(put(path, value))
    assert found.refused == ()
    assert part in found.sentence().partition("; kept")[0]
    assert not found.is_empty


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("listeners.0.address", "127.0.0.1:8088", "listeners[0].address"),
        ("listeners.0.protocol", "tcp", "listeners[0].protocol"),
        ("listeners.0.proxy_protocol", True, "listeners[0].proxy_protocol"),
        ("listeners.1.name", "other", "listeners[1].name"),
        ("runtime.workers", 3, "runtime.workers"),
        ("runtime.user", "root", "runtime.user"),
        ("runtime.group", "root", "runtime.group"),
        ("observability.metrics_bind", "127.0.0.1:9091", "observability.metrics_bind"),
    ],
)
def test_refused(path: str, value: object, sentence: str) -> None:
    assert f"{sentence}: needs a restart in this version" in planned(put(path, value)).refused


def test_every_refusal_is_told() -> None:
    def change(data: dict[str, Any]) -> None:
        data["runtime"]["workers"] = 3
        data["listeners"][0]["address"] = "127.0.0.1:1"
        del data["listeners"][2]
        data["listeners"].append({**BASE["listeners"][1], "name": "new", "address": "127.0.0.1:2"})

    assert planned(change).refused == (
        "listeners[0].address: needs a restart in this version",
        "listener secure is removed: needs a restart in this version",
        "listeners[2] is added: needs a restart in this version",
        "runtime.workers: needs a restart in this version",
    )


def test_metrics_bind_removed() -> None:
    found = planned(lambda data: data.pop("observability"))
    assert found.refused == ("observability.metrics_bind: needs a restart in this version",)


def test_listeners_may_be_written_in_another_order() -> None:
    def change(data: dict[str, Any]) -> None:
        data["listeners"].reverse()

    found = planned(change)
    assert found.is_empty
    # workers know their sockets by position, so what is sent keeps the running order
    assert [listener.name for listener in found.config.listeners] == ["web", "relay", "secure"]


def test_names_swapped_between_addresses_are_refused() -> None:
    def change(data: dict[str, Any]) -> None:
        data["listeners"][0]["name"], data["listeners"][1]["name"] = "relay", "web"

    assert planned(change).refused


def test_renewed_certificate() -> None:
    found = planned(lambda data: None, {"/certs/a.pem": b"two", "/certs/a.key": b"new"})
    assert [str(part) for part in found.swapped] == [
        "listener secure (tls.cert_path (content), tls.key_path (content))"
    ]


def test_workers_spelt_otherwise() -> None:
    automatic = copy.deepcopy(BASE)
    automatic["runtime"]["workers"] = "auto"
    before = loaded(automatic)
    same = copy.deepcopy(BASE)
    same["runtime"]["workers"] = before.config.runtime.worker_count
    assert plan(before, loaded(same)).is_empty


def test_pools_come_and_go() -> None:
    def change(data: dict[str, Any]) -> None:
        data["pools"] = [{"name": "fresh", "backends": [{"address": "127.0.0.1:9001"}]}]
        data["listeners"][1]["pool"] = "fresh"

    found = planned(change)
    assert found.refused == ()
    assert [str(part) for part in found.swapped] == [
        "listener relay (pool)",
        "pool fresh (added)",
        "pool api (removed)",
    ]
