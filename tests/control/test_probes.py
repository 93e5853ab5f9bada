"""Probes against servers that behave, and servers that do not: always a result, always in time."""

import asyncio
import errno
import gc
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from expressgateway.control import probe_wire, probes
from expressgateway.control.probes import MAX_DETAIL, Result, probe_for, run, short
from expressgateway.net.tls import ServerTls
from expressgateway.upstream.backend import BackendSettings, TlsSettings
from expressgateway.upstream.health_backend import HealthSettings
from expressgateway.wire.proxy_protocol import V1_UNKNOWN, V2_LOCAL
from tests.net import tls_peers
from tests.net.tls_peers import alice, ca, issue, site

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HANG = "hang"


def wanted(type_: str, **more: Any) -> HealthSettings:
    values: dict[str, Any] = {
        "type": type_,
        "path": "/healthz",
        "host": None,
        "expect_status": frozenset({200}),
        "expect_body": None,
        "interval_s": 5,
        "timeout_s": 30,
        "rise": 3,
        "fall": 2,
        "jitter": 0.2,
    }
    return HealthSettings(**{**values, **more})


def backend(**more: Any) -> BackendSettings:
    values: dict[str, Any] = {
        "id": "a",
        "host": "localhost",
        "port": 8080,
        "protocol": "h1",
        "weight": 1,
        "tls": None,
        "send_proxy": None,
    }
    return BackendSettings(**{**values, **more})


def tls(**more: Any) -> TlsSettings:
    values: dict[str, Any] = {
        "verify_peer": True,
        "hostname": "localhost",
        "ca_pem": ca().pem,
        "cert_pem": None,
        "key_pem": None,
    }
    return TlsSettings(**{**values, **more})


@asynccontextmanager
async def serving(
    talk: Talk, context: ssl.SSLContext | None = None, at: tuple[str, int] = ("127.0.0.1", 0)
) -> AsyncIterator[tuple[str, int]]:
    """A server on loopback; nothing of it is left at the end."""
    loop = asyncio.get_running_loop()
    talks: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
    is_over = False

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_over:  # it was on its way when the server closed
            writer.transport.abort()
        else:
            talks[writer] = loop.create_task(one(reader, writer))

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # a probe goes when it knows enough
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(accepted, *at, ssl=context)
    try:
        yield server.sockets[0].getsockname()
    finally:
        is_over = True
        server.close()
        for task in talks.values():
            task.cancel()
        await asyncio.gather(*talks.values(), return_exceptions=True)
        for writer in talks:
            writer.transport.abort()  # of a task, too, that was cancelled before it began
        await asyncio.sleep(0)


def ask(
    settings: HealthSettings,
    talk: Talk,
    *,
    server: ssl.SSLContext | None = None,
    **more: Any,
) -> Result | None:
    """One probe of a server that talks so."""

    async def main() -> Result | None:
        async with serving(talk, server) as address:
            return await run(probe_for(settings, backend(**more), address), settings.timeout_s)

    return asyncio.run(main())


