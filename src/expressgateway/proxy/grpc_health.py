"""``grpc.health.v1.Health``, answered by the gateway from what it knows of its pools.

``Health`` is one listener's answer to "is it serving?": the empty name is the listener as a whole, any other
is a pool that its routes lead to. ``HealthStream`` is what an exchange has in a backend's place: it takes the
request and gives the response, so everything else about the call is as for any other. A watch is looked at
by the sweep of its exchange; it knows nobody who would tell it of a change.

The two messages have one field each and are read and written by hand.
"""

from collections.abc import Mapping
from typing import Final

from expressgateway.observe.counters import ListenerCounters
from expressgateway.proxy.grpc_status import CONTENT_TYPE, Code, status_fields
from expressgateway.upstream.pool import Pool
from expressgateway.wire.errors import WireError
from expressgateway.wire.head import Fields, RequestHead, ResponseHead
from expressgateway.wire.sinks import ResponseSink

CHECK: Final = b"/grpc.health.v1.Health/Check"
WATCH: Final = b"/grpc.health.v1.Health/Watch"

MAX_WATCHES: Final = 1000  # of one listener and worker; more are refused with RESOURCE_EXHAUSTED
MAX_REQUEST_BYTES: Final = 4096  # a name, and whatever fields a later version adds

SERVING: Final = 1
NOT_SERVING: Final = 2
SERVICE_UNKNOWN: Final = 3

_PREFIX: Final = 5  # a flag and a length before each message
_NAME: Final = 0x0A  # the field ``service``, a string
_OK: Final[Fields] = ((b"grpc-status", b"0"),)
_TYPE: Final[Fields] = ((b"content-type", CONTENT_TYPE),)


class Health:
    """See the module's text. Outlives the services of its listener, so that a watch sees reloads, too."""

    __slots__ = ("counters", "pools")

    def __init__(self, pools: Mapping[str, Pool], counters: ListenerCounters) -> None:
        self.pools = pools
        self.counters = counters

    def status(self, name: str) -> int:
        """What is answered for a service's name."""
        if name:
            pool = self.pools.get(name)
            return SERVICE_UNKNOWN if pool is None else _status((pool,))
        return _status(tuple(self.pools.values()))


def _status(pools: tuple[Pool, ...]) -> int:
    for pool in pools:
        for backend in pool.backends:
            if backend.is_available and backend.weight:
                return SERVING
    return NOT_SERVING


class HealthStream:
    """One call of ``Check`` or ``Watch``. Implements ``ClientStream``."""

    __slots__ = (
        "_body",
        "_health",
        "_is_paused",
        "_last",
        "_name",
        "_sink",
        "_size",
        "is_reused",
        "is_watch",
        "version",
    )

    def __init__(self, health: Health, sink: ResponseSink, is_watch: bool) -> None:
        self._health = health
        self._sink: ResponseSink | None = sink
        self.is_reused = False
        self.version = b"2"
        self.is_watch = is_watch
        self._body: list[bytes] = []  # at most MAX_REQUEST_BYTES
        self._size = 0
        self._name: str | None = None  # of a watch that has begun
        self._last = 0
        self._is_paused = False

    # -- ClientStream ----------------------------------------------------------------------------------

    def send_head(self, head: RequestHead, end: bool) -> None:
        if end:
            self._answer()

    def send_data(self, chunk: bytes, end: bool) -> None:
        self._size += len(chunk)
        if self._size > MAX_REQUEST_BYTES:
            self._fail(Code.RESOURCE_EXHAUSTED, "the message is too long")
            return
        self._body.append(chunk)
        if end:
            self._answer()

    def send_trailers(self, fields: Fields) -> None:
        self._answer()

    def abort(self, error: WireError | None) -> None:
        self._let_go()

    def close(self) -> None:
        self._let_go()

    def was_delivered(self) -> bool:
        return True

    def unsent(self) -> int:
        return 0

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self.refresh()

    # -- the answer ------------------------------------------------------------------------------------

    def _let_go(self) -> ResponseSink | None:
        """The call is over. Idempotent."""
        sink, self._sink = self._sink, None
        if self._name is not None:
            self._name = None
            self._health.counters.grpc_watches -= 1
        return sink

    def _answer(self) -> None:
        try:
            name = service_of(b"".join(self._body))
        except ValueError as error:
            self._fail(Code.INVALID_ARGUMENT, str(error))
            return
        self._body.clear()
        status = self._health.status(name)
        if not self.is_watch:
            if status == SERVICE_UNKNOWN:
                self._fail(Code.NOT_FOUND, "unknown service")
                return
            self._begin(status)
            self._end(_OK)
            return
        if self._health.counters.grpc_watches >= MAX_WATCHES:
            self._fail(Code.RESOURCE_EXHAUSTED, "too many watches")
            return
        self._health.counters.grpc_watches += 1
        self._name = name
        self._begin(status)

    def _fail(self, code: Code, text: str) -> None:
        sink = self._let_go()
        if sink is not None:
            sink.on_response(ResponseHead(200, _TYPE + status_fields(code, text), None, b"2"), True)

    def _begin(self, status: int) -> None:
        if self._sink is not None:
            self._sink.on_response(ResponseHead(200, _TYPE, None, b"2"), False)
        self._tell(status)

    def _tell(self, status: int) -> None:
        self._last = status
        if self._sink is not None:
            self._sink.on_response_data(bytes((0, 0, 0, 0, 2, 0x08, status)), False)

    def _end(self, trailers: Fields) -> None:
        sink = self._let_go()
        if sink is not None:
            sink.on_response_trailers(trailers)

    # -- a watch ---------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Tell the client if it is otherwise than it was told last. A client that does not read is told the
        newest when it does."""
        name = self._name
        if name is None or self._is_paused:
            return
        status = self._health.status(name)
        if status != self._last:
            self._tell(status)

    def leave(self) -> None:
        """The gateway drains: a watch would never end by itself."""
        if self._name is None:
            return
        if self._last == SERVING and not self._is_paused:
            self._tell(NOT_SERVING)
        self._end(status_fields(Code.UNAVAILABLE, "the gateway is going away"))


def service_of(body: bytes) -> str:
    """The name in the one ``HealthCheckRequest`` that a request's body holds.

    Raises ``ValueError`` if it is anything else; what is compressed is not read.
    """
    if len(body) < _PREFIX or int.from_bytes(body[1:_PREFIX], "big") != len(body) - _PREFIX:
        raise ValueError("the request is not one message")
    if body[0]:
        raise ValueError("the message is compressed")
    name = b""
    at = _PREFIX
    while at < len(body):
        key, at = _varint(body, at)
        match key & 7:
            case 0:
                _, at = _varint(body, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(body, at)
                if key == _NAME:
                    name = body[at : at + size]
                at += size
            case 5:
                at += 4
            case _:
                raise ValueError("the message is malformed")
    if at > len(body):
        raise ValueError("the message is cut short")
    return name.decode("utf-8")  # UnicodeDecodeError is a ValueError


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("the message is malformed")
