"""Backends that misbehave: nobody else's answer, nothing cut that looks whole, nothing without a bound.

Every backend here answers ``GET /good`` as it should and misbehaves on any other path, so that a good client
is served by the same worker and the same backend throughout.
"""

import contextlib
import os
import select
import signal
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    House,
    Script,
    Steady,
    answer_ok,
    certificate,
    eventually,
    listener,
    resident_kib,
)
from tests.ports import free_port

_RUNTIME = "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 100\n"
_GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nbackend"
_LINGER_RESET = struct.pack("ii", 1, 0)

Act = Callable[[BackendConnection], None]


def misbehaving(act: Act) -> Script:
    """Good on /good, else ``act``, after which the connection is closed."""

    def serve(connection: BackendConnection) -> None:
        while True:
            head, _ = connection.request()
            if not head.startswith(b"GET /good"):
                act(connection)
                return
            connection.send(_GOOD)

    return serve


def sends(*parts: bytes) -> Act:
    def act(connection: BackendConnection) -> None:
        for part in parts:
            connection.send(part)

    return act


def then_reset(*parts: bytes) -> Act:
    def act(connection: BackendConnection) -> None:
        for part in parts:
            connection.send(part)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)

    return act


def stays(*parts: bytes) -> Act:
    """Send, then say nothing until the gateway ends the connection."""

    def act(connection: BackendConnection) -> None:
        for part in parts:
            connection.send(part)
        with contextlib.suppress(ConnectionError):
            while connection.sock.recv(65536):
                pass

    return act


def forever(first: bytes, part: bytes) -> Act:
    def act(connection: BackendConnection) -> None:
        connection.send(first)
        with contextlib.suppress(ConnectionError):
            while True:
                connection.send(part)
        connection.backend.received.append(b"CUT")

    return act


