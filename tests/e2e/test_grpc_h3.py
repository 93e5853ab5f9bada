"""gRPC over HTTP/3: every kind of call, to a server of HTTP/2 (grpcio) and to one of HTTP/3."""

import base64
import os
import queue
from collections.abc import Iterator
from typing import NamedTuple

import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # this process starts others, which never use gRPC
from expressgateway.demo.certificate import CertificateFiles
from tests.e2e import test_grpc, test_grpc_refusals
from tests.e2e.grpc_h3 import Call, Service, unary
from tests.e2e.h3_site import SWEEP, closing, quic_listener, request
from tests.e2e.harness import PATIENCE_S, Backend, Gateway, certificate, eventually
from tests.e2e.talks import CutError, Fields, rest
from tests.e2e.talks_h3 import H3Backend, H3End, dial_h3
from tests.e2e.test_grpc import BIG, CHECK, NOT_SERVING, SERVING, WATCH
from tests.ports import free_port
from tests.proxy.test_grpc import message
from tests.proxy.test_grpc_web import frames

BLOCK = "[listeners.grpc]\n"
UNHEARD, RATHER_LATE = "10000S", "300m"


class Way(NamedTuple):
    """From a client over HTTP/3 to a service, by the version that this one speaks."""

    scene: "Scene"
    back: str
    client: H3End

    @property
    def cancelled(self) -> "queue.Queue[str]":
        return self.scene.services[self.back].cancelled

    def timeout_seen(self) -> float:
        """What the backend was told, in seconds."""
        if self.back == "h2":
            seconds: float = self.scene.grpcio.seen["time"]
            return seconds
        value = self.scene.service.seen["Echo"]["grpc-timeout"]
        return int(value[:-1]) * {"S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}[value[-1]]


class Scene:
    """A gateway with ``quic`` listeners: ``h2`` and ``h3`` by what is behind them, ``short-`` ones with a
    deadline of a second, ``plain`` without the block, ``dead`` with nobody behind, ``html`` with no gRPC.
    """

    def __init__(self, files: CertificateFiles) -> None:
        self.files = files
        self.gateway: Gateway
        self.ports: dict[str, int] = {}
        self.grpcio = test_grpc.Service()
        self.service = Service()
        self.services: dict[str, test_grpc.Service | Service] = {"h2": self.grpcio, "h3": self.service}

    def dial(self, listener: str) -> H3End:
        return dial_h3(self.files, self.ports[listener])

    def calls(self, listener: str, status: int) -> float:
        return self.gateway.metric("grpc_requests_total", listener=listener, status=str(status))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("grpc-h3")
    files = certificate(directory)
    scene = Scene(files)
    trust = f'tls_ca_path = "{files.certificate}", tls_verify_hostname = "localhost"'
    with (
        test_grpc.app(scene.grpcio) as grpcio,
        H3Backend(scene.service, "h3", files) as over,
        Backend(test_grpc.html) as html,
    ):
        h2 = f'{{ address = "127.0.0.1:{grpcio}", protocol = "h2", id = "one" }}'
        h3 = f'{{ address = "{over.address}", protocol = "h3", {trust} }}'
        behind = {
            "h2": (h2, BLOCK),
            "h3": (h3, BLOCK),
            "short-h2": (h2, f"{BLOCK}max_deadline_seconds = 1\n"),
            "short-h3": (h3, f"{BLOCK}max_deadline_seconds = 1\n"),
            "plain": (h2, ""),
            "dead": (f"127.0.0.1:{free_port()}", BLOCK),
            "html": (html.address, BLOCK),
        }
        config = ""
        for name, (backend, block) in behind.items():
            port = scene.ports[name] = free_port()
            config += quic_listener(
                files,
                port,
                backend,
                name=name,
                http=f"body_timeout_ms = 1000\nhead_timeout_ms = 2000\n{block}",
            )
        runtime = "max_requests_per_h3_connection = 0\n"
        with Gateway(directory, config + SWEEP, runtime=runtime) as scene.gateway:
            yield scene


@pytest.fixture(params=["h2", "h3"])
def way(scene: Scene, request: pytest.FixtureRequest) -> Iterator[Way]:
    with closing(scene.dial(request.param)) as client:
        yield Way(scene, request.param, client)


class TestEveryKind:
    def test_unary(self, way: Way) -> None:
        labels = {"listener": way.back, "version": "3", "status_class": "2xx"}
        calls = way.scene.calls(way.back, 0)
        requests = way.scene.gateway.metric("http_requests_total", **labels)
        for text in (b"hello", b""):
            call = unary(way.client, "Echo", text)
            assert (call.rest(), call.status()) == ([text], 0)
        eventually(lambda: way.scene.calls(way.back, 0) == calls + 2, "they are counted")
        assert way.scene.gateway.metric("http_requests_total", **labels) == requests + 2

    def test_streams_of_requests(self, way: Way) -> None:
        for texts in ([b"a", b"b", b"c"], []):
            call = Call(way.client, "Collect")
            call.send(*texts, end=True)
            assert (call.rest(), call.status()) == ([b",".join(texts)], 0)

    def test_streams_of_responses(self, way: Way) -> None:
        call = unary(way.client, "Spread", b"a,b,c")
        assert (call.rest(), call.status()) == ([b"a", b"b", b"c"], 0)

    def test_both_ways_at_once(self, way: Way) -> None:
        call = Call(way.client, "Chat")
        for number in range(20):
            call.send(b"%d" % number)
            assert next(call.answers) == b"%d" % number * 2
        call.send(end=True)
        assert (call.rest(), call.status()) == ([], 0)

    def test_big_messages(self, way: Way) -> None:
        call = unary(way.client, "Echo", BIG)
        assert (call.rest(), call.status()) == ([BIG], 0)
        half = BIG[: len(BIG) // 2]
        call = Call(way.client, "Chat")
        for _ in range(2):
            call.send(half)
            assert next(call.answers) == half * 2
        call.send(end=True)
        assert (call.rest(), call.status()) == ([], 0)

    def test_metadata(self, way: Way) -> None:
        call = unary(way.client, "Echo", b"x", ("x-ask", "42"), ("x-raw-bin", "AQL/"))
        assert call.status() == 0
        raw = way.scene.services[way.back].seen["Echo"]["x-raw-bin"]
        assert raw == (b"\x01\x02\xff" if way.back == "h2" else "AQL/")
        first, last = call.talk.headers, call.last
        assert (first["x-first"], base64.b64decode(first["x-first-bin"] + "=")) == ("42", b"\x00\xff")
        assert (last["x-last"], base64.b64decode(last["x-last-bin"] + "=")) == ("42", b"\x00\xfe")

    def test_errors(self, way: Way) -> None:
        call = unary(way.client, "Fail", b"x")
        assert call.status() == 9
        assert call.last["grpc-message"].lower() == "no, 100%25 %c3%bc%0a"
        assert call.last["x-why"] == "because"
        assert unary(way.client, "Nothing", b"x").status() == 12

    def test_many_at_once(self, way: Way) -> None:
        calls = [unary(way.client, "Echo", b"%d" % number) for number in range(100)]
        assert [call.rest() for call in calls] == [[b"%d" % number] for number in range(100)]
        assert {call.status() for call in calls} == {0}

    def test_without_the_block(self, scene: Scene) -> None:
        with closing(scene.dial("plain")) as client:
            call = Call(client, "Chat")
            call.send(b"a", b"b", end=True)
            assert (call.rest(), call.status()) == ([b"aa", b"bb"], 0)


class TestCancellation:
    def test_by_the_client(self, way: Way) -> None:
        before = way.scene.calls(way.back, 1)
        call = unary(way.client, "Hang", b"at once")
        while way.scene.services[way.back].begun.get(timeout=PATIENCE_S) != "at once":
            pass
        call.talk.cut()
        assert way.cancelled.get(timeout=PATIENCE_S) == "at once"
        eventually(lambda: way.scene.calls(way.back, 1) == before + 1, "it was counted")

    def test_within_a_stream(self, way: Way) -> None:
        call = unary(way.client, "Stall", b"in a stream")
        assert next(call.answers) == b"first"
        call.talk.cut()
        assert way.cancelled.get(timeout=PATIENCE_S) == "in a stream"
        assert unary(way.client, "Echo", b"x").status() == 0

    def test_by_the_connections_end(self, way: Way) -> None:
        call = unary(way.client, "Stall", b"gone")
        assert next(call.answers) == b"first"
        way.client.close()
        assert way.cancelled.get(timeout=PATIENCE_S) == "gone"

    def test_by_the_backend(self, scene: Scene) -> None:
        """Its own code, as no status has come."""
        with closing(scene.dial("h3")) as client:
            call = Call(client, "Break")
            call.send(b"first")
            assert next(call.answers) == b"first"
            call.send(b"second")
            with pytest.raises(CutError):
                call.rest()
            assert call.talk.lost_code == 0x107


class TestDeadlines:
    def test_the_servers_view(self, way: Way) -> None:
        assert unary(way.client, "Echo", b"x", timeout="17S").status() == 0
        assert 10 < way.timeout_seen() < 18
        assert unary(way.client, "Echo", b"x", timeout=UNHEARD).status() == 0
        assert 290 < way.timeout_seen() < 301

    @pytest.mark.parametrize("back", ["h2", "h3"])
    def test_the_gateways(self, scene: Scene, back: str) -> None:
        """grpcio keeps the deadline, too, and either of the two may be first to say so."""
        with closing(scene.dial(f"short-{back}")) as client:
            before = scene.calls(f"short-{back}", 4)
            hang = unary(client, "Hang", b"before", timeout=UNHEARD)
            stall = unary(client, "Stall", b"within", timeout=UNHEARD)
            assert next(stall.answers) == b"first"
            assert (hang.status(), stall.status()) == (4, 4)
            ended = {scene.services[back].cancelled.get(timeout=PATIENCE_S) for _ in range(2)}
            assert ended == {"before", "within"}
            eventually(lambda: scene.calls(f"short-{back}", 4) == before + 2, "they were counted")

    def test_the_clients(self, way: Way) -> None:
        assert unary(way.client, "Hang", b"late", timeout=RATHER_LATE).status() == 4
        assert way.cancelled.get(timeout=PATIENCE_S) == "late"

    def test_a_silent_stream_without_one(self, way: Way) -> None:
        """The listener's time for a body."""
        call = unary(way.client, "Stall", b"without")
        assert next(call.answers) == b"first"
        assert call.status() == 4
        assert "body" in call.last["grpc-message"]
        assert way.cancelled.get(timeout=PATIENCE_S) == "without"

    @pytest.mark.parametrize("timeouts", [["soon"], ["123456789S"], ["1"], ["-1S"], ["1S", "1S"]])
    def test_a_malformed_one(self, way: Way, timeouts: list[str]) -> None:
        kind = {"kind": "grpc_bad_deadline", "listener": way.back}
        events = way.scene.gateway.metric("security_events_total", **kind)
        way.scene.services[way.back].seen.pop("Echo", None)
        call = unary(way.client, "Echo", b"x", *(("grpc-timeout", each) for each in timeouts))
        assert call.status() == 3
        assert "Echo" not in way.scene.services[way.back].seen
        assert way.scene.gateway.metric("security_events_total", **kind) == events + 1


class TestOurOwnAnswers:
    def test_nobody_is_there(self, scene: Scene) -> None:
        with closing(scene.dial("dead")) as client:
            before = scene.calls("dead", 14)
            call = unary(client, "Echo", b"x")
            assert call.status() == 14
            assert "connect_refused" in call.last["grpc-message"]
            assert scene.calls("dead", 14) == before + 1

    @pytest.mark.parametrize(("status", "code"), [(401, 16), (404, 12), (503, 14), (200, 2)])
    def test_what_is_no_grpc(self, scene: Scene, status: int, code: int) -> None:
        with closing(scene.dial("html")) as client:
            call = unary(client, f"/x/{status}", b"x")
            assert call.status() == code
            assert f"HTTP status {status}" in call.last["grpc-message"]

    def test_grpc_web(self, scene: Scene) -> None:
        with closing(scene.dial("h2")) as client:
            fields = request("/t.T/Echo", ("content-type", "application/grpc-web"), method="POST")
            talk = client.call(fields, end=False)
            talk.send(message(b"hello"), end=True)
            assert talk.read_head()["content-type"] == "application/grpc-web"
            found, trailers = frames(rest(talk))
            assert (found, trailers[b"grpc-status"]) == ([b"hello"], b"0")


class TestRefusals:
    """Those of ``test_grpc_refusals``: nothing of them reaches a backend, and the connection serves on."""

    @test_grpc_refusals.cases
    @pytest.mark.parametrize("end", [True, False])
    def test_it_is_a_status_and_nothing_else(
        self, scene: Scene, fields: Fields, code: str, reason: str, status: int, end: bool
    ) -> None:
        with closing(scene.dial("h2")) as client:
            calls = scene.calls("h2", int(code))
            talk = client.call(fields, end=end)
            talk.read_head()
            assert rest(talk) == b""
            assert (talk.headers[":status"], talk.trailers) == ("200", [])
            assert talk.headers["content-type"] == "application/grpc"
            assert talk.headers["grpc-status"] == code
            assert talk.headers["grpc-message"].replace(" ", "_").startswith(reason)
            assert talk.headers["x-request-id"]
            assert talk.headers["proxy-status"]
            assert unary(client, "Echo", b"x").status() == 0, "the connection goes on"
            assert not client.goaway
            assert scene.calls("h2", int(code)) == calls + 1

    @test_grpc_refusals.cases
    def test_without_the_block_it_is_http(
        self, scene: Scene, fields: Fields, code: str, reason: str, status: int
    ) -> None:
        with closing(scene.dial("plain")) as client:
            talk = client.call(fields, end=True)
            talk.read_head()
            assert (talk.headers[":status"], talk.headers.get("grpc-status")) == (str(status), None)
            assert reason.encode() in rest(talk)

    def test_a_head_whose_type_is_behind_the_limit_is_answered_as_http(self, scene: Scene) -> None:
        """What is over the limit is not read: nobody can know what it was."""
        with closing(scene.dial("h2")) as client:
            fields = test_grpc_refusals.call(*test_grpc_refusals.LONG, test_grpc_refusals.GRPC)
            talk = client.call(fields, end=True)
            talk.read_head()
            assert (talk.headers[":status"], talk.headers.get("grpc-status")) == ("431", None)

    def test_a_head_that_is_too_large_of_a_request_without_a_body(self, scene: Scene) -> None:
        with closing(scene.dial("plain")) as client:
            talk = client.call(test_grpc_refusals.call(*test_grpc_refusals.LONG, method="HEAD"), end=True)
            assert talk.read_head()[":status"] == "431"
            assert rest(talk) == b""


class TestHealth:
    def test_check(self, way: Way) -> None:
        call = unary(way.client, CHECK, b"")
        assert (call.rest(), call.status()) == ([SERVING], 0)
        assert unary(way.client, CHECK, b"\x0a\x04none").status() == 5

    def test_watch(self, scene: Scene) -> None:
        """What an operator says is told in the stream; the stream ends with its client."""
        with closing(scene.dial("h2")) as client:
            call = unary(client, WATCH, b"")
            assert next(call.answers) == SERVING
            scene.gateway.wait_metric("grpc_health_watches", 1, listener="h2")
            test_grpc.set_state(scene.gateway, "h2", "disabled")
            assert next(call.answers) == NOT_SERVING
            test_grpc.set_state(scene.gateway, "h2", "ready")
            assert next(call.answers) == SERVING
            call.talk.cut()
            eventually(
                lambda: scene.gateway.metric("grpc_health_watches", listener="h2") == 0, "nobody watches"
            )