def says(*parts: bytes | str, seen: list[bytes] | None = None) -> Talk:
    """Reads a head, writes the parts, closes; a part `HANG` waits for ever."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.append(head)
        for part in parts:
            if isinstance(part, str):
                await asyncio.Event().wait()
            else:
                writer.write(part)
                await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        await reader.read()

    return talk


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class TestHttp:
    def test_what_is_asked(self) -> None:
        seen: list[bytes] = []
        assert ask(wanted("http"), says(OK, seen=seen)) == Result(True, "status 200")
        start, *lines = seen[0].decode().lower().split("\r\n")
        assert start == "get /healthz http/1.1"
        assert "host: localhost:8080" in lines
        assert "connection: close" in lines

    def test_host(self) -> None:
        seen: list[bytes] = []
        ask(wanted("http", host="example.com"), says(OK, seen=seen))
        ask(wanted("http"), says(OK, seen=seen), host="::1", port=80)
        assert b"host: example.com\r\n" in seen[0]
        assert b"host: [::1]\r\n" in seen[1]

    def test_status(self) -> None:
        answer = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"
        assert ask(wanted("http"), says(answer)) == Result(False, "status 503")
        tolerant = wanted("http", expect_status=frozenset({200, 503}))
        assert ask(tolerant, says(answer)) == Result(True, "status 503")

    def test_interim_answers_are_not_the_answer(self) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        assert ask(wanted("http"), says(early, OK)) == Result(True, "status 200")

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nall is ok",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nall is\r\n3\r\n ok\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\nall is ok",
            b"HTTP/1.0 200 OK\r\n\r\nall is ok",
        ],
    )
    def test_body(self, answer: bytes) -> None:
        for found in (b"all", b"is ok", b"all is ok"):
            assert ask(wanted("http", expect_body=found), says(answer)) == Result(True, "status 200")
        result = ask(wanted("http", expect_body=b"fine"), says(answer))
        assert result == Result(False, "the body does not contain 'fine'")

    def test_a_text_split_over_reads(self) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"
        settings = wanted("http", expect_body=b"good")

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for byte in head + b"xxgoodxx":
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            await asyncio.Event().wait()

        assert ask(settings, drip) == Result(True, "status 200")

    def test_a_head_is_enough_without_a_wanted_body(self) -> None:
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"
        assert ask(wanted("http"), says(answer, HANG)) == Result(True, "status 200")

    def test_a_huge_body_is_not_read(self) -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(bytes(65536))
                sent += 65536
                await writer.drain()

        result = ask(wanted("http", expect_body=b"good"), flood)
        assert result == Result(False, "the first 65536 bytes of the body do not contain 'good'")
        assert sent < 32 * 1024 * 1024  # the kernel's buffers, not a body without end

    @pytest.mark.parametrize(
        ("answer", "cause"),
        [
            (b"SSH-2.0-OpenSSH_9.2\r\n", "it does not begin with HTTP/"),
            (b"\x15\x03\x01\x00\x02\x02\x16", "it does not begin with HTTP/"),
            (b"HTTP/1.1 abc OK\r\n\r\n", ""),
            (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "a header line without a colon"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", ""),
            (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20000 + b"\r\n\r\n", "a response head over the limit"),
            (b"HTTP/1.1 100 C\r\n\r\n" * 40, "more than 32 interim responses"),
        ],
    )
    def test_garbage(self, answer: bytes, cause: str) -> None:
        result = ask(wanted("http"), says(answer, HANG))
        assert result is not None
        assert not result.ok
        assert result.detail.startswith("garbage instead of an answer")
        assert cause in result.detail

    def test_ends(self) -> None:
        assert ask(wanted("http"), says()) == Result(False, "closed the connection before it answered")
        cut = says(b"HTTP/1.1 200 OK\r\ncontent-le")
        assert ask(wanted("http"), cut) == Result(False, "closed the connection inside its answer")

    def test_reset(self) -> None:
        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

        assert ask(wanted("http"), reset) == Result(False, "connection reset by peer")

    @pytest.mark.parametrize("talk", [hang, says(HANG), says(b"HTTP/1.1 200", HANG)])
    def test_hanging(self, talk: Talk) -> None:
        began = time.monotonic()
        assert ask(wanted("http", timeout_s=0.1), talk) == Result(False, "timed out after 100 ms")
        assert time.monotonic() - began < 20

    def test_a_slow_drip_gets_no_more_time(self) -> None:
        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nx: ")
            while True:
                writer.write(b"y")
                await asyncio.sleep(0.01)

        assert ask(wanted("http", timeout_s=0.1), drip) == Result(False, "timed out after 100 ms")

    def test_refused(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            probe = probe_for(wanted("http"), backend(), closed.getsockname())
            assert asyncio.run(run(probe, 30)) == Result(False, "connection refused")


def server_context(*names: str, **more: Any) -> ssl.SSLContext:
    return ServerTls([site(*names).pair], **more).context


class TestTls:
    def test_http(self) -> None:
        result = ask(wanted("http"), says(OK), server=server_context("localhost"), tls=tls())
        assert result == Result(True, "status 200")

    def test_handshake(self) -> None:
        assert ask(wanted("tls"), hang, server=server_context("localhost"), tls=tls()) == Result(
            True, "handshake done"
        )

    @pytest.mark.parametrize("type_", ["tls", "http"])
    def test_wrong_name(self, type_: str) -> None:
        result = ask(wanted(type_), hang, server=server_context("other.example"), tls=tls())
        assert result is not None
        assert not result.ok
        assert result.detail.startswith("certificate not accepted: Hostname mismatch")

    def test_unknown_authority(self) -> None:
        stranger = ServerTls([issue("localhost", "localhost", issuer=issue("Another CA")).pair]).context
        result = ask(wanted("tls"), hang, server=stranger, tls=tls())
        assert result is not None
        assert result.detail == "certificate not accepted: unable to get local issuer certificate"
        careless = tls(verify_peer=False, ca_pem=None)
        assert ask(wanted("tls"), hang, server=stranger, tls=careless) == Result(True, "handshake done")

    def test_a_client_certificate(self) -> None:
        context = server_context("localhost", client_auth="required", client_ca_pem=ca().pem)
        shown = tls(cert_pem=alice().pem, key_pem=alice().key_pem())
        assert ask(wanted("http"), says(OK), server=context, tls=shown) == Result(True, "status 200")
        with tls_peers.serving(context, reads=True) as (port, _):
            without = probe_for(wanted("http"), backend(tls=tls()), ("127.0.0.1", port))
            result = asyncio.run(run(without, 30))
        # In TLS 1.3 the server says so after the handshake, and may then close before it is read.
        assert result is not None
        assert not result.ok

    def test_clear_text_behind_it(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        result = ask(wanted("tls"), talk, tls=tls())
        assert result is not None
        assert result.detail == "TLS failed: wrong version number"

    def test_a_backend_whose_clients_speak_tls(self) -> None:
        """Its settings say nothing of TLS, so no certificate is wrong."""
        result = ask(wanted("tls"), hang, server=server_context("other.example"), protocol="tcp")
        assert result == Result(True, "handshake done")

    def test_hanging(self) -> None:
        assert ask(wanted("tls", timeout_s=0.1), hang, tls=tls()) == Result(False, "timed out after 100 ms")

    def test_settings_that_cannot_be_used(self) -> None:
        result = ask(wanted("tls"), hang, tls=tls(ca_pem=b"no certificate"))
        assert result is not None
        assert not result.ok
        assert result.detail.startswith("its TLS settings cannot be used: the backend's CA")

    def test_contexts_are_shared_and_go(self) -> None:
        pem = issue("One of this test's").pem
        one, other = (probe_wire.ProbeTls(name, tls(hostname=name, ca_pem=pem)) for name in ("a", "b"))
        assert one.context() is other.context()
        del one, other
        gc.collect()
        assert not any(pem in key for key in probe_wire._contexts)

    def test_the_end_is_said(self) -> None:
        """A backend that takes a missing close_notify for an attack is not given one to log."""
        ends: list[bytes | Exception] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                ends.append(await reader.read())
            except (OSError, ConnectionError) as error:
                ends.append(error)

        async def main() -> None:
            async with serving(talk, server_context("localhost")) as address:
                await run(probe_for(wanted("tls"), backend(tls=tls()), address), 30)
                async with asyncio.timeout(30):
                    while not ends:  # noqa: ASYNC110 - what the server saw has no event of its own
                        await asyncio.sleep(0.005)

        asyncio.run(main())
        assert ends == [b""]


class TestTcp:
    def test_connected(self) -> None:
        assert ask(wanted("tcp"), hang) == Result(True, "connected")

    def test_refused(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            probe = probe_for(wanted("tcp"), backend(), closed.getsockname())
            assert asyncio.run(run(probe, 30)) == Result(False, "connection refused")

    def test_a_full_backlog_hangs(self) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = []
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
                fillers.append(filler)
            probe = probe_for(wanted("tcp"), backend(), full.getsockname())
            assert asyncio.run(run(probe, 0.1)) == Result(False, "timed out after 100 ms")
            for filler in fillers:
                filler.close()

    def test_ipv6(self) -> None:
        async def main() -> Result | None:
            async with serving(hang, at=("::1", 0)) as address:
                return await run(probe_for(wanted("tcp"), backend(), address), 30)

        try:
            with socket.socket(socket.AF_INET6) as free:
                free.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 on loopback")
        assert asyncio.run(main()) == Result(True, "connected")

    def test_meeting_oneself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A port of loopback that nobody listens at, chosen by the kernel for our own end."""
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            address = chosen.getsockname()

        class Bound(socket.socket):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.bind(address)

        async def main() -> Result | None:
            with monkeypatch.context() as patched:
                patched.setattr(socket, "socket", Bound)
                return await run(probe_for(wanted("tcp"), backend(), address), 30)

        assert asyncio.run(main()) == Result(False, "connection refused")


