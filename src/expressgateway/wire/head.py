"""Message heads: the vocabulary that every codec and the exchange share.

Field names are lower-case, in order, duplicates kept. Framing and hop-by-hop fields are not in ``headers``:
the codec that reads turns them into the attributes below, the codec that writes produces its own.
"""

from typing import Final

Field = tuple[bytes, bytes]
Fields = tuple[Field, ...]

NO_FIELDS: Final[Fields] = ()

WEBSOCKET: Final = b"websocket"


class SharedFields:
    """Fields that many messages have in common. Never changed; who makes something of them keeps it here.

    A message is sent with its shared fields first, then with ``headers``. What is received has none.
    """

    __slots__ = ("fields", "h1", "h2", "said")

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.h1 = b""
        """As HTTP/1 lines, or empty while nobody asked."""
        self.h2: tuple[tuple[bytes, bytes, bool], ...] = ()
        """As HPACK takes them, likewise: the third says "never indexed"."""
        self.said: tuple[bytes, bytes] | None = None
        """User-Agent and Referer as the access log takes them, likewise None."""


NO_SHARED: Final = SharedFields(NO_FIELDS)


class RequestHead:
    """One request's head (RFC 9110 6.2).

    ``authority`` is empty for an HTTP/1.0 request without Host. ``path`` is the target in origin form, byte
    for byte as the client sent it, or ``*``. ``protocol`` is set for an extended CONNECT or an HTTP/1.1
    upgrade that the listener allows. ``content_length`` is ``None`` where the message did not declare it.
    """

    __slots__ = (
        "accepts_trailers",
        "authority",
        "content_length",
        "expects_continue",
        "headers",
        "method",
        "path",
        "protocol",
        "scheme",
        "shared",
        "version",
    )

    def __init__(
        self,
        method: bytes,
        scheme: bytes,
        authority: bytes,
        path: bytes,
        headers: Fields,
        protocol: bytes | None = None,
        content_length: int | None = None,
        version: bytes = b"1.1",
        accepts_trailers: bool = False,
        expects_continue: bool = False,
    ) -> None:
        self.method = method
        self.scheme = scheme
        self.authority = authority
        self.path = path
        self.headers = headers
        self.protocol = protocol
        self.content_length = content_length
        self.version = version
        self.accepts_trailers = accepts_trailers
        self.expects_continue = expects_continue
        self.shared = NO_SHARED

    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.authority!r} {self.path!r} {len(self.headers)} fields>"


class ResponseHead:
    """One response's head, interim (1xx) ones included.

    ``content_length`` may be set although no body follows: the answer to HEAD, and 304.
    """

    __slots__ = ("content_length", "headers", "shared", "status", "version")

    def __init__(
        self, status: int, headers: Fields, content_length: int | None = None, version: bytes = b"1.1"
    ) -> None:
        self.status = status
        self.headers = headers
        self.content_length = content_length
        self.version = version
        self.shared = NO_SHARED

    def __repr__(self) -> str:
        return f"<ResponseHead {self.status} {len(self.headers)} fields>"
