"""A DNS server on loopback, written on dnspython's message API, and a resolver that asks it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from expressgateway.upstream.dns import Resolver
from expressgateway.upstream.dns_answers import Answer, DnsError, SrvAnswer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

Zone = dict[tuple[str, str], tuple[int, list[str]]]
"""(name with its dot, type) -> (ttl, rdata)."""


def whole(reply: dns.message.Message) -> bytes:
    return reply.to_wire(max_size=65535)


class NameServer(asyncio.DatagramProtocol):
    """Answers from `zone` over UDP and TCP; a test may bend it with `mangle`, which gets question and
    reply.
    """

    def __init__(self) -> None:
        self.zone: Zone = {}
        self.asked: list[tuple[str, str]] = []
        self.mangle: Callable[[dns.message.Message], bytes | None] = whole
        self.changed = asyncio.Event()
        self.port = 0

    def put(self, name: str, kind: str, *rdata: str, ttl: int = 60) -> None:
        self.zone[name, kind] = (ttl, list(rdata))

    def reply(self, wire: bytes) -> dns.message.Message:
        question = dns.message.from_wire(wire)
        name, kind = question.question[0].name.to_text(), dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked.append((name, kind))
        self.changed.set()
        reply = dns.message.make_response(question)
        for _ in range(10):
            alias = self.zone.get((name, "CNAME"))
            if alias is None:
                break
            reply.answer.append(dns.rrset.from_text(name, alias[0], "IN", "CNAME", *alias[1]))
            name = alias[1][0]
        if (name, kind) in self.zone:
            ttl, rdata = self.zone[name, kind]
            reply.answer.append(dns.rrset.from_text(name, ttl, "IN", kind, *rdata))
        elif not any(known == name for known, _ in self.zone):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        wire = self.mangle(self.reply(data))
        if wire is not None:
            self.transport.sendto(wire, addr)

    async def serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            size = int.from_bytes(await reader.readexactly(2), "big")
            wire = self.reply(await reader.readexactly(size)).to_wire(max_size=65535)
            writer.write(len(wire).to_bytes(2, "big") + wire)
            await writer.drain()


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    server = NameServer()
    loop = asyncio.get_running_loop()
    tcp = await asyncio.start_server(server.serve_tcp, "127.0.0.1", 0)
    while True:
        server.port = tcp.sockets[0].getsockname()[1]
        try:
            udp, _ = await loop.create_datagram_endpoint(lambda: server, ("127.0.0.1", server.port))
            break
        except OSError:  # somebody has this number for UDP
            taken, tcp = tcp, await asyncio.start_server(server.serve_tcp, "127.0.0.1", 0)
            taken.close()
    try:
        yield server
    finally:
        udp.abort()  # close() would wait for what cannot be sent
        tcp.close()
        await tcp.wait_closed()


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Bench:
    """A name server, a resolver that asks it, and its clock."""

    def __init__(self, server: NameServer, files: Path, **settings: Any) -> None:
        self.server = server
        self.clock = Clock()
        self.hosts = files / "hosts"
        self.resolv_conf = files / "resolv.conf"
        settings.setdefault("nameservers", [("127.0.0.1", server.port)])
        self.resolver = Resolver(
            hosts_path=str(self.hosts), resolv_conf_path=str(self.resolv_conf), now=self.clock, **settings
        )

    def break_with(self, fault: Callable[[dns.message.Message], bytes | None]) -> None:
        """From now on the server misbehaves, and the resolver does not wait long for it."""
        self.server.mangle = fault
        self.resolver._total_timeout_s = 0.1

    def mend(self) -> None:
        self.server.mangle = whole
        self.resolver._total_timeout_s = 5.0

    async def ask(self, host: str = "web.example") -> Answer:
        return await self.resolver.resolve(host)

    async def fails(self, host: str = "web.example") -> DnsError:
        with pytest.raises(DnsError) as caught:
            await self.resolver.resolve(host)
        return caught.value

    async def ask_srv(self, name: str = "_http._tcp.example") -> SrvAnswer:
        return await self.resolver.resolve_srv(name)

    async def fails_srv(self, name: str = "_http._tcp.example") -> DnsError:
        with pytest.raises(DnsError) as caught:
            await self.resolver.resolve_srv(name)
        return caught.value


# -- what a server may do wrong


def silence(_: dns.message.Message) -> None:
    return None


def garbage(_: dns.message.Message) -> bytes:
    return b"\xff" * 40


def empty(_: dns.message.Message) -> bytes:
    return b""


def other_id(reply: dns.message.Message) -> bytes:
    reply.id ^= 1
    return reply.to_wire()


def cut(reply: dns.message.Message) -> bytes:
    return reply.to_wire()[:-3]


def servfail(reply: dns.message.Message) -> bytes:
    reply.answer.clear()
    reply.set_rcode(dns.rcode.SERVFAIL)
    return reply.to_wire()


def refused(reply: dns.message.Message) -> bytes:
    reply.answer.clear()
    reply.set_rcode(dns.rcode.REFUSED)
    return reply.to_wire()


def loop(reply: dns.message.Message) -> bytes:
    name = reply.question[0].name.to_text()
    reply.answer = [
        dns.rrset.from_text(name, 5, "IN", "CNAME", "b.example."),
        dns.rrset.from_text("b.example.", 5, "IN", "CNAME", name),
    ]
    return reply.to_wire()


FAULTS = [silence, garbage, empty, other_id, cut, servfail, refused, loop]