class TestProxyHeader:
    @pytest.mark.parametrize(("version", "header"), [("v1", V1_UNKNOWN), ("v2", V2_LOCAL)])
    def test_first(self, version: str, header: bytes) -> None:
        seen: list[bytes] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readexactly(len(header)))
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await reader.read()

        assert ask(wanted("http"), talk, send_proxy=version) == Result(True, "status 200")
        assert seen == [header]

    def test_tcp(self) -> None:
        seen: list[bytes] = []

        async def main() -> None:
            done = asyncio.Event()

            async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                seen.append(await reader.read())
                done.set()

            async with serving(talk) as address, asyncio.timeout(30):
                assert await run(probe_for(wanted("tcp"), backend(send_proxy="v2"), address), 30)
                await done.wait()

        asyncio.run(main())
        assert seen == [V2_LOCAL]

    def test_before_tls(self) -> None:
        seen: list[bytes] = []
        context = server_context("localhost")
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            raw, _ = listener.accept()
            raw.settimeout(30)
            seen.append(raw.recv(len(V1_UNKNOWN), socket.MSG_WAITALL))  # not a byte of the handshake
            with context.wrap_socket(raw, server_side=True) as connection:
                connection.recv(4096)
                connection.sendall(OK)

        thread = threading.Thread(target=serve)
        thread.start()
        probe = probe_for(wanted("http"), backend(send_proxy="v1", tls=tls()), listener.getsockname())
        assert asyncio.run(run(probe, 30)) == Result(True, "status 200")
        thread.join(30)
        listener.close()
        assert seen == [V1_UNKNOWN]


