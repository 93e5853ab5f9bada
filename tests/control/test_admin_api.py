"""The API of pools and backends, over a real connection."""

import asyncio
import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.control.admin.api import Api
from expressgateway.control.admin.http import Request
from expressgateway.control.changes import Change, ChangeError
from expressgateway.control.plan import backends_of
from expressgateway.control.reload import FAILED, REFUSED, Check, Outcome
from tests.control.changing import ODD, FakeGateway, listening

JSON = {"Content-Type": "application/json"}


class Client:
    def __init__(self, port: int) -> None:
        self.port = port
        self.headers = http.client.HTTPMessage()

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            data = response.read()
            self.headers = response.headers
        return response.status, json.loads(data) if self.headers["Content-Type"] == JSON[
            "Content-Type"
        ] else data

    def get(self, path: str) -> Any:
        status, answer = self.ask("GET", path)
        assert status == 200, answer
        return answer

    def post(self, pool: str, **table: object) -> tuple[int, Any]:
        return self.ask("POST", f"/api/v1/pools/{pool}/backends", json.dumps(table).encode())

    def patch(self, id_: str, pool: str = "web", **body: object) -> tuple[int, Any]:
        return self.ask("PATCH", f"/api/v1/pools/{pool}/backends/{quote(id_)}", json.dumps(body).encode())

    def delete(self, id_: str, pool: str = "web") -> tuple[int, Any]:
        return self.ask("DELETE", f"/api/v1/pools/{pool}/backends/{quote(id_)}")


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with listening(gateway) as port:
        yield Client(port)


class TestShow:
    def test_pools(self, client: Client, gateway: FakeGateway) -> None:
        gateway.merged = {
            "backend_inflight": {("web", "b1"): 2, ("web", "n1#10.0.0.1"): 3, ("web", "n1#10.0.0.2"): 4},
            "pool_connections": {("web", "b1", "idle"): 5, ("web", "b1", "busy"): 2},
            "backend_requests": {("web", "b1", "2xx"): 10, ("web", "b1", "5xx"): 1},
        }
        gateway.states["web", "b1"] = "unhealthy", "connection refused"
        web, odd = client.get("/api/v1/pools")["pools"]
        assert (odd["name"], odd["listeners"]) == (ODD, ["relay"])
        assert web["name"] == "web"
        assert (web["listeners"], web["policy"], web["panic"], web["changes"]) == (
            ["web"],
            "round_robin",
            False,
            [],
        )
        assert "warning" not in web
        b1, n1, g1 = web["backends"]
        assert b1 == {
            "id": "b1",
            "address": "127.0.0.1:9000",
            "protocol": "h1",
            "tls": False,
            "weight": 1,
            "state": "unhealthy",
            "since": 1000.0,
            "cause": "connection refused",
            "last_probe": None,
            "in_flight": 2,
            "open": 7,
            "requests": 11,
        }
        assert (n1["address"], n1["in_flight"], n1["state"]) == ("name.test:9001", 7, "unknown")
        assert [(one["id"], one["address"], one["in_flight"]) for one in n1["resolved"]] == [
            ("n1#10.0.0.1", "10.0.0.1:9001", 3),
            ("n1#10.0.0.2", "10.0.0.2:9001", 4),
        ]
        assert (g1["state"], g1["resolved"]) == ("unresolved", [])

    def test_one_of_each(self, client: Client) -> None:
        assert client.get("/api/v1/pools/web")["name"] == "web"
        assert [one["id"] for one in client.get("/api/v1/pools/web/backends")["backends"]] == [
            "b1",
            "n1",
            "g1",
        ]
        assert client.get("/api/v1/pools/web/backends/b1")["address"] == "127.0.0.1:9000"
        assert client.get("/api/v1/pools/web/backends/n1%2310.0.0.2")["address"] == "10.0.0.2:9001"
        with pytest.raises(ValueError, match="Expecting value"):  # there is no body
            client.ask("HEAD", "/api/v1/pools/web")

    def test_names_are_decoded(self, client: Client) -> None:
        odd = quote(ODD, safe="")
        assert client.get(f"/api/v1/pools/{odd}")["name"] == ODD
        assert client.get(f"/api/v1/pools/{odd}/backends/127.0.0.1%3A9002")["weight"] == 1

    @pytest.mark.parametrize(
        ("path", "sentence"),
        [
            ("/api/v1/pools/wbe", 'there is no pool "wbe": did you mean "web"?'),
            ("/api/v1/pools/web/backends/bb1", 'there is no backend "bb1" in pool web: did you mean "b1"?'),
            ("/api/v1/pools/", "nothing at this path"),
            ("/api/v1/pools//backends", "nothing at this path"),
            ("/api/v1/pools/web/", "nothing at this path"),
            ("/api/v1/pools/web/routes", "nothing at this path"),
            ("/api/v1/pools/web/backends/b1/x", "nothing at this path"),
            ("/api/v1/pools/%ff", "nothing at this path"),
            ("/api/v1/poolsweb", "nothing at this path"),
            ("/api/v1/", "nothing at this path"),
            ("/api/v1/pools/%00", "there is no pool"),
            ("/api/v1/pools/a/b%25%C3%A9%3F", "nothing at this path"),
        ],
    )
    def test_not_there(self, client: Client, path: str, sentence: str) -> None:
        status, answer = client.ask("GET", path)
        assert status == 404
        assert sentence in answer["error"]

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("POST", "/api/v1/pools", "GET, HEAD"),
            ("DELETE", "/api/v1/pools/web", "GET, HEAD"),
            ("PATCH", "/api/v1/pools/web/backends", "GET, HEAD, POST"),
            ("POST", "/api/v1/pools/web/backends/b1", "GET, HEAD, PATCH, DELETE"),
            ("PUT", "/api/v1/pools/web/backends/b1", "GET, HEAD, PATCH, DELETE"),
        ],
    )
    def test_methods(self, client: Client, method: str, path: str, allow: str) -> None:
        assert client.ask(method, path, None if method == "DELETE" else b"{}")[0] == 405
        assert client.headers["Allow"] == allow