def _ask(port: int, request: bytes = b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n") -> bytes:
    """All that a client is sent, up to a FIN (``.``) or a reset (``!``)."""
    with Client(port) as client:
        client.send(request)
        received = b""
        try:
            while data := client.sock.recv(65536):
                received += data
        except ConnectionResetError:
            return received + b"!"
        return received + b"."


# -- answers that are none -----------------------------------------------------------------------------------

_HEAD = b"HTTP/1.1 200 OK\r\n"
_UPGRADE = b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"

NO_ANSWERS: list[tuple[str, Act, str, str]] = [
    # name, what the backend does, reason counted, error of Proxy-Status
    ("close before the head", sends(), "backend_reset", "connection_terminated"),
    ("reset before the head", then_reset(), "backend_reset", "connection_terminated"),
    ("close in the head", sends(b"HTTP/1.1 200"), "backend_truncated", "http_response_incomplete"),
    ("close after a line", sends(_HEAD), "backend_truncated", "http_response_incomplete"),
    ("reset in the head", then_reset(_HEAD), "", ""),
    ("an endless head", forever(_HEAD, b"x-y: z\r\n" * 1000), "backend_head_too_large", ""),
    ("an endless line", forever(_HEAD + b"x: ", b"x" * 10000), "backend_head_too_large", ""),
    ("300 fields", sends(_HEAD + b"x: y\r\n" * 300 + b"\r\n"), "backend_head_too_large", ""),
    ("no HTTP", sends(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "backend_protocol", "http_protocol_error"),
    ("HTTP/2", sends(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + b"\r\n\r\n"), "backend_protocol", ""),
    ("HTTP/2.0", sends(b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    ("status 099", sends(b"HTTP/1.1 099 No\r\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    ("status 1000", sends(b"HTTP/1.1 1000 No\r\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    ("cl and te", sends(_HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "", ""),
    (
        "two cl",
        sends(_HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!"),
        "backend_protocol",
        "",
    ),
    ("a signed cl", sends(_HEAD + b"content-length: +5\r\n\r\nhello"), "backend_protocol", ""),
    (
        "unknown te",
        sends(_HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        "backend_protocol",
        "",
    ),
    ("te on 1.0", sends(b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"), "", ""),
    ("a folded header", sends(_HEAD + b"x: y\r\n z\r\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    ("a bare LF", sends(_HEAD + b"x: y\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    ("NUL", sends(_HEAD + b"x: \x00\r\ncontent-length: 0\r\n\r\n"), "backend_protocol", ""),
    (
        "unasked 101",
        stays(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
        "",
        "",
    ),
    (
        "1xx with a body",
        sends(b"HTTP/1.1 103 Early\r\ncontent-length: 5\r\n\r\nhello"),
        "backend_protocol",
        "",
    ),
]


def test_no_usable_answer_is_502(house: House) -> None:
    """Fresh and reused connections alike; the request is not idempotent, so nothing is sent twice."""
    port = house.port
    acts = {name: act for name, act, _, _ in NO_ANSWERS}
    asked: list[str] = []

    def act(connection: BackendConnection) -> None:
        acts[asked[-1]](connection)

    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        for name, _, reason, error in NO_ANSWERS:
            asked.append(name)
            before = gateway.metric("http_gateway_errors_total", reason=reason) if reason else 0
            with Client(port) as client:
                client.send(b"POST /bad HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
                status, headers, body = client.response()
                assert status == 502, f"{name}: {status} {body!r}"
                assert f"error={error}" in headers["proxy-status"], name
                client.send(b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.response()[2] == b"backend", f"{name}: the client's connection is still good"
            if reason:
                assert gateway.metric("http_gateway_errors_total", reason=reason) == before + 1, name
        eventually(lambda: backend.received.count(b"CUT") == 2, "endless heads were cut off")


def test_interim_responses_pass_but_not_without_end(house: House) -> None:
    port = house.port
    hint = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"

    def act(connection: BackendConnection) -> None:
        forever(b"", hint)(connection)

    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        with Client(port) as client:
            client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n")
            interim = 0
            while (status := client.response()[0]) == 103:
                interim += 1
            assert status == 502
            assert 1 <= interim <= 100
        gateway.wait_metric("http_gateway_errors_total", reason="backend_protocol")
        eventually(lambda: b"CUT" in backend.received, "the endless backend was cut off")


# -- answers cut short ---------------------------------------------------------------------------------------

_SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 50
_CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n32\r\n" + b"x" * 50 + b"\r\n"
_CLOSING = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 50

CUT: list[tuple[str, Act]] = [
    ("sized, close", sends(_SIZED)),
    ("sized, reset", then_reset(_SIZED)),
    ("chunked, close", sends(_CHUNKED)),
    ("chunked, close in a chunk", sends(_CHUNKED[:-20])),
    ("chunked, close in the last chunk", sends(_CHUNKED + b"0\r\n")),
    ("chunked, reset", then_reset(_CHUNKED)),
    ("chunked, then nonsense", sends(_CHUNKED + b"zz\r\n")),
    ("chunked, chunk too long", sends(_CHUNKED + b"ffffffffffffffff\r\n")),
    ("chunked, forbidden trailer", sends(_CHUNKED + b"0\r\ncontent-length: 5\r\n\r\n")),
    ("until close, reset", then_reset(_CLOSING)),
    ("sized, stalls", stays(_SIZED)),
    ("chunked, stalls", stays(_CHUNKED)),
    ("until close, stalls", stays(_CLOSING)),
]


@pytest.mark.parametrize("version", [b"1.1", b"1.0"], ids=["to HTTP/1.1", "to HTTP/1.0"])
def test_an_answer_cut_short_never_looks_complete(house: House, version: bytes) -> None:
    port = house.port
    acts = dict(CUT)
    asked: list[str] = []

    def act(connection: BackendConnection) -> None:
        acts[asked[-1]](connection)

    more = "[listeners.http]\nbody_timeout_ms = 400\n"
    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend, more), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        for name, _ in CUT:
            asked.append(name)
            got = _ask(port, b"GET /bad HTTP/" + version + b"\r\nHost: a\r\n\r\n")
            assert not _looks_complete(got), f"{name}: {got!r}"
            assert got.endswith(b"!") or b"content-length: 100" in got or b"chunked" in got, (
                f"{name}: {got!r}"
            )
        errors = gateway.metric("http_gateway_errors_total", listener="web")
        assert errors == len(CUT)
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 1, "nothing is left")


def _looks_complete(got: bytes) -> bool:
    """As a client would judge that trusts framing and, without any, an orderly end."""
    end, got = got[-1:], got[:-1]
    head, _, body = got.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        return False  # it was answered 502 or 504, or nothing
    if b"content-length: " in head:
        return len(body) >= 100
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    return end == b"."


def test_a_cut_in_a_large_answer_is_no_end(house: House) -> None:
    """The gateway has given up megabytes of it already: what is on its way arrives, then a reset or an early
    end; never the last chunk.
    """
    port = house.port
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    act = then_reset(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", *[piece] * 40)
    with Backend(misbehaving(act)) as backend, house.gateway(listener(port, backend), runtime=_RUNTIME):
        got = _ask(port)
        assert got.startswith(b"HTTP/1.1 200") or b" 502 " in got[:20] or got == b"!"
        assert not got[:-1].endswith(b"\r\n0\r\n\r\n")


def test_an_http_1_0_answer_ends_with_its_connection(house: House) -> None:
    """Close-delimited is complete after FIN, and only then."""
    port = house.port
    with (
        Backend(misbehaving(sends(_CLOSING))) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME),
    ):
        with Client(port) as client:
            client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.response()[2] == b"x" * 50
        assert _looks_complete(_ask(port, b"GET /bad HTTP/1.0\r\n\r\n"))


def test_a_tls_backend_that_is_cut_off_does_not_end_its_answer(tmp_path: Path, house: House) -> None:
    """Close-delimited over TLS: without close_notify anybody could have ended it (RFC 8446 6.1)."""
    port = house.port
    files = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    for in_order in (True, False):

        def act(connection: BackendConnection, in_order: bool = in_order) -> None:
            connection.send(_CLOSING)
            tls = connection.sock
            assert isinstance(tls, ssl.SSLSocket)
            if in_order:
                with contextlib.suppress(OSError):
                    tls.unwrap()
            else:
                socket.socket.shutdown(tls, socket.SHUT_WR)

        port = free_port()
        config = listener(port, "127.0.0.1:1").replace(
            "address = '127.0.0.1:1' }",
            "address = '127.0.0.1:{port}', tls = true, tls_ca_path = '" + str(files.certificate) + "' }",
        )
        with (
            Backend(misbehaving(act), tls=context) as backend,
            house.gateway(config.replace("{port}", str(backend.port)), runtime=_RUNTIME),
        ):
            got = _ask(port, b"GET /bad HTTP/1.0\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 200")
            assert _looks_complete(got) is in_order


# -- slow answers --------------------------------------------------------------------------------------------


def drips(first: bytes, part: bytes) -> Act:
    def act(connection: BackendConnection) -> None:
        connection.send(first)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                if threading.Event().wait(0.02):
                    break
                connection.send(part)
        connection.backend.received.append(b"CUT")

    return act


SLOW: list[tuple[str, Act]] = [
    ("a drip of a header", drips(_HEAD + b"x: ", b"y")),
    ("a drip of a status line", drips(b"", b"H")),
    ("silence", stays()),
    ("102, then silence", stays(b"HTTP/1.1 102 Processing\r\n\r\n")),
]


@pytest.mark.parametrize("setting", ["head_timeout_ms", "total_timeout_ms"])
def test_a_head_that_takes_too_long_is_504(house: House, setting: str) -> None:
    port = house.port
    acts = dict(SLOW)
    asked: list[str] = []

    def act(connection: BackendConnection) -> None:
        acts[asked[-1]](connection)

    more = f"[listeners.http]\n{setting} = 300\n"
    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend, more), runtime=_RUNTIME) as gateway,
        Steady(port),
    ):
        for number, (name, _) in enumerate(SLOW, 1):
            asked.append(name)
            with Client(port) as client:
                client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n")
                while (status := client.response()[0]) < 200:
                    pass
                assert status == 504, name
            assert gateway.metric("http_gateway_errors_total", listener="web") == number
            assert gateway.metric("pool_connections", state="busy") <= 1, "the connection was given up"


def test_a_backend_that_accepts_and_never_reads(tmp_path: Path) -> None:
    """An upload stands still: the client is paused in bounded memory, then told."""
    port = free_port()
    release = threading.Event()

    def serve(connection: BackendConnection) -> None:
        release.wait(30)

    more = "[listeners.http]\nbody_timeout_ms = 500\nmax_request_body_bytes = 0\n"
    with (
        Backend(serve) as backend,
        Gateway(tmp_path, listener(port, backend, more), runtime=_RUNTIME) as gateway,
    ):
        (worker,) = gateway.worker_pids()
        before = resident_kib(worker)
        with Client(port) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000000\r\n\r\n")
            client.sock.settimeout(0.2)
            sent = 0
            with contextlib.suppress(ConnectionError):
                while not select.select([client.sock], [], [], 0)[0]:
                    assert sent < 199_000_000, "the client was not paused"
                    with contextlib.suppress(TimeoutError):
                        sent += client.sock.send(b"x" * 65_536)
            client.sock.settimeout(30)
            assert resident_kib(worker) - before < 8192
            assert client.rest().startswith(b"HTTP/1.1 504 ")
        assert gateway.metric("http_gateway_errors_total", reason="body_timeout") == 1
        release.set()


# -- tunnelling: bytes that no request asked for -------------------------------------------------------------

_EVIL = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"


def test_bytes_after_a_complete_answer_reach_nobody(house: House) -> None:
    port = house.port

    def serve(connection: BackendConnection) -> None:
        while True:
            connection.request()
            connection.send(_GOOD + _EVIL)

    with (
        Backend(serve) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Client(port) as client,
    ):
        for number in range(5):
            client.send(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number)
            assert client.response()[2] == b"backend"
            with Client(port) as other:
                other.send(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n")
                assert other.response()[2] == b"backend"
        assert backend.connections == 10, "no such connection was used again"
        assert gateway.metric("security_events_total", kind="unsolicited_response") == 10


ENDS = (
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
)


@pytest.mark.parametrize("more", [_EVIL, b"\r\n", b"x"], ids=["an answer", "a blank line", "a byte"])
def test_whatever_ends_the_answer(house: House, more: bytes) -> None:
    port = house.port
    answers: list[bytes] = []

    def act(connection: BackendConnection) -> None:
        connection.send(answers[-1] + more)
        answer_ok(connection)

    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Steady(port),
        Client(port) as client,
    ):
        for number, answer in enumerate(ENDS, 1):
            answers.append(answer)
            client.send(b"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n")
            client.response(head_only=not answer.startswith(b"HTTP/1.1 200"))
            client.send(b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n")
            assert client.response()[2] == b"backend"
            assert gateway.metric("security_events_total", kind="unsolicited_response") == number


def test_a_body_for_head_is_not_an_answer_to_the_next(house: House) -> None:
    port = house.port

    def act(connection: BackendConnection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(_EVIL) + _EVIL)
        answer_ok(connection)

    with (
        Backend(misbehaving(act)) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Client(port) as client,
    ):
        client.send(b"HEAD /bad HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response(head_only=True)[0] == 200
        client.send(b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[2] == b"backend"
        assert gateway.metric("security_events_total", kind="unsolicited_response") == 1


def test_bytes_on_an_idle_connection_close_it(house: House) -> None:
    port = house.port
    poison = threading.Event()

    def serve(connection: BackendConnection) -> None:
        connection.request()
        connection.send(_GOOD)
        if connection.number == 1:
            poison.wait(30)
            connection.send(_EVIL)
        answer_ok(connection)

    with (
        Backend(serve) as backend,
        house.gateway(listener(port, backend), runtime=_RUNTIME) as gateway,
        Client(port) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[2] == b"backend"
        poison.set()
        gateway.wait_metric("security_events_total", kind="unsolicited_response")
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[2] == b"backend"
        assert backend.connections == 2


@pytest.mark.parametrize("is_request_first", [True, False], ids=["request first", "answer first"])
def test_bytes_that_come_together_with_the_next_request(tmp_path: Path, is_request_first: bool) -> None:
    """The worker stands still while both arrive, so it learns of them in one batch of events: an answer that
    was there before its request was sent is not the answer to it.
    """
    port = free_port()
    poison, poisoned = threading.Event(), threading.Event()

    def serve(connection: BackendConnection) -> None:
        connection.request()
        connection.send(_GOOD)
        if connection.number == 1:
            poison.wait(30)
            connection.send(_EVIL)
            poisoned.set()
        answer_ok(connection)

    with (
        Backend(serve) as backend,
        Gateway(tmp_path, listener(port, backend), runtime=_RUNTIME) as gateway,
        Client(port) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.response()[2] == b"backend"
        (worker,) = gateway.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            if is_request_first:
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            poison.set()
            assert poisoned.wait(30)
            if not is_request_first:
                client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        finally:
            os.kill(worker, signal.SIGCONT)
        assert client.response()[2] == b"backend"
        assert gateway.metric("security_events_total", kind="unsolicited_response") == 1
