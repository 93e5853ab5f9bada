"""The schema: defaults of the contract, inherited values, and the way to the workers."""

from typing import Any

import pytest
from pydantic import ValidationError

from expressgateway.config.blocks import (
    Admin,
    Observability,
    Passthrough,
    Runtime,
    RuntimeTls,
    Security,
    Watchdog,
)
from expressgateway.config.http import AltSvc, Compression, Grpc, H2Security, Http, WebSocket
from expressgateway.config.pools import (
    AffinityCookie,
    Backend,
    CircuitBreaker,
    Health,
    LoadBalancing,
    Outlier,
    Retry,
)
from expressgateway.config.schema import Config
from expressgateway.config.tls import ListenerTls, Quic, RawProxy
from expressgateway.config.values import Address, BadValueError, Block

BACKENDS = [{"address": "127.0.0.1:3000"}]
TLS = {"cert_path": "/c", "key_path": "/k"}


def listener(**keys: Any) -> dict[str, Any]:
    base = {"address": "127.0.0.1:8080", "protocol": "h1"}
    return base | ({} if "pool" in keys else {"backends": BACKENDS}) | keys


def config(*listeners: dict[str, Any], **blocks: Any) -> Config:
    return Config.model_validate({"listeners": list(listeners) or [listener()], **blocks})


CONTRACT: list[tuple[Block, dict[str, Any]]] = [
    (
        Backend.model_validate({"address": "a:1"}),
        {
            "protocol": "tcp",
            "weight": 1,
            "tls": False,
            "tls_verify_peer": True,
            "id": "a:1",
            "send_proxy": None,
        },
    ),
    (
        LoadBalancing(),
        {"policy": "round_robin", "table_size": 65537, "virtual_nodes": 160, "decay_ms": 10_000},
    ),
    (
        Health(type="http"),
        {
            "path": "/",
            "host": None,
            "expect_status": (200,),
            "expect_body": None,
            "interval_ms": 5000,
            "timeout_ms": 2000,
            "rise": 3,
            "fall": 2,
            "jitter": 20,
        },
    ),
    (
        Outlier(),
        {
            "ejection_ms": 30_000,
            "max_ejection_ms": 300_000,
            "max_ejection_percent": 50,
            "panic_threshold_percent": 50,
            "count_5xx": False,
        },
    ),
    (Retry(), {"attempts": 2, "on": ("connect", "stale"), "budget_percent": 20, "per_try_timeout_ms": 0}),
    (
        CircuitBreaker(),
        {
            "max_connections": 0,
            "max_requests": 0,
            "pool_max_connections": 0,
            "pool_max_requests": 0,
            "max_pending": 1024,
            "pending_timeout_ms": 5000,
        },
    ),
    (
        AffinityCookie(),
        {"path": "/", "secure": True, "http_only": True, "same_site": "lax", "secret_path": None},
    ),
    (
        ListenerTls.model_validate(TLS),
        {
            "ticket_rotation_interval_seconds": 86400,
            "ticket_rotation_overlap_seconds": 86400,
            "certificates": (),
            "client_auth": "none",
        },
    ),
    (
        Quic.model_validate(TLS | {"retry_secret_path": "/r"}),
        {"max_idle_timeout_ms": 30000, "max_recv_udp_payload_size": 1350, "retry": "adaptive"},
    ),
    (
        RawProxy.model_validate({"backend_addr": "a:1", "sni": "a"}),
        {"dgram_queue_cap": 1024, "max_relay_streams": 256, "alpn": ("h3",)},
    ),
    (AltSvc(h3_port=443), {"max_age": 3600}),
    (
        Http(),
        {
            "header_timeout_ms": 10000,
            "body_timeout_ms": 30000,
            "total_timeout_ms": 60000,
            "head_timeout_ms": 60000,
            "idle_timeout_ms": 75000,
            "max_request_body_bytes": 67108864,
            "max_header_bytes": 65536,
            "max_header_count": 256,
            "server_header": "expressgateway",
            "via": True,
            "forwarded": "x-forwarded",
            "compression": None,
        },
    ),
    (Compression(), {"algorithms": ("zstd", "br", "gzip"), "min_bytes": 1024}),
    (
        H2Security(),
        {
            "max_pending_accept_reset_streams": 100,
            "max_local_error_reset_streams": 100,
            "max_concurrent_streams": 256,
            "max_header_list_size": 65536,
            "max_send_buf_size": 65536,
            "keep_alive_interval_ms": 30000,
            "keep_alive_timeout_ms": 30000,
            "initial_stream_window_size": 65535,
            "initial_connection_window_size": 1048576,
        },
    ),
    (
        WebSocket(),
        {
            "enabled": True,
            "idle_timeout_seconds": 60,
            "max_message_size_bytes": 16777216,
            "ping_rate_limit_per_window": 50,
            "ping_rate_limit_window_seconds": 10,
            "read_frame_timeout_seconds": 30,
            "h2_extended_connect": False,
            "h3_extended_connect": False,
        },
    ),
    (Grpc(), {"enabled": True, "max_deadline_seconds": 300, "health_synthesized": True}),
    (
        Runtime(),
        {
            "workers": "auto",
            "xdp_enabled": False,
            "xdp_interface": None,
            "xdp_mode": "auto",
            "xdp_new_flow_cap_per_sec_per_cpu": 125000,
            "drain_timeout_ms": 10000,
            "readiness_settle_ms": 11000,
            "drain_jitter_ms": 2500,
            "handshake_timeout_ms": 5000,
            "max_inflight_connections": 65536,
            "connect_timeout_ms": 5000,
            "per_ip_connection_cap": 1024,
            "header_underscore_policy": "reject",
            "max_keepalive_requests": 100,
            "max_requests_per_h3_connection": 1000,
            "trusted_proxies": (),
            "user": None,
            "group": None,
        },
    ),
    (RuntimeTls(), {"tls13_only": False, "min_version": "1.2", "ciphers": None}),
    (Watchdog(), {"header_deadline_ms": 5000, "body_progress_min_bps": 64, "sweep_interval_ms": 1000}),
    (Observability(), {"metrics_bind": None, "max_label_cardinality": 10000}),
    (Admin(), {"api_token_hash": None, "allow_non_loopback": False}),
    (Security(), {"strict_te": False}),
    (
        Passthrough.model_validate({"bind_addr": "a:1", "backends": ["a:2"]}),
        {
            "max_quic_connections": 100000,
            "min_client_dcid_len": 8,
            "per_flow_backlog": 32,
            "strict_source_binding": False,
            "audit_throttle_window_secs": 60,
            "max_dcid_len_routed": 20,
            "mint_retry": False,
            "flow_idle_timeout_ms": 60000,
            "per_ip_flow_cap": 1024,
        },
    ),
]


