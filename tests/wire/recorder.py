"""Sinks and shells for codec tests: every call becomes a tuple, so that a conversation reads as a list.

``Recorder`` is the sink of both sides. ``ServerShell`` and ``ClientShell`` stand for a connection's shell and
keep what a codec asked for. ``ServerWorld`` and ``ClientWorld`` join one codec, its shell and its recorders.
``pieces`` gives the ways in which a conversation's bytes are cut.
"""

from collections.abc import Callable, Iterator
from typing import Any

from expressgateway.wire.errors import WireError
from expressgateway.wire.h1.client import IDLE as CLIENT_IDLE
from expressgateway.wire.h1.client import H1Client
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.h1.server import TUNNEL, H1Server, Limits
from expressgateway.wire.head import Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import RequestSink, ServerStream

Call = tuple[Any, ...]
Answer = Callable[["Recorder"], None]

MAX_HEAD = 65536
MAX_TARGET = 16384
MAX_FIELDS = 256


class Recorder:
    """A sink of requests and of responses. ``answer`` is called once the request is complete."""

    def __init__(self, stream: ServerStream | None = None, answer: Answer | None = None) -> None:
        self.stream = stream
        self.answer = answer
        self.request: RequestHead | None = None
        self.response: ResponseHead | None = None
        self.body: list[bytes] = []
        self.trailers: Fields | None = None
        self.ended = False
        self.error: WireError | None = None
        self.aborts = 0
        self.calls: list[Call] = []

    # -- RequestSink -----------------------------------------------------------------------------------

    def on_request(self, head: RequestHead, end: bool) -> None:
        self.request = head
        self.calls.append(("request", head.method, head.authority, head.path))
        if end:
            self._end()

    def on_request_data(self, chunk: bytes, end: bool) -> None:
        self.calls.append(("data", chunk, end))
        self.body.append(chunk)
        if end:
            self._end()

    def on_request_trailers(self, fields: Fields) -> None:
        self.calls.append(("trailers", fields))
        self.trailers = fields
        self._end()

    def on_request_abort(self, error: WireError) -> None:
        self.aborts += 1
        self.calls.append(("abort", type(error).__name__))
        self.error = error

    def on_front_blocked(self) -> None:
        self.calls.append(("blocked",))

    def on_front_drained(self) -> None:
        self.calls.append(("drained",))

    # -- ResponseSink ----------------------------------------------------------------------------------

    def on_informational(self, head: ResponseHead) -> None:
        self.calls.append(("informational", head.status, head.headers))

    def on_response(self, head: ResponseHead, end: bool) -> None:
        self.response = head
        self.calls.append(("response", head.status))
        if end:
            self._end()

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        self.on_request_data(chunk, end)

    def on_response_trailers(self, fields: Fields) -> None:
        self.on_request_trailers(fields)

    def on_response_abort(self, error: WireError) -> None:
        self.on_request_abort(error)

    def on_back_blocked(self) -> None:
        self.calls.append(("blocked",))

    def on_back_drained(self) -> None:
        self.calls.append(("drained",))

    # -- what the tests ask ----------------------------------------------------------------------------

    def _end(self) -> None:
        if self.ended:
            raise AssertionError("ended twice")
        self.ended = True
        if self.answer is not None:
            self.answer(self)

    @property
    def payload(self) -> bytes:
        return b"".join(self.body)

    def meaning(self) -> Call:
        """All that was told, however it was cut."""
        head = self.request
        request = (
            None
            if head is None
            else (
                head.method,
                head.scheme,
                head.authority,
                head.path,
                head.headers,
                head.protocol,
                head.content_length,
                head.version,
                head.accepts_trailers,
                head.expects_continue,
            )
        )
        response = self.response
        answer = (
            None
            if response is None
            else (response.status, response.headers, response.content_length, response.version)
        )
        error = None if self.error is None else (type(self.error), self.error.status)
        interim = [call for call in self.calls if call[0] == "informational"]
        return request, answer, interim, self.payload, self.trailers, self.ended, error


def no_answer(recorder: Recorder) -> None:
    """The backend has not answered yet."""


def answer_ok(recorder: Recorder) -> None:
    """200 with the request's path."""
    stream, head = recorder.stream, recorder.request
    if stream is None or head is None:
        raise AssertionError("nothing to answer")
    stream.send_head(ResponseHead(200, (), len(head.path)), False)
    stream.send_data(head.path, True)


