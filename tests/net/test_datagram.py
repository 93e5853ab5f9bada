"""Datagram sockets: which of our addresses a client used, and words for what keeps one from being sent."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from typing import Any

from expressgateway.net.datagram import IP_PKTINFO, LocalAddress, reason_of
from tests.l4.udp_gateway import (
    V4,
    V6,
    datagram_socket,
    gateway,
    run,
    until,
)


async def until_grown(answers: list[tuple[bytes, Any]], count: int) -> None:
    await until(lambda: len(answers) == count)


class TestLocalAddress:
    def test_a_wildcard_answers_from_the_address_that_was_asked(self) -> None:
        async def main() -> None:
            async with gateway("0.0.0.0") as one:
                one.use(one.echo().address)
                for ip in ("127.0.0.2", V4, "127.3.4.5"):
                    assert await one.client(to=(ip, one.port)).ask(b"x") == b"x"

        run(main)

    def test_one_client_at_two_of_our_addresses(self) -> None:
        async def main() -> None:
            async with gateway("0.0.0.0") as one:
                one.use(one.echo(b"a").address, one.echo(b"b").address)
                with datagram_socket(V4) as sock:
                    answers: list[tuple[bytes, Any]] = []
                    loop = asyncio.get_running_loop()
                    loop.add_reader(sock, lambda: answers.append(sock.recvfrom(10)))
                    for count, ip in enumerate(("127.0.0.2", "127.0.0.3", "127.0.0.2"), 1):
                        sock.sendto(b"", (ip, one.port))
                        await until_grown(answers, count)
                    loop.remove_reader(sock)
                    assert answers == [
                        (b"a", ("127.0.0.2", one.port)),
                        (b"b", ("127.0.0.3", one.port)),
                        (b"a", ("127.0.0.2", one.port)),
                    ]
                    assert one.listener.open == 2

        run(main)

    def test_an_ipv6_wildcard(self) -> None:
        async def main() -> None:
            async with gateway("::") as one:
                one.use(one.echo(host=V6).address)
                assert await one.client(to=(V6, one.port)).ask(b"x") == b"x"

        run(main)

    def test_an_ipv6_wildcard_that_serves_ipv4_too(self) -> None:
        async def main() -> None:
            async with gateway("::", dual=True) as one:
                one.use(one.echo().address)
                client = one.client("127.0.0.7", to=("127.0.0.2", one.port))
                assert await client.ask(b"x") == b"x"
                assert one.census.inside == {"127.0.0.7": 1}

        run(main)

    def test_what_is_said_with_an_answer(self) -> None:
        with datagram_socket("::") as sock:
            local = LocalAddress(sock)

        def reply(ip: str) -> tuple[bytes, int] | None:
            packed = socket.inet_pton(socket.AF_INET6, ip)
            control = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", packed, 3))]
            answer = local.reply(control)
            if not answer:
                return None
            ((level, kind, data),) = answer
            assert (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
            address, interface = struct.unpack("=16si", data)
            assert address == packed
            return address, interface

        assert reply("2001:db8::1") == (socket.inet_pton(socket.AF_INET6, "2001:db8::1"), 0)
        assert reply("fe80::1") == (socket.inet_pton(socket.AF_INET6, "fe80::1"), 3)
        assert reply("ff02::1") is None
        assert local.reply([]) == []

    def test_the_kernels_number(self) -> None:
        assert getattr(socket, "IP_PKTINFO", IP_PKTINFO) == IP_PKTINFO

    def test_nothing_is_asked_where_there_is_one_address(self) -> None:
        with datagram_socket(V4) as one, datagram_socket("0.0.0.0") as any_:
            assert LocalAddress(one).control_bytes == 0
            assert LocalAddress(any_).control_bytes > 0


def test_labels_are_a_closed_set() -> None:
    labels = {reason_of(OSError(code, "")) for code in errno.errorcode}
    assert labels == {"no_buffers", "not_permitted", "too_big", "unreachable", "send_failed"}
    assert reason_of(OSError()) == "send_failed"
