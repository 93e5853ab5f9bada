"""PROXY headers: believed from trusted neighbours only, bounded in size and time, and sent to backends."""

import contextlib
import select
import socket
import ssl
import struct
import time
from pathlib import Path

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    House,
    Script,
    certificate,
    eventually,
    listener,
)
from tests.ports import free_port

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
_TRUSTED = """trusted_proxies = ['127.0.0.0/8']
handshake_timeout_ms = 400
[runtime.watchdog]
sweep_interval_ms = 100
"""


def v2(source: str = "192.0.2.7", command: int = 0x21, family: int = 0x11, extra: bytes = b"") -> bytes:
    addresses = (
        socket.inet_aton(source) + socket.inet_aton("192.0.2.1") + struct.pack("!HH", 5555, 80) + extra
    )
    return _SIGNATURE + bytes((command, family)) + struct.pack("!H", len(addresses)) + addresses


V1 = b"PROXY TCP4 192.0.2.7 192.0.2.1 5555 80\r\n"


def _value(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b": ")
        if key == name:
            return value
    return None


HEADERS = (
    (V1, b"192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 2001:db8::1 5555 80\r\n", b"2001:db8::7"),
    (b"PROXY UNKNOWN\r\n", b"127.0.0.1"),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", b"127.0.0.1"),
    (v2(), b"192.0.2.7"),
    (v2(extra=b"\x04\x00\x03abc"), b"192.0.2.7"),
    (v2(command=0x20), b"127.0.0.1"),
)


def test_a_trusted_neighbour_says_who_the_client_is(house: House) -> None:
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=_TRUSTED),
    ):
        for header, shown in HEADERS:
            with Client(port) as client:  # in one piece with the request
                client.send(header + _GET)
                assert client.response()[0] == 200
            with Client(port) as client:  # byte by byte
                for byte in header:
                    client.send(bytes((byte,)))
                client.send(_GET)
                assert client.response()[0] == 200
            seen = [_value(head, b"x-forwarded-for") for head, _ in backend.requests[-2:]]
            assert seen == [shown] * 2, header


def test_what_a_client_says_of_itself_behind_a_proxy_is_not_believed(house: House) -> None:
    """The neighbour is trusted, the client it speaks for is not."""
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=_TRUSTED),
        Client(port) as client,
    ):
        client.send(V1 + b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n")
        assert client.response()[0] == 200
    assert _value(backend.requests[0][0], b"x-forwarded-for") == b"192.0.2.7"


def test_from_anyone_else_it_is_a_bad_request(tmp_path: Path) -> None:
    """From a neighbour that is not trusted, and where it is not enabled."""
    enabled, plain = free_port(), free_port()
    with Backend() as backend:
        config = listener(enabled, backend, "proxy_protocol = true") + listener(plain, backend, name="plain")
        with Gateway(tmp_path, config, runtime="trusted_proxies = ['127.0.0.5/32']\n"):
            for port, source in ((enabled, "127.0.0.6"), (plain, "127.0.0.5")):
                for header in (V1, v2()):
                    with Client(port, source=source) as client:
                        client.send(header + _GET)
                        assert client.response()[0] == 400
                        assert client.is_closed()
            assert backend.connections == 0
            with Client(enabled, source="127.0.0.5") as client:
                client.send(V1 + _GET)
                assert client.response()[0] == 200


GARBAGE: list[tuple[str, bytes]] = [
    ("no header", _GET),
    ("another signature", b"\r\n\r\n\x00\r\nQUIX\n" + b"x" * 20),
    ("v1 without addresses", b"PROXY TCP4\r\n"),
    ("v1 with a name", b"PROXY TCP4 localhost 192.0.2.1 5555 80\r\n"),
    ("v1 with IPv6 for TCP4", b"PROXY TCP4 ::1 ::1 5555 80\r\n"),
    ("v1 with a port too large", b"PROXY TCP4 192.0.2.7 192.0.2.1 65536 80\r\n"),
    ("v1 with a signed port", b"PROXY TCP4 192.0.2.7 192.0.2.1 +5 80\r\n"),
    ("v1 in lower case", b"proxy tcp4 192.0.2.7 192.0.2.1 5555 80\r\n"),
    ("v1 with two blanks", b"PROXY  TCP4 192.0.2.7 192.0.2.1 5555 80\r\n"),
    ("v1 with a bare LF", b"PROXY TCP4 192.0.2.7 192.0.2.1 5555 80\n" + b"x" * 100),
    ("v1 without an end", b"PROXY TCP4 " + b"1" * 200),
    ("v2 with another version", v2(command=0x31)),
    ("v2 with an unknown command", v2(command=0x2F)),
    ("v2 too short for its family", _SIGNATURE + b"\x21\x11\x00\x02ab"),
    ("v2 of 64 KiB", _SIGNATURE + b"\x21\x11\xff\xff" + b"x" * 65535),
]


def test_garbage_is_closed_without_a_word(house: House) -> None:
    port = house.port
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=_TRUSTED) as gateway,
    ):
        for number, (name, garbage) in enumerate(GARBAGE, 1):
            with Client(port) as client:
                with contextlib.suppress(ConnectionError):
                    client.send(garbage)
                assert client.is_closed(), name
            rejected = gateway.metric("accept_reject_total", listener="web")
            assert rejected == number, name
        assert backend.connections == 0
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 0, "they are gone")
        with Client(port) as client:
            client.send(V1 + _GET)
            assert client.response()[0] == 200


