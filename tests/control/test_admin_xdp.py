"""The XDP data plane at the admin listener and on the command line; the gateway is a fake."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from expressgateway.cli.main import main
from expressgateway.control.admin.api import Api
from expressgateway.control.admin.http import Request, Response
from tests.control.changing import FLOW, FakeGateway, listening


def asked(method: str, target: str, gateway: FakeGateway | None = None) -> Response:
    path, _, query = target.partition("?")
    body = b"{}" if method == "POST" else b""
    request = Request(method, f"/api/v1{path}", {}, "192.0.2.7", body, query)
    return asyncio.run(Api(gateway or FakeGateway()).answer(request))


def answer(method: str, target: str, gateway: FakeGateway | None = None) -> dict[str, Any]:
    response = asked(method, target, gateway)
    assert response.status == 200, response.body
    found = json.loads(response.body)
    assert isinstance(found, dict)
    return found


class TestApi:
    def test_the_state_is_shown(self) -> None:
        shown = answer("GET", "/xdp")
        assert shown["state"] == "attached"
        assert [one["name"] for one in shown["interfaces"]] == ["eth0", "eth1"]

    @pytest.mark.parametrize(("query", "limit"), [("", 100), ("?limit=1", 1), ("?limit=10000", 10_000)])
    def test_flows_are_listed_up_to_a_limit(self, query: str, limit: int) -> None:
        gateway = FakeGateway()
        shown = answer("GET", f"/xdp/flows{query}", gateway)
        assert gateway.asked == [limit]
        assert shown["flows"][0] == FLOW
        assert shown["total"] == 9

    @pytest.mark.parametrize(
        "query",
        ["limit=0", "limit=10001", "limit=", "limit=x", "limit=-1", "limit=1.5", "most=3", "limit", "&"],
    )
    def test_another_limit_is_refused(self, query: str) -> None:
        response = asked("GET", f"/xdp/flows?{query}")
        assert response.status == 422
        assert "limit" in json.loads(response.body)["error"] or "query" in json.loads(response.body)["error"]

    def test_it_can_be_taken_away_once(self) -> None:
        gateway = FakeGateway()
        assert answer("POST", "/xdp/detach", gateway)["state"] == "detached"
        assert answer("POST", "/xdp/detach", gateway)["state"] == "off"

    def test_it_can_be_taken_away_while_the_gateway_stops(self) -> None:
        gateway = FakeGateway()
        gateway.reason = "draining"
        assert answer("POST", "/xdp/detach", gateway)["state"] == "detached"


@pytest.fixture
def address() -> Iterator[str]:
    with listening(FakeGateway()) as port:
        yield f"127.0.0.1:{port}"


def ran(*words: str) -> Result:
    return CliRunner().invoke(main, ["xdp", *words])


class TestCommands:
    def test_status(self, address: str) -> None:
        result = ran("status", "--admin", address)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert lines[0] == "XDP: attached"
        assert "eth1       -       the interface is gone" in lines
        assert "left out: web/b2: there is no route to it" in lines
        assert "web: packets left to user space: no_flow 2" in lines
        assert "web: packets dropped: denied 5" in lines
        assert "nobody's packets, left to the kernel's stack: fragment 1" in lines

    def test_status_as_json(self, address: str) -> None:
        result = ran("status", "--json", "--admin", address)
        assert json.loads(result.output)["state"] == "attached"

    def test_flows(self, address: str) -> None:
        result = ran("flows", "--limit", "2", "--admin", address)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert "198.51.100.7:40000" in lines[1]
        assert lines[-1] == "and about 7 more: see --limit"

    def test_a_limit_beyond_what_there_can_be_is_a_usage_error(self, address: str) -> None:
        assert ran("flows", "--limit", "10001", "--admin", address).exit_code == 2

    def test_detach_where_nothing_is_left(self, tmp_path: Path) -> None:
        config = tmp_path / "gateway.toml"
        config.write_text('[runtime]\nxdp_pin_path = "/sys/fs/bpf/there_is_nothing"\n')
        result = ran("detach", "--config", str(config))
        assert result.exit_code == 0, result.output
        assert result.output == "there is nothing below /sys/fs/bpf/there_is_nothing\n"

    def test_who_answers_something_else_is_told_of(
        self, address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("expressgateway.cli.xdp_commands.call", lambda *_: {"state": "attached"})
        for command in ("status", "flows"):
            result = ran(command, "--admin", address)
            assert result.exit_code == 1
            assert "see --json" in result.output
