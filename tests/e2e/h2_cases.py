"""Cases of HTTP/2 frames against the running gateway: what a client sends, and what must become of it.

A ``Case`` is steps (bytes to send, or what to wait for) and a *verdict*: ``dies`` for a connection error
(GOAWAY with this code, then the end), ``resets`` for a stream error (RST_STREAM with this code, and the
connection still serves), ``serves`` for what is sound or to be ignored. Each case has
a connection of its own.

The backend knows ``/kb`` (1 kB), ``/sink`` (reads the body, then the same), ``/echo`` and ``/empty`` (204);
what must never reach it is sent to ``/forbidden``.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.h2_raw import (
    STREAMS,
    Answer,
    RawH2,
    h2_context,
    headers,
    request,
    settings,
    settings_ack,
)
from tests.e2e.harness import BackendConnection
from tests.e2e.http_world import World, answer, field, http_world, read_body, read_chunked

KB = bytes(range(256)) * 4
AFTER = 2_000_001
"""The stream on which a connection shows that it still serves."""
FRONTS = ("tls8", "h2c")
"""Over TLS, with eight streams at once; in clear text."""

Wait = Callable[[RawH2], object]
Step = bytes | Wait
Verdict = Callable[[RawH2], None]


def _listeners(directory: Path) -> str:
    return f"""
[[listeners]]
name = "h2c"
address = "127.0.0.1:{{port_h2c}}"
protocol = "h1"
h2c = true
backends = [{{ address = "{{backend}}" }}]
[[listeners]]
name = "tls8"
address = "127.0.0.1:{{port_tls8}}"
protocol = "h1s"
tls = {{ cert_path = "{directory}/server.crt", key_path = "{directory}/server.key" }}
backends = [{{ address = "{{backend}}" }}]
[listeners.h2_security]
max_concurrent_streams = 8
"""


class Case:
    """See the module's text. ``offer``: settings in the client's first frame."""

    def __init__(
        self, name: str, *steps: Step, want: Verdict, offer: tuple[tuple[int, int], ...] = ()
    ) -> None:
        self.name = name
        self.steps = steps
        self.want = want
        self.offer = offer

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def cases(*each: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", each, ids=str)


class H2World:
    """A gateway with the listeners of ``FRONTS``."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.gateway = world.gateway
        self.forbidden: list[bytes] = []
        """Heads that must not have come."""
        self._tls = h2_context(str(world.trust))

    def client(self, front: str, **more: object) -> RawH2:
        tls = self._tls if front.startswith("tls") else None
        return RawH2(self.world.ports[front], tls=tls, **more)  # type: ignore[arg-type]  # RawH2's own

    def check(self, case: Case, front: str) -> None:
        with self.client(front, offer=case.offer) as client:
            # Once it has closed, what is still to be sent does not matter.
            with contextlib.suppress(ConnectionError):
                for step in case.steps:
                    if isinstance(step, bytes):
                        client.send(step)
                    else:
                        step(client)
            case.want(client)
        assert not self.forbidden, "it was forwarded"

    def is_sound(self) -> None:
        """A good client is served, and no safety net was needed."""
        for front in FRONTS:
            with self.client(front) as client:
                assert client.ask(request("/echo", "POST"), KB).body == KB
        assert self.gateway.metric("worker_faults_total") == 0


