"""gRPC through a running gateway, with a client and a server that we did not write (grpcio).

Requests and responses are plain bytes: what is proved is calls, not protobuf.
"""

import base64
import contextlib
import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # this process starts others, which never use gRPC
import grpc  # type: ignore[import-untyped]  # it has no types of its own

from expressgateway.demo.certificate import CertificateFiles
from tests.e2e.harness import (
    PATIENCE_S,
    Backend,
    BackendConnection,
    Client,
    Gateway,
    certificate,
    eventually,
)
from tests.e2e.http_world import client_context
from tests.ports import free_port
from tests.proxy.test_grpc import message
from tests.proxy.test_grpc_web import frames, plain

Code = grpc.StatusCode
BIG = bytes(range(256)) * 12_000  # 3 MB: many windows, and below the 4 MB that grpcio takes by default

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]  # as above
    """The backend's methods, one of each kind, and some that go wrong."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        """What the calls said that are to be cancelled."""
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.seen: dict[str, Any] = {}

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]
        self.seen[name] = dict(details.invocation_metadata)
        kinds: dict[str, Callable[..., Any]] = {
            "Echo": grpc.unary_unary_rpc_method_handler,
            "Fail": grpc.unary_unary_rpc_method_handler,
            "Hang": grpc.unary_unary_rpc_method_handler,
            "Check": grpc.unary_unary_rpc_method_handler,
            "Collect": grpc.stream_unary_rpc_method_handler,
            "Spread": grpc.unary_stream_rpc_method_handler,
            "Stall": grpc.unary_stream_rpc_method_handler,
            "Chat": grpc.stream_stream_rpc_method_handler,
        }
        kind = kinds.get(name)
        return kind(getattr(self, name.lower())) if kind is not None else None

    def echo(self, request: bytes, context: Any) -> bytes:
        sent = dict(context.invocation_metadata())
        self.seen["time"] = context.time_remaining()
        if "x-ask" in sent:
            context.send_initial_metadata((("x-first", sent["x-ask"]), ("x-first-bin", b"\x00\xff")))
            context.set_trailing_metadata((("x-last", sent["x-ask"]), ("x-last-bin", b"\x00\xfe")))
        return request

    def fail(self, request: bytes, context: Any) -> None:
        context.set_trailing_metadata((("x-why", "because"),))
        context.abort(Code.FAILED_PRECONDITION, "no, 100% \u00fc\n")

    def check(self, request: bytes, context: Any) -> bytes:
        return b"the backend's own"

    def hang(self, request: bytes, context: Any) -> bytes:
        self._tell(request, context).wait(PATIENCE_S)
        return b""

    def _tell(self, request: bytes, context: Any) -> threading.Event:
        """Tell the test when this call has ended."""
        over = threading.Event()

        def end() -> None:
            self.cancelled.put(request.decode())
            over.set()

        if not context.add_callback(end):
            end()  # it has ended already
        self.begun.put(request.decode())
        return over

    def collect(self, requests: Iterator[bytes], context: Any) -> bytes:
        return b",".join(requests)

    def spread(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield from request.split(b",")

    def stall(self, request: bytes, context: Any) -> Iterator[bytes]:
        over = self._tell(request, context)
        yield b"first"
        over.wait(PATIENCE_S)

    def chat(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for each in requests:
            yield each + each


class Scene:
    """A gateway with several listeners, their channels, and the service behind most of them."""

    def __init__(
        self, gateway: Gateway, ports: dict[str, int], files: CertificateFiles, service: Service
    ) -> None:
        self.gateway = gateway
        self.ports = ports
        self.files = files
        self.service = service
        self.backend_is_up = True
        self._channels: dict[str, Any] = {}

    def channel(self, listener: str) -> Any:
        channel = self._channels.get(listener)
        if channel is None:
            address = f"localhost:{self.ports[listener]}"
            if listener == "clear":
                channel = grpc.insecure_channel(address)
            else:
                trust = grpc.ssl_channel_credentials(self.files.certificate.read_bytes())
                channel = grpc.secure_channel(address, trust)
            self._channels[listener] = channel
        return channel

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def one(self, listener: str, method: str) -> Any:
        return self.channel(listener).unary_unary(path_of(method))

    def cancellations(self) -> str:
        return self.service.cancelled.get(timeout=PATIENCE_S)

    def calls(self, listener: str, status: int) -> float:
        return self.gateway.metric("grpc_requests_total", listener=listener, status=str(status))


def path_of(method: str) -> str:
    return method if method.startswith("/") else f"/t.T/{method}"


def html(connection: BackendConnection) -> None:
    """A backend that is no gRPC server: answers with the status that the path names."""
    while True:
        head, _ = connection.request()
        status = int(head.split(b" ")[1].rpartition(b"/")[2])
        connection.send(b"HTTP/1.1 %d X\r\ncontent-type: text/html\r\ncontent-length: 4\r\n\r\n<p/>" % status)


LISTENERS = """
[[pools]]
name = "app"
backends = [{{ address = "127.0.0.1:{app}", protocol = "h2" }}]
[[pools]]
name = "dead"
backends = [{{ address = "127.0.0.1:{nobody}", protocol = "h2" }}]
"""


@contextlib.contextmanager
def app(service: Service, port: int = 0) -> Iterator[int]:
    """The service on a port, by grpcio's server."""
    server = grpc.server(ThreadPoolExecutor(16), handlers=(service,), options=(("grpc.so_reuseport", 0),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(0).wait(PATIENCE_S)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("grpc")
    files = certificate(directory)
    ports = {name: free_port() for name in ("grpc", "plain", "short", "dead", "html", "own", "clear")}
    pools = {"grpc": "app", "plain": "app", "short": "app", "dead": "dead", "own": "app", "clear": "app"}
    blocks = {
        "plain": "",
        "short": "[listeners.grpc]\nmax_deadline_seconds = 1\n",
        "own": "[listeners.grpc]\nhealth_synthesized = false\n",
    }
    service = Service()
    with app(service) as port, Backend(html) as other:
        config = LISTENERS.format(app=port, nobody=free_port())
        for name, number in ports.items():
            is_clear = name == "clear"
            config += f"[[listeners]]\nname = '{name}'\naddress = '127.0.0.1:{number}'\n"
            config += "protocol = 'h1'\nh2c = true\n" if is_clear else "protocol = 'h1s'\n"
            config += f"pool = '{pools[name]}'\n" if name in pools else ""
            config += f"backends = [{{ address = '{other.address}' }}]\n" if name not in pools else ""
            if not is_clear:
                config += f"[listeners.tls]\ncert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
            config += "[listeners.http]\nbody_timeout_ms = 1000\nhead_timeout_ms = 2000\n"
            config += blocks.get(name, "[listeners.grpc]\n")
        runtime = "max_keepalive_requests = 0\n[runtime.watchdog]\nsweep_interval_ms = 200"
        with Gateway(directory, config, runtime=runtime) as gateway:
            scene = Scene(gateway, ports, files, service)
            try:
                yield scene
            finally:
                scene.close()


@pytest.fixture(params=["grpc", "plain", "clear"])
def front(request: pytest.FixtureRequest) -> str:
    """With the block and without it: calls pass all the same."""
    value: str = request.param
    return value


class TestEveryKind:
    def test_unary(self, scene: Scene, front: str) -> None:
        assert scene.one(front, "Echo")(b"hello", timeout=PATIENCE_S) == b"hello"
        assert scene.one(front, "Echo")(b"", timeout=PATIENCE_S) == b""

    def test_metadata(self, scene: Scene, front: str) -> None:
        sent = (("x-ask", "42"), ("x-raw-bin", b"\x01\x02\xff"))
        answer, call = scene.one(front, "Echo").with_call(b"x", metadata=sent, timeout=PATIENCE_S)
        assert answer == b"x"
        assert scene.service.seen["Echo"]["x-raw-bin"] == b"\x01\x02\xff"
        first, last = dict(call.initial_metadata()), dict(call.trailing_metadata())
        assert (first["x-first"], first["x-first-bin"]) == ("42", b"\x00\xff")
        assert (last["x-last"], last["x-last-bin"]) == ("42", b"\x00\xfe")

    def test_errors(self, scene: Scene, front: str) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            scene.one(front, "Fail")(b"x", timeout=PATIENCE_S)
        assert caught.value.code() is Code.FAILED_PRECONDITION
        assert caught.value.details() == "no, 100% \u00fc\n"
        assert ("x-why", "because") in caught.value.trailing_metadata()
        with pytest.raises(grpc.RpcError) as caught:
            scene.one(front, "Nothing")(b"x", timeout=PATIENCE_S)
        assert caught.value.code() is Code.UNIMPLEMENTED

    def test_streams_of_requests(self, scene: Scene, front: str) -> None:
        collect = scene.channel(front).stream_unary(path_of("Collect"))
        assert collect(iter([b"a", b"b", b"c"]), timeout=PATIENCE_S) == b"a,b,c"
        assert collect(iter([]), timeout=PATIENCE_S) == b""

    def test_streams_of_responses(self, scene: Scene, front: str) -> None:
        spread = scene.channel(front).unary_stream(path_of("Spread"))
        assert list(spread(b"a,b,c", timeout=PATIENCE_S)) == [b"a", b"b", b"c"]

    def test_both_ways_at_once(self, scene: Scene, front: str) -> None:
        asks: queue.Queue[bytes | None] = queue.Queue()
        chat = scene.channel(front).stream_stream(path_of("Chat"))
        answers = chat(iter(asks.get, None), timeout=PATIENCE_S)
        for number in range(20):
            asks.put(b"%d" % number)
            assert next(answers) == b"%d" % number * 2
        asks.put(None)
        assert list(answers) == []
        assert answers.code() is Code.OK

    def test_big_messages(self, scene: Scene, front: str) -> None:
        assert scene.one(front, "Echo")(BIG, timeout=PATIENCE_S) == BIG
        chat = scene.channel(front).stream_stream(path_of("Chat"))
        half = BIG[: len(BIG) // 2]
        assert list(chat(iter([half] * 3), timeout=PATIENCE_S)) == [half * 2] * 3

    def test_many_at_once(self, scene: Scene, front: str) -> None:
        echo = scene.one(front, "Echo")
        calls = [echo.future(b"%d" % number, timeout=PATIENCE_S) for number in range(300)]
        assert [call.result() for call in calls] == [b"%d" % number for number in range(300)]


class TestCancellation:
    def test_by_the_client(self, scene: Scene, front: str) -> None:
        call = scene.one(front, "Hang").future(front.encode(), timeout=PATIENCE_S)
        while scene.service.begun.get(timeout=PATIENCE_S) != front:
            pass
        call.cancel()
        assert scene.cancellations() == front
        assert call.code() is Code.CANCELLED

    def test_within_a_stream(self, scene: Scene) -> None:
        before = scene.calls("grpc", 1)
        call = scene.channel("grpc").unary_stream(path_of("Stall"))(b"in a stream", timeout=PATIENCE_S)
        assert next(call) == b"first"
        call.cancel()
        assert scene.cancellations() == "in a stream"
        eventually(lambda: scene.calls("grpc", 1) == before + 1, "it was counted")


class TestDeadlines:
    def test_the_servers_view(self, scene: Scene) -> None:
        scene.one("grpc", "Echo")(b"x", timeout=17)
        assert 10 < scene.service.seen["time"] < 18  # grpcio rounds up
        scene.one("grpc", "Echo")(b"x", timeout=4000)
        assert 290 < scene.service.seen["time"] < 301
        scene.one("plain", "Echo")(b"x", timeout=4000)
        assert 3900 < scene.service.seen["time"] < 4100

    def test_the_clients_own(self, scene: Scene) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            scene.one("grpc", "Hang")(b"by the client", timeout=0.3)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert scene.cancellations() == "by the client"

    def test_the_gateways(self, scene: Scene) -> None:
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            scene.one("short", "Hang")(b"by the gateway", timeout=PATIENCE_S)
        assert time.monotonic() - begun < PATIENCE_S / 2
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert scene.cancellations() == "by the gateway"

    def test_the_gateways_within_a_stream(self, scene: Scene) -> None:
        before = scene.calls("short", 4)
        stall = scene.channel("short").unary_stream(path_of("Stall"))
        call = stall(b"within", timeout=PATIENCE_S)
        assert next(call) == b"first"
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert scene.cancellations() == "within"
        # The backend has the same deadline, so either of the two may be first to say so.
        eventually(lambda: scene.calls("short", 4) == before + 1, "it was counted")

    def test_a_silent_stream_with_one_is_left_alone(self, scene: Scene) -> None:
        """Longer than the listener's body and head times."""
        stall = scene.channel("grpc").unary_stream(path_of("Stall"))
        call = stall(b"silent", timeout=2.6)
        assert next(call) == b"first"
        begun = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert time.monotonic() - begun > 2
        assert scene.cancellations() == "silent"

    def test_a_silent_stream_without_one(self, scene: Scene) -> None:
        call = scene.channel("grpc").unary_stream(path_of("Stall"))(b"without")
        assert next(call) == b"first"
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert "body" in caught.value.details()
        assert scene.cancellations() == "without"


class TestOurOwnAnswers:
    def test_nobody_is_there(self, scene: Scene) -> None:
        before = scene.calls("dead", 14)
        with pytest.raises(grpc.RpcError) as caught:
            scene.one("dead", "Echo")(b"x", timeout=PATIENCE_S)
        assert caught.value.code() is Code.UNAVAILABLE
        assert "connect_refused" in caught.value.details()
        assert scene.calls("dead", 14) == before + 1

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (401, Code.UNAUTHENTICATED),
            (404, Code.UNIMPLEMENTED),
            (503, Code.UNAVAILABLE),
            (200, Code.UNKNOWN),
        ],
    )
    def test_what_is_no_grpc(self, scene: Scene, status: int, code: Any) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            scene.one("html", f"/x/{status}")(b"x", timeout=PATIENCE_S)
        assert caught.value.code() is code
        assert f"HTTP status {status}" in caught.value.details()

    def test_a_channel_survives_all_that(self, scene: Scene) -> None:
        for _ in range(3):
            with pytest.raises(grpc.RpcError):
                scene.one("html", "/x/500")(b"x", timeout=PATIENCE_S)


class TestHealth:
    def test_check(self, scene: Scene) -> None:
        check = scene.one("grpc", CHECK)
        assert check(b"", timeout=PATIENCE_S) == SERVING
        assert check(b"\x0a\x03app", timeout=PATIENCE_S) == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(b"\x0a\x04dead", timeout=PATIENCE_S)  # it exists, but not for this listener
        assert caught.value.code() is Code.NOT_FOUND

    def test_left_to_the_backend(self, scene: Scene) -> None:
        for listener in ("own", "plain"):
            assert scene.one(listener, CHECK)(b"", timeout=PATIENCE_S) == b"the backend's own"

    def test_watch(self, scene: Scene, tmp_path: Path) -> None:
        """A change, a reload, a drain: in one stream."""
        service = Service()
        files = certificate(tmp_path)
        port = free_port()
        with app(service) as backend:

            def config(pool: str) -> str:
                return (
                    f"[[listeners]]\nname = 'w'\naddress = '127.0.0.1:{port}'\nprotocol = 'h1s'\n"
                    f"pool = '{pool}'\n[listeners.tls]\ncert_path = '{files.certificate}'\n"
                    f"key_path = '{files.key}'\n[listeners.grpc]\n"
                    f"[[pools]]\nname = '{pool}'\n"
                    f"backends = [{{ address = '127.0.0.1:{backend}', protocol = 'h2', id = 'one' }}]\n"
                )

            runtime = "[runtime.watchdog]\nsweep_interval_ms = 100"
            with Gateway(tmp_path, config("first"), runtime=runtime) as gateway:
                trust = grpc.ssl_channel_credentials(files.certificate.read_bytes())
                with grpc.secure_channel(f"localhost:{port}", trust) as channel:
                    watch = channel.unary_stream(WATCH)
                    whole = watch(b"", timeout=PATIENCE_S)
                    later = watch(b"\x0a\x06second", timeout=PATIENCE_S)
                    assert next(whole) == SERVING
                    assert next(later) == b"\x08\x03"
                    gateway.wait_metric("grpc_health_watches", 2)
                    set_state(gateway, "first", "disabled")
                    assert next(whole) == NOT_SERVING
                    set_state(gateway, "first", "ready")
                    assert next(whole) == SERVING
                    assert gateway.reload(config("second"))
                    assert next(later) == SERVING
                    gateway.process.terminate()
                    assert list(later_until_error(later)) == [NOT_SERVING]
                    assert later.code() is Code.UNAVAILABLE
                    assert "going away" in later.details()
                    gateway.process.wait(PATIENCE_S)


def later_until_error(call: Any) -> Iterator[bytes]:
    with contextlib.suppress(grpc.RpcError):
        yield from call


def set_state(gateway: Gateway, pool: str, state: str) -> None:
    """By the admin API, as an operator would."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.admin, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        body = json.dumps({"state": state})
        path = f"/api/v1/pools/{pool}/backends/one"
        connection.request("PATCH", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()


class TestGrpcWeb:
    def ask(self, scene: Scene, kind: str, body: bytes, path: str = "/t.T/Echo") -> tuple[int, Any, bytes]:
        trust = client_context(scene.files.certificate)
        with Client(scene.ports["grpc"], tls=trust) as client:
            client.send(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nx-ask: 7\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
            )
            client.send(body)
            return client.response()

    def test_binary(self, scene: Scene) -> None:
        body = message(BIG)
        status, headers, answer = self.ask(scene, "application/grpc-web+proto", body)
        assert status == 200
        assert headers["content-type"].startswith("application/grpc-web")
        assert headers["x-first"] == "7"
        messages, trailers = frames(answer)
        assert messages == [BIG]
        assert trailers[b"grpc-status"] == b"0"
        assert trailers[b"x-last"] == b"7"

    def test_text(self, scene: Scene) -> None:
        body = base64.b64encode(message(b"hello"))
        status, headers, answer = self.ask(scene, "application/grpc-web-text", body)
        assert (status, headers["content-type"]) == (200, "application/grpc-web-text")
        messages, trailers = frames(plain(answer))
        assert (messages, trailers[b"grpc-status"]) == ([b"hello"], b"0")

    def test_errors(self, scene: Scene) -> None:
        _, _, answer = self.ask(scene, "application/grpc-web", message(b"x"), "/t.T/Fail")
        messages, trailers = frames(answer)
        assert (messages, trailers[b"grpc-status"]) == ([], b"9")
        assert trailers[b"x-why"] == b"because"

    def test_streams(self, scene: Scene) -> None:
        _, _, answer = self.ask(scene, "application/grpc-web", message(b"a,b,c"), "/t.T/Spread")
        assert frames(answer)[0] == [b"a", b"b", b"c"]

    def test_plain_grpc_is_refused_there(self, scene: Scene) -> None:
        status, _, text = self.ask(scene, "application/grpc", message(b"x"))
        assert status == 415
        assert b"unsupported_media" in text
