"""No secret in any log, at the most talkative level, whatever goes wrong: all that is written is searched."""

import base64
import hashlib
import http.client
import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.cells import VERSIONS, call
from tests.e2e.collector import Collector
from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, certificate, eventually
from tests.e2e.talks import rest
from tests.ports import free_port

TOKEN = "the-token-of-the-admin-7d1f"
CID_KEY = "8f95f09245765f80256934e50c66207f"
PASSWORD = "open-sesame-4b1c"
COOKIE = "session-cookie-55aa"
OTLP_KEY = "collector-key-9e3d"


def script(connection: BackendConnection) -> None:
    while True:
        connection.request()
        connection.send(
            b"HTTP/1.1 200 OK\r\nset-cookie: id=" + COOKIE.encode() + b"\r\ncontent-length: 2\r\n\r\nok"
        )


@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_never(tmp_path: Path, form: str) -> None:
    files = certificate(tmp_path)
    secret = tmp_path / "cookie.secret"
    ports = {name: free_port() for name in ("tls", "passthrough", "dead")}
    pair = f"cert_path = '{files.certificate}', key_path = '{files.key}'"
    with Backend(script) as backend, Collector() as collector:
        config = f"""
tracing = {{ endpoint = "{collector.endpoint}", sample = 1.0 }}
access_log = {{ path = "stdout" }}
[admin]
api_token_hash = "{hashlib.sha256(TOKEN.encode()).hexdigest()}"
[[listeners]]
name = "tls"
address = "127.0.0.1:{ports["tls"]}"
protocol = "h1s"
tls = {{ {pair} }}
pool = "app"
routes = [{{ match = {{ path = "/dead" }}, pool = "dead" }}]
[[listeners]]
name = "quic"
address = "127.0.0.1:{ports["tls"]}"
protocol = "quic"
quic = {{ {pair}, retry_secret_path = "{tmp_path / "retry.secret"}" }}
pool = "app"
[[pools]]
name = "app"
backends = [{{ address = "{backend.address}", id = "b" }}]
load_balancing = {{ policy = "session_affinity", cookie = {{ secret_path = "{secret}" }} }}
[[pools]]
name = "dead"
backends = [{{ address = "127.0.0.1:{ports["dead"]}" }}]
[passthrough]
bind_addr = "127.0.0.1:{ports["passthrough"]}"
backends = [{{ address = "127.0.0.1:{ports["dead"]}", id = "0a0b" }}]
cid_routing = {{ config_id = 0, server_id_length = 2, key = "{CID_KEY}" }}
"""
        gateway = Gateway(tmp_path, config)
        gateway.environment |= {
            "LB_LOG_LEVEL": "debug",
            "LB_LOG_FORMAT": form,
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={OTLP_KEY}",
        }
        with gateway:
            for version in VERSIONS.values():
                caller = version.dial(files, ports["tls"], True)
                for path in ("/", f"/?password={PASSWORD}", "/dead", "/%2e%2e/"):
                    secrets = (
                        ("authorization", f"Bearer {PASSWORD}"),
                        ("cookie", f"id={COOKIE}"),
                        ("x-api-key", PASSWORD),
                    )
                    talk = call(caller, path, *secrets)
                    talk.read_head()
                    rest(talk)
                    if ":status" in talk.headers and talk.headers[":status"] == "400":
                        break
                caller.close()
            with Client(ports["tls"]) as client:
                client.send(f"GET / HTTP/1.1\r\nAuthorization: {PASSWORD}\r\n\r\n".encode())
                client.rest()
            collector.until(lambda it: it.spans, "spans")
            assert _asked(gateway, TOKEN) == 200
            assert _asked(gateway, TOKEN + "-wrong") == 401
            for mistake in (
                config.replace("config_id = 0", "config_id = 0, oops = 1"),
                config.replace(CID_KEY, CID_KEY[:-1]),
                config.replace("http://127.0.0.1", f"http://me:{PASSWORD}@127.0.0.1"),
                config + "[[listeners]]\n",
            ):
                gateway.write(mistake)
                before = _reloads(gateway)
                gateway.process.send_signal(signal.SIGHUP)
                eventually(lambda before=before: _reloads(gateway) > before, "the reload is over")  # type: ignore[misc]  # a default binds it
            gateway.write(config.replace("sample = 1.0", "sample = 0.9"))
            gateway.process.send_signal(signal.SIGHUP)
            os.kill(_worker_of(gateway), signal.SIGKILL)
            eventually(lambda: " is replaced" in gateway.log(), "a worker dies")
        assert collector.headers["x-key"] == OTLP_KEY
        text = gateway.log()
        told = repr(collector.spans)
    # Where a client's secret stands in what it asked for, the access log tells it: that is its business.
    logged = "\n".join(line for line in text.splitlines() if '"user_agent":' not in line)
    assert len(logged.splitlines()) > 10
    assert re.search(r"passthrough\.cid_routing\.oops", logged), "the mistakes are told"
    held = {
        "token": TOKEN,
        "hash": hashlib.sha256(TOKEN.encode()).hexdigest(),
        "password": PASSWORD,
        "cookie": COOKIE,
        "CID key": CID_KEY,
        "all of it but the end": CID_KEY[:-1],
        "collector's key": OTLP_KEY,
        "private key": files.key.read_text().splitlines()[1],
    }
    for file in (secret, tmp_path / "retry.secret"):
        assert len(file.read_bytes()) == 32
        held[file.name] = file.read_bytes().hex()
        held[f"{file.name} in base64"] = base64.b64encode(file.read_bytes()).decode()
    assert [name for name, each in held.items() if each in logged] == []
    assert [name for name, each in held.items() if each in told] == []
    accessed = "\n".join(line for line in text.splitlines() if '"user_agent":' in line)
    assert [name for name, each in held.items() if name != "password" and each in accessed] == []


def _connection(gateway: Gateway) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", gateway.admin, timeout=60)


def _asked(gateway: Gateway, token: str) -> int:
    connection = _connection(gateway)
    connection.request("GET", "/api/v1/status", headers={"Authorization": f"Bearer {token}"})
    status = connection.getresponse().status
    connection.close()
    return status


def _worker_of(gateway: Gateway) -> int:
    return next(
        pid
        for pid in gateway.worker_pids()  # and the exporter's
        if b"expressgateway.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def _reloads(gateway: Gateway) -> int:
    return gateway.log().count("reload ")
