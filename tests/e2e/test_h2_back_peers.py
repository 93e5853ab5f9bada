"""HTTP/2 servers of other makers behind the gateway, in clear text and over TLS, through every front."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.h2_backends import backend_table, hypercorn
from tests.e2e.h2_raw import RawH2, h2_context, request
from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    certificate,
    eventually,
    need,
    server,
)
from tests.e2e.http_world import answer, client_context, field, read_body, read_chunked
from tests.e2e.test_peers import nginx
from tests.ports import free_port

BLOB = bytes(range(256)) * 20_000  # 5 MB
FRONTS = ("h1", "h1s", "h2c", "h2")
NAMES = ("nginx", "hypercorn")


class Answer(NamedTuple):
    status: int
    fields: list[tuple[str, str]]
    body: bytes


class World:
    """Two listeners for each backend, in clear text and over TLS, each for HTTP/1.1 and HTTP/2."""

    def __init__(self, gateway: Gateway, ports: dict[tuple[str, bool], int], files: CertificateFiles) -> None:
        self.gateway = gateway
        self._ports = ports
        self._files = files

    def ask(
        self, front: str, backend: str, path: str, body: bytes | None = None, method: str = "", *more: str
    ) -> Answer:
        """``more``: values of Cookie."""
        method = method or ("GET" if body is None else "POST")
        if front in ("h1", "h1s"):
            return self._ask_h1(front, backend, path, body, method, more)
        tls = h2_context(str(self._files.certificate)) if front == "h2" else None
        with RawH2(self._ports[backend, front == "h2"], tls=tls) as client:
            fields = request(path, method, *(("cookie", value) for value in more))
            found = client.ask(fields, body)
            assert found.is_complete, found
            return Answer(found.status, found.headers, bytes(found.body))

    def _ask_h1(
        self, front: str, backend: str, path: str, body: bytes | None, method: str, cookies: tuple[str, ...]
    ) -> Answer:
        tls = client_context(self._files.certificate) if front == "h1s" else None
        with Client(self._ports[backend, front == "h1s"], tls=tls) as client:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Cookie: {'; '.join(cookies)}\r\n" if cookies else ""
            head += f"Content-Length: {len(body)}\r\n" if body is not None else ""
            client.send(head.encode() + b"\r\n" + (body or b""))
            got = client.until(b"\r\n\r\n")
            status = int(got.split()[1])
            lines = (line.partition(":") for line in got.decode("latin-1").split("\r\n")[1:-2])
            fields = [(name.lower(), value.strip()) for name, _, value in lines]
            if method == "HEAD" or status in (204, 304):
                found = b""
            elif field(got, "transfer-encoding") == "chunked":
                found = read_chunked(client)[0]
            else:
                found = client.exactly(int(field(got, "content-length") or 0))
            # What follows on the same connection is an answer again: nothing was left over.
            client.send(b"GET /empty HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert client.rest().startswith(b"HTTP/1.1 204 ")
            return Answer(status, fields, found)


def echo(connection: BackendConnection) -> None:
    """What is behind nginx: as hypercorn's app."""
    while True:
        head = connection.until(b"\r\n\r\n")
        path = head.split()[1]
        body = read_body(connection, head)
        if path == b"/empty":
            connection.send(b"HTTP/1.1 204 No Content\r\nx-version: 1\r\n\r\n")
        elif path == b"/fields":
            answer(connection, b"\n".join(head.split(b"\r\n")[1:-2]).lower(), headers=COOKIES)
        elif head.startswith(b"HEAD"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n" + COOKIES + b"\r\n")
        else:
            answer(connection, BLOB if path == b"/big" else body, headers=COOKIES)


COOKIES = b"set-cookie: a=1\r\nset-cookie: b=2; Path=/\r\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("h2-peers")
    files = certificate(directory)
    behind = {(name, is_tls): free_port() for name in NAMES for is_tls in (False, True)}
    ports = {key: free_port() for key in behind}
    text = ""
    for (name, is_tls), port in ports.items():
        # Clear text before clear text, TLS before TLS.
        table = backend_table(f"127.0.0.1:{behind[name, is_tls]}", files if is_tls else None)
        more = (
            f"tls = {{ cert_path = '{files.certificate}', key_path = '{files.key}' }}"
            if is_tls
            else "h2c = true"
        )
        text += (
            f"[[listeners]]\nname = '{name}-{is_tls}'\naddress = '127.0.0.1:{port}'\n"
            f"protocol = '{'h1s' if is_tls else 'h1'}'\nbackends = [{table}]\n{more}\n"
        )
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(Backend(echo))
        servers = "".join(
            f"server {{ listen 127.0.0.1:{behind['nginx', is_tls]} {how} http2; client_max_body_size 0;\n"
            f"ssl_certificate {files.certificate}; ssl_certificate_key {files.key};\n"
            f"location / {{ proxy_pass http://{there.address}; proxy_http_version 1.1; }} }}\n"
            for is_tls, how in ((False, ""), (True, "ssl"))
        )
        stack.enter_context(nginx(directory, behind["nginx", True], servers))
        stack.enter_context(hypercorn(behind["hypercorn", False]))
        stack.enter_context(hypercorn(behind["hypercorn", True], files))
        gateway = stack.enter_context(Gateway(directory, text))
        yield World(gateway, ports, files)
        eventually(lambda: gateway.metric("backend_inflight") == 0, "nothing is under way")
        assert gateway.metric("http_gateway_errors_total") == 0
        assert gateway.metric("backend_retries_total") == 0


every = pytest.mark.parametrize(("front", "backend"), [(front, name) for front in FRONTS for name in NAMES])


@need("nginx")
@every
class TestEveryFront:
    @pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, len(BLOB)])
    def test_bodies_both_ways(self, world: World, front: str, backend: str, size: int) -> None:
        found = world.ask(front, backend, "/echo", BLOB[:size])
        assert found.status == 200
        assert found.body == BLOB[:size]

    def test_a_long_answer(self, world: World, front: str, backend: str) -> None:
        assert world.ask(front, backend, "/big").body == BLOB

    def test_no_content(self, world: World, front: str, backend: str) -> None:
        found = world.ask(front, backend, "/empty")
        assert (found.status, found.body) == (204, b"")

    def test_head(self, world: World, front: str, backend: str) -> None:
        found = world.ask(front, backend, "/echo", method="HEAD")
        assert (found.status, found.body) == (200, b"")

    def test_cookies(self, world: World, front: str, backend: str) -> None:
        found = world.ask(front, backend, "/fields", None, "", "x=1", "y=2")
        assert [value for name, value in found.fields if name == "set-cookie"] == ["a=1", "b=2; Path=/"]
        sent = [line.partition(b": ")[2] for line in found.body.split(b"\n") if line.startswith(b"cookie:")]
        assert b"; ".join(sent) == b"x=1; y=2"
        assert b"via: " in found.body


