"""The programs people run before, behind and against a gateway: nginx, HAProxy, curl, wrk and others."""

import contextlib
import hashlib
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import (
    Backend,
    BackendConnection,
    Client,
    Gateway,
    House,
    certificate,
    need,
    run,
    server,
)
from tests.e2e.http_world import answer, field, read_body
from tests.ports import free_port

BLOB = bytes(range(256)) * 20_000


def listener(
    port: int, backends: str, *, name: str = "web", tls: str = "", protocol: str = "", keys: str = ""
) -> str:
    """``backends``: inline tables. ``tls``: the listener's own table, which makes it ``h1s``."""
    return f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "{protocol or ("h1s" if tls else "h1")}"
backends = [{backends}]
{f"tls = {{ {tls} }}" if tls else ""}
{keys}
"""


def at(address: str, **keys: str | bool | Path) -> str:
    """A backend's inline table."""
    return ", ".join(
        [f'{{ address = "{address}"']
        + [f"{key} = {str(value).lower() if value in (True, False) else repr(str(value))}"
           for key, value in keys.items()]
    ) + " }"  # fmt: skip


@contextlib.contextmanager
def nginx(directory: Path, port: int, body: str) -> Iterator[None]:
    """``body``: what stands in its ``http`` block."""
    path = directory / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path.write_text(
        f"daemon off; user root; worker_processes 1; pid {directory}/nginx.pid; error_log stderr warn;\n"
        f"events {{ worker_connections 512; }}\nhttp {{ access_log off;\n{temporary}{body}\n}}\n"
    )
    with server("nginx", "-p", str(directory), "-c", str(path), "-e", "stderr", port=port):
        yield


@contextlib.contextmanager
def haproxy(directory: Path, port: int, body: str) -> Iterator[None]:
    path = directory / "haproxy.cfg"
    path.write_text(
        "global\n  maxconn 256\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n"
        f"  timeout client 10s\n  timeout server 10s\n{body}\n"
    )
    with server("haproxy", "-db", "-q", "-f", str(path), port=port):
        yield


