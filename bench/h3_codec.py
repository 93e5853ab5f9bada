"""What the HTTP/3 codec alone costs, without QUIC: microseconds per request, both roles, and bulk.

``python -m bench.h3_codec``. The transport is a list: what one role gives it, the other is told, a stream
at a time, as QUIC does it. ``repeated``: every request is the same, as load generators send them.
``distinct``: each has its own path and cookie, so that every block is encoded, decoded and judged.
"""

import time
from collections.abc import Callable

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h3.client import H3Client, H3ClientStream
from expressgateway.wire.h3.limits import H3Limits
from expressgateway.wire.h3.server import H3Server
from expressgateway.wire.head import Fields, RequestHead, ResponseHead, SharedFields
from expressgateway.wire.sinks import RequestSink, ServerStream

REQUESTS = 20_000
BATCH = 16  # requests per read
FIELDS: Fields = (
    (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0"),
    (b"accept", b"text/html,application/xhtml+xml"),
    (b"accept-language", b"en-GB,en;q=0.5"),
    (b"accept-encoding", b"gzip, deflate, br"),
    (b"referer", b"https://example.org/start"),
    (b"cache-control", b"no-cache"),
)
SHARED = SharedFields(((b"server", b"expressgateway"), (b"date", b"Fri, 20 Nov 2026 12:00:00 GMT")))
BODY = b"x" * 64
LIMITS = H3Limits(FieldRules(), reset_percent=0)


class Shell:
    """Answers every request at once, or counts what it is told."""

    def __init__(self) -> None:
        self.done = 0
        self.stream: ServerStream | None = None
        self.received = 0
        self.answers = True

    def wake(self) -> None: ...
    def stream_done(self, stream: object) -> None:
        self.done += 1

    def close(self, linger: bool) -> None:
        raise SystemExit("the connection was closed")

    def security_event(self, kind: str, detail: str) -> None:
        raise SystemExit(f"{kind}: {detail}")

    def limits_changed(self) -> None: ...
    def unavailable(self) -> None: ...
    def refuse(self, stream: ServerStream, error: WireError, head: RequestHead | None) -> None:
        raise SystemExit(f"refused: {error}")

    def rejected(self, error: WireError) -> None:
        raise SystemExit(f"rejected: {error}")

    def open_exchange(self, stream: ServerStream) -> RequestSink:
        self.stream = stream
        return self

    def on_request(self, head: RequestHead, end: bool) -> None:
        if end and self.stream is not None and self.answers:
            response = ResponseHead(200, (), len(BODY))
            response.shared = SHARED
            self.stream.send_head(response, False)
            self.stream.send_data(BODY, True)

    def on_request_data(self, chunk: bytes, end: bool) -> None:
        self.received += len(chunk)

    def on_request_trailers(self, fields: Fields) -> None: ...
    def on_request_abort(self, error: WireError) -> None:
        raise SystemExit(f"aborted: {error}")

    def on_front_blocked(self) -> None: ...
    def on_front_drained(self) -> None: ...
    def on_informational(self, head: ResponseHead) -> None: ...
    def on_response(self, head: ResponseHead, end: bool) -> None: ...
    def on_response_data(self, chunk: bytes, end: bool) -> None:
        self.received += len(chunk)

    def on_response_trailers(self, fields: Fields) -> None: ...
    def on_response_abort(self, error: WireError) -> None:
        raise SystemExit(f"aborted: {error}")

    def on_back_blocked(self) -> None: ...
    def on_back_drained(self) -> None: ...


def head_of(number: int, is_distinct: bool) -> RequestHead:
    path = b"/items/%d" % number if is_distinct else b"/"
    fields = (*FIELDS, (b"cookie", b"session=%032d" % number)) if is_distinct else FIELDS
    return RequestHead(b"GET", b"https", b"example.org", path, fields, accepts_trailers=False)


class Transport:
    """Keeps what was sent, by stream."""

    def __init__(self, first_id: int) -> None:
        self.next_request = first_id
        self.next_other = first_id + 2
        self.sent: dict[int, list[bytes]] = {}
        self.ended: set[int] = set()
        self.consumed_bytes = 0

    def open_stream(self, unidirectional: bool) -> int | None:
        if unidirectional:
            stream_id = self.next_other
            self.next_other += 4
        else:
            stream_id = self.next_request
            self.next_request += 4
        return stream_id

    def send(self, stream_id: int, data: bytes, end: bool) -> None:
        chunks = self.sent.get(stream_id)
        if chunks is None:
            self.sent[stream_id] = [data]
        else:
            chunks.append(data)
        if end:
            self.ended.add(stream_id)

    def reset(self, stream_id: int, code: int) -> None:
        raise SystemExit(f"reset: {code:#x}")

    def stop(self, stream_id: int, code: int) -> None:
        raise SystemExit(f"stopped: {code:#x}")

    def consumed(self, stream_id: int, size: int) -> None:
        self.consumed_bytes += size

    def queued(self, stream_id: int) -> int:
        return sum(map(len, self.sent.get(stream_id, ())))

    def close(self, code: int, reason: str) -> None:
        raise SystemExit(f"closed: {code:#x} {reason}")

    def take(self) -> list[tuple[int, bytes, bool]]:
        taken = [(each, b"".join(chunks), each in self.ended) for each, chunks in self.sent.items()]
        self.sent = {}
        self.ended.clear()
        return taken


Taken = list[tuple[int, bytes, bool]]


class Both:
    """The two roles, begun."""

    def __init__(self, answers: bool = True) -> None:
        self.back, self.front = Shell(), Shell()
        self.front.answers = answers
        self.to_server, self.to_client = Transport(0), Transport(1)
        self.client = H3Client(self.back, self.to_server, LIMITS)
        self.server = H3Server(self.front, self.to_client, LIMITS)
        self.client.begin(1.0)
        self.server.begin(1.0)
        self.cross()
        self.cross()

    def cross(self) -> None:
        asked, answered = self.to_server.take(), self.to_client.take()
        self.client.sent()
        self.server.sent()
        for each in asked:
            self.server.receive(*each, 1.0)
        for each in answered:
            self.client.receive(*each, 1.0)


def conversation(is_distinct: bool) -> tuple[float, float]:
    """Run the two roles against each other. Give the seconds of each, the client's first."""
    both = Both()
    client, server, back = both.client, both.server, both.back
    of_client = of_server = 0.0
    number = 0
    clock = time.perf_counter
    for _ in range(REQUESTS // BATCH):
        heads = [head_of(number + each, is_distinct) for each in range(BATCH)]
        number += BATCH
        begin = clock()
        for head in heads:
            if client.can_open:
                client.open(back).send_head(head, True)
        of_client += clock() - begin
        asked = both.to_server.take()
        begin = clock()
        client.sent()
        of_client += clock() - begin
        begin = clock()
        for each in asked:
            server.receive(*each, 1.0)
        of_server += clock() - begin
        answered = both.to_client.take()
        begin = clock()
        server.sent()
        of_server += clock() - begin
        begin = clock()
        for each in answered:
            client.receive(*each, 1.0)
        of_client += clock() - begin
    both.cross()
    if back.done != number or both.front.done != number:
        raise SystemExit(f"{number} asked, {both.front.done} answered, {back.done} heard")
    return of_client, of_server


def bulk(upload: bool) -> float:
    """Seconds of both sides for 256 MB, in chunks of 256 KiB that arrive in pieces of 64 KiB."""
    both = Both(answers=False)
    stream: H3ClientStream = both.client.open(both.back)
    stream.send_head(RequestHead(b"POST", b"https", b"example.org", b"/", ()), not upload)
    both.cross()
    source: ServerStream | H3ClientStream | None = stream if upload else both.front.stream
    if source is None:
        raise SystemExit("nothing was opened")
    if not upload and both.front.stream is not None:
        both.front.stream.send_head(ResponseHead(200, ()), False)
    chunk = b"x" * 262_144
    seconds = 0.0
    for _ in range(1024):
        begin = time.perf_counter()
        source.send_data(chunk, False)
        seconds += time.perf_counter() - begin
        taken = (both.to_server if upload else both.to_client).take()
        into = both.server if upload else both.client
        pieces = [
            (each, data[at : at + 65_536]) for each, data, _ in taken for at in range(0, len(data), 65_536)
        ]
        begin = time.perf_counter()
        for each, data in pieces:
            into.receive(each, data, False, 1.0)
        both.client.sent()
        both.server.sent()
        seconds += time.perf_counter() - begin
    return seconds


def median(run: Callable[[], float]) -> float:
    return sorted(run() for _ in range(5))[2]


def main() -> None:
    for is_distinct in (False, True):
        runs = [conversation(is_distinct) for _ in range(5)]
        of_client, of_server = (1e6 * min(each) / REQUESTS for each in zip(*runs, strict=True))
        name = "distinct" if is_distinct else "repeated"
        print(f"{name}: server {of_server:5.2f} us/request, client {of_client:5.2f} us/request")
    for upload in (True, False):
        seconds = median(lambda upload=upload: bulk(upload))  # type: ignore[misc]  # bound at once
        print(f"{'upload' if upload else 'download'}: {4000 * seconds:4.0f} ms/GB, both roles together")


if __name__ == "__main__":
    main()
