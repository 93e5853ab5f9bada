"""Calls that the gateway refuses before any backend sees them: their clients get a status in gRPC's terms.

By hand, for clients of gRPC keep to the rules; and by grpcio, where it can be made to break one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # this process starts others, which never use gRPC
import grpc  # type: ignore[import-untyped]  # it has no types of its own

from tests.e2e.h2_raw import Fields, RawH2, request
from tests.e2e.harness import PATIENCE_S, Backend, Gateway
from tests.ports import free_port
from tests.proxy.test_grpc_web import frames

GRPC = ("content-type", "application/grpc+proto")
WEB = ("content-type", "application/grpc-web")
INVALID, EXHAUSTED, UNIMPLEMENTED = "3", "8", "12"
LONG = [(f"x-{number}", "v" * 7000) for number in range(10)]
MANY = [(f"x-{number}", "v") for number in range(260)]


@dataclass
class Scene:
    gateway: Gateway
    backend: Backend
    ports: dict[str, int]

    def calls(self, status: str) -> float:
        return self.gateway.metric("grpc_requests_total", listener="grpc", status=status)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    ports = {"grpc": free_port(), "http": free_port()}
    with Backend() as backend:
        config = ""
        for name, port in ports.items():
            config += f"""
[[listeners]]
name = "{name}"
address = "127.0.0.1:{port}"
protocol = "h1"
h2c = true
backends = [{{ address = "{backend.address}" }}]
{"[listeners.grpc]" if name == "grpc" else ""}
"""
        directory = tmp_path_factory.mktemp("grpc-refusals")
        with Gateway(directory, config, runtime="max_keepalive_requests = 0") as gateway:
            yield Scene(gateway, backend, ports)


def call(*more: tuple[str, str], path: str = "/t.T/Echo", method: str = "POST") -> list[tuple[str, str]]:
    return [*request(path, method), ("te", "trailers"), *more]


CONNECT = [(":method", "CONNECT"), (":authority", "localhost:1")]
REFUSED: list[tuple[str, Fields, str, str, int]] = [
    ("a head that is too large", call(GRPC, *LONG), EXHAUSTED, "head_too_large", 431),
    ("too many fields", call(GRPC, *MANY), EXHAUSTED, "head_too_large", 431),
    ("too long a path", call(GRPC, path="/" + "a" * 20_000), EXHAUSTED, "uri_too_long", 414),
    ("an underscore", call(GRPC, ("x_y", "1")), INVALID, "malformed", 400),
    ("two hosts", call(("host", "other.example"), GRPC), INVALID, "bad_authority", 400),
    ("CONNECT", [*CONNECT, GRPC], UNIMPLEMENTED, "method", 405),
    ("a path above the root", call(GRPC, path="/../x"), INVALID, "bad_path", 400),
    ("such a path with another method", call(GRPC, path="/../x", method="PUT"), INVALID, "bad_path", 400),
]
cases = pytest.mark.parametrize(
    ("fields", "code", "reason", "status"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)


@cases
@pytest.mark.parametrize("end", [True, False])
def test_it_is_a_status_and_nothing_else(
    scene: Scene, fields: Fields, code: str, reason: str, status: int, end: bool
) -> None:
    calls = scene.calls(code)
    with RawH2(scene.ports["grpc"]) as client:
        got = client.response(client.open(fields, end=end))
        assert (got.status, got.body, got.trailers, got.is_complete) == (200, b"", None, True)
        assert got.get("content-type") == "application/grpc"
        assert got.get("grpc-status") == code
        assert (got.get("grpc-message") or "").replace(" ", "_").startswith(reason)
        assert got.get("x-request-id")
        assert got.get("proxy-status")
        assert client.ask(request()).status == 200, "the connection goes on"
        assert not client.goaways
    assert scene.calls(code) == calls + 1
    assert all(b"/t.T" not in head and b"/x" not in head for head, _ in scene.backend.requests)


@cases
def test_without_the_block_it_is_http(
    scene: Scene, fields: Fields, code: str, reason: str, status: int
) -> None:
    with RawH2(scene.ports["http"]) as client:
        got = client.ask(fields)
        assert (got.status, got.get("grpc-status")) == (status, None)
        assert reason.encode() in got.body


@cases
def test_what_is_no_grpc_is_answered_as_http(
    scene: Scene, fields: Fields, code: str, reason: str, status: int
) -> None:
    with RawH2(scene.ports["grpc"]) as client:
        got = client.ask([("content-type", "text/plain") if each == GRPC else each for each in fields])
        assert (got.status, got.get("grpc-status")) == (status, None)
        assert reason.encode() in got.body


@cases
def test_grpc_web_has_its_status_in_the_body(
    scene: Scene, fields: Fields, code: str, reason: str, status: int
) -> None:
    with RawH2(scene.ports["grpc"]) as client:
        got = client.ask([WEB if each == GRPC else each for each in fields])
        assert (got.status, got.get("content-type")) == (200, "application/grpc-web")
        messages, trailers = frames(got.body)
        assert (messages, trailers[b"grpc-status"]) == ([], code.encode())


def test_a_head_whose_type_is_behind_the_limit_is_answered_as_http(scene: Scene) -> None:
    """What is over the limit is not read: nobody can know what it was."""
    with RawH2(scene.ports["grpc"]) as client:
        got = client.ask(call(*LONG, GRPC))
        assert (got.status, got.get("grpc-status")) == (431, None)


def test_a_head_that_is_too_large_of_a_request_without_a_body(scene: Scene) -> None:
    with RawH2(scene.ports["http"]) as client:
        got = client.ask(call(*LONG, method="HEAD"))
        assert (got.status, got.body, got.is_complete) == (431, b"", True)


def test_a_client_of_grpc_is_told(scene: Scene) -> None:
    with grpc.insecure_channel(f"localhost:{scene.ports['grpc']}") as channel:
        method = channel.unary_unary("/t.T/Echo")
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                method(b"x", metadata=MANY, timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "more than 256 header fields" in caught.value.details()
