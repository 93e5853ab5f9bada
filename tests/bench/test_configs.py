"""The generated configurations say what the bench promises about them."""

import json
import tomllib
from pathlib import Path

import pytest
from bench.world import Ports, Site, free_ports, make_site

from bench import configs
from expressgateway.config.load import load

SITE = Site(1, 2, 3, 4, Path("/files"), Path("/c.pem"), Path("/k.pem"), Path("/b.pem"), is_root=False)
PORTS = Ports(11, 12, 13, 14)


def test_gateway_has_its_listeners_and_one_worker() -> None:
    read = tomllib.loads(configs.gateway_toml(SITE, PORTS, workers=1, directory=Path("/run")))
    assert read["runtime"]["workers"] == 1
    assert read["runtime"]["max_keepalive_requests"] == 0
    assert [(one["protocol"], one["address"]) for one in read["listeners"]] == [
        ("h1", "127.0.0.1:11"),
        ("h1s", "127.0.0.1:12"),
        ("tcp", "127.0.0.1:13"),
        ("h1", "127.0.0.1:14"),
    ]
    assert read["listeners"][1]["tls"] == {"cert_path": "/c.pem", "key_path": "/k.pem"}
    plain, full = read["listeners"][:3], read["listeners"][3]
    assert {one["backends"][0]["address"] for one in plain} == {"127.0.0.1:1"}
    assert not any(key in one for one in plain for key in ("routes", "health", "outlier", "retry"))
    assert {route["pool"] for route in full["routes"]} == {"full"}
    assert full["routes"][-1]["match"] == {"path_prefix": "/"}
    (pool,) = read["pools"]
    assert pool["backends"] == [{"address": "127.0.0.1:1"}]
    assert pool["load_balancing"] == {"policy": "least_requests"}
    assert {"health", "outlier", "retry"} <= pool.keys()


def test_a_port_before_an_http2_backend_and_one_that_holds_are_there_when_asked_for() -> None:
    ports = Ports(11, 12, 13, 14, 15, 16)
    gateway = tomllib.loads(configs.gateway_toml(SITE, ports, workers=1, directory=Path("/run")))["listeners"]
    backends = {one["address"]: one["backends"][0] for one in gateway if "backends" in one}
    assert backends["127.0.0.1:15"] == {"address": "127.0.0.1:3", "protocol": "h2"}
    assert backends["127.0.0.1:16"] == {"address": "127.0.0.1:4", "protocol": "h1"}
    envoy = json.loads(configs.envoy_json(SITE, ports))["static_resources"]
    assert [one["address"]["socket_address"]["port_value"] for one in envoy["listeners"]][3:] == [15, 16]
    assert [one["name"] for one in envoy["clusters"]] == ["backend", "h2", "held"]
    haproxy = configs.haproxy_cfg(SITE, ports, tuned=False)
    assert "server one 127.0.0.1:3 proto h2" in haproxy
    nginx = configs.nginx_conf(SITE, ports, Path("/d"), workers=1, tuned=False, stream_module=None)
    assert "proxy_pass http://127.0.0.1:4;" in nginx


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gateway_accepts_its_configuration(tmp_path: Path, workers: int) -> None:
    site = make_site(tmp_path)
    path = tmp_path / "gateway.toml"
    path.write_text(
        configs.gateway_toml(site, Ports(*free_ports(6)), workers=workers, directory=tmp_path), "ascii"
    )
    loaded = load(path)
    assert loaded.config.runtime.workers == workers
    assert not loaded.warnings


def test_envoy_listens_on_the_same_three() -> None:
    read = json.loads(configs.envoy_json(SITE, PORTS))["static_resources"]
    assert [one["address"]["socket_address"]["port_value"] for one in read["listeners"]] == [11, 12, 13]
    assert ["transport_socket" in one["filter_chains"][0] for one in read["listeners"]] == [
        False,
        True,
        False,
    ]


def test_only_the_tuned_haproxy_splices_and_has_large_buffers() -> None:
    plain, tuned = (configs.haproxy_cfg(SITE, PORTS, tuned=tuned) for tuned in (False, True))
    for word in ("splice-request", "splice-response", "tune.bufsize 65536"):
        assert word in tuned
        assert word not in plain


def test_only_the_tuned_nginx_has_large_buffers() -> None:
    plain, tuned = (
        configs.nginx_conf(SITE, PORTS, Path("/d"), workers=1, tuned=tuned, stream_module="/m.so")
        for tuned in (False, True)
    )
    assert tuned.count("proxy_buffer_size 65536") == 2
    assert "65536" not in plain


@pytest.mark.parametrize("module", [None, "/m.so"])
def test_nginx_relays_tcp_only_with_its_module(module: str | None) -> None:
    text = configs.nginx_conf(SITE, PORTS, Path("/d"), workers=1, tuned=False, stream_module=module)
    assert ("stream {" in text) == ("load_module" in text) == (module is not None)


def test_two_nginx_workers_have_a_socket_each() -> None:
    one, two = (
        configs.nginx_conf(SITE, PORTS, Path("/d"), workers=workers, tuned=False, stream_module=None)
        for workers in (1, 2)
    )
    assert "reuseport" not in one
    assert two.count("reuseport") == 2


def test_free_ports_are_different_and_keep_off_outgoing_connections() -> None:
    ports = free_ports(20)
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    assert len(set(ports)) == 20
    assert all(10000 <= port < max(low, 32768) for port in ports)