@pytest.mark.parametrize(("block", "defaults"), CONTRACT, ids=lambda value: type(value).__name__)
def test_defaults_are_those_of_the_contract(block: Block, defaults: dict[str, Any]) -> None:
    assert {key: getattr(block, key) for key in defaults} == defaults


EVERYTHING = {
    "listeners": [
        listener(
            name="a",
            http={"via": False},
            websocket={},
            alt_svc={"h3_port": 443},
            proxy_protocol=True,
            h2c=True,
        ),
        listener(
            address="[::1]:443", protocol="h1s", tls=TLS | {"certificates": [TLS]}, pool="p", h2_security={}
        ),
        listener(
            address="[::1]:443", protocol="quic", quic=TLS | {"retry_secret_path": "/r"}, pool="q", grpc={}
        ),
        listener(
            address="localhost:1",
            protocol="tls",
            tls=TLS | {"client_auth": "required", "client_ca_path": "/a"},
        ),
        listener(address="localhost:1", protocol="udp", drain_timeout_ms=100),
        listener(
            address="localhost:2",
            pool="p",
            routes=[{"match": {"path": "/", "headers": {"X": "y"}}, "split": [{"pool": "p"}]}],
        ),
        listener(
            address="localhost:3",
            load_balancing={"policy": "session_affinity", "cookie": {"name": "c"}},
            health={"type": "http"},
            outlier={},
            retry={"on": ["5xx", 503]},
            circuit_breaker={},
        ),
        listener(
            address="localhost:4",
            protocol="tcp",
            load_balancing={"policy": "maglev"},
            health={"type": "grpc", "host": "a"},
            retry={},
            circuit_breaker={"max_requests": 1, "max_pending": 0},
        ),
        listener(address="localhost:4", protocol="udp", health={"type": "tcp"}, circuit_breaker={}),
    ],
    "pools": [
        {"name": "p", "backends": [{"address": "b:1", "tls": True, "tls_ca_path": "/ca"}]},
        {"name": "q", "backends": [{"address": "b:1", "protocol": "h3", "tls_ca_path": "/ca"}]},
    ],
    "runtime": {"trusted_proxies": ["10.0.0.0/8", "::1"], "tls": {"tls13_only": True}, "xdp_mode": "skb"},
    "observability": {
        "metrics_bind": "0.0.0.0:1",
        "access_log": {"sample": 1},
        "tracing": {"endpoint": "http://a"},
    },
    "admin": {"api_token_hash": "AB" * 32, "allow_non_loopback": True},
    "passthrough": {"bind_addr": "0.0.0.0:444", "backends": ["a:1", {"address": "b:1", "id": "b"}]},
}


