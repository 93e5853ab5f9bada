"""Two HTTP/1 parsers that we did not write, behind one question: which requests do these bytes hold?"""

from dataclasses import dataclass, field

import h11
import httptools

# What a parser says of framing; the codec keeps it out of its heads.
FRAMING = frozenset({b"content-length", b"transfer-encoding", b"connection", b"host"})


@dataclass
class Seen:
    """One request as a parser read it. ``fields``: without framing and Host."""

    method: bytes = b""
    target: bytes = b""
    host: bytes = b""
    version: bytes = b""
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    is_complete: bool = False


class PeerError(Exception):
    """The parser refuses these bytes."""


class _Llhttp:
    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.parser: httptools.HttpRequestParser | None = None

    def on_message_begin(self) -> None:
        self.seen.append(Seen())
        self._in_trailers = False

    def on_url(self, url: bytes) -> None:
        self.seen[-1].target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"host":
            self.seen[-1].host = value
        elif lower not in FRAMING and not self._in_trailers:
            self.seen[-1].fields.append((lower, value))

    def on_headers_complete(self) -> None:
        self._in_trailers = True
        if self.parser is not None:
            self.seen[-1].method = self.parser.get_method()
            self.seen[-1].version = self.parser.get_http_version().encode()

    def on_body(self, body: bytes) -> None:
        self.seen[-1].body += body

    def on_message_complete(self) -> None:
        self.seen[-1].is_complete = True


def by_llhttp(data: bytes) -> list[Seen]:
    """As httptools reads them; the last may be incomplete. Raises ``PeerError``."""
    watch = _Llhttp()
    parser = httptools.HttpRequestParser(watch)
    watch.parser = parser
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        raise PeerError(repr(error)) from error
    return watch.seen


def by_h11(data: bytes) -> list[Seen]:
    """As h11 reads them; the last may be incomplete. Raises ``PeerError``."""
    seen: list[Seen] = []
    rest = data
    while rest:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(rest)
        one = Seen()
        try:
            while True:
                event = connection.next_event()
                if isinstance(event, h11.Request):
                    seen.append(one)
                    one.method, one.target, one.version = event.method, event.target, event.http_version
                    for name, value in event.headers:
                        if name == b"host":
                            one.host = value
                        elif name not in FRAMING:
                            one.fields.append((name, value))
                elif isinstance(event, h11.Data):
                    one.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    one.is_complete = True
                    break
                else:
                    return seen
        except h11.RemoteProtocolError as error:
            raise PeerError(str(error)) from error
        rest = connection.trailing_data[0]
    return seen
