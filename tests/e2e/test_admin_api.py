"""The admin API of a running gateway: what it shows of traffic, writes that meet, clients that mean harm.

And every operation against its own description, by ``schemathesis``.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from expressgateway.cli.main import main
from expressgateway.config.render import REDACTED
from expressgateway.control.admin.http import MAX_BODY_BYTES, MAX_CONNECTIONS
from expressgateway.control.admin.openapi import document
from tests.e2e.h2_raw import settings as h2_settings
from tests.e2e.harness import PATIENCE_S, Backend, BackendConnection, Client, Gateway, certificate, eventually
from tests.e2e.talks_h3 import dial_h3
from tests.ports import free_port

SECRET = "Basic c2VjcmV0"
REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
TOKEN = "secret"
TOKEN_HASH = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
JSON = {"Content-Type": "application/json"}


class Site:
    """A gateway with a listener of each kind."""

    def __init__(self, directory: Path, backend: Backend, echo: int) -> None:
        self.files = certificate(directory)
        self.ports = {name: free_port() for name in ("web", "secure", "relay", "datagrams", "h3")}
        ports, files, address = self.ports, self.files, backend.address
        pair = f'cert_path = "{files.certificate}"\nkey_path = "{files.key}"\n'
        self.config = f"""
[[listeners]]
name = "web"
address = "127.0.0.1:{ports["web"]}"
protocol = "h1"
pool = "web"
[[listeners.routes]]
match = {{ path_prefix = "/with", headers = {{ x-api-key = "hush" }} }}
pool = "web"
headers = {{ request = {{ set = {{ authorization = "{SECRET}", x-team = "blue" }} }} }}
[[listeners]]
name = "secure"
address = "127.0.0.1:{ports["secure"]}"
protocol = "h1s"
pool = "web"
[listeners.tls]
{pair}
[[listeners]]
name = "relay"
address = "127.0.0.1:{ports["relay"]}"
protocol = "tcp"
backends = [{{ address = "{address}" }}]
[[listeners]]
name = "datagrams"
address = "127.0.0.1:{ports["datagrams"]}"
protocol = "udp"
backends = [{{ address = "127.0.0.1:{echo}" }}]
[[listeners]]
name = "h3"
address = "127.0.0.1:{ports["h3"]}"
protocol = "quic"
pool = "web"
[listeners.quic]
{pair}
retry_secret_path = "{directory / "retry.secret"}"
[[pools]]
name = "web"
backends = [{{ id = "b1", address = "{address}" }}, {{ id = "b2", address = "{address}" }}]
"""
        self.gateway = Gateway(
            directory, self.config, workers=2, runtime="max_keepalive_requests = 0\ndrain_timeout_ms = 500"
        )

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = ({} if method == "GET" else JSON) | {k.replace("_", "-"): v for k, v in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.admin, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, f"/api/v1{path}", data, fields)
            with connection.getresponse() as response:
                answer: dict[str, Any] = json.loads(response.read())
                return response.status, answer, response.headers

    def get(self, path: str) -> dict[str, Any]:
        status, answer, _ = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def weight(self, id_: str = "b1") -> int:
        weight: int = self.get(f"/pools/web/backends/{id_}")["weight"]
        return weight

    def reload(self, more: str = "", **headers: str) -> tuple[int, dict[str, Any]]:
        self.gateway.write(self.config + more)
        return self.ask("POST", "/reload", {}, **headers)[:2]

    def context(self, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.files.certificate))
        context.set_alpn_protocols(list(alpn))
        return context


def echo_first(connection: BackendConnection) -> None:
    """HTTP for those who ask for it, silence for others."""
    while True:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo, Backend(echo_first) as backend:
        echo.bind(("127.0.0.1", 0))
        echo.settimeout(PATIENCE_S)
        found = Site(tmp_path_factory.mktemp("admin"), backend, echo.getsockname()[1])
        with found.gateway:
            yield found


class TestShown:
    def test_connections_of_every_kind(self, site: Site) -> None:
        ports = site.ports
        with contextlib.ExitStack() as stack:
            web = stack.enter_context(Client(ports["web"], source="127.0.0.9"))
            for _ in range(3):
                web.send(REQUEST)
                web.response()
            relay = stack.enter_context(Client(ports["relay"]))
            relay.send(REQUEST)
            relay.response()
            h2 = stack.enter_context(Client(ports["secure"], tls=site.context("h2")))
            h2.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + h2_settings())
            h2.exactly(9)
            opening = stack.enter_context(Client(ports["secure"]))
            h3 = stack.enter_context(contextlib.closing(dial_h3(site.files, ports["h3"])))
            datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            datagrams.connect(("127.0.0.1", ports["datagrams"]))
            datagrams.send(b"x")

            def listed() -> dict[str, dict[str, Any]]:
                return {each["client"]: each for each in site.get("/connections")["listed"]}

            def place(sock: socket.socket) -> str:
                host, port = sock.getsockname()
                return f"{host}:{port}"

            eventually(lambda: len(listed()) == 6, "all are listed")
            found = listed()
            want = {
                place(web.sock): ("web", "HTTP/1.1", 3, "idle"),
                place(relay.sock): ("relay", "tcp", None, "active"),
                place(h2.sock): ("secure", "HTTP/2", 0, "idle"),
                place(opening.sock): ("secure", "HTTP/1.1", 0, "opening"),
                place(datagrams): ("datagrams", "udp", None, "opening"),
            }
            for client, facts in want.items():
                each = found.pop(client)
                assert (each["listener"], each["protocol"], each["requests"], each["state"]) == facts
                assert each["worker"] in (0, 1)
            (last,) = found.values()
            assert (last["listener"], last["protocol"], last["requests"]) == ("h3", "HTTP/3", 0)
            del h3

            def counted() -> bool:
                shown = site.get("/connections")
                by_name = {each["name"]: each for each in shown["listeners"]}
                assert shown["silent_workers"] == []
                assert by_name["secure"]["protocols"] == {"HTTP/2": 1, "HTTP/1.1": 1}
                return bool(shown["open"] == shown["looked_at"] == 6)

            eventually(counted, "what is open is what was looked at")
        eventually(
            lambda: site.get("/connections")["looked_at"] <= 1, "they are gone, but for the datagrams' flow"
        )

    def test_workers_and_listeners(self, site: Site) -> None:
        eventually(
            lambda: all(each["loop_lag_s"] is not None for each in site.get("/workers")["workers"]),
            "both have reported",
        )
        workers = site.get("/workers")["workers"]
        assert sorted(each["pid"] for each in workers) == sorted(site.gateway.worker_pids())
        for each in workers:
            assert each["state"] == "serving"
            assert each["rss_bytes"] > 10_000_000
            assert each["cpu_s"] > 0
        before = {each["name"]: each for each in site.get("/listeners")["listeners"]}
        assert {name: each["tls"] for name, each in before.items()} == {
            "web": False,
            "secure": True,
            "relay": False,
            "datagrams": False,
            "h3": True,
        }
        assert before["web"]["bound"] == before["web"]["address"] == f"127.0.0.1:{site.ports['web']}"
        assert before["web"]["drain_timeout_ms"] == 500
        with Client(site.ports["web"]) as client:
            client.send(REQUEST)
            client.response()

            def counted() -> bool:
                now = {each["name"]: each for each in site.get("/listeners")["listeners"]}
                return all(now["web"][key] == before["web"][key] + 1 for key in ("requests", "connections"))

            eventually(counted, "the request is counted")

    def test_config_without_secrets(self, site: Site) -> None:
        shown = site.get("/config")
        listener = next(one for one in shown["config"]["listeners"] if one["name"] == "web")
        route = listener["routes"][0]
        assert route["headers"]["request"]["set"] == {"authorization": REDACTED, "x-team": "blue"}
        assert route["match"]["headers"] == {"x-api-key": REDACTED}
        text = json.dumps(shown)
        assert SECRET not in text
        assert "hush" not in text
        assert "PRIVATE KEY" not in text
        assert str(site.files.key) in text, "paths are no secret"


class TestWrites:
    def test_reload(self, site: Site) -> None:
        version = site.get("/status")["config"]["version"]
        status, answer = site.reload()
        assert (status, answer["result"], answer["version"]) == (200, "unchanged", version)
        tag = site.ask("GET", "/config")[2]["ETag"]
        status, answer = site.reload("[[pools]]\nname = 'more'\nbackends = [{ address = '127.0.0.1:9' }]\n")
        assert (status, answer["result"], answer["version"]) == (200, "applied", version + 1)
        assert "swapped: pool more (added)" in answer["plan"]
        status, answer = site.reload("[nonsense]\n[runtime]\nx = 1\n")
        assert (status, answer["result"]) == (422, "invalid")
        assert answer["details"]
        assert answer["version"] == version + 1
        status, answer = site.reload("[security]\nstrict_te = true\n", If_Match=tag)
        assert (status, answer["version"]) == (412, version + 1)
        with socket.create_server(("127.0.0.1", free_port())) as taken:
            more = f"[[listeners]]\naddress = '127.0.0.1:{taken.getsockname()[1]}'\nprotocol = 'tcp'\n"
            status, answer = site.reload(f"{more}backends = [{{ address = '127.0.0.1:9' }}]\n")
        assert (status, answer["result"]) == (409, "refused")
        assert "is already in use" in answer["error"]
        assert site.reload()[0] == 200

    @pytest.mark.parametrize(
        ("based_on", "allowed"), [("tag", [200, 412]), ("version", [200, 409]), ("", [200])]
    )
    def test_at_once(self, site: Site, based_on: str, allowed: list[int]) -> None:
        """Eight clients that have all seen the same: one of them wins, and its word stands."""
        tag = site.ask("GET", "/pools")[2]["ETag"]
        version = site.get("/status")["config"]["version"]
        first = site.weight()
        start = threading.Barrier(8)
        ends: list[tuple[int, int]] = []

        def write(weight: int) -> None:
            body: dict[str, object] = {"weight": weight}
            if based_on == "version":
                body["version"] = version
            start.wait(PATIENCE_S)
            fields = {"If_Match": tag} if based_on == "tag" else {}
            status, _, _ = site.ask("PATCH", "/pools/web/backends/b1", body, **fields)
            ends.append((weight, status))

        threads = [threading.Thread(target=write, args=(first + 1 + each,)) for each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert sorted({status for _, status in ends}) == allowed
        made = [weight for weight, status in ends if status == 200]
        assert len(made) == (1 if based_on else 8)
        assert site.weight() in made
        if not based_on:
            assert site.get("/status")["config"]["version"] == version + 8, "taken in order, none lost"

    def test_state_makes_a_tag_stale(self, site: Site) -> None:
        _, _, headers = site.ask("GET", "/pools/web/backends")
        assert site.ask("PATCH", "/pools/web/backends/b2", {"state": "draining"})[0] == 200
        status, answer, fields = site.ask(
            "PATCH", "/pools/web/backends/b2", {"state": "ready"}, If_Match=headers["ETag"]
        )
        assert status == 412, answer
        assert site.get("/pools/web/backends/b2")["state"] == "draining"
        status, _, _ = site.ask(
            "PATCH", "/pools/web/backends/b2", {"state": "ready"}, If_Match=fields["ETag"]
        )
        assert status == 200

    def test_log_level_reaches_workers_and_those_that_come_after(self, site: Site) -> None:
        sources = iter(f"127.0.1.{number}" for number in range(1, 100))  # each is logged of once a minute

        def break_a_handshake() -> str:
            """The log's lines that tell of it, once a worker is done with it."""
            source = next(sources)
            before = site.gateway.metric("tls_handshakes_total", result="failed")
            with Client(site.ports["secure"], source=source) as client:
                client.send(b"GET / HTTP/1.1\r\n\r\n")
                client.rest()
            site.gateway.wait_metric("tls_handshakes_total", before + 1, result="failed")
            return "\n".join(line for line in site.gateway.log().splitlines() if f'"{source}"' in line)

        assert "TLS handshake failed" in break_a_handshake()
        try:
            assert site.ask("PATCH", "/log", {"level": "error"})[:2] == (200, {"level": "error"})
            assert break_a_handshake() == ""
            old = site.gateway.worker_pids()
            for pid in old:
                os.kill(pid, signal.SIGKILL)

            def are_new() -> bool:
                workers = site.get("/workers")["workers"]
                return all(each["state"] == "serving" and each["pid"] not in old for each in workers)

            eventually(are_new, "both workers are replaced")
            for _ in range(2):  # whichever of them accepts
                assert break_a_handshake() == ""
        finally:
            assert site.ask("PATCH", "/log", {"level": "info"})[0] == 200
        assert "TLS handshake failed" in break_a_handshake()


