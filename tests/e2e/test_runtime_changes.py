"""Backends changed while the gateway runs and clients ask: no request fails, and a reload takes it all back.

``python -m bench.outage --only-changes`` makes a thousand such changes under wrk.
"""

import contextlib
import http.client
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench.outage_changes import Draw
from bench.outage_world import FaultyBackend

from tests.e2e.harness import PATIENCE_S, Client, Gateway, eventually, run
from tests.e2e.load import Load
from tests.ports import free_port

NAMES = ("b1", "b2", "b3")
RUNTIME = "max_keepalive_requests = 0"
REQUEST = b"GET /x HTTP/1.1\r\nHost: a.example\r\n\r\n"


def config(port: int, backends: Sequence[FaultyBackend], more: str = "") -> str:
    each = ", ".join(f'{{ id = "{backend.name}", address = "{backend.address}" }}' for backend in backends)
    return (
        f'[[listeners]]\nname = "web"\naddress = "127.0.0.1:{port}"\nprotocol = "h1"\npool = "web"\n'
        f'[[pools]]\nname = "web"\nbackends = [{each}]\n{more}\n'
    )


@pytest.fixture(scope="module")
def backends() -> Iterator[list[FaultyBackend]]:
    """Nothing is done to them here, so that all tests may have the same."""
    found = [FaultyBackend(name, free_port()) for name in NAMES]
    try:
        for backend in found:
            backend.start()
        yield found
    finally:
        for backend in found:
            backend.kill()