@pytest.mark.parametrize("document", [{"listeners": [listener()]}, EVERYTHING], ids=["minimal", "everything"])
def test_workers_receive_the_same_configuration(document: dict[str, Any]) -> None:
    first = Config.model_validate(document)
    second = Config.model_validate_json(first.model_dump_json())
    assert second == first
    assert second.model_dump_json() == first.model_dump_json()


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        config().runtime.workers = 3


class TestInheritedValues:
    def test_name_and_id_are_the_address(self) -> None:
        only = config().listeners[0]
        assert (only.name, only.backends[0].id) == ("127.0.0.1:8080", "127.0.0.1:3000")

    def test_a_datagram_listener_that_shares_an_address_gets_its_own_name(self) -> None:
        names = [each.name for each in config(listener(protocol="udp"), listener(protocol="tcp")).listeners]
        assert names == ["127.0.0.1:8080/udp", "127.0.0.1:8080"]

    def test_drain_comes_from_runtime(self) -> None:
        built = config(runtime={"drain_timeout_ms": 8000})
        assert built.runtime.drain_jitter_ms == 2000
        assert (built.listeners[0].drain_timeout_ms, built.listeners[0].drain_jitter_ms) == (8000, 2000)

    def test_an_inherited_jitter_is_capped_to_the_listeners_own_timeout(self) -> None:
        assert config(listener(drain_timeout_ms=500)).listeners[0].drain_jitter_ms == 500

    def test_tcp_means_h1_on_http_listeners_only(self) -> None:
        built = config(listener(), listener(address="a:1", protocol="tcp"))
        assert [each.backends[0].protocol for each in built.listeners] == ["h1", "tcp"]

    def test_tcp_means_h1_in_the_pools_of_http_listeners(self) -> None:
        pools = [{"name": name, "backends": BACKENDS} for name in ("web", "raw")]
        built = config(listener(pool="web"), listener(address="a:1", protocol="tcp", pool="raw"), pools=pools)
        assert [pool.backends[0].protocol for pool in built.pools] == ["h1", "tcp"]
        pool = built.pool_of(built.listeners[0])
        assert pool is not None
        assert pool.backends[0].protocol == "h1"

    def test_the_name_to_verify_is_the_host(self) -> None:
        backends = [{"address": "App.Example:1", "tls": True}, {"address": "b:1"}]
        names = [
            each.tls_verify_hostname for each in config(listener(backends=backends)).listeners[0].backends
        ]
        assert names == ["app.example", None]

    def test_the_name_to_verify_of_a_service_is_its_domain(self) -> None:
        backends = [{"address": "_h._tcp.App.Example", "tls": True, "weight": 2}]
        (backend,) = config(listener(backends=backends)).listeners[0].backends
        assert backend.address.is_srv
        assert backend.tls_verify_hostname == "app.example"
        assert backend.id == "_h._tcp.app.example"
        assert backend.model_dump()["address"] == "_h._tcp.app.example"

    def test_tls13_only_and_min_version_agree(self) -> None:
        assert config(runtime={"tls": {"tls13_only": True}}).runtime.tls.min_version == "1.3"
        assert config(runtime={"tls": {"min_version": "1.3"}}).runtime.tls.tls13_only