class TestAbuse:
    def test_token(self, site: Site) -> None:
        admin = f"[admin]\napi_token_hash = '{TOKEN_HASH}'\n"
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert site.reload(admin)[0] == 200
        try:
            for method, path in (("GET", "/status"), ("POST", "/reload"), ("GET", "/nothing")):
                for fields in ({}, {"Authorization": "Bearer wrong"}):
                    status, answer, headers = site.ask(method, path, None, **fields)
                    assert (status, answer) == (401, {"error": "a valid token is needed"})
                    assert headers["WWW-Authenticate"].startswith("Bearer")
            status, answer, _ = site.ask("GET", "/config", None, **right)
            assert answer["config"]["admin"]["api_token_hash"] == REDACTED
            assert site.ask("GET", "/status", None, Host="gateway.example", **right)[0] == 200
        finally:
            assert site.reload(**right)[0] == 200
        assert site.ask("GET", "/status", None, Host="gateway.example")[0] == 421

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            ({"Content_Type": "text/plain"}, 415),
            ({"Origin": "https://evil.example"}, 403),
            ({"Sec_Fetch_Site": "cross-site"}, 403),
            ({"Host": "evil.example"}, 421),
        ],
    )
    def test_other_sites(self, site: Site, fields: dict[str, str], status: int) -> None:
        for method, path, body in (
            ("POST", "/drain", {}),
            ("PATCH", "/log", {"level": "error"}),
            ("POST", "/certificates/renew", {}),
        ):
            found, answer, _ = site.ask(method, path, body, **fields)
            assert (found, list(answer)) == (status, ["error"])
        assert site.get("/log") == {"level": "info"}
        assert site.get("/status")["state"] == "serving"

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            (b"x" * (MAX_BODY_BYTES + 1), 413, ""),
            (b"{", 400, "not valid JSON"),
            (b"[]", 400, "must be a JSON object"),
            ({"weight": 1, "colour": 2, "size": 3}, 400, 'unknown key "size"'),
            ({"weight": -1}, 422, "weight: expected"),
        ],
    )
    def test_bodies(self, site: Site, body: object, status: int, words: str) -> None:
        weight = site.weight()
        found, answer, _ = site.ask("PATCH", "/pools/web/backends/b1", body)
        assert (found, words in answer["error"]) == (status, True), answer
        assert site.weight() == weight

    def test_slow_clients_hold_nobody_up(self, site: Site) -> None:
        """They fill all places but one, and are told after half of their time."""
        slow = [Client(site.gateway.admin) for _ in range(MAX_CONNECTIONS - 1)]
        try:
            for client in slow[1:]:
                client.send(b"PATCH /api/v1/log HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
            slow[0].send(
                b"PATCH /api/v1/log HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{"
            )
            for _ in range(3):
                assert site.get("/status")["state"] == "serving"
            for client in (slow[0], slow[-1]):
                status, _, body = client.response()
                assert (status, json.loads(body)) == (408, {"error": "Request Timeout"})
        finally:
            for client in slow:
                client.sock.close()
        eventually(lambda: site.get("/status"), "there is room again")


CHECKED = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
)
OPERATIONS = [
    result.ok()
    for result in schemathesis.openapi.from_dict(document()).get_all_operations()
    # The drain is tested by itself: nothing would be left to ask. The events do not end.
    if isinstance(result, Ok) and result.ok().label not in ("POST /drain", "GET /events")
]


GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("operation", "mode"),
    # Only a body can be wrong: all else is any string.
    [(each, mode) for each in OPERATIONS for mode in (GOOD, BAD) if mode is GOOD or each.body],
    ids=lambda value: value.value if isinstance(value, GenerationMode) else value.label,
)
def test_as_described(site: Site, operation: Any, mode: GenerationMode) -> None:
    """What is made of the description is answered as described; what breaks it is refused."""
    base = f"http://127.0.0.1:{site.gateway.admin}/api/v1"
    has_input = bool(operation.path_parameters or operation.headers or operation.body)

    @settings(
        max_examples=12 if has_input else 1,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        operation.as_strategy(generation_mode=mode),
        st.sampled_from(["b1", "b2", "b3", ""]),
        st.sampled_from([True, True, False]),
    )
    def ask(case: Any, id_: str, knows_version: bool) -> None:
        if case.path_parameters and id_:
            case.path_parameters = {name: {"pool": "web", "id": id_}[name] for name in case.path_parameters}
        if case.headers and (knows_version or mode is BAD):
            case.headers.pop("If-Match", None)
        if isinstance(case.body, dict) and mode is GOOD:
            if knows_version:
                case.body.pop("version", None)
            if "address" in case.body:
                case.body["address"] = "127.0.0.1:9"  # no names: nobody is asked for them
        more = JSON if case.method == "DELETE" else {}
        response = case.call(base_url=base, headers=more)
        checks = [*CHECKED, negative_data_rejection] if mode is BAD else list(CHECKED)
        case.validate_response(response, checks=checks)
        answer = json.loads(response.text)
        assert ("error" in answer) == (response.status_code >= 400)

    try:
        ask()
    finally:
        assert site.reload()[0] == 200
        assert site.ask("PATCH", "/log", {"level": "info"})[0] == 200


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