class TestAdd:
    def test_added(self, client: Client, gateway: FakeGateway) -> None:
        status, answer = client.post("web", address="LOCALHOST:9", weight=2)
        assert status == 201
        assert answer == {
            "result": "applied",
            "version": 2,
            "plan": [
                "swapped: listener web (backends)",
                "kept: listener relay, pool a/b%é?, block runtime, block observability, block admin, "
                "block security",
            ],
            "persisted": False,
            "note": "not written to /etc/x.toml: a reload returns to what it says",
        }
        place = client.headers["Location"]
        assert place == "/api/v1/pools/web/backends/localhost%3A9"
        assert client.get(place)["weight"] == 2
        assert client.get("/api/v1/pools/web")["changes"] == ["added localhost:9"]

    def test_in_a_pool_of_odd_name(self, client: Client) -> None:
        assert client.post(quote(ODD, safe=""), address="a:1", id="x/y?")[0] == 201
        assert client.get(client.headers["Location"])["id"] == "x/y?"

    @pytest.mark.parametrize(
        ("table", "status", "sentence"),
        [
            ({"address": "a:1", "id": "b1"}, 409, "pool web has a backend"),
            ({}, 422, "address: this key is required"),
            ({"address": "a:1", "colour": "red"}, 422, 'unknown key "colour"'),
            ({"address": "a:1", "weight": 1e99}, 422, "weight: expected a whole number"),
        ],
    )
    def test_refused(
        self, client: Client, gateway: FakeGateway, table: dict[str, Any], status: int, sentence: str
    ) -> None:
        found, answer = client.post("web", **table)
        assert found == status
        assert sentence in answer["error"]
        assert gateway.reloads.version == 1

    def test_details(self, client: Client) -> None:
        _, answer = client.post("web", address="x", weight=-1)
        assert len(answer["details"]) == 2

    def test_unknown_pool(self, client: Client) -> None:
        assert client.post("nothing", address="a:1")[0] == 404


class TestRemove:
    def test_removed(self, client: Client) -> None:
        status, answer = client.delete("b1")
        assert (status, answer["result"], answer["persisted"]) == (200, "applied", False)
        assert client.delete("b1")[0] == 404

    def test_last_one(self, client: Client) -> None:
        for id_ in ("b1", "n1", "g1"):
            status, answer = client.delete(id_)
            assert status == 200
        assert answer["warning"] == "pool web has no backends: new requests are answered with 502"
        pool = client.get("/api/v1/pools/web")
        assert (pool["backends"], pool["warning"], pool["listeners"]) == ([], answer["warning"], ["web"])
        status, answer = client.post("web", address="a:1")
        assert status == 201
        assert "warning" not in answer

    def test_address_of_a_name(self, client: Client) -> None:
        status, answer = client.delete("n1#10.0.0.1")
        assert status == 404
        assert 'is an address that backend "n1" of pool web resolves to' in answer["error"]