def answer(
    status: int = 200,
    *chunks: bytes,
    length: int | None = None,
    trailers: tuple[tuple[bytes, bytes], ...] = (),
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> Answer:
    """Chunks as they are; the end comes with the last, or with the head."""

    def give(recorder: Recorder) -> None:
        stream = recorder.stream
        assert stream is not None
        head = ResponseHead(status, headers, length)
        if not chunks and not trailers:
            stream.send_head(head, True)
            return
        stream.send_head(head, False)
        for at, chunk in enumerate(chunks):
            stream.send_data(chunk, not trailers and at == len(chunks) - 1)
        if trailers:
            stream.send_trailers(trailers)

    return give


def ok(body: bytes, *lines: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(body)
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


class ServerShell:
    """The connection around an ``H1Server``."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.exchanges: list[Recorder] = []
        self.refusals: list[WireError] = []
        self.done: list[bool] = []
        self.asked: list[str] = []
        self.is_paused = False
        self.wakes = 0
        self.resets = 0
        self.half_closes = 0
        self.budget = 0

    def wake(self) -> None:
        self.wakes += 1

    def pause_reading(self) -> None:
        self.is_paused = True
        self.asked.append("pause")

    def resume_reading(self) -> None:
        self.is_paused = False
        self.asked.append("resume")

    def unsent(self) -> int:
        return 0

    def open_exchange(self, stream: ServerStream) -> RequestSink:
        recorder = Recorder(stream, self.answer)
        self.exchanges.append(recorder)
        if self.budget and len(self.exchanges) >= self.budget and isinstance(stream, H1Server):
            stream.close_after = True
        return recorder

    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        self.refusals.append(error)
        stream.send_head(ResponseHead(error.status, (), 7), False)
        stream.send_data(b"refused", True)

    def exchange_done(self, is_reusable: bool) -> None:
        self.done.append(is_reusable)

    def half_close(self) -> None:
        self.half_closes += 1

    def reset(self) -> None:
        self.resets += 1


class ServerWorld:
    """One client connection without a socket. A paused shell keeps what comes, as a socket would."""

    def __init__(
        self,
        answer: Answer = answer_ok,
        *,
        underscore: str = "reject",
        strict_te: bool = False,
        websocket: bool = False,
        max_head: int = MAX_HEAD,
        max_target: int = MAX_TARGET,
        max_fields: int = MAX_FIELDS,
        fields: FieldReader | None = None,
        budget: int = 0,
    ) -> None:
        self.shell = ServerShell(answer)
        self.shell.budget = budget
        reader = fields or FieldReader(max_fields, strict_te=strict_te, underscore=underscore)
        self.codec = H1Server(self.shell, Limits(reader, max_head, max_target, websocket), b"http")
        self._waiting: list[bytes] = []

    def feed(self, *data: bytes) -> "ServerWorld":
        for piece in data:
            if self.shell.is_paused:
                self._waiting.append(piece)
            else:
                self.codec.receive_data(piece)
        self._go_on()
        return self

    def _go_on(self) -> None:
        """What ``net`` does between exchanges: the early bytes, then the socket's."""
        for _ in range(100_000):
            if self.codec.is_idle or self.codec.is_mid_head or self.codec.reading is TUNNEL:
                held = self.codec.take_pipelined() if self.shell.is_paused else b""
                if self.shell.is_paused:
                    self.shell.is_paused = False
                if held:
                    self.codec.receive_data(held)
                    continue
            if self.shell.is_paused or not self._waiting:
                return
            self.codec.receive_data(self._waiting.pop(0))
        raise AssertionError("does not end")

    def go_on(self) -> None:
        """The exchange ended outside a read."""
        self._go_on()

    def eof(self) -> "ServerWorld":
        self.codec.receive_eof()
        return self

    def reset(self) -> "ServerWorld":
        self.codec.receive_reset()
        return self

    @property
    def out(self) -> bytes:
        return b"".join(self.codec.out)

    @property
    def exchanges(self) -> list[Recorder]:
        return self.shell.exchanges

    @property
    def exchange(self) -> Recorder:
        return self.shell.exchanges[-1]

    def outcome(self) -> Call:
        """All that can be seen of this connection."""
        shell = self.shell
        return (
            [exchange.meaning() for exchange in shell.exchanges],
            [(type(error), error.status) for error in shell.refusals],
            self.out,
            shell.done,
            shell.resets,
            shell.half_closes,
        )


class ClientShell:
    """The connection around an ``H1Client``."""

    def __init__(self) -> None:
        self.done: list[bool] = []
        self.asked: list[str] = []
        self.resets = 0
        self.half_closes = 0
        self.delivered = False

    def wake(self) -> None:
        self.asked.append("wake")

    def pause_reading(self) -> None:
        self.asked.append("pause")

    def resume_reading(self) -> None:
        self.asked.append("resume")

    def unsent(self) -> int:
        return 0

    def half_close(self) -> None:
        self.half_closes += 1

    def exchange_done(self, is_reusable: bool) -> None:
        self.done.append(is_reusable)

    def reset(self) -> None:
        self.resets += 1

    def was_delivered(self) -> bool:
        return self.delivered


def request(method: bytes = b"GET", path: bytes = b"/", **more: Any) -> RequestHead:
    """A request head with the usual rest."""
    return RequestHead(method, b"http", b"example.org", path, more.pop("headers", ()), **more)


class ClientWorld:
    """One backend connection without a socket."""

    def __init__(self, *, max_head: int = MAX_HEAD, max_fields: int = MAX_FIELDS) -> None:
        self.shell = ClientShell()
        self.codec = H1Client(self.shell, FieldReader(max_fields, underscore="allow"), max_head)
        self.sink = Recorder()

    def ask(self, head: RequestHead | None = None, end: bool = True) -> "ClientWorld":
        """Begin an exchange and send its head."""
        self.sink = Recorder()
        self.codec.open(self.sink)
        self.codec.send_head(head or request(), end)
        return self

    def feed(self, *data: bytes) -> "ClientWorld":
        for piece in data:
            self.codec.receive_data(piece)
        return self

    def eof(self) -> "ClientWorld":
        self.codec.receive_eof()
        return self

    @property
    def out(self) -> bytes:
        return b"".join(self.codec.out)

    def take_out(self) -> bytes:
        out = self.out
        self.codec.out = []
        return out

    @property
    def is_reusable(self) -> bool:
        """Whether the shell may lease this connection out again."""
        return self.shell.done[-1:] == [True] and self.codec.reading is CLIENT_IDLE

    def outcome(self) -> Call:
        return self.sink.meaning(), self.shell.done, self.shell.resets, self.codec.reading, self.out


def pieces(data: bytes) -> Iterator[list[bytes]]:
    """The bytes in one piece, cut in two at every position, and one by one."""
    yield [data]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]
