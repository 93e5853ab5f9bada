"""The line of one exchange: what is in it, and its two forms.

An *entry* is what an exchange says of itself when it has ended; plain tuples, as every request makes one.
Most of it was chosen by a peer, so neither form copies a byte that could end a string or a line: both are
ASCII, JSON by its own escapes, ``combined`` by ``\\"``, ``\\\\`` and ``\\xHH``, as Apache httpd does. Where a
line goes is not known here.

Theory. A line is one ``frame % values``, in bytes, which Python formats in half the time that text takes. The
*frame* is what lines have in common, written once. Values that come again and again are written once as well.
The rest goes in as it is, if a look at that of many entries at a time finds nothing to escape. What is
remembered is bounded, and no line differs for it.
"""

import re
import time
from collections.abc import Callable, Sequence
from itertools import chain
from json.encoder import encode_basestring_ascii
from operator import itemgetter
from typing import Final, TypeVar

Common = tuple[str, str, str, str, int, int, tuple[str, ...]]
"""Listener, route, pool, id of the backend, status, attempts, flags. The status is 0 if none was sent, 499 if
the client went before one was; flags are from closed sets."""

Kind = tuple[Common, bytes, bytes, bytes]
"""What lines have in common: besides, method, authority, version (``1.1``)."""

Raw = tuple[bytes, bytes, bytes, bytes]
"""Target before any rewrite, request id, trace id, span id."""

Said = tuple[bytes, bytes]
"""User-Agent, Referer."""

Sizes = tuple[int, int]
"""Bytes of the bodies of request and response."""

Times = tuple[float, float | None, float | None]
"""Seconds: of the whole exchange; until connected, None if a connection was reused or none was made; from the
request's head to the response's, None if none came."""

Entry = tuple[Kind, bytes, Raw, Said, int, Sizes, Times]
"""Besides, the client's address, and when the exchange ended, in milliseconds since 1970. All bytes are as
peers sent them; empty: there was none."""

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MEMO_ENTRIES: Final = 1024  # of what was written before; then it begins anew
_MEMO_BYTES: Final = 512  # what is longer is not kept
_SAFE: Final = bytes(code for code in range(0x20, 0x7F) if code not in b'"\\')
_MILLIS: Final = tuple(b".%03dZ" % ms for ms in range(1000))
_UNSAFE: Final = re.compile(r"[^ !#-\[\]-~]")
_RAW: Final[Callable[[Entry], Raw]] = itemgetter(2)

_K = TypeVar("_K")


class _Memo(dict[_K, bytes]):
    """What is written, by what it is made of: ``_MEMO_ENTRIES`` of at most ``_MEMO_BYTES``."""

    __slots__ = ("_write",)

    def __init__(self, write: Callable[[_K], bytes]) -> None:
        super().__init__()
        self._write = write

    def __missing__(self, made_of: _K) -> bytes:
        written = self._write(made_of)
        if len(written) <= _MEMO_BYTES:
            if len(self) >= _MEMO_ENTRIES:
                self.clear()
            self[made_of] = written
        return written


