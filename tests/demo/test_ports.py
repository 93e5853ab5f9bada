"""The demo's ports."""

from __future__ import annotations

import socket
from dataclasses import astuple, replace

import pytest

from expressgateway.demo.ports import Ports
from tests.ports import free_port


def test_the_usual_ones() -> None:
    assert Ports() == Ports(http=8080, https=8443, tcp=9000, tls=9443, udp=9053, h3=8443, admin=9090)


def test_from_a_base() -> None:
    assert astuple(Ports.from_base(20_000)) == tuple(range(20_000, 20_007))


@pytest.mark.parametrize("base", [-1, 0, 65_530, 65_536])
def test_from_a_base_that_is_none(base: int) -> None:
    with pytest.raises(ValueError, match="is not a port with 6 more above it"):
        Ports.from_base(base)


def test_one_in_use_is_replaced_and_said() -> None:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        taken = {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1]}
        wanted = replace(Ports(*(free_port() for _ in range(7))), **taken)
        ports, sentences = wanted.with_free_ones()
    assert (ports.http, ports.https, ports.tls, ports.h3, ports.admin) == (
        wanted.http,
        wanted.https,
        wanted.tls,
        wanted.h3,
        wanted.admin,
    )
    assert ports.tcp != wanted.tcp
    assert ports.udp != wanted.udp
    assert sentences == [
        f"Port {wanted.tcp} for tcp is in use: taking {ports.tcp} instead.",
        f"Port {wanted.udp} for udp is in use: taking {ports.udp} instead.",
    ]
    assert len(set(astuple(ports))) == 7


def test_one_shared_by_another_program_counts_as_in_use() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        wanted = Ports(http=other.getsockname()[1])
        assert wanted.with_free_ones()[0].http != wanted.http


def test_connections_just_closed_are_not_in_the_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        wanted = Ports(http=listening.getsockname()[1])
        with socket.create_connection(listening.getsockname()) as client:
            served, _ = listening.accept()
            served.close()  # this side closes first, and keeps the port in TIME_WAIT
            client.recv(1)
    assert wanted.with_free_ones()[0].http == wanted.http


def test_any_free_ones() -> None:
    ports, sentences = Ports(0, 0, 0, 0, 0, 0, 0).with_free_ones()
    assert 0 not in astuple(ports)
    assert len(set(astuple(ports))) == 7
    assert sentences == []
