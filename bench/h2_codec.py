"""What the HTTP/2 codec alone costs, without sockets: microseconds per request, both roles, and bulk.

``python -m bench.h2_codec``. The client's bytes are recorded once, from our own client, and played back, so
that each role is measured by itself. ``repeated``: every request is the same, as load generators send them.
``distinct``: each has its own path and cookie, so that every block is decoded and judged.
"""

import time
from collections.abc import Callable

from expressgateway.wire.errors import WireError
from expressgateway.wire.h2.client import H2Client, H2ClientStream
from expressgateway.wire.h2.fields import FieldRules
from expressgateway.wire.h2.limits import H2Limits
from expressgateway.wire.h2.server import H2Server
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
LIMITS = H2Limits(FieldRules(), reset_percent=0)


class Shell:
    """Answers every request at once, or counts what it is told."""

    def __init__(self) -> None:
        self.server: H2Server | None = None
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


def conversation(is_distinct: bool) -> tuple[list[bytes], list[bytes], float, float]:
    """Run the two roles against each other. Give both sides' bytes by batch, and seconds of each side."""
    back, front = Shell(), Shell()
    client, server = H2Client(back, LIMITS), H2Server(front, LIMITS, b"https")
    client.begin()
    server.begin()
    server.receive_data(b"".join(client.take_out()), 1.0)
    client.receive_data(b"".join(server.take_out()), 1.0)
    server.receive_data(b"".join(client.take_out()), 1.0)
    asked: list[bytes] = []
    answered: list[bytes] = []
    of_client = of_server = 0.0
    number = 0
    for _ in range(REQUESTS // BATCH):
        heads = [head_of(number + each, is_distinct) for each in range(BATCH)]
        number += BATCH
        begin = time.perf_counter()
        for head in heads:
            client.open(back).send_head(head, True)
        asked.append(b"".join(client.take_out()))
        middle = time.perf_counter()
        server.receive_data(asked[-1], 1.0)
        answered.append(b"".join(server.take_out()))
        end = time.perf_counter()
        client.receive_data(answered[-1], 1.0)
        of_client += middle - begin + time.perf_counter() - end
        of_server += end - middle
    if back.done != number or front.done != number:
        raise SystemExit(f"{number} asked, {front.done} answered, {back.done} heard")
    return asked, answered, of_client, of_server


def bulk(upload: bool) -> float:
    """Seconds of both sides for 256 MB, in reads of 256 KiB."""
    back, front = Shell(), Shell()
    front.answers = False
    client, server = H2Client(back, LIMITS), H2Server(front, LIMITS, b"https")
    client.begin()
    server.begin()
    stream: H2ClientStream = client.open(back)
    now = 1.0
    stream.send_head(RequestHead(b"POST", b"https", b"example.org", b"/", ()), not upload)
    server.receive_data(b"".join(client.take_out()), now)
    client.receive_data(b"".join(server.take_out()), now)
    server.receive_data(b"".join(client.take_out()), now)
    source: ServerStream | H2ClientStream | None = stream if upload else front.stream
    if source is None:
        raise SystemExit("nothing was opened")
    if not upload and front.stream is not None:
        front.stream.send_head(ResponseHead(200, ()), False)
    chunk = b"x" * 262_144
    begin = time.perf_counter()
    for _ in range(1024):
        source.send_data(chunk, False)
        while source.unsent():
            server.receive_data(b"".join(client.take_out()), now)
            client.receive_data(b"".join(server.take_out()), now)
        now += 0.0005
    return time.perf_counter() - begin


def median(run: Callable[[], float]) -> float:
    return sorted(run() for _ in range(5))[2]


def main() -> None:
    for is_distinct in (False, True):
        runs = sorted(conversation(is_distinct)[2:] for _ in range(5))
        of_client, of_server = (1e6 * each / REQUESTS for each in runs[0])  # the least disturbed one
        name = "distinct" if is_distinct else "repeated"
        print(f"{name}: server {of_server:5.2f} us/request, client {of_client:5.2f} us/request")
    for upload in (True, False):
        seconds = median(lambda upload=upload: bulk(upload))  # type: ignore[misc]  # bound at once
        print(f"{'upload' if upload else 'download'}: {4000 * seconds:4.0f} ms/GB, both roles together")


if __name__ == "__main__":
    main()