class Form:
    """One of the two. Never raises for what peers sent."""

    __slots__ = ("_clients", "_frames", "_numbers", "_said", "_seconds")

    def __init__(self) -> None:
        self._frames = _Memo(self.frame)
        self._clients = _Memo(self.client)
        self._said = _Memo(self.said)
        self._seconds = _Memo(self.second)
        self._numbers: _Memo[int] = _Memo(lambda number: b"%d" % number)

    def lines(self, entries: Sequence[Entry]) -> list[bytes]:
        """One for each, with its newline."""
        texts = b"".join(chain.from_iterable(map(_RAW, entries)))
        if texts.translate(None, _SAFE):
            entries = [self._escaped(entry) for entry in entries]
        return self.fill(entries)

    def cut(self, entry: Entry, length: int) -> bytes:
        """The line with no more than ``length`` bytes of anything that a peer chose. It says so."""
        (common, *head), client, raw, said, ended_ms, sizes, times = entry
        method, authority, version = (text[:length] for text in head)
        target, request_id, trace, span = (text[:length] for text in raw)
        agent, referer = (text[:length] for text in said)
        kind = common, method, authority, version
        short = target, request_id, trace, span
        (line,) = self.lines([(kind, client[:length], short, (agent, referer), ended_ms, sizes, times)])
        return self.marked(line)

    def _escaped(self, entry: Entry) -> Entry:
        kind, client, (target, request_id, trace, span), said, ended_ms, sizes, times = entry
        write = self.escape
        raw = write(target), write(request_id), write(trace), write(span)
        return kind, client, raw, said, ended_ms, sizes, times

    # -- what the forms differ in ----------------------------------------------------------------------

    def fill(self, entries: Sequence[Entry]) -> list[bytes]:
        """The lines of entries in which what is ``Raw`` needs no escapes."""
        raise NotImplementedError

    def escape(self, raw: bytes) -> bytes:
        raise NotImplementedError

    def frame(self, kind: Kind) -> bytes:
        """A format for ``fill``: what is of the kind is written, and there are places for the rest."""
        raise NotImplementedError

    def client(self, address: bytes) -> bytes:
        raise NotImplementedError

    def said(self, said: Said) -> bytes:
        raise NotImplementedError

    def second(self, whole_s: int) -> bytes:
        """When it was, to the second."""
        raise NotImplementedError

    def marked(self, line: bytes) -> bytes:
        """The line with the mark that something was cut."""
        raise NotImplementedError


class JsonForm(Form):
    """One JSON object a line. Every key is in every line, but ``cut``."""

    __slots__ = ()

    def fill(self, entries: Sequence[Entry]) -> list[bytes]:
        frames, clients, said = self._frames, self._clients, self._said
        numbers, seconds = self._numbers, self._seconds
        lines = []
        ms, timed, stamp, duration, connect, until_head = -1, None, b"", b"", b"", b""
        for kind, client, (target, request_id, trace, span), spoken, ended_ms, sizes, took in entries:
            if ended_ms != ms:
                ms = ended_ms
                stamp = seconds[ms // 1000] + _MILLIS[ms % 1000]
            if took != timed:
                timed = took
                duration, connect, until_head = _written(took, b"null")
            received, sent = sizes
            values = (
                stamp,
                clients[client],
                target,
                numbers[received],
                numbers[sent],
                duration,
                connect,
                until_head,
                request_id,
                trace,
                span,
                said[spoken],
            )
            lines.append(frames[kind] % values)
        return lines

    def frame(self, kind: Kind) -> bytes:
        (listener, route, pool, backend, status, attempts, flags), *head = kind
        method, authority, version = (_quoted(text) for text in head)
        listener, route, pool, backend = map(encode_basestring_ascii, (listener, route, pool, backend))
        texts = (
            f'{{"time":"\0","listener":{listener},"client":\0,"method":{method},"authority":{authority}',
            f',"target":"\0","version":{version},"status":{status:d},"request_bytes":\0,"response_bytes":\0',
            f',"duration_s":\0,"connect_s":\0,"head_s":\0,"route":{route},"pool":{pool},"backend":{backend}',
            f',"attempts":{attempts:d},"flags":[{",".join(map(encode_basestring_ascii, flags))}]',
            ',"request_id":"\0","trace_id":"\0","span_id":"\0",\0}\n',
        )
        return _format_of("".join(texts))

    def escape(self, raw: bytes) -> bytes:
        return _quoted(raw)[1:-1].encode("ascii")

    def client(self, address: bytes) -> bytes:
        return _quoted(address).encode("ascii")

    def said(self, said: Said) -> bytes:
        agent, referer = said
        return f'"user_agent":{_quoted(agent)},"referer":{_quoted(referer)}'.encode("ascii")

    def second(self, whole_s: int) -> bytes:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole_s)).encode("ascii")

    def marked(self, line: bytes) -> bytes:
        return line[:-2] + b',"cut":true}\n'


