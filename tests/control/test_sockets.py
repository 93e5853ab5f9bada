"""Binding: every member, or a sentence and nothing."""

import errno
import os
import socket
from pathlib import Path

import pytest

from expressgateway.config.values import Address
from expressgateway.control import sockets as module
from expressgateway.control.failures import StartError
from expressgateway.control.sockets import MAX_BACKLOG, Bound, Wanted, bind_admin, bind_all, listen_backlog
from tests.ports import free_port


def listener(host: str, port: int, protocol: str = "tcp", name: str = "web") -> Wanted:
    return Wanted(name, protocol, protocol == "udp", Address(host, port))  # port 0 is for tests only


def mode_a(port: int) -> Wanted:
    return Wanted("passthrough", "passthrough", True, Address("127.0.0.1", port))


def bind(*listeners: Wanted, workers: int = 2) -> list[Bound]:
    return bind_all(listeners, workers)


def closed(bound: list[Bound]) -> None:
    for one in bound:
        one.close()


class TestMembers:
    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_one_for_each_worker_on_one_port(self, protocol: str) -> None:
        (one,) = bind(listener("127.0.0.1", 0, protocol), workers=3)
        assert {member.getsockname() for member in one.members} == {("127.0.0.1", one.address.port)}
        assert one.address.port > 0
        assert all(member.gettimeout() == 0 for member in one.members)
        one.close()

    def test_connections_reach_members(self) -> None:
        (one,) = bind(listener("127.0.0.1", 0))
        clients = [socket.create_connection(("127.0.0.1", one.address.port), 5) for _ in range(32)]
        taken = [0, 0]
        for index, member in enumerate(one.members):
            try:
                while True:
                    member.accept()[0].close()
                    taken[index] += 1
            except BlockingIOError:
                pass
        assert sum(taken) == 32
        assert all(taken)
        for client in clients:
            client.close()
        one.close()

    def test_given_port(self) -> None:
        port = free_port()
        (one,) = bind(listener("127.0.0.1", port))
        assert one.address == Address("127.0.0.1", port)
        one.close()

    def test_restart_over_connections_in_time_wait(self) -> None:
        (one,) = bind(listener("127.0.0.1", 0), workers=1)
        port = one.address.port
        with socket.create_connection(("127.0.0.1", port)):
            one.members[0].accept()[0].close()  # we close first: the port stays in TIME_WAIT
        one.close()
        closed(bind(listener("127.0.0.1", port)))

    def test_host_name(self) -> None:
        (one,) = bind(listener("localhost", 0))
        assert one.address.host == "127.0.0.1"
        one.close()

    def test_ipv6_is_not_ipv4(self) -> None:
        (one,) = bind(listener("::", free_port()))
        socket.create_connection(("::1", one.address.port), 5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", one.address.port), 5)
        one.close()

    def test_both_side_by_side(self) -> None:
        port = free_port()
        both = bind(listener("::", port, name="six"), listener("0.0.0.0", port, name="four"))
        assert [str(one.address) for one in both] == [f"[::]:{port}", f"0.0.0.0:{port}"]
        closed(both)

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_our_own_may_overlap(self, protocol: str) -> None:
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        port = free_port()
        wide, close = bind(
            listener("0.0.0.0", port, protocol), listener("127.0.0.1", port, protocol, "close"), workers=1
        )
        with socket.socket(socket.AF_INET, kind) as client:
            client.connect(("127.0.0.1", port))
            client.send(b"x")
            taker = close.members[0]
            taker.setblocking(True)
            taker.settimeout(30)
            if protocol == "tcp":
                taker, _ = taker.accept()
            assert taker.recv(1) == b"x"
            taker.close()
        closed([wide, close])

    def test_backlog(self) -> None:
        assert 0 < listen_backlog() <= MAX_BACKLOG


class TestFailures:
    def fails(self, *listeners: Wanted) -> str:
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StartError) as failure:
            bind(*listeners)
        assert len(os.listdir("/proc/self/fd")) == descriptors  # nothing stays bound
        return str(failure.value)

    @pytest.mark.parametrize("protocol", ["tcp", "udp"])
    def test_port_of_another_that_also_reuses(self, protocol: str) -> None:
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET, kind) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
            if protocol == "tcp":
                other.listen()
            port = other.getsockname()[1]
            said = self.fails(listener("127.0.0.1", 0), listener("127.0.0.1", port, protocol, "taken"))
        assert f"the listener 'taken' cannot be bound: 127.0.0.1:{port} is already in use" in said
        assert f"ss -lnp --{protocol} 'sport = :{port}'" in said

    def test_address_of_another_machine(self) -> None:
        assert "no interface of this machine has the address" in self.fails(
            listener("192.0.2.1", free_port())
        )

    def test_name_that_does_not_resolve(self) -> None:
        said = self.fails(listener("no-such-host.invalid", 8080))
        assert "the host name 'no-such-host.invalid' does not resolve" in said

    @pytest.mark.parametrize(
        ("number", "words"),
        [
            (errno.EACCES, "CAP_NET_BIND_SERVICE"),
            (errno.EAFNOSUPPORT, "no IPv6"),
            (errno.EMFILE, "too many open files"),
            (errno.ENOBUFS, os.strerror(errno.ENOBUFS)),
        ],
    )
    def test_other_causes(self, number: int, words: str) -> None:
        said = module._cause(Address("::1", 80), OSError(number, os.strerror(number)), "tcp")
        assert words in said
        assert "[::1]:80" in said

    def test_unprivileged_port_is_named(self) -> None:
        assert str(
            Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip()
        ) in module._cause(Address("::1", 80), PermissionError(errno.EACCES, "denied"), "tcp")


class TestAdmin:
    def test_listens(self) -> None:
        sock = bind_admin(Address("127.0.0.1", 0))
        socket.create_connection(sock.getsockname(), 5).close()
        sock.close()

    def test_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(StartError, match=rf"metrics_bind = 127.0.0.1:{port}.* is already in use"):
                bind_admin(Address("127.0.0.1", port))


class TestPassthrough:
    def test_where_it_cannot_be(self) -> None:
        (one,) = bind(mode_a(0), workers=1)
        with pytest.raises(StartError, match=r"passthrough \(bind_addr = .*\) cannot be bound: .* in use"):
            bind(mode_a(one.address.port), workers=1)
        one.close()