class TestPatch:
    def test_weight(self, client: Client, gateway: FakeGateway) -> None:
        status, answer = client.patch("b1", weight=7)
        assert (status, answer["result"], answer["version"]) == (200, "applied", 2)
        assert client.get("/api/v1/pools/web/backends/b1")["weight"] == 7
        status, answer = client.patch("b1", weight=7)
        assert (status, answer["result"], answer["version"]) == (200, "unchanged", 2)

    def test_all_weights_zero(self, client: Client) -> None:
        for id_ in ("b1", "n1", "g1"):
            status, answer = client.patch(id_, weight=0)
            assert status == 200
        assert (
            answer["warning"] == "pool web has only backends of weight 0: new requests are answered with 503"
        )

    @pytest.mark.parametrize("state", ["draining", "disabled", "ready"])
    def test_state(self, client: Client, gateway: FakeGateway, state: str) -> None:
        status, answer = client.patch("b1", state=state)
        assert status == 200
        assert (answer["result"], answer["state"], answer["addresses"]) == ("applied", state, ["b1"])
        assert (answer["persisted"], answer["version"]) == (False, 1)
        assert answer["note"] == "not written to any file: a state survives reloads, not a restart"
        assert gateway.states == {("web", "b1"): (state, "the admin API, from 127.0.0.1")}
        assert gateway.changes == []

    def test_state_of_a_name_is_that_of_its_addresses(self, client: Client, gateway: FakeGateway) -> None:
        _, answer = client.patch("n1", state="draining")
        assert answer["addresses"] == ["n1#10.0.0.1", "n1#10.0.0.2"]
        assert client.get("/api/v1/pools/web/backends/n1")["state"] == "draining"
        client.patch("n1#10.0.0.2", state="ready")
        assert gateway.states["web", "n1#10.0.0.2"][0] == "ready"
        assert client.get("/api/v1/pools/web/backends/n1")["state"] == "mixed"
        status, answer = client.patch("g1", state="draining")
        assert status == 409
        assert "has no address at present" in answer["error"]

    def test_weight_of_an_address(self, client: Client, gateway: FakeGateway) -> None:
        status, _ = client.patch("n1#10.0.0.1", weight=3, state="draining")
        assert status == 404
        assert gateway.states == {}, "not even the part that could have been done"

    def test_both(self, client: Client, gateway: FakeGateway) -> None:
        _, answer = client.patch("b1", weight=0, state="draining")
        assert (answer["state"], answer["version"]) == ("draining", 2)
        assert "/etc/x.toml" in answer["note"]
        assert gateway.states["web", "b1"][0] == "draining"

    def test_pool_that_is_drained_as_a_whole(self, client: Client) -> None:
        client.patch("g1", weight=0)
        assert "warning" not in client.patch("b1", state="draining")[1]
        _, answer = client.patch("n1", state="disabled")
        assert "only backends that are drained or disabled" in answer["warning"]

    @pytest.mark.parametrize(
        ("body", "status", "sentence"),
        [
            (b"", 400, "not valid JSON"),
            (b"{", 400, "not valid JSON"),
            (b"[]", 400, "must be a JSON object"),
            (b'"x"', 400, "must be a JSON object"),
            (b"null", 400, "must be a JSON object"),
            (b"{}", 400, "nothing is asked for: the keys are weight, state and version"),
            (b'{"wieght": 1}', 400, 'unknown key "wieght" (did you mean "weight"?)'),
            (b'{"weight": 1, "x": 1}', 400, 'unknown key "x" (the keys are weight, state and version)'),
            (b'{"weight": 1, "weight": 2}', 400, "a key stands twice"),
            (b'{"weight": NaN}', 400, "NaN is no value"),
            (b'{"weight": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
            (b"[" * 30000, 400, "not valid JSON"),
            (b'{"weight": "\xff"}', 400, "not valid UTF-8"),
            ('{"weight": 1}'.encode("utf-16"), 400, "not valid"),
            (b'{"weight": null}', 422, "weight: expected a whole number"),
            (b'{"weight": "1"}', 422, "weight: expected a whole number"),
            (b'{"weight": 65536}', 422, "from 0 to 65535"),
            (b'{"state": "drainign"}', 422, 'did you mean "draining"?'),
            (b'{"state": null}', 422, "state: expected one of ready, draining, disabled"),
            (b'{"state": ["ready"]}', 422, "found an array"),
            (b'{"state": {}}', 422, "found a table"),
            (b'{"state": "ready", "weight": -1}', 422, "weight: expected"),
        ],
    )
    def test_bad_body(
        self, client: Client, gateway: FakeGateway, body: bytes, status: int, sentence: str
    ) -> None:
        found, answer = client.ask("PATCH", "/api/v1/pools/web/backends/b1", body)
        assert (found, sentence in answer["error"]) == (status, True), answer
        assert gateway.states == {}
        assert gateway.reloads.version == 1


class TestFailure:
    @pytest.mark.parametrize(
        ("outcome", "status"), [(Outcome(FAILED, ("no",)), 500), (Outcome(REFUSED, ("too large",)), 409)]
    )
    def test_told(self, client: Client, gateway: FakeGateway, outcome: Outcome, status: int) -> None:
        gateway.fault = outcome
        for answered in (client.post("web", address="a:1"), client.delete("b1")):
            assert answered[0] == status
            assert answered[1]["error"] == outcome.report[0]
            assert "persisted" not in answered[1]
        answered = client.patch("b1", weight=3, state="draining")
        assert answered[0] == status
        assert gateway.states == {}, "the state is set after the weight, or not at all"

    def test_not_while_booting_or_draining(self, client: Client, gateway: FakeGateway) -> None:
        gateway.reason = "draining"
        for status, answer in (
            client.post("web", address="a:1"),
            client.delete("b1"),
            client.patch("b1", state="ready"),
        ):
            assert status == 503
            assert answer["error"] == "nothing can be changed now: draining"
            assert client.headers["Retry-After"] == "1"
        assert gateway.changes == []
        client.get("/api/v1/pools")

    def test_busy(self, client: Client, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        async def busy(change: Change, check: Check | None) -> Outcome:
            raise ChangeError(504, "the workers take too long")

        monkeypatch.setattr(gateway, "change", busy)
        assert client.delete("b1") == (504, {"error": "the workers take too long"})


class TestCrossSite:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 415),
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Content-Type": "application/jsonp"}, 415),
            ({"Content-Type": "text/plain; application/json"}, 415),
            ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
            (JSON | {"Origin": "https://evil.example"}, 403),
            (JSON | {"Origin": "null"}, 403),
            (JSON | {"Origin": "http://127.0.0.1:1"}, 403),
            (JSON | {"Origin": ""}, 403),
            (JSON | {"Sec-Fetch-Site": "cross-site"}, 403),
            (JSON | {"Sec-Fetch-Site": "same-site"}, 403),
            (JSON | {"Sec-Fetch-Site": "same-origin"}, 200),
            (JSON | {"Sec-Fetch-Site": "none"}, 200),
            (JSON | {"Host": "evil.example"}, 421),
        ],
    )
    def test_writes(self, client: Client, gateway: FakeGateway, headers: dict[str, str], status: int) -> None:
        path = "/api/v1/pools/web/backends/b1"
        assert client.ask("PATCH", path, b'{"state": "draining"}', headers)[0] == status
        assert client.ask("DELETE", path, None, headers)[0] == status
        assert bool(gateway.states) == bool(gateway.changes) == (status == 200)

    def test_own_origin(self, client: Client) -> None:
        headers = JSON | {"Origin": f"http://127.0.0.1:{client.port}"}
        path = "/api/v1/pools/web/backends/b1"
        assert client.ask("PATCH", path, b'{"state": "draining"}', headers)[0] == 200

    def test_reads_are_not_asked(self, client: Client) -> None:
        assert client.ask("GET", "/api/v1/pools", None, {"Origin": "https://evil.example"})[0] == 200

    def test_token(self, client: Client, gateway: FakeGateway) -> None:
        gateway.token_hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
        path = "/api/v1/pools/web/backends/b1"
        assert client.ask("DELETE", path)[0] == 401
        assert client.ask("DELETE", path, None, JSON | {"Authorization": "Bearer wrong"})[0] == 401
        assert client.ask("GET", "/api/v1/pools")[0] == 401
        assert gateway.changes == []
        assert client.ask("DELETE", path, None, JSON | {"Authorization": "Bearer secret"})[0] == 200


@given(
    st.sampled_from(["GET", "POST", "PATCH", "DELETE", "PUT", "X"]),
    st.lists(st.sampled_from(["web", "b1", "backends", "%", "%2f", "%ff", "", "x"]), max_size=4),
    st.binary(max_size=20)
    | st.dictionaries(
        st.sampled_from(["weight", "state", "address", "id", "x"]),
        st.none() | st.integers() | st.text(max_size=5) | st.just("ready"),
    ).map(lambda body: json.dumps(body).encode()),
)
def test_whatever_is_sent_is_answered(method: str, path: list[str], body: bytes) -> None:
    gateway = FakeGateway()
    request = Request(method, "/".join(["/api/v1/pools", *path]), {}, "127.0.0.1", body)
    response = asyncio.run(Api(gateway).answer(request))
    assert 200 <= response.status < 500
    json.loads(response.body)
    assert backends_of(gateway.loaded.config).keys() == {"web", ODD}
