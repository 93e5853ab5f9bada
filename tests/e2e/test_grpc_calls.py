"""What gRPC's interoperability tests ask of a client and a server, asked of the way between them.

The fourteen cases are those of the published description of these tests, in our words: the client, the server
and their HTTP/2 are grpcio's; requests say in JSON what the server is to do, so that no protobuf is needed.
"""

import json
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # this process starts others, which never use gRPC
import grpc  # type: ignore[import-untyped]  # it has no types of its own

from tests.e2e.harness import PATIENCE_S, Gateway, certificate, eventually
from tests.e2e.test_grpc import app
from tests.ports import free_port

Code = grpc.StatusCode
ASKED = (27_182, 8, 1_828, 45_904)
ANSWERED = (31_415, 9, 2_653, 58_979)
SPECIAL = "\t\nwhite space\r\nand Unicode of the BMP \u263a and beyond \U0001f608\t\n"
FIRST, LAST = "x-first-metadata", "x-last-metadata-bin"


def ask(payload: int = 0, **what: Any) -> bytes:
    """A request: what the server is to do, then ``payload`` zeros."""
    return json.dumps(what).encode() + bytes(payload)


def asked(request: bytes) -> tuple[dict[str, Any], int]:
    """The reverse: what to do, and the payload's size."""
    text = request.rstrip(b"\0")
    what: dict[str, Any] = json.loads(text or b"{}")
    return what, len(request) - len(text)


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]  # as above
    """Methods of all four kinds that do as they are told."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        self.ended: queue.Queue[str] = queue.Queue()

    def service(self, details: Any) -> Any:
        kinds = {
            "/t.Test/Empty": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
            "/t.Test/Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "/t.Test/In": grpc.stream_unary_rpc_method_handler(self.take),
            "/t.Test/Out": grpc.unary_stream_rpc_method_handler(self.give),
            "/t.Test/Both": grpc.stream_stream_rpc_method_handler(self.both),
        }
        return kinds.get(details.method)

    def _begin(self, context: Any) -> None:
        """Metadata that is to come back; and tell the test how far the call is, if it wants to know."""
        sent = dict(context.invocation_metadata())
        if FIRST in sent:
            context.send_initial_metadata(((FIRST, sent[FIRST]),))
        if LAST in sent:
            context.set_trailing_metadata(((LAST, sent[LAST]),))
        name = sent.get("x-name")
        if name is not None:
            context.add_callback(lambda: self.ended.put(name))
            self.begun.put(name)

    def _status(self, what: dict[str, Any], context: Any) -> None:
        if "code" in what:
            context.set_code(what["code"])
            context.set_details(what["details"])

    def unary(self, request: bytes, context: Any) -> bytes:
        self._begin(context)
        what, _ = asked(request)
        self._status(what, context)
        return bytes(what.get("size", 0))

    def take(self, requests: Iterator[bytes], context: Any) -> bytes:
        self._begin(context)
        return b"%d" % sum(asked(request)[1] for request in requests)

    def give(self, request: bytes, context: Any) -> Iterator[bytes]:
        self._begin(context)
        yield from map(bytes, asked(request)[0]["sizes"])

    def both(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self._begin(context)
        for request in requests:
            what, _ = asked(request)
            self._status(what, context)
            yield from map(bytes, what.get("sizes", ()))


class Way:
    """A channel to the service, through one of the gateway's listeners."""

    def __init__(self, channel: Any, service: Service) -> None:
        self.channel = channel
        self.service = service

    def unary(self, method: str) -> Any:
        return self.channel.unary_unary(method)

    def both(self, requests: Iterator[bytes], **options: Any) -> Any:
        return self.channel.stream_stream("/t.Test/Both")(requests, **options)

    def named(self, name: str) -> dict[str, Any]:
        """Options of a call that the server tells of."""
        while not self.service.begun.empty():
            self.service.begun.get()
        while not self.service.ended.empty():
            self.service.ended.get()
        return {"metadata": (("x-name", name),), "timeout": PATIENCE_S}


