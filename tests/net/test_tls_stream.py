"""TLS on a stream: the handshake's ends, bytes under backpressure, and both ways of ending one direction."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest

from expressgateway.net import tls_stream
from expressgateway.net.stream import HIGH_BYTES, LINGER_S
from expressgateway.net.tls import ServerTls
from expressgateway.net.tls_end import Ended, send_close_notify
from expressgateway.net.tls_stream import TlsStream, is_ragged_eof
from tests.net.loopback import PATIENCE_S, Owner, Peer, World, connection, narrow, run
from tests.net.tls_peers import alice, ca, issue, site, trusting

if TYPE_CHECKING:
    from collections.abc import Callable

BULK = os.urandom(1 << 20)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def stranger(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, trusted: bool = True) -> ssl.SSLContext:
    """The context of a client that is not ours."""
    context = ssl.create_default_context(cadata=ca().pem.decode() if trusted else issue("Other").pem.decode())
    context.minimum_version = context.maximum_version = version
    return context


def server(**options: Any) -> ssl.SSLContext:
    return ServerTls([site("a.test").pair], **options).context


class TlsPeer:
    """The far end in a thread of its own: blocking, as most programs are."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, name: str | None = "a.test") -> None:
        sock.settimeout(PATIENCE_S)
        self.raw = sock
        self._context = context
        self._name = name
        self.sock: ssl.SSLSocket | None = None

    async def do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(call, *arguments)

    async def shake_hands(self) -> ssl.SSLSocket:
        def wrap() -> ssl.SSLSocket:
            return self._context.wrap_socket(
                self.raw,
                server_side=self._name is None,
                server_hostname=self._name,
                suppress_ragged_eofs=False,
            )

        self.sock = await self.do(wrap)
        return self.sock

    def close(self) -> None:
        (self.sock or self.raw).close()


async def secured(
    world: World,
    *,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    is_narrow: bool = False,
    is_client: bool = False,
) -> tuple[TlsStream, Owner, TlsPeer, ssl.SSLSocket]:
    """A stream of ours with its handshake done, and the far end."""
    near, far = connection()
    if is_narrow:
        narrow(near, far)
    owner = Owner()
    if is_client:
        stream = TlsStream(world.reactor, near, owner, trusting(), server_hostname="a.test")
        peer = TlsPeer(far, server(), None)
    else:
        stream = TlsStream(world.reactor, near, owner, server())
        peer = TlsPeer(far, stranger(version))
    owner.stream = stream
    stream.start()
    sock = await peer.shake_hands()
    await world.until(lambda: "open" in owner.calls)
    return stream, owner, peer, sock


def receive(sock: ssl.SSLSocket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        data = sock.recv(65536)
        if not data:
            break
        got += data
    return bytes(got)


def receive_all(sock: ssl.SSLSocket) -> tuple[bytes, str]:
    """Everything until the end, and how it ended."""
    got = bytearray()
    try:
        while data := sock.recv(65536):
            got += data
    except OSError as error:
        if is_ragged_eof(error):
            return bytes(got), "ragged"
        return bytes(got), type(error).__name__
    return bytes(got), "close_notify"


class TestHandshake:
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("is_client", [False, True])
    def test_open_comes_after_it(self, version: ssl.TLSVersion, is_client: bool) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, version=version, is_client=is_client)
            assert owner.calls == ["open"]
            stream.write([b"hello"])
            assert await peer.do(receive, sock, 5) == b"hello"
            await peer.do(sock.sendall, b"dear me")
            await world.until(lambda: owner.data == b"dear me")
            stream.close()
            assert owner.has_ended()
            peer.close()

        run(test)

    def test_not_open_before(self) -> None:
        async def test(world: World) -> None:
            near, far = connection()
            owner = Owner()
            stream = TlsStream(world.reactor, near, owner, server())
            stream.start()
            assert stream.is_shaking_hands
            await world.turns()
            assert owner.calls == []
            assert await world.batches_in() == 0
            stream.close()
            assert owner.calls == ["released"]
            far.close()

        run(test)

    @pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 100, b""])
    def test_something_else_fails_with_a_sentence(self, said: bytes) -> None:
        async def test(world: World) -> None:
            near, far = connection()
            owner, peer = Owner(), Peer(far)
            TlsStream(world.reactor, near, owner, server()).start()
            await peer.send(said)
            peer.write_eof()
            await world.until(owner.has_ended)
            assert owner.calls == ["closed", "released"]
            assert owner.error.startswith("TLS handshake failed: ")
            peer.close()

        run(test)

    @pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"])
    def test_a_client_that_was_gone_before_we_began(self, sent: bytes) -> None:
        """The library takes the socket over and then finds it dead: the owner hears of it all the same."""

        async def test(world: World) -> None:
            near, far = connection()
            owner, peer = Owner(), Peer(far)
            if sent:
                await peer.send(sent)
            peer.reset()
            TlsStream(world.reactor, near, owner, server()).start()
            await world.until(owner.has_ended)
            assert owner.calls == ["closed", "released"]
            assert world.reactor.faults == 0

        run(test)

    def test_a_backend_with_another_name_is_not_accepted(self) -> None:
        async def test(world: World) -> None:
            near, far = connection()
            owner = Owner()
            stream = TlsStream(world.reactor, near, owner, trusting(), server_hostname="b.test")
            peer = TlsPeer(far, server(), None)
            stream.start()
            with contextlib.suppress(OSError):
                await peer.shake_hands()
            await world.until(owner.has_ended)
            assert owner.calls == ["closed", "released"]
            assert stream.is_certificate_refused
            assert "b.test" in owner.error
            peer.close()

        run(test)

    def test_nor_one_from_an_unknown_issuer(self) -> None:
        async def test(world: World) -> None:
            near, far = connection()
            owner = Owner()
            stream = TlsStream(world.reactor, near, owner, stranger(trusted=False), server_hostname="a.test")
            peer = TlsPeer(far, server(), None)
            stream.start()
            with contextlib.suppress(OSError):
                await peer.shake_hands()
            await world.until(owner.has_ended)
            assert stream.is_certificate_refused
            peer.close()

        run(test)

    @pytest.mark.parametrize("has_one", [False, True])
    def test_a_certificate_is_demanded_of_clients(self, has_one: bool) -> None:
        async def test(world: World) -> None:
            near, far = connection()
            owner = Owner()
            context = server(client_auth="required", client_ca_pem=ca().pem)
            stream = TlsStream(world.reactor, near, owner, context)
            peer = TlsPeer(far, trusting(certificate=alice().pair) if has_one else stranger())
            stream.start()
            with contextlib.suppress(OSError):
                await peer.shake_hands()
            await world.until(lambda: owner.calls)
            assert owner.calls[0] == ("open" if has_one else "closed")
            stream.reset()
            peer.close()

        run(test)


