"""The API's operations without a connection: what each asks of the gateway, and what it answers."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expressgateway.config.render import REDACTED
from expressgateway.control.admin.api import Api
from expressgateway.control.admin.http import READS, Request, Response
from expressgateway.control.admin.resources import TABLE
from expressgateway.control.admin.table import ROOT, Routes
from expressgateway.control.plan import backends_of
from expressgateway.control.reload import APPLIED, FAILED, INVALID, REFUSED, UNCHANGED, Outcome
from expressgateway.observe.logs import LEVELS
from tests.control.changing import ODD, FakeGateway


class Asking:
    """A client of one API."""

    def __init__(self) -> None:
        self.gateway = FakeGateway()
        self.api = Api(self.gateway)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Response:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        request = Request(method, ROOT + path, fields, "127.0.0.1", data)
        return asyncio.run(self.api.answer(request))

    def get(self, path: str) -> Any:
        response = self.ask("GET", path)
        assert response.status == 200
        return json.loads(response.body)

    def etag(self, path: str = "/pools") -> str:
        return self.ask("GET", path).headers["ETag"]


@pytest.fixture
def asking() -> Asking:
    return Asking()


B1 = "/pools/web/backends/b1"


def told(response: Response) -> tuple[int, dict[str, Any]]:
    answer = json.loads(response.body)
    assert isinstance(answer, dict)
    assert isinstance(answer.get("error", ""), str)
    return response.status, answer


class TestShow:
    @pytest.mark.parametrize(
        ("path", "key"),
        [
            ("/listeners", "listeners"),
            ("/workers", "workers"),
            ("/pools", "pools"),
            ("/backends", "backends"),
            ("/certificates", "certificates"),
            ("/connections", "listed"),
        ],
    )
    def test_lists_stand_in_an_object(self, asking: Asking, path: str, key: str) -> None:
        assert isinstance(asking.get(path)[key], list)

    def test_backends_of_all_pools(self, asking: Asking) -> None:
        found = asking.get("/backends")["backends"]
        assert [(each["pool"], each["id"]) for each in found] == [
            ("web", "b1"),
            ("web", "n1"),
            ("web", "g1"),
            (ODD, "127.0.0.1:9002"),
        ]

    def test_status(self, asking: Asking) -> None:
        assert asking.get("/status")["state"] == "serving"

    def test_config_has_no_secrets(self, asking: Asking) -> None:
        gateway = asking.gateway
        admin = gateway.loaded.config.admin.model_copy(update={"api_token_hash": "ab" * 32})
        config = gateway.loaded.config.model_copy(update={"admin": admin})
        gateway.loaded = type(gateway.loaded)(config, gateway.loaded.path)
        shown = asking.get("/config")
        assert shown["config"]["admin"]["api_token_hash"] == REDACTED
        assert "abab" not in json.dumps(shown)
        assert shown["version"] == 1

    @pytest.mark.parametrize("path", ["", "/", "/nothing", "/pools/", "/status/x", "/openapi.json/x"])
    def test_nothing_there(self, asking: Asking, path: str) -> None:
        assert told(asking.ask("GET", path)) == (404, {"error": "there is nothing at this path"})

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("DELETE", "/status", "GET, HEAD"),
            ("GET", "/reload", "POST"),
            ("POST", "/log", "GET, HEAD, PATCH"),
        ],
    )
    def test_methods(self, asking: Asking, method: str, path: str, allow: str) -> None:
        response = asking.ask(method, path)
        assert (response.status, response.headers["Allow"]) == (405, allow)


class TestVersions:
    """RFC 9110 13.1.1, and the body's `version`."""

    def test_a_tag_changes_with_every_write_and_with_nothing_else(self, asking: Asking) -> None:
        gateway = asking.gateway
        seen = [asking.etag()]
        asking.ask("PATCH", B1, {"weight": 7})
        seen.append(asking.etag())
        asking.ask("PATCH", B1, {"state": "draining"})
        seen.append(asking.etag())
        assert len(set(seen)) == 3
        gateway.states["web", "b1"] = "unhealthy", "not by a write"
        gateway.merged = {"backend_requests": {("web", "b1", "2xx"): 5}}
        asking.ask("PATCH", B1, {"weight": 7})
        asking.ask("PATCH", "/log", {"level": "debug"})
        assert asking.etag() == seen[-1] == asking.etag("/config") == asking.etag("/backends")

    def test_two_runs_have_no_tag_in_common(self) -> None:
        assert Asking().etag() != Asking().etag()

    def test_a_write_gives_the_tag_of_what_it_made(self, asking: Asking) -> None:
        response = asking.ask("PATCH", B1, {"weight": 7}, if_match=asking.etag())
        assert (response.status, response.headers["ETag"]) == (200, asking.etag())

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("PATCH", B1, {"weight": 7}),
            ("PATCH", B1, {"state": "draining"}),
            ("DELETE", B1, None),
            ("POST", "/pools/web/backends", {"address": "127.0.0.1:1"}),
            ("POST", "/reload", {}),
        ],
    )
    def test_stale_tag(self, asking: Asking, method: str, path: str, body: object) -> None:
        seen = asking.etag()
        asking.ask("PATCH", "/pools/web/backends/n1", {"state": "disabled"})
        response = asking.ask(method, path, body, if_match=seen)
        status, answer = told(response)
        assert (status, answer["version"], response.headers["ETag"]) == (412, 1, asking.etag())
        assert asking.gateway.changes == []
        assert ("web", "b1") not in asking.gateway.states

    @pytest.mark.parametrize(
        ("field", "status"),
        [
            ("*", 200),
            ('"x", {}', 200),
            ('{} , "x"', 200),
            ('"x"', 412),
            ("W/{}", 412),
            ("", 412),
            ("x", 400),
            ('"x" "y"', 400),
            ('"x', 400),
        ],
    )
    def test_fields(self, asking: Asking, field: str, status: int) -> None:
        tag = asking.etag()
        assert asking.ask("PATCH", B1, {"weight": 7}, if_match=field.format(tag)).status == status

    def test_reads_ask_for_nothing(self, asking: Asking) -> None:
        assert asking.ask("GET", "/pools", if_match='"x"').status == 200

    def test_stale_version(self, asking: Asking) -> None:
        assert asking.ask("PATCH", B1, {"weight": 7, "version": 1}).status == 200
        status, answer = told(asking.ask("PATCH", B1, {"weight": 8, "version": 1}))
        assert (status, answer["version"]) == (409, 2)
        assert "version 1 is not in force, 2 is" in answer["error"]
        assert asking.ask("POST", "/reload", {"version": 1}).status == 409
        assert asking.ask("POST", "/reload", {"version": 2}).status == 200
        added = {"address": "127.0.0.1:1", "version": 2}
        assert asking.ask("POST", "/pools/web/backends", added).status == 201

    @pytest.mark.parametrize("version", [None, "1", 1.0, True, [1]])
    def test_version_that_is_none(self, asking: Asking, version: object) -> None:
        status, answer = told(asking.ask("PATCH", B1, {"weight": 7, "version": version}))
        assert (status, answer["error"][:25]) == (422, "version: expected a whole")

    def test_changed_while_it_waits_for_its_turn(self, asking: Asking) -> None:
        """It was right when it came: what counts is the moment it is made."""

        def overtake() -> None:
            asking.gateway.reloads.finish(1, Outcome(APPLIED))

        asking.gateway.before_change = overtake
        assert asking.ask("PATCH", B1, {"weight": 7}, if_match=asking.etag()).status == 412
        assert asking.ask("PATCH", B1, {"weight": 7, "version": 2}).status == 409
        assert asking.gateway.changes == []