class Pipe:
    """Requests that are sent when the test says so; the stream of them stays open until ``close``."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._queue.get, None)

    def send(self, request: bytes) -> None:
        self._queue.put(request)

    def close(self) -> None:
        self._queue.put(None)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    it = Pipe()
    yield it
    it.close()  # or grpcio's thread waits for ever


@pytest.fixture(scope="module", params=["tls", "clear", "without the block"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    directory: Path = tmp_path_factory.mktemp("grpc")
    port = free_port()
    files = certificate(directory)
    service = Service()
    text = f"[[listeners]]\nname = 'calls'\naddress = '127.0.0.1:{port}'\npool = 'app'\n"
    if request.param == "clear":
        text += "protocol = 'h1'\nh2c = true\n"
    else:
        text += (
            "protocol = 'h1s'\n[listeners.tls]\n"
            f"cert_path = '{files.certificate}'\nkey_path = '{files.key}'\n"
        )
    if request.param != "without the block":
        text += "[listeners.grpc]\n"
    with app(service) as behind:
        text += (
            f"[[pools]]\nname = 'app'\nbackends = [{{ address = '127.0.0.1:{behind}', protocol = 'h2' }}]\n"
        )
        with Gateway(directory, text) as gateway:
            address = f"localhost:{port}"
            if request.param == "clear":
                channel = grpc.insecure_channel(address)
            else:
                trust = grpc.ssl_channel_credentials(files.certificate.read_bytes())
                channel = grpc.secure_channel(address, trust)
            with channel:
                yield Way(channel, service)
                eventually(lambda: gateway.metric("backend_inflight", pool="app") == 0, "no call is left")


def test_empty_unary(way: Way) -> None:
    assert way.unary("/t.Test/Empty")(b"", timeout=PATIENCE_S) == b""


def test_large_unary(way: Way) -> None:
    assert way.unary("/t.Test/Unary")(ask(271_828, size=314_159), timeout=PATIENCE_S) == bytes(314_159)


def test_client_streaming(way: Way) -> None:
    take = way.channel.stream_unary("/t.Test/In")
    assert take((ask(size) for size in ASKED), timeout=PATIENCE_S) == b"%d" % sum(ASKED)


def test_server_streaming(way: Way) -> None:
    give = way.channel.unary_stream("/t.Test/Out")
    assert tuple(map(len, give(ask(sizes=ANSWERED), timeout=PATIENCE_S))) == ANSWERED


def test_ping_pong(way: Way, pipe: Pipe) -> None:
    """Each request is sent when the answer to the one before has come: nothing waits on the way."""
    answers = way.both(iter(pipe), timeout=PATIENCE_S)
    for size, answer in zip(ASKED, ANSWERED, strict=True):
        pipe.send(ask(size, sizes=[answer]))
        assert next(answers) == bytes(answer)
    pipe.close()
    assert list(answers) == []
    assert answers.code() is Code.OK


def test_empty_stream(way: Way, pipe: Pipe) -> None:
    pipe.close()
    answers = way.both(iter(pipe), timeout=PATIENCE_S)
    assert list(answers) == []
    assert answers.code() is Code.OK


def test_cancel_after_begin(way: Way, pipe: Pipe) -> None:
    """No request has been sent, and the server has the call: it learns that it is over."""
    call = way.channel.stream_unary("/t.Test/In").future(iter(pipe), **way.named("begun"))
    assert way.service.begun.get(timeout=PATIENCE_S) == "begun"
    assert call.cancel()
    assert call.cancelled()
    assert call.code() is Code.CANCELLED
    assert way.service.ended.get(timeout=PATIENCE_S) == "begun"


def test_cancel_after_first_response(way: Way, pipe: Pipe) -> None:
    answers = way.both(iter(pipe), **way.named("answered"))
    pipe.send(ask(ASKED[0], sizes=[ANSWERED[0]]))
    assert next(answers) == bytes(ANSWERED[0])
    answers.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is Code.CANCELLED
    assert way.service.ended.get(timeout=PATIENCE_S) == "answered"


@pytest.mark.parametrize("timeout_s", [0.001, 0.2])
def test_timeout_on_sleeping_server(way: Way, pipe: Pipe, timeout_s: float) -> None:
    """The first is over on the way, the second at the server."""
    pipe.send(ask(ASKED[0]))
    answers = way.both(iter(pipe), timeout=timeout_s)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize("details", ["test status message", SPECIAL], ids=["plain", "special"])
def test_status_code_and_message(way: Way, pipe: Pipe, details: str) -> None:
    """Of a call of one request and one answer, and of one with streams both ways."""
    request = ask(1, size=1, sizes=[1], code=2, details=details)
    with pytest.raises(grpc.RpcError) as caught:
        way.unary("/t.Test/Unary")(request, timeout=PATIENCE_S)
    assert (caught.value.code(), caught.value.details()) == (Code.UNKNOWN, details)
    answers = way.both(iter(pipe), timeout=PATIENCE_S)
    pipe.send(request)
    assert next(answers) == bytes(1)
    pipe.close()
    with pytest.raises(grpc.RpcError):
        next(answers)
    assert (answers.code(), answers.details()) == (Code.UNKNOWN, details)


@pytest.mark.parametrize("method", ["/t.Test/Unheard", "/t.Unheard/Unary"], ids=["method", "service"])
def test_unimplemented(way: Way, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        way.unary(method)(b"", timeout=PATIENCE_S)
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_custom_metadata(way: Way, pipe: Pipe) -> None:
    """To the server, back before there is any message, and back behind the last one; text and bytes."""
    text, octets = "first value", b"\x0a\x0b\x0a\x0b\x0a\x0b\x00\xff"
    options = {"metadata": ((FIRST, text), (LAST, octets)), "timeout": PATIENCE_S}
    _, call = way.unary("/t.Test/Unary").with_call(ask(1, size=1), **options)
    assert dict(call.initial_metadata())[FIRST] == text
    assert dict(call.trailing_metadata())[LAST] == octets
    answers = way.both(iter(pipe), **options)
    assert dict(answers.initial_metadata())[FIRST] == text
    pipe.send(ask(1, sizes=[1]))
    assert next(answers) == bytes(1)
    pipe.close()
    assert list(answers) == []
    assert dict(answers.trailing_metadata())[LAST] == octets