class TestBytes:
    @pytest.mark.parametrize("is_client", [False, True])
    def test_twenty_megabytes_out_under_backpressure(self, is_client: bool) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, is_client=is_client)
            reading = asyncio.ensure_future(peer.do(receive, sock, 20 << 20))
            sizes = [70_000, 1, 16_384, 16_385, 3, 40_000]
            at = turn = 0
            sent = bytearray()
            while at < 20 << 20:
                batch = []
                for _ in range(3):
                    size = min(sizes[turn % 6], (20 << 20) - at)
                    turn += 1
                    batch.append(BULK[turn : turn + size])
                    sent += batch[-1]
                    at += size
                stream.write(batch)
                assert stream.backlog_bytes < HIGH_BYTES + 3 * 70_000
                if stream.backlog_bytes > HIGH_BYTES:
                    await world.until(lambda: not stream.backlog_bytes)
            assert await reading == sent
            assert owner.calls.count("congested") == owner.calls.count("drained") > 0
            stream.close()
            peer.close()

        run(test)

    def test_twenty_megabytes_in_with_pauses(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world)
            sending = asyncio.ensure_future(peer.do(sock.sendall, BULK * 20))
            pauses = 0
            while len(owner.data) < 20 << 20:
                stream.pause()
                size = len(owner.data)
                await world.turns(1)
                assert len(owner.data) == size
                stream.resume()
                pauses += 1
                await world.turns(2)
            await sending
            assert owner.data == BULK * 20
            assert pauses > 3
            stream.close()
            peer.close()

        run(test)

    def test_a_write_that_could_not_finish_is_repeated_with_the_same_bytes(self) -> None:
        """Many small buffers behind a full connection: what OpenSSL began must go on as it was."""

        async def test(world: World) -> None:
            stream, _, peer, sock = await secured(world, is_narrow=True)
            stream.write([BULK[:80_000]])
            for at in range(80_000, 120_000, 100):
                stream.write([BULK[at : at + 100]])
            assert stream.backlog_bytes
            assert await peer.do(receive, sock, 120_000) == BULK[:120_000]
            stream.close()
            peer.close()

        run(test)


@pytest.fixture(params=[True, False], ids=["openssl", "unwrap"])
def with_openssl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to send close_notify: by OpenSSL's own call, and where that cannot be had."""
    if not request.param:
        monkeypatch.setattr(tls_stream, "send_close_notify", lambda connection: Ended.UNAVAILABLE)


