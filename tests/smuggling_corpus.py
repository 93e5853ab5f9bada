"""Raw requests on which two readers could disagree, and the one meaning that each may have.

Data, for whoever puts bytes on a connection: the codec's tests, and end to end a running gateway before a
backend that records. A case is *refused* with a status before anything is forwarded (one marked ``late`` is
refused while its body is read: its head may have been forwarded, but the request never completes), or it is
*forwarded* with exactly this meaning: method, path, the named headers, body. ``None`` as a header's value
says that it must be absent. What follows a message on the connection belongs to the next one: ``then`` are
the meanings, or the status, of what comes after.

The expectations hold for a listener with its default settings (``_`` refused, no WebSocket).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Meaning:
    """What the backend must see."""

    method: bytes
    path: bytes
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes | None], ...] = ()
    authority: bytes = b"a.example"


@dataclass(frozen=True)
class Case:
    name: str
    raw: bytes
    status: int = 0
    """Refused with this status; 0: forwarded."""
    meaning: Meaning | None = None
    late: bool = False
    then: tuple["Meaning | int", ...] = field(default=())


CASES: list[Case] = []
_H = b"Host: a.example\r\n"


def _refused(name: str, raw: bytes, status: int = 400, *, late: bool = False) -> None:
    CASES.append(Case(name, raw, status, late=late))


def _forwarded(name: str, raw: bytes, meaning: Meaning, *then: Meaning | int) -> None:
    CASES.append(Case(name, raw, 0, meaning, then=then))


def _get(*lines: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\n" + _H + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def _post(*lines: bytes, body: bytes = b"") -> bytes:
    return b"POST /p HTTP/1.1\r\n" + _H + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


_TE = b"Transfer-Encoding: chunked"
_SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n"
_POSTED = Meaning(b"POST", b"/p")
_HELLO = Meaning(b"POST", b"/p", b"hello")
_ROOT = Meaning(b"GET", b"/")
_HIDDEN = Meaning(b"GET", b"/smuggled")

# -- CL.TE and TE.CL: both framings at once (RFC 9112 6.3) -------------------------------------------------
_refused("cl-te", _post(b"Content-Length: 6", _TE, body=b"0\r\n\r\nX"))
_refused("te-cl", _post(_TE, b"Content-Length: 4", body=b"5c\r\n" + _SMUGGLED + b"\r\n0\r\n\r\n"))
_refused("cl-te with cl 0", _post(b"Content-Length: 0", _TE, body=b"0\r\n\r\n"))
_refused("cl-te that agree", _post(b"Content-Length: 10", _TE, body=b"5\r\nhello\r\n0\r\n\r\n"))
_refused(
    "cl-te in lower case", _post(b"content-length: 6", b"transfer-encoding: chunked", body=b"0\r\n\r\nX")
)
_refused(
    "cl-te, te in upper case", _post(b"Content-Length: 6", b"TRANSFER-ENCODING: CHUNKED", body=b"0\r\n\r\nX")
)
_refused("cl-te on GET", _get(b"Content-Length: 6", _TE) + b"0\r\n\r\nX")
_refused("cl-te, te identity", _post(b"Content-Length: 5", b"Transfer-Encoding: identity", body=b"hello"))
_refused("cl-te, te empty", _post(b"Content-Length: 5", b"Transfer-Encoding:", body=b"hello"))
_refused(
    "cl-te, te hidden by a tab",
    _post(b"Content-Length: 6", b"Transfer-Encoding:\tchunked", body=b"0\r\n\r\nX"),
)
_refused(
    "cl-te with connection naming te",
    _post(b"Content-Length: 6", _TE, b"Connection: transfer-encoding", body=b"0\r\n\r\nX"),
)
_refused(
    "te-cl with connection naming cl",
    _post(_TE, b"Content-Length: 4", b"Connection: content-length", body=b"0\r\n\r\n"),
)

# -- TE.TE: a Transfer-Encoding that one reader overlooks --------------------------------------------------
for _value in (
    b"xchunked",
    b"chunkedx",
    b"chunked, chunked",
    b"chunked, identity",
    b"identity, chunked",
    b"gzip, chunked",
    b"chunked, gzip",
    b"gzip",
    b"identity",
    b"cow",
    b"chunked;q=1",
    b"chunked; foo=bar",
    b",chunked",
    b"chunked,",
    b", chunked",
    b'"chunked"',
    b"'chunked'",
    b"chun ked",
    b"trailers",
    b"",
):
    _refused(f"te is {_value.decode()!r}", _post(b"Transfer-Encoding: " + _value, body=b"0\r\n\r\n"))
_refused("te with NUL", _post(b"Transfer-Encoding: chunked\x00", body=b"0\r\n\r\n"))
_refused("te with VT before", _post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"))
_refused("te with FF before", _post(b"Transfer-Encoding: \x0cchunked", body=b"0\r\n\r\n"))
_refused("te with VT after", _post(b"Transfer-Encoding: chunked\x0b", body=b"0\r\n\r\n"))
_refused("te with DEL", _post(b"Transfer-Encoding: chunked\x7f", body=b"0\r\n\r\n"))
_refused("te with NBSP", _post(b"Transfer-Encoding: \xa0chunked", body=b"0\r\n\r\n"))
_refused("te with a dotless i", _post(b"Transfer-Encod\xc4\xb1ng: chunked", body=b"0\r\n\r\n"))
_refused("te with a Kelvin sign", _post(b"Transfer-Encoding: chun\xe2\x84\xaaed", body=b"0\r\n\r\n"))
_refused("te twice", _post(_TE, _TE, body=b"0\r\n\r\n"))
_refused("te twice, second unknown", _post(_TE, b"Transfer-Encoding: cow", body=b"0\r\n\r\n"))
_refused("te twice, first identity", _post(b"Transfer-Encoding: identity", _TE, body=b"0\r\n\r\n"))
_refused("te blank before colon", _post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"))
_refused("te tab before colon", _post(b"Transfer-Encoding\t: chunked", body=b"0\r\n\r\n"))
_refused("te blank before name", _post(b"X: y", b" Transfer-Encoding: chunked", body=b"0\r\n\r\n"))
_refused("te folded", _post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"))
_refused("te folded by a tab", _post(b"Transfer-Encoding:\r\n\tchunked", body=b"0\r\n\r\n"))
_refused("te after a bare LF", _post(b"X: y\nTransfer-Encoding: chunked", body=b"0\r\n\r\n"))
_refused("te after a bare CR", _post(b"X: y\rTransfer-Encoding: chunked", body=b"0\r\n\r\n"))
_refused("te with underscore", _post(b"Transfer_Encoding: chunked", body=b"0\r\n\r\n"))
_refused("te with a semicolon in the name", _post(b"Transfer-Encoding;: chunked", body=b"0\r\n\r\n"))
_refused("te in a quoted name", _post(b'"Transfer-Encoding": chunked', body=b"0\r\n\r\n"))
_forwarded("te in other case", _post(b"tRANSFER-eNCODING: Chunked", body=b"5\r\nhello\r\n0\r\n\r\n"), _HELLO)
_forwarded(
    "te with blanks around",
    _post(b"Transfer-Encoding: \t chunked \t", body=b"5\r\nhello\r\n0\r\n\r\n"),
    _HELLO,
)
_refused(
    "te on HTTP/1.0",
    b"POST /p HTTP/1.0\r\n" + _H + _TE + b"\r\n\r\n0\r\n\r\n",
)
_refused(
    "te on HTTP/1.0 with keep-alive",
    b"POST /p HTTP/1.0\r\n" + _H + b"Connection: keep-alive\r\n" + _TE + b"\r\n\r\n0\r\n\r\n",
)

# -- CL.CL and the forms of a length -----------------------------------------------------------------------
_refused("cl-cl that differ", _post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"))
_refused("cl-cl that agree", _post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"))
_refused("cl-cl, zero first", _post(b"Content-Length: 0", b"Content-Length: 5", body=b"hello"))
_refused("cl-cl, zero last", _post(b"Content-Length: 5", b"Content-Length: 0", body=b"hello"))
_refused("cl-cl in other case", _post(b"Content-Length: 5", b"CONTENT-LENGTH: 6", body=b"hello!"))
for _length in (
    b"+5",
    b"-5",
    b"-0",
    b"05",
    b"005",
    b"00",
    b"5,5",
    b"5, 5",
    b"5, 6",
    b"5,",
    b",5",
    b"0x5",
    b"5h",
    b"5.0",
    b"5e0",
    b"5 5",
    b"5;x",
    b'"5"',
    b"",
    b"five",
    b"1_0",
    b"18446744073709551621",
    b"9" * 19,
    b"9" * 400,
    b"\xd9\xa5",  # ARABIC-INDIC DIGIT FIVE
    b"\xb2",
    b"5\x00",
    b"5\x0b",
    b"\x0c5",
):
    _refused(f"cl is {_length[:24]!r}", _post(b"Content-Length: " + _length, body=b"hello"))
_refused("cl blank before colon", _post(b"Content-Length : 5", body=b"hello"))
_refused("cl with underscore", _post(b"Content_Length: 5", body=b"hello"))
_refused("cl folded", _post(b"Content-Length:\r\n 5", body=b"hello"))
_refused("cl after a bare LF", _post(b"X: y\nContent-Length: 5", body=b"hello"))
_refused("cl on the second line of a folded header", _post(b"X: y\r\n Content-Length: 5", body=b"hello"))
_forwarded("cl with blanks around", _post(b"Content-Length:  \t5 \t", body=b"hello"), _HELLO)
_forwarded("cl without a blank", _post(b"Content-Length:5", body=b"hello"), _HELLO)

# -- CL.0 and 0.CL: where the body ends ---------------------------------------------------------------------
_forwarded(
    "cl.0: a body that looks like a request",
    _post(b"Content-Length: %d" % len(_SMUGGLED), body=_SMUGGLED),
    Meaning(b"POST", b"/p", _SMUGGLED),
)
_forwarded(
    "cl.0 on GET", _get(b"Content-Length: %d" % len(_SMUGGLED)) + _SMUGGLED, Meaning(b"GET", b"/", _SMUGGLED)
)
_forwarded(
    "cl.0 on HEAD",
    b"HEAD / HTTP/1.1\r\n" + _H + b"Content-Length: %d\r\n\r\n" % len(_SMUGGLED) + _SMUGGLED,
    Meaning(b"HEAD", b"/", _SMUGGLED),
)
_forwarded(
    "cl.0 on OPTIONS",
    b"OPTIONS / HTTP/1.1\r\n" + _H + b"Content-Length: 5\r\n\r\nhello",
    Meaning(b"OPTIONS", b"/", b"hello"),
)
_forwarded(
    "cl.0 on DELETE",
    b"DELETE /d HTTP/1.1\r\n" + _H + b"Content-Length: 5\r\n\r\nhello",
    Meaning(b"DELETE", b"/d", b"hello"),
)
_forwarded(
    "0.cl: a request after an empty body", _post(b"Content-Length: 0", body=_SMUGGLED), _POSTED, _HIDDEN
)
_forwarded("0.cl: a request after no declared body", _post(body=_SMUGGLED), _POSTED, _HIDDEN)
_forwarded("chunked GET", _get(_TE) + b"5\r\nhello\r\n0\r\n\r\n", Meaning(b"GET", b"/", b"hello"))
_forwarded(
    "a body shorter than what follows",
    _post(b"Content-Length: 5", body=b"hello" + _SMUGGLED),
    _HELLO,
    _HIDDEN,
)
_forwarded(
    "cl named by Connection",
    _post(b"Content-Length: 5", b"Connection: content-length", body=b"hello" + _SMUGGLED),
    _HELLO,
    _HIDDEN,
)
_forwarded(
    "cl named by Connection, twice",
    _post(b"Connection: close, content-length", b"Content-Length: 5", body=b"hello"),
    _HELLO,
)
_forwarded(
    "te named by Connection",
    _post(_TE, b"Connection: transfer-encoding", body=b"5\r\nhello\r\n0\r\n\r\n"),
    _HELLO,
)
_forwarded("host named by Connection", _get(b"Connection: host"), _ROOT)
_forwarded(
    "forwarding fields named by Connection",
    _get(b"Connection: x-secret", b"X-Secret: 1"),
    Meaning(b"GET", b"/", headers=((b"x-secret", None),)),
)
_forwarded("garbage after a request", _get() + b"\x00\x01", _ROOT, 400)

# -- chunked bodies (RFC 9112 7.1) -------------------------------------------------------------------------
for _name, _body in (
    ("size is empty", b"\r\nhello\r\n0\r\n\r\n"),
    ("size with 0x", b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("size with plus", b"+5\r\nhello\r\n0\r\n\r\n"),
    ("size with minus", b"-5\r\nhello\r\n0\r\n\r\n"),
    ("size not hexadecimal", b"g\r\nhello\r\n0\r\n\r\n"),
    ("size with h", b"5h\r\nhello\r\n0\r\n\r\n"),
    ("size with underscore", b"0_5\r\nhello\r\n0\r\n\r\n"),
    ("size with a blank before", b" 5\r\nhello\r\n0\r\n\r\n"),
    ("size with a blank after", b"5 \r\nhello\r\n0\r\n\r\n"),
    ("size with a tab after", b"5\t\r\nhello\r\n0\r\n\r\n"),
    ("size over 64 bits", b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
    ("size over 60 bits", b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    ("size padded by a hundred zeros", b"0" * 100 + b"5\r\nhello\r\n0\r\n\r\n"),
    ("size of 300 bytes", b"0" * 300 + b"\r\n\r\n"),
    ("size with NUL", b"5\x00\r\nhello\r\n0\r\n\r\n"),
    ("size in wide digits", b"\xef\xbc\x95\r\nhello\r\n0\r\n\r\n"),
    ("size ends with a bare LF", b"5\nhello\r\n0\r\n\r\n"),
    ("size ends with a bare CR", b"5\rhello\r\n0\r\n\r\n"),
    ("size ends with CR CR LF", b"5\r\r\nhello\r\n0\r\n\r\n"),
    ("data ends with a bare LF", b"5\r\nhello\n0\r\n\r\n"),
    ("data ends with a bare CR", b"5\r\nhello\r0\r\n\r\n"),
    ("another byte for the CR after the data", b"5\r\nhelloX\n0\r\n\r\n"),
    ("another byte for the LF after the data", b"5\r\nhello\rX0\r\n\r\n"),
    ("data longer than its size", b"5\r\nhello!\r\n0\r\n\r\n"),
    ("data shorter than its size", b"6\r\nhello\r\n0\r\n\r\n"),
    ("no CRLF after the data", b"5\r\nhello0\r\n\r\n"),
    ("two bytes of anything after the data", b"5\r\nhelloXX0\r\n\r\n"),
    ("last chunk ends with a bare LF", b"5\r\nhello\r\n0\n\r\n"),
    ("extension without a name", b"5;\r\nhello\r\n0\r\n\r\n"),
    ("extension with a bare LF", b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    ("extension with a bare CR", b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    ("extension with NUL", b"5;a=\x00\r\nhello\r\n0\r\n\r\n"),
    ("extension with an open quote", b'5;a="\r\nhello\r\n0\r\n\r\n'),
    ("extension after a blank", b"5 ;a=b\r\nhello\r\n0\r\n\r\n"),
    ("extension of 300 bytes", b"5;a=" + b"b" * 300 + b"\r\nhello\r\n0\r\n\r\n"),
    ("extension quoting a bare LF", b'5;a="\n"\r\nhello\r\n0\r\n\r\n'),
    ("comma instead of an extension", b"5,5\r\nhello\r\n0\r\n\r\n"),
):
    _refused(f"chunk {_name}", _post(_TE, body=_body), late=True)
for _name, _line in (
    ("content-length", b"Content-Length: 5"),
    ("transfer-encoding", b"Transfer-Encoding: chunked"),
    ("host", b"Host: b.example"),
    ("connection", b"Connection: close"),
    ("te", b"TE: trailers"),
    ("upgrade", b"Upgrade: h2c"),
    ("keep-alive", b"Keep-Alive: timeout=5"),
    ("proxy-connection", b"Proxy-Connection: keep-alive"),
    ("authorization", b"Authorization: Basic eDp5"),
    ("cookie", b"Cookie: a=b"),
    ("content-type", b"Content-Type: text/html"),
    ("expect", b"Expect: 100-continue"),
    ("trailer", b"Trailer: x"),
    ("a folded line", b"X: y\r\n z"),
    ("a blank before the colon", b"X : y"),
    ("a bare LF", b"X: y\nZ: z"),
    ("NUL", b"X: \x00"),
    ("no colon", b"GET /smuggled HTTP/1.1"),
    ("an underscore", b"X_y: z"),
):
    _refused(f"trailer section with {_name}", _post(_TE, body=b"0\r\n" + _line + b"\r\n\r\n"), late=True)
_forwarded(
    "chunk sizes in other case, padded",
    _post(_TE, body=b"00A\r\n0123456789\r\n0000\r\n\r\n"),
    Meaning(b"POST", b"/p", b"0123456789"),
)
_forwarded(
    "chunk extensions are dropped", _post(_TE, body=b'5;a;b=c;d="e\\"f"\r\nhello\r\n0;x=y\r\n\r\n'), _HELLO
)
_forwarded(
    "chunk data that looks like an end",
    _post(_TE, body=b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n"),
    Meaning(b"POST", b"/p", b"\r\n0\r\n\r\n"),
)
_forwarded(
    "a request after the last chunk", _post(_TE, body=b"5\r\nhello\r\n0\r\n\r\n" + _SMUGGLED), _HELLO, _HIDDEN
)
_forwarded(
    "a request after a trailer section",
    _post(_TE, body=b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n" + _SMUGGLED),
    _HELLO,
    _HIDDEN,
)
_forwarded("garbage after the last chunk", _post(_TE, body=b"0\r\n\r\nX: y\r\n\r\n"), _POSTED, 400)

# -- lines, names and values -------------------------------------------------------------------------------
_refused("bare LF after the request line", b"GET / HTTP/1.1\nHost: a.example\r\n\r\n")
_refused("bare LF everywhere", b"GET / HTTP/1.1\nHost: a.example\n\n\r\n\r\n")
_refused(
    "bare LF inside the head, early end",
    b"GET / HTTP/1.1\r\nHost: a.example\n\nGET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n",
)
_refused("bare CR after the request line", b"GET / HTTP/1.1\rHost: a.example\r\n\r\n")
_refused("bare CR in a value", _get(b"X: a\rb"))
_refused("CR CR LF at a line's end", _get(b"X: a\r"))
_refused("NUL in a value", _get(b"X: a\x00b"))
_refused("NUL in a name", _get(b"X\x00: a"))
_refused("NUL in the request line", b"GET /\x00 HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a control character in a value", _get(b"X: a\x1bb"))
_refused("obs-fold", _get(b"X: a", b" b"))
_refused("obs-fold by a tab", _get(b"X: a", b"\tb"))
_refused("a blank line that is not empty", b"GET / HTTP/1.1\r\n" + _H + b" \r\n\r\n")
_refused("a first header line that is folded", b"GET / HTTP/1.1\r\n Host: a.example\r\n\r\n")
_refused("a blank before the colon", _get(b"X : a"))
_refused("no name", _get(b": a"))
_refused("no colon", _get(b"X"))
_refused("a request line among the headers", _get(b"GET /smuggled HTTP/1.1"))
_refused("a name with a blank", _get(b"X Y: a"))
_refused("a name with a slash", _get(b"X/Y: a"))
_refused("a name with brackets", _get(b"[X]: a"))
_refused("a name with obs-text", _get(b"X\xff: a"))
_refused("a name with an underscore", _get(b"X_Forwarded_For: 127.0.0.1"))
_refused("a line of blanks and NUL", _get(b"X:" + b" " * 500 + b"\x00"))
_forwarded("obs-text in a value", _get(b"X: \xff\x80"), Meaning(b"GET", b"/", headers=((b"x", b"\xff\x80"),)))
_forwarded("a colon in a value", _get(b"X: a: b"), Meaning(b"GET", b"/", headers=((b"x", b"a: b"),)))
_forwarded("a blank line before the request", b"\r\n" + _get(), _ROOT)
_refused("two blank lines before the request", b"\r\n\r\n" + _get())
_refused("a bare LF before the request", b"\n" + _get())
_refused("a blank before the method", b" " + _get())

# -- request lines -----------------------------------------------------------------------------------------
_refused("HTTP/0.9", b"GET /\r\n\r\n")
_refused("HTTP/0.9 with a version", b"GET / HTTP/0.9\r\n" + _H + b"\r\n", 505)
_refused("HTTP/1.2", b"GET / HTTP/1.2\r\n" + _H + b"\r\n", 505)
_refused("HTTP/2.0", b"GET / HTTP/2.0\r\n" + _H + b"\r\n", 505)
_refused("HTTP/3.1", b"GET / HTTP/3.1\r\n" + _H + b"\r\n", 505)
_refused("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
_refused("HTTP/1.10", b"GET / HTTP/1.10\r\n" + _H + b"\r\n")
_refused("HTTP/01.1", b"GET / HTTP/01.1\r\n" + _H + b"\r\n")
_refused("HTTP/1,1", b"GET / HTTP/1,1\r\n" + _H + b"\r\n")
_refused("HTTP/1.", b"GET / HTTP/1.\r\n" + _H + b"\r\n")
_refused("http/1.1", b"GET / http/1.1\r\n" + _H + b"\r\n")
_refused("HTTPS/1.1", b"GET / HTTPS/1.1\r\n" + _H + b"\r\n")
_refused("a blank after the version", b"GET / HTTP/1.1 \r\n" + _H + b"\r\n")
_refused("two blanks before the target", b"GET  / HTTP/1.1\r\n" + _H + b"\r\n")
_refused("two blanks after the target", b"GET /  HTTP/1.1\r\n" + _H + b"\r\n")
_refused("tabs for blanks", b"GET\t/\tHTTP/1.1\r\n" + _H + b"\r\n")
_refused("VT for a blank", b"GET\x0b/ HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a blank in the target", b"GET /a b HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a second request in the target", b"GET / HTTP/1.1\rGET /smuggled HTTP/1.1\r\n" + _H + b"\r\n")
_refused("obs-text in the target", b"GET /\xff HTTP/1.1\r\n" + _H + b"\r\n")
_refused("DEL in the target", b"GET /\x7f HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a fragment", b"GET /a#b HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a method with a colon", b"GET: / HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a method with NUL", b"G\x00T / HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a target without a slash", b"GET x HTTP/1.1\r\n" + _H + b"\r\n")
_refused("a star on GET", b"GET * HTTP/1.1\r\n" + _H + b"\r\n")
_refused("CONNECT", b"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n", 405)
_refused("CONNECT with a path", b"CONNECT / HTTP/1.1\r\n" + _H + b"\r\n", 405)
_forwarded("a star on OPTIONS", b"OPTIONS * HTTP/1.1\r\n" + _H + b"\r\n", Meaning(b"OPTIONS", b"*"))
_forwarded("a method of our own", b"M-SEARCH /m HTTP/1.1\r\n" + _H + b"\r\n", Meaning(b"M-SEARCH", b"/m"))
_forwarded("a method in lower case", b"get / HTTP/1.1\r\n" + _H + b"\r\n", Meaning(b"get", b"/"))
_forwarded(
    "a path with two slashes",
    b"GET //b.example/x HTTP/1.1\r\n" + _H + b"\r\n",
    Meaning(b"GET", b"//b.example/x"),
)
_forwarded(
    "a path with an escaped slash", b"GET /a%2fb HTTP/1.1\r\n" + _H + b"\r\n", Meaning(b"GET", b"/a%2fb")
)
_forwarded(
    "a path with dots that stays",
    b"GET /a/../b?c=../d HTTP/1.1\r\n" + _H + b"\r\n",
    Meaning(b"GET", b"/a/../b?c=../d"),
)

# -- authority (RFC 9112 3.2) ------------------------------------------------------------------------------
_refused("no Host", b"GET / HTTP/1.1\r\n\r\n")
_refused("Host twice", _get(b"Host: b.example"))
_refused("Host twice, the same", _get(b"Host: a.example"))
for _host in (
    b"",
    b"a.example, b.example",
    b"a.example b.example",
    b"a.example,b.example",
    b"user@a.example",
    b"http://a.example",
    b"a.example/",
    b"a.example?x",
    b"a.example#x",
    b"a.example:80:80",
    b"a.example:8o",
    b"a.example:-1",
    b"a.example:99999",
    b"a.example:123456",
    b":80",
    b"[::1",
    b"::1",
    b"[::1]x",
    b"[]",
    b"[g::1]",
    b"a\\b",
    b'a"b',
    b"a<b",
    b"a%zz",
    b"a\xffb",
    b"a\x00b",
):
    _refused(f"Host is {_host!r}", b"GET / HTTP/1.1\r\nHost: " + _host + b"\r\n\r\n")
_refused("Host with a blank before the colon", b"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n")
_refused("Host folded", b"GET / HTTP/1.1\r\nHost:\r\n a.example\r\n\r\n")
_forwarded(
    "Host with a port",
    b"GET / HTTP/1.1\r\nHost: a.example:8080\r\n\r\n",
    Meaning(b"GET", b"/", authority=b"a.example:8080"),
)
_forwarded(
    "Host of IPv6",
    b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n",
    Meaning(b"GET", b"/", authority=b"[::1]:8080"),
)
_forwarded("Host in upper case", b"GET / HTTP/1.1\r\nHost: A.EXAMPLE\r\n\r\n", _ROOT)
_forwarded("absolute form", b"GET http://a.example/x?y HTTP/1.1\r\n" + _H + b"\r\n", Meaning(b"GET", b"/x?y"))
_forwarded("absolute form without a path", b"GET http://a.example HTTP/1.1\r\n" + _H + b"\r\n", _ROOT)
_forwarded(
    "absolute form with a query only",
    b"GET http://a.example?q HTTP/1.1\r\n" + _H + b"\r\n",
    Meaning(b"GET", b"/?q"),
)
_forwarded(
    "absolute form of OPTIONS",
    b"OPTIONS http://a.example HTTP/1.1\r\n" + _H + b"\r\n",
    Meaning(b"OPTIONS", b"*"),
)
_refused("absolute form and another Host", b"GET http://b.example/ HTTP/1.1\r\n" + _H + b"\r\n")
_refused("absolute form and another port", b"GET http://a.example:81/ HTTP/1.1\r\n" + _H + b"\r\n")
_refused("absolute form without Host", b"GET http://a.example/ HTTP/1.1\r\n\r\n")
_refused("absolute form with userinfo", b"GET http://a.example@b.example/ HTTP/1.1\r\n" + _H + b"\r\n")
_refused("absolute form with a backslash", b"GET http://a.example\\b/ HTTP/1.1\r\n" + _H + b"\r\n")
_refused("absolute form with no host", b"GET http:///x HTTP/1.1\r\n" + _H + b"\r\n")
_refused("absolute form of another scheme", b"GET file:///etc/passwd HTTP/1.1\r\n" + _H + b"\r\n")
_refused("authority form on GET", b"GET a.example:80 HTTP/1.1\r\n" + _H + b"\r\n")
_forwarded("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n", Meaning(b"GET", b"/", authority=b""))
_forwarded("HTTP/1.0 with an absolute target", b"GET http://a.example/ HTTP/1.0\r\n\r\n", _ROOT)

# -- upgrades and hop-by-hop fields ------------------------------------------------------------------------
_NO_UPGRADE = ((b"upgrade", None), (b"http2-settings", None))
_forwarded(
    "h2c",
    _get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    Meaning(b"GET", b"/", headers=_NO_UPGRADE),
)
_forwarded(
    "h2c without HTTP2-Settings in Connection",
    _get(b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    Meaning(b"GET", b"/", headers=_NO_UPGRADE),
)
_forwarded(
    "h2c without Connection",
    _get(b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    Meaning(b"GET", b"/", headers=_NO_UPGRADE),
)
_forwarded(
    "h2c and more",
    _get(b"Connection: Upgrade", b"Upgrade: websocket, h2c"),
    Meaning(b"GET", b"/", headers=_NO_UPGRADE),
)
_forwarded(
    "a WebSocket that is not offered",
    _get(b"Connection: Upgrade", b"Upgrade: websocket") + _SMUGGLED,
    Meaning(b"GET", b"/", headers=_NO_UPGRADE),
    _HIDDEN,
)
_forwarded(
    "TE", _get(b"TE: trailers, chunked", b"Connection: TE"), Meaning(b"GET", b"/", headers=((b"te", None),))
)
_forwarded(
    "Proxy-Connection",
    _get(b"Proxy-Connection: keep-alive"),
    Meaning(b"GET", b"/", headers=((b"proxy-connection", None),)),
)
_forwarded(
    "Proxy-Authorization",
    _get(b"Proxy-Authorization: Basic eDp5"),
    Meaning(b"GET", b"/", headers=((b"proxy-authorization", None),)),
)
_forwarded(
    "Keep-Alive", _get(b"Keep-Alive: timeout=5"), Meaning(b"GET", b"/", headers=((b"keep-alive", None),))
)
_forwarded("two requests in one piece", _get() + _SMUGGLED, _ROOT, _HIDDEN)
_forwarded("a request after Connection: close", _get(b"Connection: close") + _SMUGGLED, _ROOT)
_forwarded("a request after one of HTTP/1.0", b"GET / HTTP/1.0\r\n" + _H + b"\r\n" + _SMUGGLED, _ROOT)