def test_a_header_that_does_not_come_is_not_waited_for(house: House) -> None:
    port = house.port
    parts = (b"", b"PROXY TCP4 192.0", v2()[:20])
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=_TRUSTED) as gateway,
    ):
        began = time.monotonic()
        clients = [Client(port) for _ in parts]
        for client, part in zip(clients, parts, strict=True):
            client.send(part)
        for client in clients:
            assert client.is_closed()
            client.sock.close()
        assert time.monotonic() - began < 4.5  # five seconds are the default
        assert gateway.metric("accept_reject_total", reason="proxy_header_timeout") == len(parts)
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 0, "they are gone")


def test_half_a_header_and_fin_is_over_at_once(house: House) -> None:
    """Not a byte more can come: waiting for the timeout would also spin on the hang-up."""
    port = house.port
    runtime = _TRUSTED.replace("400", "8000")
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=runtime) as gateway,
    ):
        for header in (b"", b"P", V1[:20], v2()[:20]):
            with Client(port) as client:
                client.send(header)
                client.sock.shutdown(socket.SHUT_WR)
                assert select.select([client.sock], [], [], 2)[0], header
                assert client.is_closed()
        assert gateway.metric("accept_reject_total", reason="proxy_header_missing") == 4


def test_caps_count_the_address_that_the_header_names(house: House) -> None:
    port = house.port
    runtime = "per_ip_connection_cap = 2\n" + _TRUSTED
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, "proxy_protocol = true"), runtime=runtime) as gateway,
    ):
        clients = [Client(port) for _ in range(4)]
        for client, source in zip(clients, ("192.0.2.7", "192.0.2.7", "192.0.2.7", "192.0.2.8"), strict=True):
            client.send(v2(source) + _GET)
        assert [client.response()[0] for client in clients] == [200, 200, 503, 200]
        assert gateway.metric("accept_reject_total", reason="ip_cap") == 1
        for client in clients:
            client.sock.close()
        eventually(lambda: gateway.metric("connections_inflight", listener="web") == 0, "all are gone")
        with Client(port) as client:
            client.send(v2() + _GET)
            assert client.response()[0] == 200


def test_before_tls(tmp_path: Path, house: House) -> None:
    """The header is in the clear, the handshake right behind it."""
    port = house.port
    files = certificate(tmp_path)
    more = f"proxy_protocol = true\ntls = {{ cert_path = '{files.certificate}', key_path = '{files.key}' }}"
    context = ssl.create_default_context(cafile=str(files.certificate))
    with (
        Backend() as backend,
        house.gateway(listener(port, backend, more, protocol="h1s"), runtime=_TRUSTED),
        Client(port) as client,
    ):
        client.send(V1)
        client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        client.send(_GET)
        assert client.response()[0] == 200
    assert _value(backend.requests[0][0], b"x-forwarded-for") == b"192.0.2.7"
    assert _value(backend.requests[0][0], b"x-forwarded-proto") == b"https"


# -- towards backends ----------------------------------------------------------------------------------------


def _introduced(seen: list[bytes]) -> Script:
    def serve(connection: BackendConnection) -> None:
        while True:  # a header may come by itself: only a request is answered
            head = connection.until(b"GET / ")
            seen.append(head + connection.until(b"\r\n\r\n"))
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    return serve


def test_a_backend_is_told_who_the_client_is(tmp_path: Path) -> None:
    """One connection speaks for one client: none is used for another, or again."""
    seen: list[bytes] = []
    kinds = [(protocol, version) for protocol in ("h1", "tcp") for version in ("v1", "v2")]
    ports = {kind: free_port() for kind in kinds}
    with Backend(_introduced(seen)) as backend:
        config = "".join(
            listener(ports[kind], backend, name="-".join(kind), protocol=kind[0]).replace(
                "' }", f"', send_proxy = '{kind[1]}' }}"
            )
            for kind in kinds
        )
        with Gateway(tmp_path, config):
            for kind in kinds:
                _check_introductions(ports[kind], kind[1], seen)
        assert backend.connections == 2 * len(kinds)


def _check_introductions(port: int, version: str, seen: list[bytes]) -> None:
    seen.clear()
    expected = []
    for source in ("127.0.0.2", "127.0.0.3"):
        with Client(port, source=source) as client:
            source_port = client.sock.getsockname()[1]
            client.send(_GET)
            assert client.response()[2] == b"ok"
        if version == "v1":
            expected.append(f"PROXY TCP4 {source} 127.0.0.1 {source_port} {port}\r\n".encode())
        else:
            addresses = socket.inet_aton(source) + socket.inet_aton("127.0.0.1")
            addresses += struct.pack("!HH", source_port, port)
            expected.append(_SIGNATURE + b"\x21\x11\x00\x0c" + addresses)
    for introduction in expected:
        assert introduction + b"GET / " in b"".join(seen)


def test_the_address_of_a_header_is_passed_on(house: House) -> None:
    port = house.port
    seen: list[bytes] = []
    with Backend(_introduced(seen)) as backend:
        config = listener(port, backend, "proxy_protocol = true").replace("' }", "', send_proxy = 'v1' }")
        with house.gateway(config, runtime=_TRUSTED), Client(port) as client:
            client.send(V1 + _GET)
            assert client.response()[0] == 200
    assert b"".join(seen).startswith(V1)