def echo(connection: BackendConnection) -> None:
    """Give the body back; without one, say who asked."""
    while True:
        head = connection.until(b"\r\n\r\n")
        connection.backend.requests.append((head, b""))
        if field(head, "expect") == "100-continue":
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = read_body(connection, head) or (field(head, "x-forwarded-for") or "").encode()
        if head.startswith(b"HEAD"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4242\r\n\r\n")
        else:
            answer(connection, body)


@need("nginx")
class TestNginx:
    def test_as_backend(self, tmp_path: Path) -> None:
        port, behind = free_port(), free_port()
        (tmp_path / "blob").write_bytes(BLOB)
        (tmp_path / "put").mkdir()
        site = f"""
        server {{
            listen 127.0.0.1:{behind};
            client_max_body_size 0;
            location / {{ root {tmp_path}; }}
            location /put/ {{ root {tmp_path}; dav_methods PUT; }}
            location /see {{ return 200 "$remote_addr|$http_x_forwarded_for|$host|$http_cookie"; }}
            location /empty {{ return 204; }}
        }}"""
        with (
            nginx(tmp_path, behind, site),
            Gateway(tmp_path, listener(port, at(f"127.0.0.1:{behind}"))) as gateway,
            Client(port) as client,
        ):

            def ask(
                method: str, path: str, *lines: str, body: bytes = b""
            ) -> tuple[int, dict[str, str], bytes]:
                text = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a.example", *lines, "", ""])
                client.send(text.encode() + body)
                return client.response(head_only=method == "HEAD")

            status, headers, body = ask("GET", "/blob")
            assert (status, body) == (200, BLOB)
            assert headers["server"].startswith("nginx")
            assert ask("GET", "/blob", "Range: bytes=1000-1999")[::2] == (206, BLOB[1000:2000])
            assert ask("GET", "/blob", f"If-None-Match: {headers['etag']}")[0] == 304
            assert ask("HEAD", "/blob")[1]["content-length"] == str(len(BLOB))
            assert ask("GET", "/empty")[0] == 204
            assert ask("GET", "/nothing")[0] == 404
            seen = ask("GET", "/see", "Cookie: a=b; c=d")[2]
            assert seen == b"127.0.0.1|127.0.0.1|a.example|a=b; c=d"
            assert ask("PUT", "/put/one", f"Content-Length: {len(BLOB)}", body=BLOB)[0] == 201
            pieces = b"".join(
                b"2710\r\n%s\r\n" % BLOB[at_ : at_ + 10_000] for at_ in range(0, len(BLOB), 10_000)
            )
            assert ask("PUT", "/put/two", "Transfer-Encoding: chunked", body=pieces + b"0\r\n\r\n")[0] == 201
            for name in ("one", "two"):
                assert (tmp_path / "put" / name).read_bytes() == BLOB
            assert gateway.metric("pool_leases_total") - gateway.metric("pool_reuse_total") == 1

    def test_as_front(self, tmp_path: Path) -> None:
        """With kept-alive upstream connections, and its word about the client believed."""
        port, front = free_port(), free_port()
        site = f"""
        upstream us {{ server 127.0.0.1:{port}; keepalive 4; }}
        server {{
            listen 127.0.0.1:{front};
            client_max_body_size 0;
            location / {{
                proxy_pass http://us; proxy_http_version 1.1; proxy_set_header Connection "";
                proxy_set_header Host $host; proxy_request_buffering off;
                proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            }}
        }}"""
        trusted = 'trusted_proxies = ["127.0.0.1/32"]'
        with (
            Backend(echo) as backend,
            Gateway(tmp_path, listener(port, at(backend.address)), runtime=trusted) as gateway,
            nginx(tmp_path, front, site),
            Client(front, source="127.0.0.9") as client,
        ):
            for number in range(150):
                client.send(b"GET /%d HTTP/1.1\r\nHost: a.example\r\n\r\n" % number)
                assert client.response()[::2] == (200, b"127.0.0.9, 127.0.0.1")
            assert gateway.metric("connections_total", listener="web") <= 3, "nginx keeps its connections"
            client.send(
                b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % len(BLOB) + BLOB
            )
            assert client.response()[::2] == (200, BLOB)

    def test_as_tls_backend_that_wants_a_certificate(self, tmp_path: Path) -> None:
        port, behind = free_port(), free_port()
        files, ours = certificate(tmp_path), certificate(tmp_path, "gateway.example", stem="client")
        site = f"""
        server {{
            listen 127.0.0.1:{behind} ssl;
            ssl_certificate {files.certificate}; ssl_certificate_key {files.key};
            ssl_client_certificate {ours.certificate}; ssl_verify_client on;
            location / {{ return 200 "$ssl_client_verify $ssl_client_s_dn $ssl_server_name"; }}
        }}"""
        table = at(
            f"127.0.0.1:{behind}", tls=True, tls_ca_path=files.certificate, tls_verify_hostname="localhost",
            tls_cert_path=ours.certificate, tls_key_path=ours.key,
        )  # fmt: skip
        with nginx(tmp_path, behind, site), Gateway(tmp_path, listener(port, table)), Client(port) as client:
            for _ in range(3):
                client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                assert client.response()[::2] == (200, b"SUCCESS CN=gateway.example localhost")


@need("haproxy")
class TestHaproxy:
    @pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
    @pytest.mark.parametrize("secure", [False, True])
    def test_as_front_with_the_proxy_protocol(self, tmp_path: Path, version: str, secure: bool) -> None:
        port, front = free_port(), free_port()
        files = certificate(tmp_path)
        pair = f'cert_path = "{files.certificate}", key_path = "{files.key}"' if secure else ""
        tls = f"ssl verify required ca-file {files.certificate} verifyhost localhost sni str(localhost)"
        body = f"""
frontend in
  bind 127.0.0.1:{front}
  default_backend us
backend us
  http-reuse never
  server us 127.0.0.1:{port} {version} {tls if secure else ""}"""
        trusted = 'trusted_proxies = ["127.0.0.1/32"]'
        with Backend(echo) as backend:
            text = listener(port, at(backend.address), tls=pair, keys="proxy_protocol = true")
            with (
                Gateway(tmp_path, text, runtime=trusted),
                haproxy(tmp_path, front, body),
                Client(front, source="127.0.0.9") as client,
            ):
                for _ in range(5):
                    client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    assert client.response()[::2] == (200, b"127.0.0.9")

    @pytest.mark.parametrize("version", ["v1", "v2"])
    def test_as_backend_that_takes_the_proxy_protocol(self, tmp_path: Path, version: str) -> None:
        port, behind = free_port(), free_port()
        body = f"""
frontend in
  bind 127.0.0.1:{behind} accept-proxy
  http-request return status 200 content-type text/plain lf-string "%[src] %[dst_port]" """
        table = at(f"127.0.0.1:{behind}", send_proxy=version)
        with (
            haproxy(tmp_path, behind, body),
            Gateway(tmp_path, listener(port, table)),
            Client(port, source="127.0.0.9") as one,
            Client(port, source="127.0.0.10") as two,
        ):
            for _ in range(3):
                for client, source in ((one, "127.0.0.9"), (two, "127.0.0.10")):
                    client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    assert client.response()[::2] == (200, f"{source} {port}".encode())


@pytest.fixture
def echoing(tmp_path: Path) -> Iterator["Echoing"]:
    """The gateway in clear text, with TLS, and relaying TLS, before an echo."""
    files = certificate(tmp_path)
    clear, secure, relay = free_port(), free_port(), free_port()
    pair = f'cert_path = "{files.certificate}", key_path = "{files.key}"'

    def bounce(connection: BackendConnection) -> None:
        while data := connection.sock.recv(65536):
            connection.send(data)

    with Backend(echo) as backend, Backend(bounce) as raw:
        text = listener(clear, at(backend.address)) + listener(
            secure, at(backend.address), name="secure", tls=pair
        )
        text += listener(relay, at(raw.address), name="relay", tls=pair, protocol="tls")
        with Gateway(tmp_path, text) as gateway:
            yield Echoing(gateway, backend, clear, secure, relay, str(files.certificate))


class Echoing:
    def __init__(
        self, gateway: Gateway, backend: Backend, clear: int, secure: int, relay: int, trust: str
    ) -> None:
        self.gateway = gateway
        self.backend = backend
        self.clear = clear
        self.secure = secure
        self.relay = relay
        self.trust = trust

    def urls(self) -> list[str]:
        return [f"http://localhost:{self.clear}", f"https://localhost:{self.secure}"]


@need("curl")
class TestCurl:
    def curl(self, echoing: Echoing, *arguments: str, stdin: bytes = b"") -> str:
        return run("curl", "-sS4", "-m", "20", "--cacert", echoing.trust, *arguments, stdin=stdin)

    def test_gets(self, echoing: Echoing) -> None:
        for url in echoing.urls():
            assert self.curl(echoing, url) == "127.0.0.1"
            assert self.curl(echoing, "--http1.0", url) == "127.0.0.1"
            assert "content-length: 4242" in self.curl(echoing, "-I", url).lower()
            assert self.curl(echoing, "-X", "OPTIONS", "--request-target", "*", url) == "127.0.0.1"
            assert self.curl(echoing, url, url, url) == "127.0.0.1" * 3
            shown = self.curl(echoing, "-o", "/dev/null", "-w", "%{http_version} %{num_connects}", url)
            assert shown == ("2 1" if url.startswith("https") else "1.1 1")

    def test_uploads(self, echoing: Echoing, tmp_path: Path) -> None:
        blob = tmp_path / "blob"
        blob.write_bytes(BLOB)
        wanted = hashlib.sha256(BLOB).hexdigest()
        for number, url in enumerate(echoing.urls()):
            for kind, arguments in {
                "length": ("-T", str(blob), "-H", "Expect:"),
                "chunked": ("-T", str(blob), "-H", "Transfer-Encoding: chunked", "-H", "Expect:"),
                "expect": ("-T", str(blob), "-H", "Expect: 100-continue", "--expect100-timeout", "15"),
                "post": ("--data-binary", f"@{blob}"),
            }.items():
                got = tmp_path / f"got-{kind}-{number}"
                shown = self.curl(
                    echoing, "-o", str(got), "-w", "%{http_code} %{time_total}", *arguments, f"{url}/x"
                )
                status, seconds = shown.split()
                assert status == "200"
                assert float(seconds) < 10, "not by waiting for a 100 that never came"
                assert hashlib.sha256(got.read_bytes()).hexdigest() == wanted, kind

    def test_parallel(self, echoing: Echoing, tmp_path: Path) -> None:
        for url in echoing.urls():
            shown = self.curl(
                echoing,
                "-Z",
                "--no-progress-meter",
                "--parallel-max",
                "20",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}\n",
                f"{url}/[1-100]",
            )
            assert shown.split() == ["200"] * 100

    def test_a_wrong_name_is_seen(self, echoing: Echoing) -> None:
        url = f"https://other.example:{echoing.secure}"
        shown = run(
            "curl", "-sS4", "-m", "5", "--cacert", echoing.trust,
            "--resolve", f"other.example:{echoing.secure}:127.0.0.1", url, check=False,
        )  # fmt: skip
        assert "other.example" in shown


