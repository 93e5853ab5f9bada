"""Connections to backends: who answers, who refuses, and what is said about it."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from expressgateway.net.quic.connection import QuicConnection
from expressgateway.net.quic.dial import QuicDialler
from expressgateway.net.quic.events import Ended
from expressgateway.net.quic.tls import Grants
from expressgateway.upstream.backend import Backend, BackendSettings, TlsSettings
from expressgateway.upstream.errors import Fault
from tests.net.quic.endpoints import Choked, Echo, Scene, scene
from tests.net.quic.world import ALPN, authority, certificate, noise


class Caller(Echo):
    """A session with a backend: it asks, and hears."""

    def __init__(self, connection: QuicConnection) -> None:
        super().__init__(connection)
        self.heard = bytearray()
        self.is_finished = False

    def on_stream_data(self, stream_id: int, data: bytes, end: bool) -> None:
        self.heard += data
        self.is_finished |= end
        self.connection.engine.consumed(stream_id, len(data))


def dial(
    one: Scene, *, ca: bytes | None = None, name: str = "localhost", port: int = 0, **more: Any
) -> Caller:
    host = one.address[0]
    tls = TlsSettings(
        verify_peer=True, hostname=name, ca_pem=ca or certificate().certificate, cert_pem=None, key_pem=None
    )
    to = (host, port or one.address[1], *one.address[2:])
    backend = Backend(BackendSettings("b", host, to[1], "h3", 1, tls, None), to, "b")
    dialler = QuicDialler(one.reactor, one.timers, 5.0, more.get("alpn", [ALPN]), Grants())
    made: list[Caller] = []

    def open_session(connection: QuicConnection) -> Caller:
        made.append(Caller(connection))
        return made[0]

    dialler.dial(backend, open_session)
    return made[0]


async def hang_up(one: Scene, caller: Caller) -> None:
    if not caller.is_over:
        caller.connection.engine.close(0, "")
        caller.connection.wake()
        await one.world.turns(3)
        caller.connection.forget()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("retry", ["never", "always"])
def test_a_backend_that_answers(family: socket.AddressFamily, retry: str) -> None:
    async def test(one: Scene) -> None:
        caller = dial(one)
        await one.world.until(lambda: caller.is_open)
        engine = caller.connection.engine
        stream_id = engine.open_stream(False)
        assert stream_id is not None
        data = noise(1_000_000)
        engine.send(stream_id, data, True)
        caller.connection.wake()
        await one.world.until(lambda: caller.is_finished)
        assert caller.heard == data
        await hang_up(one, caller)

    scene(test, family=family, retry=retry)


def test_nobody_listens() -> None:
    async def test(one: Scene) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        caller = dial(one, port=port)
        await one.world.until(lambda: caller.is_over)
        assert caller.ended is not None
        assert QuicDialler.explain(caller.ended).fault is Fault.REFUSED

    scene(test)


def test_another_name() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one, name="example.org")
        await one.world.until(lambda: caller.ended)
        assert caller.ended is not None
        assert QuicDialler.explain(caller.ended).fault is Fault.CERTIFICATE
        assert not caller.is_open
        await one.world.until(lambda: one.sessions[0].ended)
        assert not one.sessions[0].is_open
        await hang_up(one, caller)

    scene(test)


def test_another_authority() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one, ca=authority().pem)
        await one.world.until(lambda: caller.ended)
        assert caller.ended is not None
        assert QuicDialler.explain(caller.ended).fault is Fault.CERTIFICATE
        await hang_up(one, caller)

    scene(test)


def test_nothing_in_common() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one, alpn=["h3"])
        await one.world.until(lambda: caller.ended)
        assert caller.ended is not None
        assert caller.ended.code == 0x178
        assert QuicDialler.explain(caller.ended).fault is Fault.PROTOCOL
        await hang_up(one, caller)

    scene(test)


def test_no_room_there() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one)
        await one.world.until(lambda: caller.ended)
        assert caller.ended is not None
        assert caller.ended.code == 0x2
        assert not caller.ended.is_ours
        await hang_up(one, caller)

    scene(test, room=0)


def test_a_backend_that_forgot_us_says_so() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one)
        await one.world.until(lambda: caller.is_open and one.endpoint.open == 1 and one.sessions[0].is_open)
        await one.world.turns()
        one.endpoint.connections()[0].forget()
        caller.connection.engine.ping()
        caller.connection.wake()
        await one.world.until(lambda: caller.is_over)
        assert one.counters.dropped["unknown_connection"] >= 1

    scene(test)


def test_a_full_socket() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one)
        way: Any = caller.connection.way
        choked = Choked(way._batch.sock, 3)
        way._batch.sock = choked
        await one.world.until(lambda: caller.is_open)
        engine = caller.connection.engine
        stream_id = engine.open_stream(False)
        assert stream_id is not None
        engine.send(stream_id, noise(300_000), True)
        caller.connection.wake()
        await one.world.until(lambda: caller.is_finished)
        assert choked.refusals > 5
        await hang_up(one, caller)

    scene(test)


def test_garbage_from_there() -> None:
    async def test(one: Scene) -> None:
        caller = dial(one)
        await one.world.until(lambda: caller.is_open)
        way: Any = caller.connection.way
        for size in range(1, 1200, 7):
            way.on_datagrams(os.urandom(size), size, one.address, [], 0)
        stream_id = caller.connection.engine.open_stream(False)
        assert stream_id is not None
        caller.connection.engine.send(stream_id, b"hello", True)
        caller.connection.wake()
        await one.world.until(lambda: caller.is_finished)
        await hang_up(one, caller)

    scene(test)


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0x10, "x", is_ours=True, errno=111), Fault.REFUSED),
        (Ended(0x10, "x", is_ours=True, errno=113), Fault.UNREACHABLE),
        (Ended(0x178, ""), Fault.PROTOCOL),
        (Ended(0x100 + 42, "", is_ours=True), Fault.CERTIFICATE),
        (Ended(0x100 + 48, "", is_ours=True), Fault.CERTIFICATE),
        (Ended(0x100 + 40, ""), Fault.TLS),
        (Ended(0x2, ""), Fault.PROTOCOL),
    ],
)
def test_words(ended: Ended, fault: Fault) -> None:
    assert QuicDialler.explain(ended).fault is fault