class Api:
    """The admin API, as a program of somebody's own would use it."""

    def __init__(self, gateway: Gateway) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", gateway.admin, timeout=PATIENCE_S)

    def __call__(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """``path`` is below the pool's backends."""
        data = None if body is None else json.dumps(body)
        whole = "/api/v1/pools/web/backends" + (f"/{path}" if path else "")
        fields = {} if method == "GET" else {"Content-Type": "application/json"}
        self._connection.request(method, whole, data, fields)
        with self._connection.getresponse() as response:
            answer: dict[str, Any] = json.loads(response.read())
        return response.status, answer

    def must(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        status, answer = self(method, path, body)
        assert 200 <= status < 300, answer
        return answer

    def shown(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self.must("GET", "")["backends"]}

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def running(directory: Path, text: str, *, workers: int = 1) -> Iterator[tuple[Gateway, Api]]:
    with (
        Gateway(directory, text, workers=workers, runtime=RUNTIME) as gateway,
        contextlib.closing(Api(gateway)) as api,
    ):
        yield gateway, api


def ask(port: int) -> tuple[int, dict[str, str], bytes]:
    with Client(port) as client:
        client.send(REQUEST)
        return client.response()


class TestUnderLoad:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "balancing",
        [
            'policy = "round_robin", slow_start_ms = 300',
            'policy = "least_requests"',
            'policy = "maglev", hash_key = "header:X-Key", table_size = 1009',
        ],
        ids=["round_robin", "least_requests", "maglev"],
    )
    def test_two_hundred_changes_cost_no_request(
        self, tmp_path: Path, backends: list[FaultyBackend], balancing: str
    ) -> None:
        port = free_port()
        text = config(port, backends, f"load_balancing = {{ {balancing} }}")
        addresses = {backend.name: backend.address for backend in backends}
        draw = Draw(addresses)
        with running(tmp_path, text, workers=2) as (gateway, api), contextlib.ExitStack() as clients:
            loads = [
                clients.enter_context(
                    Load(port, 1, b"GET /x HTTP/1.1\r\nHost: a\r\nX-Key: %d\r\n\r\n" % (number * 7919))
                )
                for number in range(6)
            ]
            eventually(lambda: all(load.total for load in loads), "all are served")
            for _ in range(200):
                _kind, method, path, body = draw.next()
                api.must(method, path, body)
            before = sum(load.total for load in loads)
            eventually(lambda: sum(load.total for load in loads) > before + 100, "and are served on")
            clients.close()
            assert [load.broken for load in loads if load.broken] == []
            assert {status for load in loads for status in load.answers} == {200}
            shown = api.shown()
            assert {name: each["weight"] for name, each in shown.items()} == {
                name: each.weight for name, each in draw.known.items()
            }
            assert gateway.metric("http_requests_total", status_class="5xx") == 0

    def test_who_is_drained_gets_nothing_new(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        with running(tmp_path, config(port, backends)) as (_, api):
            for body in ({"state": "draining"}, {"state": "disabled"}, {"weight": 0}):
                api.must("PATCH", "b2", body)
                eventually(lambda: ask(port)[2] != b"b2", "the workers know")
                assert {ask(port)[2] for _ in range(30)} == {b"b1", b"b3"}
                api.must("PATCH", "b2", {"state": "ready", "weight": 1})
                eventually(lambda: ask(port)[2] == b"b2", "it works again")


class TestReload:
    def test_returns_to_the_file(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        text = config(port, backends)
        with running(tmp_path, text) as (gateway, api):
            added = api.must("POST", "", {"id": "extra", "address": backends[0].address})
            assert added["persisted"] is False
            api.must("PATCH", "b1", {"weight": 7})
            api.must("DELETE", "b3")
            api.must("PATCH", "b2", {"state": "draining"})
            assert set(api.shown()) == {"b1", "b2", "extra"}
            with Load(port, 2) as load:
                eventually(lambda: load.total > 20, "some answers")
                assert gateway.reload(text)
                eventually(lambda: load.bodies[b"b3"], "the one removed is back")
            assert set(load.answers) == {200}
            assert load.broken == []
            shown = api.shown()
            assert list(shown) == list(NAMES)
            assert shown["b1"]["weight"] == 1
            assert shown["b2"]["state"] == "draining"  # an operator's word is no part of the file
            dropped = re.search(r"run-time changes to pool web are dropped: ([^\";]*)", gateway.log())
            assert dropped is not None, gateway.log()
            for word in ("extra", "b1", "b3"):
                assert word in dropped[1]


class TestCommands:
    def test_each_does_what_it_says(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        program = str(Path(sys.executable).parent / "expressgateway")
        with running(tmp_path, config(port, backends)) as (gateway, api):

            def command(*words: str) -> str:
                return run(program, "backend", *words, "--config", str(gateway.path))

            assert all(name in command("list", "web") for name in NAMES)
            said = command("add", "web", backends[0].address, "--id", "extra", "--weight", "3")
            assert "pool web: extra is added" in said
            assert f"not written to {gateway.path}" in said
            assert api.shown()["extra"]["weight"] == 3
            command("weight", "web", "extra", "5")
            assert api.shown()["extra"]["weight"] == 5
            listed = json.loads(command("list", "web", "--json"))["backends"]
            assert {each["id"]: each["weight"] for each in listed} == dict.fromkeys(NAMES, 1) | {"extra": 5}
            for word, state in (("drain", "draining"), ("disable", "disabled")):
                command(word, "web", "b2")
                assert api.shown()["b2"]["state"] == state
            command("enable", "web", "b2")
            assert api.shown()["b2"]["state"] == "unknown"
            command("remove", "web", "extra")
            assert list(api.shown()) == list(NAMES)
            listed = json.loads(command("list", "web", "--json"))["backends"]
            assert [each["id"] for each in listed] == list(NAMES)
            with pytest.raises(AssertionError, match=r"ended with 1:\n.*no backend .*nobody"):
                command("remove", "web", "nobody")
            assert ask(port)[0] == 200


class TestNobodyLeft:
    def test_a_pool_emptied_and_filled_again(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        with running(tmp_path, config(port, backends)) as (gateway, api):
            assert ask(port)[0] == 200
            for name in NAMES:
                answer = api.must("DELETE", name)
            assert "warning" in answer
            status, headers, _ = ask(port)
            assert status == 502
            assert "error=destination_not_found;" in headers["proxy-status"]
            gateway.wait_metric("pool_unavailable_total", pool="web")
            api.must("POST", "", {"id": "new", "address": backends[0].address})
            assert ask(port)[::2] == (200, b"b1")

    def test_all_weights_0(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        with running(tmp_path, config(port, backends)) as (_, api):
            for name in NAMES:
                answer = api.must("PATCH", name, {"weight": 0})
            assert "warning" in answer
            status, headers, _ = ask(port)
            assert status == 503
            assert "error=destination_unavailable;" in headers["proxy-status"]
            assert "retry-after" in headers
            api.must("PATCH", "b3", {"weight": 2})
            assert ask(port)[::2] == (200, b"b3")

    def test_all_drained(self, tmp_path: Path, backends: list[FaultyBackend]) -> None:
        port = free_port()
        with running(tmp_path, config(port, backends)) as (_, api):
            for name in NAMES:
                api.must("PATCH", name, {"state": "draining"})
            eventually(lambda: ask(port)[0] == 503, "nobody takes new work")
            api.must("PATCH", "b2", {"state": "ready"})
            eventually(lambda: ask(port)[::2] == (200, b"b2"), "one does again")