@need("nginx")
def test_what_version_they_saw(world: World) -> None:
    for front in FRONTS:
        assert ("x-version", "2") in world.ask(front, "hypercorn", "/empty").fields


@need("nghttpd")
@pytest.mark.parametrize("is_tls", [False, True], ids=["clear", "tls"])
def test_nghttpd(tmp_path: Path, is_tls: bool) -> None:
    """Files with their conditions and trailers, and uploads echoed."""
    files = certificate(tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    (root / "big").write_bytes(BLOB)
    behind, port = free_port(), free_port()
    how = [str(files.key), str(files.certificate)] if is_tls else ["--no-tls"]
    table = backend_table(f"127.0.0.1:{behind}", files if is_tls else None)
    command = ["nghttpd", "-a", "127.0.0.1", "-d", str(root), "--echo-upload", "--trailer", "x-sum: 7"]
    arguments = [*command, str(behind), *how] if is_tls else [*command, *how, str(behind)]
    text = (
        f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{port}'\nprotocol = 'h1'\nh2c = true\n"
        f"backends = [{table}]\n"
    )
    with server(*arguments, port=behind), Gateway(tmp_path, text) as gateway, RawH2(port) as client:
        got = client.ask(request("/big"))
        assert (got.status, bytes(got.body)) == (200, BLOB)
        assert got.trailers == [("x-sum", "7")]
        modified = got.get("last-modified") or ""
        assert client.ask(request("/big", "GET", ("if-modified-since", modified))).status == 304
        head = client.ask(request("/big", "HEAD"))
        assert (head.status, head.get("content-length"), bytes(head.body)) == (200, str(len(BLOB)), b"")
        assert client.ask(request("/missing")).status == 404
        assert client.ask(request("/", "POST"), BLOB).body == BLOB
        streams = [client.open(request("/big")) for _ in range(20)]
        for stream in streams:
            assert client.response(stream).body == BLOB
        assert gateway.metric("pool_connections") == 1