class TestCommands:
    def test_config(self, site: Site) -> None:
        result = call("config", str(site.gateway.path))
        assert result.exit_code == 0
        assert f'authorization = "{REDACTED}"' in result.output
        assert 'name = "datagrams"' in result.output
        shown = json.loads(call("config", str(site.gateway.path), "--json").output)
        assert shown["config"]["runtime"]["workers"] == 2

    def test_log_level(self, site: Site) -> None:
        result = call("log-level", "warning", str(site.gateway.path))
        assert (result.exit_code, result.output) == (0, "the log's level is warning\n")
        assert call("log-level", "info", str(site.gateway.path)).exit_code == 0
        assert call("log-level", "loud", str(site.gateway.path)).exit_code == 2

    def test_certificates(self, site: Site) -> None:
        assert call("certificates", str(site.gateway.path)).exit_code == 0
        assert "certificates" in json.loads(call("certificates", str(site.gateway.path), "--json").output)


def test_drain(tmp_path: Path) -> None:
    """Asked for twice, it still takes its time: what is under way ends."""
    may_answer = threading.Event()

    def slowly(connection: BackendConnection) -> None:
        connection.request()
        may_answer.wait(PATIENCE_S)
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    port = free_port()
    with Backend(slowly) as backend:
        config = (
            f"[[listeners]]\nname = 'web'\naddress = '127.0.0.1:{port}'\nprotocol = 'h1'\n"
            f"backends = [{{ address = '{backend.address}' }}]\n"
        )
        with (
            Gateway(tmp_path, config, runtime="drain_timeout_ms = 20000") as gateway,
            Client(port) as client,
        ):
            client.send(REQUEST)
            eventually(lambda: backend.received, "the request is under way")
            first = call("drain", str(gateway.path))
            assert (first.exit_code, first.output.split(":")[0]) == (0, "draining")
            eventually(lambda: gateway.ask("/readyz")[0] == 503, "it is unready")
            assert call("drain", str(gateway.path)).exit_code == 0
            # A hook that drains first and the manager's signal after it are one stop.
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: "SIGTERM: stopping" in gateway.log(), "the signal came")
            late = call("reload", str(gateway.path))
            assert late.exit_code == 1
            assert "nothing can be changed now" in late.output
            may_answer.set()
            assert client.response()[0] == 200
            client.sock.close()
            assert gateway.process.wait(PATIENCE_S) == 0