@contextlib.contextmanager
def h2_world(directory: Path) -> Iterator[H2World]:
    def kb(connection: BackendConnection, head: bytes) -> None:
        if head.startswith(b"HEAD"):
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1024\r\n\r\n")
        else:
            answer(connection, KB)

    def sink(connection: BackendConnection, head: bytes) -> None:
        read_body(connection, head)
        kb(connection, head)

    def echo(connection: BackendConnection, head: bytes) -> None:
        if field(head, "transfer-encoding") == "chunked":
            body, trailers = read_chunked(connection)
        else:
            body, trailers = read_body(connection, head), []
        told = "".join(f"x-trailer: {name}={value}\r\n" for name, value in trailers)
        told += f"x-cookie: {field(head, 'cookie')}\r\n"
        told += f"x-got: {field(head, 'x-a')}\r\n"
        answer(connection, body, headers=told.encode("latin-1"))

    with http_world(directory, more=_listeners(directory), runtime="max_keepalive_requests = 0") as world:
        world.on(kb, "/kb")
        world.on(sink, "/sink")
        world.on(echo, "/echo")
        world.on(
            lambda connection, _: connection.send(b"HTTP/1.1 204 No Content\r\n\r\n"),
            "/empty",
        )
        made = H2World(world)

        def forbidden(connection: BackendConnection, head: bytes) -> None:
            made.forbidden.append(head)
            raise EOFError

        world.on(forbidden, "/forbidden")
        yield made


# -- verdicts ----------------------------------------------------------------------------------------------


def dies(code: int, last: int | None = None) -> Verdict:
    """A connection error (RFC 9113 5.4.1). ``last``: the stream that GOAWAY names."""

    def verdict(client: RawH2) -> None:
        client.rest()
        assert client.goaways, "closed without GOAWAY"
        assert client.goaways[-1][1] == code, client.goaways
        assert client.goaways[-1][2], "the client's operator is told why"
        assert last is None or client.goaways[-1][0] == last, client.goaways

    return verdict


def resets(code: int, stream: int = 1) -> Verdict:
    """A stream error (RFC 9113 5.4.2)."""

    def verdict(client: RawH2) -> None:
        found = client.answer(stream)
        client.until(lambda: found.reset is not None or client.goaways, "RST_STREAM")
        assert found.reset == code, client
        _still_serves(client, {stream})

    return verdict


def serves(
    *streams: int,
    status: int = 200,
    body: bytes | None = None,
    check: Callable[[Answer], object] | None = None,
) -> Verdict:
    """These streams are answered, nothing is reset, and the connection still serves."""

    def verdict(client: RawH2) -> None:
        for stream in streams:
            found = client.response(stream)
            assert (found.status, found.reset) == (status, None), client
            assert body is None or found.body == body
            assert check is None or check(found), found.headers
        _still_serves(client, set())

    return verdict


def _still_serves(client: RawH2, failed: set[int]) -> None:
    client.send(headers(AFTER, request("/empty")))
    assert client.response(AFTER).status == 204, client
    client.pong()
    assert not client.goaways
    assert {stream for stream, found in client.answers.items() if found.reset is not None} == failed, client


# -- steps -------------------------------------------------------------------------------------------------


def done(stream: int = 1) -> Wait:
    """Wait until a stream is over: it is closed then, on both sides."""
    return lambda client: client.response(stream)


def answered(stream: int = 1) -> Wait:
    """Wait for the response's head."""
    return lambda client: client.until(lambda: client.answer(stream).status, "the head")


def was_reset(stream: int = 1) -> Wait:
    return lambda client: client.until(lambda: client.answer(stream).reset is not None, "RST_STREAM")


def read(client: RawH2) -> None:
    """Wait until all before has been read."""
    client.pong()


def in_pieces(raw: bytes) -> Wait:
    """Send it byte by byte."""

    def send(client: RawH2) -> None:
        for octet in raw:
            client.send(bytes((octet,)))

    return send


def fill(client: RawH2) -> None:
    """As many streams as are allowed, none of which ends."""
    client.until(lambda: STREAMS in client.settings, "SETTINGS")
    count = client.settings[STREAMS]
    client.send(b"".join(headers(2 * number + 1, request("/kb")) for number in range(count)))


def beyond(client: RawH2) -> int:
    """The first stream beyond those of ``fill``."""
    return 2 * client.settings[STREAMS] + 1


EMPTY_SETTINGS = settings()
ACKED = settings_ack()