class TestLog:
    def test_set(self, asking: Asking) -> None:
        assert asking.get("/log") == {"level": "info"}
        for level in LEVELS:
            assert told(asking.ask("PATCH", "/log", {"level": level})) == (200, {"level": level})
            assert asking.gateway.level == level

    @pytest.mark.parametrize(
        ("body", "status", "sentence"),
        [
            ({}, 400, "nothing is asked for: the keys are level and version"),
            ({"levle": "info"}, 400, 'unknown key "levle" (did you mean "level"?)'),
            ({"level": "inof"}, 422, 'did you mean "info"?'),
            ({"level": 7}, 422, "level: expected one of debug, info, warning, error, found 7"),
            ({"version": 1}, 422, "level: expected one of"),
        ],
    )
    def test_refused(self, asking: Asking, body: object, status: int, sentence: str) -> None:
        found, answer = told(asking.ask("PATCH", "/log", body))
        assert (found, sentence in answer["error"]) == (status, True), answer

    def test_also_while_it_stops(self, asking: Asking) -> None:
        asking.gateway.reason = "draining"
        assert asking.ask("PATCH", "/log", {"level": "debug"}).status == 200


class TestReload:
    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            (Outcome(APPLIED, ("swapped: listener web", "kept: pool p")), 200),
            (Outcome(UNCHANGED, ("swapped: nothing", "kept: pool p")), 200),
            (Outcome(INVALID, ("x.toml:1:1: error: no", "x.toml:2:1: error: no")), 422),
            (Outcome(REFUSED, ("a; b",)), 409),
            (Outcome(FAILED, ("a worker cannot apply it",)), 500),
        ],
    )
    def test_outcomes(self, asking: Asking, outcome: Outcome, status: int) -> None:
        asking.gateway.fault = outcome
        found, answer = told(asking.ask("POST", "/reload", {}))
        assert (found, answer["result"]) == (status, outcome.result)
        assert answer["version"] == (2 if outcome.result == APPLIED else 1)
        if status == 200:
            assert answer["plan"] == list(outcome.report)
            assert "error" not in answer
        else:
            assert answer["details"] == list(outcome.report)
            assert answer["error"]

    def test_body(self, asking: Asking) -> None:
        assert asking.ask("POST", "/reload", b"").status == 200
        assert asking.ask("POST", "/reload", b"null").status == 400
        assert "the keys are version" in told(asking.ask("POST", "/reload", {"x": 1}))[1]["error"]

    def test_not_while_it_stops(self, asking: Asking) -> None:
        asking.gateway.reason = "draining"
        response = asking.ask("POST", "/reload", {})
        assert (response.status, response.headers["Retry-After"]) == (503, "1")


