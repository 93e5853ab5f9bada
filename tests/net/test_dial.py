"""Dialling: the socket's settings, the PROXY header in front, and the words for what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace
from typing import Any

import pytest

from expressgateway.net.dial import Dialler, tune
from expressgateway.net.stream import Stream
from expressgateway.net.tls import ServerTls
from expressgateway.net.tls_stream import TlsStream
from expressgateway.upstream.backend import Backend, BackendSettings, TlsSettings
from expressgateway.upstream.errors import Fault
from tests.net import loopback
from tests.net.loopback import Owner, World, refused_address, run
from tests.net.tls_peers import ca, issue, site

ADDRESSES = (("192.0.2.7", 4711), ("198.51.100.1", 80))
TLS = TlsSettings(verify_peer=True, hostname="a.test", ca_pem=ca().pem, cert_pem=None, key_pem=None)


def backend(address: tuple[str, int], **more: Any) -> Backend:
    settings = BackendSettings("b", address[0], address[1], "h1", 1, None, None)
    return Backend(replace(settings, **more), address, "b")


class Explained(Owner):
    """Asks for the explanation where the program does: while the stream fails."""

    fault: Fault | None = None

    def on_closed(self, error: str) -> None:
        super().on_closed(error)
        assert self.stream is not None
        self.fault = Dialler.explain(self.stream, error).fault


def dial(world: World, to: Backend, addresses: Any = ADDRESSES) -> tuple[Stream, Explained]:
    owner = Explained()
    stream = Dialler(world.reactor, 5.0, ("http/1.1",)).dial(to, owner, addresses)
    owner.stream = stream
    return stream, owner


@pytest.mark.parametrize(
    ("version", "addresses", "expected"),
    [
        ("v1", ADDRESSES, b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 80\r\n"),
        ("v1", None, b"PROXY UNKNOWN\r\n"),
        ("v2", None, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
        (
            "v2",
            ADDRESSES,
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\7\xc6\x33\x64\1\x12\x67\0\x50",
        ),
        (None, ADDRESSES, b""),
    ],
)
def test_the_proxy_header_comes_before_anything_else(version: Any, addresses: Any, expected: bytes) -> None:
    async def test(world: World) -> None:
        there = loopback.Backend()
        stream, owner = dial(world, backend(there.address, send_proxy=version), addresses)
        peer = await there.accept()
        await world.until(lambda: owner.calls == ["open"])
        stream.write([b"hello"])
        stream.close()
        assert await peer.read_all() == expected + b"hello"
        peer.close()
        there.close()

    run(test)


def test_the_proxy_header_is_in_the_clear_before_tls() -> None:
    async def test(world: World) -> None:
        there = loopback.Backend()
        stream, _ = dial(world, backend(there.address, send_proxy="v1", tls=TLS))
        peer = await there.accept()
        assert await peer.read_until(b"\r\n") == b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 80\r\n"
        assert (await peer.read_exactly(1)) == b"\x16"
        stream.reset()
        peer.close()
        there.close()

    run(test)


def test_refused_is_called_refused() -> None:
    async def test(world: World) -> None:
        for tls in (None, TLS):
            _, owner = dial(world, backend(refused_address(), tls=tls))
            await world.until(owner.has_ended)
            assert owner.fault is Fault.REFUSED

    run(test)


def test_no_way_there_is_called_unreachable() -> None:
    async def test(world: World) -> None:
        _, owner = dial(world, backend(("255.255.255.255", 9)))
        await world.until(owner.has_ended)
        assert owner.fault in (Fault.UNREACHABLE, Fault.REFUSED)

    run(test)


@pytest.mark.parametrize(
    ("tls", "fault"),
    [
        (TLS, None),
        (replace(TLS, hostname="b.test"), Fault.CERTIFICATE),
        (replace(TLS, ca_pem=issue("Other").pem), Fault.CERTIFICATE),
        (replace(TLS, ca_pem=None, verify_peer=False, hostname="b.test"), None),
    ],
)
def test_a_certificate_that_is_not_accepted(tls: TlsSettings, fault: Fault | None) -> None:
    async def test(world: World) -> None:
        there = loopback.Backend()
        stream, owner = dial(world, backend(there.address, tls=tls))
        assert isinstance(stream, TlsStream)
        peer = await there.accept()
        peer.sock.settimeout(30)

        def serve() -> None:
            with contextlib.suppress(OSError):
                peer.sock = ServerTls([site("a.test").pair]).context.wrap_socket(peer.sock, server_side=True)

        serving = asyncio.ensure_future(asyncio.to_thread(serve))
        await world.until(lambda: owner.calls)
        assert owner.fault is fault
        assert owner.calls[0] == ("closed" if fault else "open")
        stream.reset()
        await serving
        peer.close()
        there.close()

    run(test)


@pytest.mark.parametrize("is_abrupt", [False, True])
def test_what_is_no_tls_is_called_tls(is_abrupt: bool) -> None:
    async def test(world: World) -> None:
        there = loopback.Backend()
        _, owner = dial(world, backend(there.address, tls=TLS))
        peer = await there.accept()
        await peer.read(1)
        if not is_abrupt:
            await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.reset()
        await world.until(owner.has_ended)
        assert owner.fault is Fault.TLS
        there.close()

    run(test)


def test_equal_settings_share_a_context_and_a_reload_swaps_them() -> None:
    async def test(world: World) -> None:
        dialler = Dialler(world.reactor, 5.0, ())
        context = dialler.context_for(TLS)
        assert dialler.context_for(replace(TLS)) is context
        assert dialler.context_for(replace(TLS, verify_peer=False, ca_pem=None)) is not context
        other = Dialler(world.reactor, 1.0, ())
        dialler.take_over(other)
        assert (dialler.connect_timeout_s, dialler.contexts) == (1.0, {})

    run(test)


def test_sockets_do_not_wait_and_notice_a_dead_peer() -> None:
    async def test(world: World) -> None:
        there = loopback.Backend()
        stream, _ = dial(world, backend(there.address))
        (await there.accept()).close()
        assert stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        stream.close()
        tune(there.sock)
        with socket.create_connection(there.address, timeout=60):
            peer = await there.accept()
            assert peer.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60  # inherited
            peer.close()
        there.close()

    run(test)
