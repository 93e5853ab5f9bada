"""Probes that ask for a path and judge the answer by its status and, if wanted, a text in its body.

Over HTTP/1.1 the answer is read by the codec of the data path: what its backend says there would be refused
is refused here, for the same reason.
"""

from typing import Final

from expressgateway.control import probe_h2, probe_h3
from expressgateway.control.probe_wire import ProbeError, ProbeTls, Target, opened
from expressgateway.upstream.health_backend import HealthSettings
from expressgateway.wire.errors import PeerClosedError, TruncatedError, WireError
from expressgateway.wire.h1.client import H1Client
from expressgateway.wire.h1.fields import FieldReader
from expressgateway.wire.head import Fields, RequestHead, ResponseHead

MAX_BODY_BYTES: Final = 65536  # of a body that is searched
MAX_HEAD_BYTES: Final = 16384
USER_AGENT: Final = "expressgateway-health"

_START: Final = b"HTTP/"
_FIELDS: Final = FieldReader(256, underscore="allow")


class Verdict:
    """What is asked of an answer."""

    __slots__ = ("_body", "_searched", "_settings")

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._body = bytearray()  # up to MAX_BODY_BYTES and one read
        self._searched = 0

    def on_status(self, status: int) -> bool:
        """Whether the body matters too. Raises `ProbeError` for a status that is not expected."""
        if status not in self._settings.expect_status:
            raise ProbeError(f"status {status}")
        return self._settings.expect_body is not None

    def on_body(self, chunk: bytes, end: bool) -> bool:
        """Whether the text was found. Raises `ProbeError` when it cannot be found any more."""
        text = self._settings.expect_body or b""
        self._body += chunk
        if self._body.find(text, max(0, self._searched - len(text))) >= 0:
            return True
        self._searched = len(self._body)
        shown = text.decode(errors="replace")
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        if len(self._body) > MAX_BODY_BYTES:
            raise ProbeError(f"the first {MAX_BODY_BYTES} bytes of the body do not contain {shown!r}")
        if end:
            raise ProbeError(f"the body does not contain {shown!r}")
        return False


class HttpProbe:
    """GET over HTTP/1.1, on a connection of its own."""

    __slots__ = ("_head", "_settings", "_target", "_tls")

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target
        self._settings = settings
        tls = target.settings.tls
        self._tls = None if tls is None else ProbeTls(target.settings.host, tls, ("http/1.1",))
        self._head = RequestHead(
            b"GET",
            b"http" if tls is None else b"https",
            (settings.host or target.authority).encode("latin-1"),
            settings.path.encode("latin-1"),
            (
                (b"user-agent", USER_AGENT.encode()),
                (b"accept", b"*/*"),
                (b"accept-encoding", b"identity"),
                (b"connection", b"close"),
            ),
        )

    async def run(self) -> str:
        async with opened(self._target, self._tls) as wire:
            reading = _Reading(Verdict(self._settings))
            codec = H1Client(reading, _FIELDS, MAX_HEAD_BYTES)
            codec.open(reading)
            codec.send_head(self._head, end=True)
            wire.send(b"".join(codec.out))
            start = b""
            while not reading.is_over:
                data = await wire.receive()
                if not data:
                    codec.receive_eof()
                    break
                if len(start) < len(_START):
                    # What has no line breaks would be waited for until the time is up.
                    start = (start + data[: len(_START)])[: len(_START)]
                    if not _START.startswith(start):
                        raise ProbeError("garbage instead of an answer: it does not begin with HTTP/")
                codec.receive_data(data)
        if reading.error is not None:
            raise reading.error
        return f"status {reading.status}"


class _Reading:
    """The codec's shell and the sink of its one answer. Errors are kept: its calls return to the codec."""

    __slots__ = ("_verdict", "error", "is_over", "status")

    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self.status = 0
        self.is_over = False
        self.error: ProbeError | None = None

    def _end(self, error: ProbeError | None = None) -> None:
        if not self.is_over:
            self.is_over = True
            self.error = error

    # -- ResponseSink

    def on_informational(self, head: ResponseHead) -> None: ...

    def on_response(self, head: ResponseHead, end: bool) -> None:
        self.status = head.status
        try:
            if not self._verdict.on_status(head.status):
                self._end()
            elif end:
                self.on_response_data(b"", True)
        except ProbeError as error:
            self._end(error)

    def on_response_data(self, chunk: bytes, end: bool) -> None:
        if self.is_over:
            return
        try:
            if self._verdict.on_body(chunk, end):
                self._end()
        except ProbeError as error:
            self._end(error)

    def on_response_trailers(self, fields: Fields) -> None:
        self.on_response_data(b"", True)

    def on_response_abort(self, error: WireError) -> None:
        if isinstance(error, PeerClosedError):
            self._end(ProbeError("closed the connection before it answered"))
        elif isinstance(error, TruncatedError):
            self._end(ProbeError("closed the connection inside its answer"))
        else:
            self._end(ProbeError(f"garbage instead of an answer: {error.detail}"))

    def on_back_blocked(self) -> None: ...
    def on_back_drained(self) -> None: ...

    # -- Shell: the probe writes once, and closes by itself

    def wake(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def half_close(self) -> None: ...
    def reset(self) -> None: ...
    def exchange_done(self, is_reusable: bool) -> None: ...
    def unsent(self) -> int:
        return 0

    def was_delivered(self) -> bool:
        return True


class Http2Probe:
    """The same over HTTP/2."""

    __slots__ = ("_headers", "_settings", "_target", "_tls")

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target
        self._settings = settings
        tls = target.settings.tls
        self._tls = None if tls is None else ProbeTls(target.settings.host, tls, probe_h2.ALPN)
        self._headers = [
            (":method", "GET"),
            (":scheme", "http" if tls is None else "https"),
            (":authority", settings.host or target.authority),
            (":path", settings.path),
            ("user-agent", USER_AGENT),
            ("accept", "*/*"),
            ("accept-encoding", "identity"),
        ]

    async def run(self) -> str:
        answer = await probe_h2.exchange(self._target, self._tls, self._headers, b"", MAX_BODY_BYTES)
        verdict = Verdict(self._settings)
        if verdict.on_status(answer.status):
            verdict.on_body(bytes(answer.body), answer.is_complete)
        return f"status {answer.status}"


class Http3Probe:
    """The same over HTTP/3."""

    __slots__ = ("_headers", "_quic", "_settings", "_target")

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target
        self._settings = settings
        self._quic = probe_h3.ProbeQuic(target)
        self._headers = [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", settings.host or target.authority),
            (":path", settings.path),
            ("user-agent", USER_AGENT),
            ("accept", "*/*"),
            ("accept-encoding", "identity"),
        ]

    async def run(self) -> str:
        answer = await probe_h3.exchange(self._target, self._quic, self._headers, b"", MAX_BODY_BYTES)
        verdict = Verdict(self._settings)
        if verdict.on_status(answer.status):
            verdict.on_body(bytes(answer.body), answer.is_complete)
        return f"status {answer.status}"
