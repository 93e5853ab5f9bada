"""The commands that show and change backends, against an admin listener without a gateway behind it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expressgateway.cli import backend_commands
from expressgateway.cli.admin_client import TOKEN_VARIABLE
from expressgateway.cli.main import main
from expressgateway.control.changes import AddBackend
from expressgateway.control.reload import FAILED, Outcome
from tests.control.changing import ODD, FakeGateway, listening

Call = Callable[..., Result]


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def call(gateway: FakeGateway) -> Iterator[Call]:
    with listening(gateway) as port:

        def call(*arguments: str, **env: str) -> Result:
            command = ["backend", *arguments, "--admin", f"127.0.0.1:{port}"]
            return CliRunner().invoke(main, command, env={TOKEN_VARIABLE: None, **env})

        yield call


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def bad(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    return result.output


class TestList:
    def test_as_a_table(self, call: Call, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "time", lambda: 1000.0 + 3 * 3600)
        gateway.merged = {"backend_requests": {("web", "b1", "2xx"): 1234}}
        gateway.states["web", "n1#10.0.0.2"] = "unhealthy", "refused\x1b[2J"
        assert good(call("list", "web")).splitlines() == [
            "pool web, round_robin",
            "ID             ADDRESS         WEIGHT  STATE       SINCE  IN FLIGHT  OPEN  REQUESTS  CAUSE",
            "b1             127.0.0.1:9000  1       unknown     3 h    0          0     1234",
            "n1             name.test:9001  1       mixed       3 h    0          0     0         "
            "its addresses differ",
            "  n1#10.0.0.1  10.0.0.1:9001           unknown     3 h    0          0     0",
            "  n1#10.0.0.2  10.0.0.2:9001           unhealthy   3 h    0          0     0         "
            "refused\ufffd[2J",
            "g1             gone.test:9001  1       unresolved  -      0          0     0         "
            "the name has no address at present",
        ]

    def test_all_pools(self, call: Call) -> None:
        shown = good(call("list"))
        assert "pool web, round_robin" in shown
        assert f"\n\npool {ODD}, round_robin" in shown

    def test_what_is_not_in_the_file(self, call: Call) -> None:
        call("weight", "web", "b1", "0")
        call("remove", ODD, "127.0.0.1:9002")
        shown = good(call("list"))
        assert "run-time changes, not in the file: weight of b1" in shown
        assert f"warning: pool {ODD} has no backends" in shown

    def test_json(self, call: Call) -> None:
        assert [pool["name"] for pool in json.loads(good(call("list", "--json")))["pools"]] == ["web", ODD]
        assert json.loads(good(call("list", "web", "--json")))["backends"][0]["id"] == "b1"

    def test_unknown(self, call: Call) -> None:
        assert 'there is no pool "wbe": did you mean "web"?' in bad(call("list", "wbe"))

    @pytest.mark.parametrize(
        ("since", "words"),
        [(None, "-"), (940.0, "60 s"), (2000.0, "0 s"), (1000.0 - 7300, "2 h"), (1000.0 - 180, "3 min")],
    )
    def test_ages(self, since: float | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "time", lambda: 1000.0)
        assert backend_commands._ago(since) == words


class TestChanges:
    def test_add(self, call: Call, gateway: FakeGateway) -> None:
        shown = good(call("add", "web", "127.0.0.1:9009", "--id", "b9", "--weight", "3"))
        assert shown == (
            "pool web: b9 is added; configuration 2 is in force\n"
            "not written to /etc/x.toml: a reload returns to what it says\n"
        )
        assert gateway.changes == [AddBackend("web", {"address": "127.0.0.1:9009", "id": "b9", "weight": 3})]

    def test_every_key_can_be_given(self, call: Call, gateway: FakeGateway) -> None:
        call(
            "add",
            "web",
            "a:1",
            *("--protocol", "h1", "--tls", "--tls-ca-path", "ca.pem", "--tls-verify-hostname", "b"),
            *("--tls-cert-path", "/c.pem", "--tls-key-path", "k.pem", "--send-proxy", "v2"),
            "--no-tls-verify-peer",
        )
        (change,) = gateway.changes
        assert change == AddBackend(
            "web",
            {
                "address": "a:1",
                "protocol": "h1",
                "tls": True,
                "tls_ca_path": str(Path("ca.pem").absolute()),
                "tls_verify_hostname": "b",
                "tls_cert_path": "/c.pem",
                "tls_key_path": str(Path("k.pem").absolute()),
                "send_proxy": "v2",
                "tls_verify_peer": False,
            },
        )

    def test_remove(self, call: Call) -> None:
        assert "pool web: b1 is removed; configuration 2 is in force\nnot written to" in good(
            call("remove", "web", "b1")
        )
        assert 'has no backend "b1"' in bad(call("remove", "web", "b1"))

    def test_weight(self, call: Call) -> None:
        assert "the weight of b1 is 5; configuration 2" in good(call("weight", "web", "b1", "5"))
        assert "b1 is 5; nothing changed by it; configuration 2" in good(call("weight", "web", "b1", "5"))

    @pytest.mark.parametrize(
        ("command", "state"), [("drain", "draining"), ("enable", "ready"), ("disable", "disabled")]
    )
    def test_states(self, call: Call, gateway: FakeGateway, command: str, state: str) -> None:
        shown = good(call(command, "web", "n1#10.0.0.1"))
        assert shown.startswith(
            f"pool web: n1#10.0.0.1 is {state}; configuration 1 is in force\nnot written to"
        )
        assert gateway.states["web", "n1#10.0.0.1"][0] == state
        assert json.loads(good(call(command, "web", "b1", "--json")))["state"] == state

    def test_odd_names(self, call: Call, gateway: FakeGateway) -> None:
        good(call("add", ODD, "a:1", "--id", "x/../y?#%"))
        good(call("drain", ODD, "127.0.0.1:9002"))
        good(call("remove", ODD, "x/../y?#%"))

    def test_warning(self, call: Call) -> None:
        assert f"warning: pool {ODD} has no backends" in good(call("remove", ODD, "127.0.0.1:9002"))

    def test_everything_wrong_is_told(self, call: Call) -> None:
        shown = bad(call("add", "web", "nonsense", "--protocol", "x"))
        assert (
            'Error: not valid:\n  "nonsense" has no port' in shown or '  address: "nonsense" has no' in shown
        )
        assert "expected one of" in shown

    def test_failure(self, call: Call, gateway: FakeGateway) -> None:
        gateway.fault = Outcome(FAILED, ("a worker cannot apply it",))
        assert "a worker cannot apply it" in bad(call("weight", "web", "b1", "5"))


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["weight", "web", "b1", "-1"],
            ["weight", "web", "b1", "65536"],
            ["weight", "web", "b1", "x"],
            ["weight", "web", "b1"],
            ["add", "web"],
            ["add", "web", "a:1", "--weight", "x"],
            ["drain", "web"],
            ["explode", "web", "b1"],
            ["list", "a", "b"],
        ],
    )
    def test_exits_2(self, call: Call, gateway: FakeGateway, arguments: list[str]) -> None:
        bad(call(*arguments), 2)
        assert gateway.changes == []

    def test_where_the_gateway_is_stands_in_the_file(self, tmp_path: Path, gateway: FakeGateway) -> None:
        path = tmp_path / "x.toml"
        with listening(gateway) as port:
            path.write_text(f'[observability]\nmetrics_bind = "0.0.0.0:{port}"\n')
            result = CliRunner().invoke(main, ["backend", "list", "--config", str(path)])
        assert "pool web" in good(result)
        assert path.read_text().count("\n") == 2
        result = CliRunner().invoke(main, ["backend", "list", "--config", str(path)])
        assert "does not answer" in bad(result)

    @pytest.mark.parametrize("address", ["x", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:http", ":9090"])
    def test_no_address(self, address: str) -> None:
        assert "is no address" in bad(CliRunner().invoke(main, ["backend", "list", "--admin", address]))

    def test_token(self, call: Call, gateway: FakeGateway) -> None:
        gateway.token_hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
        assert TOKEN_VARIABLE in bad(call("drain", "web", "b1"))
        good(call("drain", "web", "b1", **{TOKEN_VARIABLE: "secret"}))
        good(call("drain", "web", "b1", **{TOKEN_VARIABLE: "secret\n"}))  # as a file has it

    @pytest.mark.parametrize("token", ["sec\nret", "sec\x7fret", "secr\u20act"])
    def test_a_token_that_cannot_be_sent_is_not_shown(self, call: Call, token: str) -> None:
        def status(*_: str, **env: str) -> Result:
            return CliRunner().invoke(main, ["status", "--admin", "127.0.0.1:1"], env=env)

        for command in (call, status):
            told = bad(command("list", **{TOKEN_VARIABLE: token}))
            assert TOKEN_VARIABLE in told
            assert "sec" not in told


@contextmanager
def answering(wire: bytes) -> Iterator[int]:
    """A server that is no gateway."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(wire)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            thread.join(30)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (b"", "does not answer"),
        (b"nonsense\r\n\r\n", "does not answer"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "is no ExpressGateway"),
        (b"HTTP/1.1 200 OK\r\n\r\n[1]", "is no ExpressGateway"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100000, "is no ExpressGateway"),
        (b"HTTP/1.1 404 Not Found\r\n\r\nNot Found\n", "or an older one (status 404)"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"pools": 5}', "shows no pools"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"pools": [{"name": "x"}]}', "shows no pools"),
        (b"HTTP/1.1 500 X\r\n\r\n{}", "refused with status 500"),
    ],
)
def test_what_is_no_gateway(wire: bytes, words: str) -> None:
    with answering(wire) as port:
        result = CliRunner().invoke(main, ["backend", "list", "--admin", f"127.0.0.1:{port}"])
    assert words in bad(result)
