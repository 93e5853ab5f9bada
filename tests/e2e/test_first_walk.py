"""The shortest way through: a client, the gateway, a backend."""

from pathlib import Path

from tests.e2e.harness import Backend, Client, Gateway
from tests.ports import free_port


def test_a_request_and_its_answer(tmp_path: Path) -> None:
    port = free_port()
    with Backend() as backend:
        config = f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{port}"
protocol = "h1"
backends = [{{ address = "{backend.address}" }}]
"""
        with Gateway(tmp_path, config) as gateway, Client(port) as client:
            for _ in range(3):
                client.send(b"GET /x HTTP/1.1\r\nHost: a.example\r\nCookie: a=b\r\n\r\n")
                status, headers, body = client.response()
                assert (status, body) == (200, b"backend")
                assert headers["via"] == "1.1 expressgateway"
            gateway.wait_metric("http_requests_total", 3, listener="web", status_class="2xx", version="1.1")
        head, _ = backend.requests[0]
        assert head.startswith(b"GET /x HTTP/1.1\r\nhost: a.example\r\n")
        assert b"\r\ncookie: a=b\r\n" in head
        assert b"\r\nx-forwarded-for: 127.0.0.1\r\n" in head
        assert backend.connections == 1