class TestRun:
    def test_want_of_descriptors_says_nothing_about_the_backend(self) -> None:
        class Broken:
            async def run(self) -> str:
                raise OSError(errno.EMFILE, "Too many open files")

        assert asyncio.run(run(Broken(), 1)) is None

    def test_the_kernel_gives_up_before_we_do(self) -> None:
        class Broken:
            async def run(self) -> str:
                raise TimeoutError(errno.ETIMEDOUT, "x")

        assert asyncio.run(run(Broken(), 1)) == Result(False, "connection timed out")

    def test_a_defect_is_a_result(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken:
            async def run(self) -> str:
                raise ZeroDivisionError

        result = asyncio.run(run(Broken(), 1))
        assert result == Result(False, "the probe failed unexpectedly: ZeroDivisionError")
        assert "a defect" in caplog.text

    def test_cancelled(self) -> None:
        async def main() -> None:
            probing = asyncio.get_running_loop().create_task(self._forever())
            await asyncio.sleep(0)
            probing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await probing

        asyncio.run(main())

    async def _forever(self) -> None:
        class Hanging:
            async def run(self) -> str:
                await asyncio.Event().wait()
                return ""

        await run(Hanging(), 10)

    def test_no_probe_for_what_nobody_speaks(self) -> None:
        with pytest.raises(LookupError, match="no http probe for a backend that speaks spdy"):
            probe_for(wanted("http"), backend(protocol="spdy"), ("127.0.0.1", 1))

    def test_every_type_has_a_probe_in_every_protocol(self) -> None:
        types = ("http", "tcp", "tls", "grpc")
        protocols = ("tcp", "h1", "h2", "h3")
        assert set(probes._PROBES) == {(type_, one) for type_ in types for one in protocols}

    def test_details_fit_a_line(self) -> None:
        assert short("a\nb\x1b[2Jc") == "a?b?[2Jc"
        assert len(short("x" * 1000)) == MAX_DETAIL