class TestPoolOf:
    def test_own_backends_form_a_pool_of_the_listeners_name(self) -> None:
        built = config(listener(name="web", load_balancing={"policy": "weighted_round_robin"}))
        pool = built.pool_of(built.listeners[0])
        assert pool is not None
        assert (pool.name, pool.load_balancing.policy) == ("web", "weighted_round_robin")
        assert pool.backends == built.listeners[0].backends

    def test_a_listener_with_routes_only_has_none(self) -> None:
        built = config(listener(backends=[], routes=[{"respond": {"status": 204}}]))
        assert built.pool_of(built.listeners[0]) is None
        assert list(built.every_pool()) == []

    def test_pools_of_routes_are_in_use(self) -> None:
        routes = [{"split": [{"pool": "a"}, {"pool": "b", "weight": 0}], "mirror": {"pool": "c"}}]
        pools = [{"name": name, "backends": BACKENDS} for name in "abcd"]
        built = config(listener(name="own", routes=routes), pools=pools)
        assert [pool.name for pool in built.every_pool()] == ["a", "b", "c", "own"]
        assert [pool.name for _, pool in built.unused_pools()] == ["d"]


class TestHashKey:
    @pytest.mark.parametrize("policy", ["maglev", "ring_hash"])
    def test_is_the_client_for_policies_that_need_one(self, policy: str) -> None:
        assert LoadBalancing(policy=policy).hash_key == "client_ip"
        assert LoadBalancing(policy=policy, hash_key="path").hash_key == "path"

    @pytest.mark.parametrize("policy", ["round_robin", "ewma", "package.module:Class"])
    def test_is_absent_for_others(self, policy: str) -> None:
        assert LoadBalancing(policy=policy).hash_key is None

    def test_is_absent_with_a_cookie(self) -> None:
        built = LoadBalancing.model_validate({"policy": "session_affinity", "cookie": {}})
        assert built.hash_key is None


def test_faults_of_rules_carry_the_precise_key() -> None:
    document = {
        "listeners": [
            listener(),
            listener(address="a:1", backends=[{"address": "b:1", "tls_verify_peer": True}]),
        ]
    }
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(document)
    assert [error["loc"] for error in caught.value.errors()] == [
        ("listeners", 1, "backends", 0, "tls_verify_peer")
    ]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("[0:0::1]:443", Address("::1", 443)),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
        ("Backend.Example:65535", Address("backend.example", 65535)),
        ("a_b-c:1", Address("a_b-c", 1)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    parsed = Address.parse(text)
    assert parsed == address
    assert Address.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["_http._tcp.example.com", "_x._udp.a", "_a-b._tcp.web.internal."])
def test_services_are_addresses_of_backends_only(text: str) -> None:
    parsed = Address.parse_backend(text)
    assert parsed == Address(text, 0)
    assert parsed.is_srv
    assert Address.parse_backend(str(parsed)) == Address.parse_backend(parsed) == parsed
    with pytest.raises(BadValueError, match="only the address of a backend"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:443", "_x.example:80", "a._tcp.b:80"])
def test_other_addresses_of_backends_are_like_all(text: str) -> None:
    assert Address.parse_backend(text) == Address.parse(text)
    assert not Address.parse(text).is_srv


@pytest.mark.parametrize("text", ["_http._tcp", "_http._tcp.", "_http._tcp.1", "_http._tcp.a:1", "_a._b.c/d"])
def test_what_is_no_service(text: str) -> None:
    with pytest.raises(BadValueError):
        Address.parse_backend(text)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.b", False),
    ],
)
def test_loopback(host: str, is_loopback: bool) -> None:
    assert Address(host, 1).is_loopback is is_loopback


def test_auto_workers_are_the_cores_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(300)))
    assert (Runtime().worker_count, Runtime(workers=3).worker_count) == (256, 3)


def test_many_pools_and_routes_are_checked_in_few_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over every route for each pool took ten seconds with a thousand of both."""
    names = [f"p{number}" for number in range(30)]
    routes = [{"match": {"host": f"{name}.example"}, "pool": name} for name in names]
    pools = [{"name": name, "backends": BACKENDS} for name in names]
    made = config(listener(routes=routes, pool="p0"), pools=pools)
    walks = 0
    walk = Config._pool_names

    def counted(self: Config) -> Any:
        nonlocal walks
        walks += 1
        return walk(self)

    monkeypatch.setattr(Config, "_pool_names", counted)
    assert list(made.faults()) == []
    assert walks < 5
    assert {name: len(users) for name, users in made.users().items()} == dict.fromkeys(names, 1) | {"p0": 2}