class TestEnding:
    @pytest.mark.parametrize("is_allowed", [False, True])
    def test_an_end_without_close_notify(self, is_allowed: bool) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world)
            stream.is_ragged_eof_allowed = is_allowed
            await peer.do(sock.sendall, b"half of it")
            socket.socket.shutdown(sock, socket.SHUT_WR)
            if is_allowed:
                await world.until(lambda: "eof" in owner.calls)
                assert owner.calls == ["open", "bytes", "eof"]
                stream.close()
            else:
                await world.until(owner.has_ended)
                assert owner.calls == ["open", "bytes", "closed", "released"]
                assert owner.error == "the peer closed the connection without ending TLS"
            peer.close()

        run(test)

    @pytest.mark.parametrize("version", VERSIONS)
    def test_the_peers_close_notify_is_its_end_and_no_more(self, version: ssl.TLSVersion) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, version=version)
            await peer.do(sock.sendall, b"question")
            unwrapping = asyncio.ensure_future(peer.do(quietly_unwrap, sock))
            await world.until(lambda: "eof" in owner.calls)
            assert owner.calls == ["open", "bytes", "eof"]
            stream.close()
            await unwrapping
            assert owner.has_ended()
            peer.close()

        run(test)

    @pytest.mark.usefixtures("with_openssl")
    @pytest.mark.parametrize("version", VERSIONS)
    @pytest.mark.parametrize("is_paused", [False, True])
    def test_our_end_leaves_the_other_direction_open(self, version: ssl.TLSVersion, is_paused: bool) -> None:
        """Also when the peer's bytes were there, unread, at the moment our end was sent."""

        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, version=version)
            if is_paused:
                stream.pause()
                await peer.do(sock.sendall, b"before ")
                await world.turns()
            stream.write([b"the end"])
            stream.write_eof()
            await world.turns()
            assert await world.batches_in() == 0
            stream.resume()
            assert await peer.do(receive_all, sock) == (b"the end", "close_notify")
            # Python's ssl is polite enough to go on sending after it has read close_notify.
            await peer.do(sock.sendall, b"goes on")
            await world.until(lambda: owner.data.endswith(b"goes on") or owner.has_ended())
            assert owner.calls == ["open", "bytes"]
            assert bytes(owner.data) == (b"before goes on" if is_paused else b"goes on")
            stream.close()
            peer.close()

        run(test)

    @pytest.mark.usefixtures("with_openssl")
    def test_our_end_when_the_peers_has_come_unread(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world)
            stream.pause()
            unwrapping = asyncio.ensure_future(peer.do(quietly_unwrap, sock))
            await asyncio.sleep(0.05)
            stream.write_eof()
            await world.turns()
            stream.resume()
            await unwrapping
            await world.until(lambda: "eof" in owner.calls or owner.has_ended())
            assert owner.calls == ["open", "eof"]
            assert world.reactor.faults == 0
            stream.close()
            peer.close()

        run(test)

    @pytest.mark.parametrize("size", [10, 150_000])
    @pytest.mark.parametrize("linger", [False, True])
    def test_close_sends_what_is_left_and_close_notify(self, size: int, linger: bool) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, is_narrow=True)
            stream.write([BULK[:size]])
            stream.close(linger)
            assert await peer.do(receive_all, sock) == (BULK[:size], "close_notify")
            peer.close()
            await world.until(owner.has_ended)
            assert "closed" not in owner.calls

        run(test)

    @pytest.mark.parametrize("is_closed", [False, True])
    @pytest.mark.parametrize("is_native", [True, False], ids=["openssl", "unwrap"])
    def test_close_notify_waits_for_room(
        self, is_closed: bool, is_native: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel took the last record and has no room for another: the end must wait, not be lost."""
        busy = [Ended.WANTS_WRITABLE, Ended.WANTS_WRITABLE]  # it does not run out of room on demand

        def end(connection: ssl.SSLSocket) -> Ended:
            if is_native:
                return busy.pop() if busy else send_close_notify(connection)
            return Ended.UNAVAILABLE

        monkeypatch.setattr(tls_stream, "send_close_notify", end)

        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world, is_narrow=True)
            stream.write([BULK[:100_000]])
            tls = stream.tls
            assert tls is not None
            unwrap = tls.unwrap

            def busy_unwrap() -> socket.socket:
                if busy:
                    busy.pop()
                    raise ssl.SSLWantWriteError
                return unwrap()

            tls.unwrap = busy_unwrap  # type: ignore[method-assign]
            if is_closed:
                stream.close()
                assert not owner.has_ended()
            else:
                stream.write_eof()
            got, end = await peer.do(receive_all, sock)
            assert (got == BULK[:100_000], end) == (True, "close_notify")
            assert busy == []
            stream.close()
            peer.close()
            await world.until(owner.has_ended)

        run(test)

    def test_lingering_reads_on(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world)
            await peer.do(sock.sendall, BULK[:100_000])
            stream.write([b"413"])
            stream.close(linger=True)
            assert await peer.do(receive_all, sock) == (b"413", "close_notify")
            assert not owner.has_ended()
            stream.sweep(world.reactor.now + LINGER_S + 0.1)
            assert owner.has_ended()
            peer.close()

        run(test)

    def test_reset_does_not_say_goodbye(self) -> None:
        async def test(world: World) -> None:
            stream, owner, peer, sock = await secured(world)
            stream.write([b"half of it"])
            stream.reset()
            assert owner.calls == ["open", "released"]
            _, end = await peer.do(receive_all, sock)
            assert end != "close_notify"
            peer.close()

        run(test)

    def test_a_reset_by_the_peer(self) -> None:
        async def test(world: World) -> None:
            _, owner, _, sock = await secured(world)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
            await world.until(owner.has_ended)
            assert owner.calls == ["open", "closed", "released"]

        run(test)


def quietly_unwrap(sock: ssl.SSLSocket) -> None:
    with contextlib.suppress(OSError):
        sock.unwrap()


def test_no_thread_is_left_behind() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]