class CombinedForm(Form):
    """The nine fields of the combined log format, and behind them ours as ``name=value``."""

    __slots__ = ()

    def fill(self, entries: Sequence[Entry]) -> list[bytes]:
        frames, clients, said = self._frames, self._clients, self._said
        numbers, seconds = self._numbers, self._seconds
        lines = []
        ms, timed, stamp, duration, connect, until_head = -1, None, b"", b"", b"", b""
        for kind, client, (target, request_id, trace, span), spoken, ended_ms, sizes, took in entries:
            if ended_ms != ms:
                ms = ended_ms
                stamp = seconds[ms // 1000]
            if took != timed:
                timed = took
                duration, connect, until_head = _written(took, b"-")
            received, sent = sizes
            values = (
                clients[client],
                stamp,
                target or b"-",
                numbers[sent],
                said[spoken],
                numbers[received],
                duration,
                connect,
                until_head,
                request_id or b"-",
                trace or b"-",
                span or b"-",
            )
            lines.append(frames[kind] % values)
        return lines

    def frame(self, kind: Kind) -> bytes:
        (listener, route, pool, backend, status, attempts, flags), method, authority, version = kind
        request = f"{_safe(method)} \0 HTTP/{_safe(version)}" if method else "-"
        texts = (
            f'\0 - - [\0] "{request}" {status:03d} \0 \0',
            " request_bytes=\0 duration_s=\0 connect_s=\0 head_s=\0",
            f' listener="{_safe_text(listener)}" authority="{_safe(authority)}" route="{_safe_text(route)}"',
            f' pool="{_safe_text(pool)}" backend="{_safe_text(backend)}" attempts={attempts:d}',
            f' flags="{_safe_text(",".join(flags))}" request_id="\0" trace_id="\0" span_id="\0"\n',
        )
        made = _format_of("".join(texts))
        # Without a method there is no request line, so that the target, which is given, stands nowhere.
        return made if method else made.replace(b'"-"', b'"-%.0b"', 1)

    def escape(self, raw: bytes) -> bytes:
        return _safe(raw).encode("ascii")

    def client(self, address: bytes) -> bytes:
        # It stands without quotation marks: blanks would shift what follows.
        return _safe(address).replace(" ", "\\x20").encode("ascii")

    def said(self, said: Said) -> bytes:
        agent, referer = said
        return f'"{_safe(referer)}" "{_safe(agent)}"'.encode("ascii")

    def second(self, whole_s: int) -> bytes:
        at = time.gmtime(whole_s)
        # Not %b: months are English here whatever the locale.
        return time.strftime(f"%d/{_MONTHS[at.tm_mon - 1]}/%Y:%H:%M:%S +0000", at).encode("ascii")

    def marked(self, line: bytes) -> bytes:
        return line[:-1] + b" cut=1\n"


FORMS: Final[dict[str, Callable[[], Form]]] = {"json": JsonForm, "combined": CombinedForm}
"""By the value of ``observability.access_log.format``."""


def _format_of(text: str) -> bytes:
    """``\\0``, which no escaped text has, is a place for bytes."""
    return text.replace("%", "%%").replace("\0", "%b").encode("ascii")


def _written(times: Times, none: bytes) -> tuple[bytes, bytes, bytes]:
    duration_s, connect_s, head_s = times
    duration = b"%.6f" % duration_s
    return (
        duration,
        none if connect_s is None else b"%.6f" % connect_s,
        # They are the same where all of the response came at once.
        duration if head_s == duration_s else none if head_s is None else b"%.6f" % head_s,
    )


def _quoted(raw: bytes) -> str:
    return encode_basestring_ascii(raw.decode("latin-1"))


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char in '"\\':
        return "\\" + char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else char.encode("ascii", "backslashreplace").decode("ascii")


def _safe_text(text: str) -> str:
    return _UNSAFE.sub(_escape, text) if text else "-"


def _safe(raw: bytes) -> str:
    return _safe_text(raw.decode("latin-1"))
