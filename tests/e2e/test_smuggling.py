"""Every raw request of the corpus through one running gateway to a backend that records what arrives.

A *stream* is all that one backend connection received. In the end every stream is read twice by parsers that
are not ours (h11 and llhttp): what they find must be exactly the requests that should have been forwarded, so
nothing that two readers could read differently has passed, not even in cases that looked right on their own.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import h11
import httptools
import pytest

from tests.e2e.harness import Backend, BackendConnection, Client, Gateway, Steady, listener
from tests.ports import free_port
from tests.smuggling_corpus import CASES, Case, Meaning

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_GOOD = b"/good"


@dataclass
class Message:
    """One request as a strict parser saw it."""

    method: bytes
    path: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""

    @property
    def key(self) -> tuple[bytes, bytes, bytes]:
        return self.method, self.path, self.body

    def value(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class Stream:
    """All that one backend connection received, read by h11 as it comes."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self.messages: list[Message] = []
        self.complaint = ""
        self._parser = h11.Connection(h11.SERVER)
        self._open: Message | None = None

    def feed(self, data: bytes) -> int:
        """How many more requests are complete now."""
        self.raw += data
        before = len(self.messages)
        parser = self._parser
        try:
            parser.receive_data(data)
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Request):
                    self._open = Message(event.method, event.target, list(event.headers))
                elif isinstance(event, h11.Data) and self._open is not None:
                    self._open.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage) and self._open is not None:
                    self.messages.append(self._open)
                    parser.send(h11.Response(status_code=200, headers=[(b"content-length", b"0")]))
                    parser.send(h11.EndOfMessage())
                    parser.start_next_cycle()
        except h11.ProtocolError as error:
            self.complaint = f"{error}: {bytes(self.raw[-600:])!r}"
        return len(self.messages) - before


@dataclass
class Streams:
    """What arrived at the backend, by connection."""

    streams: list[Stream] = field(default_factory=list)

    def record(self, connection: BackendConnection) -> None:
        """The backend's script: answer each complete request, keep every byte."""
        stream = Stream()
        self.streams.append(stream)
        while data := connection.sock.recv(65536):
            for _ in range(stream.feed(data)):
                connection.send(_ANSWER)

    def size(self) -> int:
        return sum(len(stream.raw) for stream in self.streams)

    def case_messages(self) -> list[Message]:
        found = [message for stream in self.streams for message in stream.messages]
        return [message for message in found if message.path != _GOOD]


class _Llhttp:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._path = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body = b""
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self._path, self._headers, self._body = b"", [], b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.messages.append(Message(self.parser.get_method(), self._path, self._headers, self._body))


def read_with_llhttp(stream: bytes) -> list[Message]:
    reader = _Llhttp()
    reader.parser.feed_data(stream)
    return reader.messages


def _config(port: int, backend: Backend, more: str = "") -> str:
    return listener(port, backend) + more


def _is_like(message: Message, meaning: Meaning) -> bool:
    host = message.value(b"host")
    return (
        message.key == (meaning.method, meaning.path, meaning.body)
        and host is not None
        and host.lower() == meaning.authority
        and all(message.value(name) == value for name, value in meaning.headers)
    )


def _send(port: int, case: Case) -> None:
    """One case on a fresh connection, up to the last byte it can cause."""
    with Client(port) as client:
        client.send(case.raw)
        expected: list[Meaning | int] = [*([case.meaning] if case.meaning else []), *case.then]
        if case.status:
            expected.append(case.status)
        for one in expected:
            is_head = isinstance(one, Meaning) and one.method == b"HEAD"
            status, headers, _ = client.response(head_only=is_head)
            assert status == (200 if isinstance(one, Meaning) else one), f"{case.name}: {status}"
            if not isinstance(one, Meaning):
                assert headers.get("connection") == "close", case.name
                assert client.is_closed(), case.name
    # Closed by us, or by the gateway, which then has read all it will ever read.


def test_the_corpus_is_large_enough() -> None:
    assert len({case.raw for case in CASES}) >= 120
    assert sum(1 for case in CASES if case.status) >= 100
    assert sum(1 for case in CASES if not case.status) >= 20


def test_nothing_ambiguous_ever_arrives(tmp_path: Path) -> None:
    port = free_port()
    streams = Streams()
    expected: Counter[tuple[bytes, bytes, bytes]] = Counter()
    with (
        Backend(streams.record) as backend,
        Gateway(tmp_path, _config(port, backend), runtime="max_keepalive_requests = 0") as gateway,
    ):
        for case in CASES:
            before = streams.size()
            _send(port, case)
            if case.status and not case.late:
                assert streams.size() == before, f"{case.name}: bytes reached the backend"
            forwarded = [one for one in (case.meaning, *case.then) if isinstance(one, Meaning)]
            for one in forwarded:
                expected[one.method, one.path, one.body] += 1
            with Client(port) as client:  # a fence: what the case caused is ahead of this
                client.send(b"GET /good HTTP/1.1\r\nHost: good.example\r\n\r\n")
                assert client.response()[0] == 200, case.name
            found = streams.case_messages()
            assert len(found) == expected.total(), f"{case.name}: {found[-2:]}"
            if forwarded:
                for one in forwarded:
                    assert any(_is_like(message, one) for message in found), f"{case.name}: {found[-2:]}"
        smuggling = gateway.metric("security_events_total", listener="web", kind="request_smuggling")
        assert smuggling >= 60
        assert gateway.metric("security_events_total", listener="web", kind="malformed_request") >= 40
        assert gateway.metric("security_events_total", listener="web", kind="bad_authority") >= 20
    assert Counter(message.key for message in streams.case_messages()) == expected
    for stream in streams.streams:
        assert not stream.complaint, stream.complaint
        ours = [message.key for message in stream.messages]
        if any(method == b"get" for method, _, _ in ours):
            continue  # llhttp knows a closed list of methods, and none in lower case
        try:
            theirs = [message.key for message in read_with_llhttp(bytes(stream.raw))]
        except httptools.HttpParserError as error:
            raise AssertionError(bytes(stream.raw[-600:])) from error
        assert theirs == ours


@pytest.mark.parametrize("cut", ["whole", "halves"])
def test_a_good_client_is_served_between_cases(tmp_path: Path, cut: str) -> None:
    """The same connection of a good client, all the time, on the worker that refuses the rest."""
    port = free_port()
    refused = [case for case in CASES if case.status][::3]
    with (
        Backend() as backend,
        Gateway(tmp_path, _config(port, backend), runtime="max_keepalive_requests = 0"),
        Steady(port) as good,
    ):
        for case in refused:
            with Client(port) as client:
                if cut == "halves":
                    middle = len(case.raw) // 2
                    client.send(case.raw[:middle])
                    client.send(case.raw[middle:])
                else:
                    client.send(case.raw)
                answer = client.rest()
                assert answer.startswith(b"HTTP/1.1 %d " % case.status), (case.name, answer)
                assert answer.count(b"\r\nproxy-status: ") == 1, (case.name, answer)
        assert good.served >= 2


def test_strict_te_takes_only_the_exact_word(tmp_path: Path) -> None:
    port = free_port()
    strict = "[security]\nstrict_te = true\n"
    with Backend() as backend, Gateway(tmp_path, _config(port, backend, strict)):
        for value, status in ((b"chunked", 200), (b"Chunked", 400), (b"CHUNKED", 400)):
            with Client(port) as client:
                client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: %s\r\n\r\n0\r\n\r\n" % value)
                assert client.response()[0] == status, value
