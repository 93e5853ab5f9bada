"""What a reload changes, and how."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from expressgateway.config.load import Loaded
from expressgateway.config.material import Material
from expressgateway.config.schema import Config
from expressgateway.control.changes import AddBackend, Change, RemoveBackend, SetWeight, changed
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
        ("listeners.0.proxy_protocol", True, "listener web (proxy_protocol)"),
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
    assert found.rolled == ()
    assert part in found.sentence().partition("; kept")[0]
    assert not found.is_empty


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("listeners.0.address", "127.0.0.1:8088", "listener web (address)"),
        ("listeners.0.protocol", "tcp", "listener web (protocol"),
        ("listeners.1.name", "other", "listener other (name)"),
        ("runtime.workers", 3, "block runtime (workers)"),
        ("runtime.user", "root", "block runtime (user)"),
        ("runtime.group", "root", "block runtime (group)"),
        ("observability.metrics_bind", "127.0.0.1:9091", "block observability (metrics_bind)"),
    ],
)
def test_rolled(path: str, value: object, part: str) -> None:
    found = planned(put(path, value))
    assert found.swapped == ()
    assert found.sentence().startswith(f"rolled: {part}")
    assert found.rolls_workers == (path in ("runtime.user", "runtime.group"))


def test_every_part_is_told() -> None:
    def change(data: dict[str, Any]) -> None:
        data["runtime"]["workers"] = 3
        data["listeners"][0]["address"] = "127.0.0.1:1"
        data["security"] = {"strict_te": True}
        del data["listeners"][2]
        data["listeners"].append({**BASE["listeners"][1], "name": "new", "address": "127.0.0.1:2"})

    assert planned(change).lines() == (
        "rolled: listener web (address), listener secure (removed), listener new (added), "
        "block runtime (workers)",
        "swapped: block security (strict_te)",
        "kept: listener relay, pool api, block observability, block admin",
    )


def test_metrics_bind_removed() -> None:
    found = planned(lambda data: data.pop("observability"))
    assert [str(part) for part in found.rolled] == ["block observability (metrics_bind)"]


def test_listeners_may_be_written_in_another_order() -> None:
    assert planned(lambda data: data["listeners"].reverse()).is_empty


def test_names_swapped_between_addresses() -> None:
    def change(data: dict[str, Any]) -> None:
        data["listeners"][0]["name"], data["listeners"][1]["name"] = "relay", "web"

    assert len(planned(change).rolled) == 2


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
    assert found.rolled == ()
    assert [str(part) for part in found.swapped] == [
        "listener relay (pool)",
        "pool fresh (added)",
        "pool api (removed)",
    ]


class TestRunTimeChanges:
    def runs(self, *changes: Change) -> Loaded:
        current = loaded(BASE)
        for change in changes:
            current = changed(current, change)
        return current

    def test_a_change_is_planned_like_a_reload(self) -> None:
        before = loaded(BASE)
        one = changed(before, SetWeight("web", "127.0.0.1:9000", 5))
        found = plan(before, one)
        assert [str(part) for part in found.swapped] == ["listener web (backends)"]
        two = changed(one, AddBackend("api", {"address": "127.0.0.1:9009"}))
        found = plan(one, two)
        assert [str(part) for part in found.swapped] == ["pool api (backends)"]
        assert found.dropped == ()
        assert plan(two, changed(two, SetWeight("web", "127.0.0.1:9000", 5))).is_empty
        assert plan(two, changed(two, SetWeight("web", "127.0.0.1:9000", 6))).dropped == ()

    def test_unchanged_file_drops_them(self) -> None:
        current = self.runs(
            SetWeight("api", "127.0.0.1:9001", 5),
            AddBackend("api", {"address": "127.0.0.1:9009", "id": "b9"}),
            SetWeight("web", "127.0.0.1:9000", 2),
        )
        found = plan(current, loaded(BASE))
        assert not found.is_empty
        assert found.rolled == ()
        assert found.dropped == (
            "run-time changes to pool web are dropped: weight of 127.0.0.1:9000",
            "run-time changes to pool api are dropped: weight of 127.0.0.1:9001, added b9",
        )
        assert found.sentence().endswith("; ".join(found.dropped))

    def test_those_the_file_has_too_are_not_dropped(self) -> None:
        current = self.runs(
            SetWeight("api", "127.0.0.1:9001", 5), AddBackend("api", {"address": "a:1", "id": "b9"})
        )
        data = copy.deepcopy(BASE)
        data["pools"][0]["backends"][0]["weight"] = 5
        found = plan(current, loaded(data))
        assert found.dropped == ("run-time changes to pool api are dropped: added b9",)
        data["pools"][0]["backends"].append({"address": "a:1", "id": "b9"})
        assert plan(current, loaded(data)).is_empty

    def test_emptied_pool_comes_back(self) -> None:
        current = self.runs(RemoveBackend("web", "127.0.0.1:9000"), SetWeight("secure", "127.0.0.1:9000", 0))
        found = plan(loaded(BASE), current)
        assert [str(part) for part in found.swapped] == [
            "listener web (backends)",
            "listener secure (backends)",
        ]
        found = plan(current, loaded(BASE))
        assert found.sentence().startswith(
            "swapped: listener web (backends), listener secure (backends); kept: "
        )
        assert set(found.dropped) == {
            "run-time changes to pool web are dropped: removed 127.0.0.1:9000",
            "run-time changes to pool secure are dropped: weight of 127.0.0.1:9000",
        }

    def test_undone_by_hand_is_nothing_to_drop(self) -> None:
        current = self.runs(SetWeight("api", "127.0.0.1:9001", 5), SetWeight("api", "127.0.0.1:9001", 1))
        assert plan(current, loaded(BASE)).is_empty

    def test_pool_that_leaves_with_its_changes(self) -> None:
        data = copy.deepcopy(BASE)
        data["pools"][0]["name"] = "other"
        data["listeners"][1]["pool"] = "other"
        found = plan(self.runs(SetWeight("api", "127.0.0.1:9001", 5)), loaded(data))
        assert found.dropped == ("run-time changes to pool api are dropped: weight of 127.0.0.1:9001",)

    def test_pool_of_the_listeners_name_taken_from_it(self) -> None:
        data = copy.deepcopy(BASE)
        data["pools"].append({"name": "web", "backends": [{"address": "127.0.0.1:9000"}]})
        del data["listeners"][0]["backends"]
        data["listeners"][0] |= {"routes": [{"match": {"path": "/"}, "pool": "web"}], "pool": "web"}
        before = loaded(data)
        del data["listeners"][0]["pool"]
        assert [str(part) for part in plan(before, loaded(data)).swapped] == ["listener web (pool)"]


class TestPassthrough:
    TABLE: ClassVar[dict[str, Any]] = {
        "bind_addr": "127.0.0.1:443",
        "backends": ["127.0.0.1:1", "127.0.0.1:2"],
    }

    def _plan(self, before: dict[str, Any] | None, after: dict[str, Any] | None) -> Plan:
        old, new = ({} if table is None else {"passthrough": table} for table in (before, after))
        return plan(loaded(BASE | old), loaded(BASE | new))

    def test_nothing(self) -> None:
        assert self._plan(self.TABLE, self.TABLE).is_empty

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("backends", ["127.0.0.1:3"]),
            ("flow_idle_timeout_ms", 1000),
            ("max_quic_connections", 7),
            ("strict_source_binding", True),
        ],
    )
    def test_what_can_be_swapped(self, key: str, value: object) -> None:
        made = self._plan(self.TABLE, self.TABLE | {key: value})
        assert not made.rolled
        (part,) = made.swapped
        assert str(part) == f"block passthrough ({key})"

    @pytest.mark.parametrize(
        ("before", "after", "word"),
        [
            (TABLE, TABLE | {"bind_addr": "127.0.0.1:444"}, "bind_addr"),
            (None, TABLE, "added"),
            (TABLE, None, "removed"),
        ],
    )
    def test_what_is_rolled(
        self, before: dict[str, Any] | None, after: dict[str, Any] | None, word: str
    ) -> None:
        assert [str(part) for part in self._plan(before, after).rolled] == [f"block passthrough ({word})"]

    def test_run_time_changes_are_dropped_by_name(self) -> None:
        before = loaded(BASE | {"passthrough": self.TABLE})
        running = changed(before, SetWeight("passthrough", "127.0.0.1:1", 5))
        assert plan(running, before).dropped == (
            "run-time changes to pool passthrough are dropped: weight of 127.0.0.1:1",
        )


class TestQuic:
    LISTENER: ClassVar[dict[str, Any]] = {
        "name": "h3",
        "address": "127.0.0.1:8444",
        "protocol": "quic",
        "quic": {
            "cert_path": "/certs/a.pem",
            "key_path": "/certs/a.key",
            "retry_secret_path": "/certs/secret",
        },
    }
    RAW: ClassVar[dict[str, Any]] = {"backend_addr": "127.0.0.1:9", "sni": "a.example"}

    def _plan(self, before: dict[str, Any], after: dict[str, Any]) -> Plan:
        def with_quic(more: dict[str, Any]) -> Loaded:
            listener = {**self.LISTENER, "quic": {**self.LISTENER["quic"], **more}}
            if "raw_proxy" not in more:
                listener["backends"] = [{"address": "127.0.0.1:9000"}]
            return loaded({**BASE, "listeners": [listener]})

        return plan(with_quic(before), with_quic(after))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("retry", "always"),
            ("max_idle_timeout_ms", 1000),
            ("max_recv_udp_payload_size", 1400),
            ("retry_secret_path", "/certs/other"),
        ],
    )
    def test_new_connections_go_by_the_new_block(self, key: str, value: object) -> None:
        made = self._plan({}, {key: value})
        assert not made.rolled
        (part,) = made.swapped
        assert str(part) == f"listener h3 (quic.{key})"

    def test_so_do_those_of_mode_b(self) -> None:
        made = self._plan({"raw_proxy": self.RAW}, {"raw_proxy": {**self.RAW, "backend_addr": "127.0.0.1:8"}})
        assert not made.rolled
        assert [str(part) for part in made.swapped] == ["listener h3 (quic.raw_proxy.backend_addr)"]

    @pytest.mark.parametrize("is_first", [True, False])
    def test_from_one_mode_to_the_other(self, is_first: bool) -> None:
        tables: list[dict[str, Any]] = [{"raw_proxy": self.RAW}, {}]
        before, after = tables if is_first else reversed(tables)
        (part,) = self._plan(before, after).rolled
        assert "quic.raw_proxy" in str(part)
