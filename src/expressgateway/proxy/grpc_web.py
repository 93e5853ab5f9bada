"""gRPC-Web: gRPC for clients that can neither read trailers nor send what they like, over any HTTP version.

The messages are the same; the trailers come as a last frame of the body, and the ``-text`` kinds are base64.
Each piece that is sent has its own padding, so nothing waits for its neighbours, and padding may stand
anywhere in what is received. A ``WebBridge`` translates one call; it knows no exchange.
"""

import binascii
from typing import Final

from expressgateway.proxy.grpc_status import CONTENT_TYPE
from expressgateway.wire.head import Fields

_TRAILERS: Final = 0x80  # the flag of a frame that holds trailers
_TEXT: Final = b"application/grpc-web-text"
_WEB: Final = b"application/grpc-web"
_QUAD: Final = 4  # characters of base64 that make a whole


class WebBridge:
    """See the module's text."""

    __slots__ = ("_answers_text", "_carry", "_format", "is_text")

    def __init__(self, subtype: bytes, accept: bytes) -> None:
        """``subtype``: what follows ``application/grpc``, in lower case; ``accept``: the request's Accept."""
        family, plus, name = subtype.partition(b"+")
        self._format = plus + name
        self.is_text = family == b"-web-text"
        accept = accept.lower()
        self._answers_text = _TEXT in accept or (self.is_text and _WEB not in accept)
        self._carry = b""  # shorter than a quad

    @property
    def content_type(self) -> bytes:
        """The request's, for a gRPC server."""
        return CONTENT_TYPE + self._format

    def answer_type(self, subtype: bytes) -> bytes:
        """The response's, for the client. ``subtype``: of the server's content type."""
        return (_TEXT if self._answers_text else _WEB) + subtype

    def decode(self, chunk: bytes, end: bool) -> bytes:
        """A piece of the request. Raises ``ValueError`` if it is not base64, or not all of it."""
        if not self.is_text:
            return chunk
        data = self._carry + chunk
        whole = len(data) - len(data) % _QUAD
        self._carry = data[whole:]
        if end and self._carry:
            raise ValueError("base64 that ends too early")
        if b"=" not in data[: max(0, whole - _QUAD)]:
            # fast path: padding at most at the end
            return binascii.a2b_base64(data[:whole], strict_mode=True) if whole else b""
        parts: list[bytes] = []
        begin = 0
        while begin < whole:
            pad = data.find(b"=", begin, whole)
            past = whole if pad < 0 else pad - pad % _QUAD + _QUAD
            parts.append(binascii.a2b_base64(data[begin:past], strict_mode=True))
            begin = past
        return b"".join(parts)

    def encode(self, chunk: bytes) -> bytes:
        """A piece of the response's body."""
        return binascii.b2a_base64(chunk, newline=False) if self._answers_text else chunk

    def last_frame(self, trailers: Fields) -> bytes:
        """The end of the response's body."""
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in trailers)
        return self.encode(b"%c" % _TRAILERS + len(lines).to_bytes(4, "big") + lines)
