"""The generated configurations say what the bench promises about them."""

import json
import tomllib
from pathlib import Path

import pytest
from bench.world import Ports, Site, free_ports, make_site

from bench import configs
from expressgateway.config.load import load

SITE = Site(1, 2, Path("/files"), Path("/c.pem"), Path("/k.pem"), Path("/b.pem"), is_root=False)
PORTS = Ports(11, 12, 13)


def test_gateway_has_the_three_listeners_and_one_worker() -> None:
    read = tomllib.loads(configs.gateway_toml(SITE, PORTS, workers=1))
    assert read["runtime"]["workers"] == 1
    assert read["runtime"]["max_keepalive_requests"] == 0
    assert [(one["protocol"], one["address"]) for one in read["listeners"]] == [
        ("h1", "127.0.0.1:11"),
        ("h1s", "127.0.0.1:12"),
        ("tcp", "127.0.0.1:13"),
    ]
    assert read["listeners"][1]["tls"] == {"cert_path": "/c.pem", "key_path": "/k.pem"}
    assert {one["backends"][0]["address"] for one in read["listeners"]} == {"127.0.0.1:1"}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_gateway_accepts_its_configuration(tmp_path: Path, workers: int) -> None:
    site = make_site(tmp_path)
    http, https, tcp = free_ports(3)
    path = tmp_path / "gateway.toml"
    path.write_text(configs.gateway_toml(site, Ports(http, https, tcp), workers=workers), "ascii")
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