@need("wrk")
class TestWrk:
    def test_a_burst_without_an_error(self, echoing: Echoing) -> None:
        for url in echoing.urls():
            shown = run("wrk", "-t1", "-c16", "-d1s", "--timeout", "5s", url)
            assert "Socket errors" not in shown, shown
            assert "Non-2xx" not in shown, shown
            match = re.search(r"(\d+) requests in", shown)
            assert match is not None
            assert int(match[1]) > 200, shown


@need("h2load")
class TestH2load:
    def test_http_1_without_an_error(self, echoing: Echoing) -> None:
        for url in echoing.urls():
            # Each client stays within its connection's budget of requests: h2load does not reconnect.
            shown = run("h2load", "--h1", "-n", "800", "-c", "10", "-t", "1", f"{url}/")
            assert "800 succeeded, 0 failed, 0 errored" in shown, shown


@need("openssl")
class TestOpenssl:
    def s_client(self, port: int, trust: str, *arguments: str, stdin: bytes = b"") -> str:
        return run(
            "openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost",
            "-CAfile", trust, "-verify_return_error", *arguments, stdin=stdin,
        )  # fmt: skip

    @pytest.mark.parametrize("version", ["1_2", "1_3"])
    def test_h1s(self, echoing: Echoing, version: str) -> None:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        shown = self.s_client(
            echoing.secure, echoing.trust, f"-tls{version}", "-alpn", "http/1.1", "-ign_eof", stdin=request
        )
        assert f"TLSv{version.replace('_', '.')}" in shown
        assert "Verify return code: 0 (ok)" in shown
        assert "ALPN protocol: http/1.1" in shown
        assert "HTTP/1.1 200 OK" in shown
        assert "Secure Renegotiation IS NOT supported" not in shown or version == "1_3"

    @pytest.mark.parametrize("version", ["1_2", "1_3"])
    def test_sessions_resume(self, echoing: Echoing, tmp_path: Path, version: str) -> None:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        session = str(tmp_path / "session.pem")
        first = self.s_client(
            echoing.secure, echoing.trust, f"-tls{version}", "-ign_eof", "-sess_out", session, stdin=request
        )
        assert "New, TLS" in first
        again = self.s_client(
            echoing.secure, echoing.trust, f"-tls{version}", "-ign_eof", "-sess_in", session, stdin=request
        )
        assert "Reused, TLS" in again
        echoing.gateway.wait_metric("tls_handshakes_total", 1, listener="secure", resumed="yes", result="ok")

    def test_old_versions_are_refused(self, echoing: Echoing) -> None:
        with pytest.raises(AssertionError, match=r"alert|error"):
            self.s_client(echoing.secure, echoing.trust, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")

    def test_tls(self, echoing: Echoing) -> None:
        shown = self.s_client(echoing.relay, echoing.trust, "-quiet", "-no_ign_eof", stdin=b"marco\n")
        assert "marco" in shown or "verify return:1" in shown
        context = ssl.create_default_context(cafile=echoing.trust)
        with Client(echoing.relay, tls=context) as client:
            client.send(b"marco\n")
            assert client.until(b"\n") == b"marco\n"


class TestTlsToBackends:
    """What is verified of a backend, and what a client hears of it."""

    @pytest.mark.parametrize(
        ("name", "keys", "expected"),
        [
            ("localhost", {"tls_ca_path": "right"}, (200, "")),
            ("localhost", {"tls_ca_path": "wrong"}, (502, "tls_certificate_error")),
            ("localhost", {}, (502, "tls_certificate_error")),
            ("other.example", {"tls_ca_path": "right"}, (502, "tls_certificate_error")),
            ("127.0.0.1", {"tls_ca_path": "right"}, (200, "")),
            ("other.example", {"tls_verify_peer": False}, (200, "")),
        ],
        ids=["right CA", "wrong CA", "system's roots", "wrong name", "an address", "unverified"],
    )
    def test_verification(
        self,
        tmp_path: Path,
        house: House,
        name: str,
        keys: dict[str, str | bool | Path],
        expected: tuple[int, str],
    ) -> None:
        port = house.port
        right, wrong = certificate(tmp_path), certificate(tmp_path, stem="wrong")
        paths = {"right": right.certificate, "wrong": wrong.certificate}
        keys = {key: paths[value] if isinstance(value, str) else value for key, value in keys.items()}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(right.certificate, right.key)
        with Backend(echo, tls=context) as backend:
            table = at(backend.address, tls=True, tls_verify_hostname=name, **keys)
            with house.gateway(listener(port, table)) as gateway, Client(port) as client:
                client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                status, headers, body = client.response()
                assert status == expected[0], body
                assert expected[1] in headers.get("proxy-status", "")
                if status == 502:
                    gateway.wait_metric("http_gateway_errors_total", 1, reason="backend_certificate")
                    assert not backend.requests
                if keys.get("tls_verify_peer") is False:
                    assert "tls_verify_peer" in gateway.log()

    def test_a_client_certificate(self, tmp_path: Path) -> None:
        port, without = free_port(), free_port()
        theirs, ours = certificate(tmp_path), certificate(tmp_path, "gateway.example", stem="ours")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(theirs.certificate, theirs.key)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ours.certificate)
        with Backend(echo, tls=context) as backend:
            text = listener(
                port,
                at(
                    backend.address, tls=True, tls_ca_path=theirs.certificate,
                    tls_cert_path=ours.certificate, tls_key_path=ours.key,
                ),
            )  # fmt: skip
            text += listener(
                without, at(backend.address, tls=True, tls_ca_path=theirs.certificate), name="without"
            )
            with Gateway(tmp_path, text):
                with Client(port) as client:
                    client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    assert client.response()[0] == 200
                with Client(without) as client:
                    client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                    status, headers, body = client.response()
                    assert status == 502, body
                    assert "error=" in headers["proxy-status"]

    def test_a_backend_that_speaks_no_tls(self, tmp_path: Path, house: House) -> None:
        port = house.port
        files = certificate(tmp_path)

        def clear(connection: BackendConnection) -> None:
            connection.sock.recv(100)
            connection.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

        with Backend(clear) as backend:
            text = listener(port, at(backend.address, tls=True, tls_ca_path=files.certificate))
            with house.gateway(text) as gateway, Client(port) as client:
                client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                status, headers, _ = client.response()
                assert (status, "tls_protocol_error" in headers["proxy-status"]) == (502, True)
                gateway.wait_metric("http_gateway_errors_total", 1, reason="backend_tls")