class TestDrainAndRenew:
    def test_drain(self, asking: Asking) -> None:
        status, answer = told(asking.ask("POST", "/drain", {}))
        assert (status, answer["state"]) == (202, "draining")
        assert asking.gateway.drained_by == ["the admin API, from 127.0.0.1"]
        asking.gateway.reason = "draining"
        assert asking.ask("POST", "/drain", b"").status == 202
        assert asking.ask("POST", "/drain", {"listener": "web"}).status == 400
        assert asking.ask("POST", "/drain", {"version": 9}).status == 409
        assert len(asking.gateway.drained_by) == 2

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [(Outcome(APPLIED, ("web",)), 200), (Outcome(INVALID, ("no pair",)), 422), (Outcome(REFUSED), 409)],
    )
    def test_renew(self, asking: Asking, outcome: Outcome, status: int) -> None:
        asking.gateway.renewed = outcome
        found, answer = told(asking.ask("POST", "/certificates/renew", {}))
        assert (found, answer["result"]) == (status, outcome.result)


class TestTable:
    def test_every_operation_is_found_by_its_path(self) -> None:
        routes = Routes(TABLE)
        for operation in TABLE:
            found = routes.find(ROOT + operation.path.replace("{pool}", "a%2Fb").replace("{id}", "x"))
            assert found is not None
            methods, names = found
            assert methods[operation.method] is operation
            assert names == {
                key: value for key, value in (("pool", "a/b"), ("id", "x")) if f"{{{key}}}" in operation.path
            }

    def test_names_of_operations_are_their_own(self) -> None:
        assert len({operation.name for operation in TABLE}) == len(TABLE)
        assert len({(operation.method, operation.path) for operation in TABLE}) == len(TABLE)


_SEGMENTS = st.sampled_from(
    ["web", "b1", "%", "%2f", "%ff", "", "x", *(p for one in TABLE for p in one.path.split("/") if p)]
)
_BODIES: st.SearchStrategy[bytes] = st.binary(max_size=20) | st.dictionaries(
    st.sampled_from(["weight", "state", "address", "id", "version", "level", "x"]),
    st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["ready", "info"]),
).map(lambda body: json.dumps(body).encode())
_FIELDS: st.SearchStrategy[Mapping[str, str]] = st.just({}) | st.builds(
    lambda value: {"if-match": value}, st.sampled_from(["*", "x", '"x"', 'W/"x"', ","]) | st.text(max_size=6)
)


@given(
    st.sampled_from([*READS, "POST", "PATCH", "DELETE", "X"]),
    st.lists(_SEGMENTS, max_size=4),
    _BODIES,
    _FIELDS,
)
def test_whatever_is_sent_is_answered(
    method: str, path: list[str], body: bytes, fields: Mapping[str, str]
) -> None:
    gateway = FakeGateway()
    request = Request(method, "/".join([ROOT, *path]), dict(fields), "127.0.0.1", body)
    response = asyncio.run(Api(gateway).answer(request))
    assert 200 <= response.status < 500
    answer = json.loads(response.body)
    assert ("error" in answer) == (response.status >= 400)
    assert backends_of(gateway.loaded.config).keys() == {"web", ODD}
