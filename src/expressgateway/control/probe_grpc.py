"""The probe of ``grpc.health.v1.Health/Check``, asked about the server as a whole (no service name).

Two messages of one field each are written and read by hand: a protobuf library would be the larger risk.
"""

from typing import Final
from urllib.parse import unquote

from expressgateway.control import probe_h2, probe_h3
from expressgateway.control.probe_http import USER_AGENT
from expressgateway.control.probe_wire import ProbeError, ProbeTls, Target
from expressgateway.upstream.health_backend import HealthSettings

MAX_MESSAGE_BYTES: Final = 4096

_REQUEST: Final = bytes(5)  # not compressed, of no length: HealthCheckRequest without a service
_PREFIX: Final = 5
_SERVING: Final = 1
_STATUSES: Final = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_CODES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


class GrpcProbe:
    """Healthy is what answers SERVING."""

    __slots__ = ("_headers", "_target", "_tls")

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        self._target = target
        tls = target.settings.tls
        self._tls = None if tls is None else ProbeTls(target.settings.host, tls, probe_h2.ALPN)
        self._headers = [
            (":method", "POST"),
            (":scheme", "http" if tls is None else "https"),
            (":authority", settings.host or target.authority),
            (":path", "/grpc.health.v1.Health/Check"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{max(1, round(settings.timeout_s * 1000))}m"),
            ("user-agent", USER_AGENT),
        ]

    async def run(self) -> str:
        answer = await probe_h2.exchange(
            self._target, self._tls, self._headers, _REQUEST, MAX_MESSAGE_BYTES + _PREFIX
        )
        return judge(answer)


class Grpc3Probe(GrpcProbe):
    """The same over HTTP/3."""

    __slots__ = ("_quic",)

    def __init__(self, target: Target, settings: HealthSettings) -> None:
        super().__init__(target, settings)
        self._quic = probe_h3.ProbeQuic(target)

    async def run(self) -> str:
        most = MAX_MESSAGE_BYTES + _PREFIX
        return judge(await probe_h3.exchange(self._target, self._quic, self._headers, _REQUEST, most))


def judge(answer: probe_h2.Answer) -> str:
    """What the answer says. Raises `ProbeError` unless it is SERVING."""
    if answer.status != 200:
        raise ProbeError(f"status {answer.status}")
    if not answer.headers.get("content-type", "").startswith("application/grpc"):
        raise ProbeError("garbage instead of an answer: it is not gRPC")
    if len(answer.body) > MAX_MESSAGE_BYTES + _PREFIX:
        raise ProbeError(f"garbage instead of an answer: more than {MAX_MESSAGE_BYTES} bytes")
    # Without a message the trailers are the head (gRPC's Trailers-Only).
    trailers = answer.trailers or answer.headers
    code = trailers.get("grpc-status", "")
    if code != "0":
        raise ProbeError(_failed(code, trailers.get("grpc-message", "")))
    status = serving_status(bytes(answer.body))
    name = _STATUSES[status] if status < len(_STATUSES) else str(status)
    if status != _SERVING:
        raise ProbeError(f"answers {name}")
    return name


def _failed(code: str, message: str) -> str:
    if not code:
        return "garbage instead of an answer: no grpc-status"
    number = int(code) if code.isascii() and code.isdigit() and len(code) < 3 else -1
    name = _CODES[number] if 0 <= number < len(_CODES) else code[:20]
    text = unquote(message)[:100]
    return f"gRPC status {name}: {text}" if text else f"gRPC status {name}"


def serving_status(body: bytes) -> int:
    """The one field of a HealthCheckResponse. Raises `ProbeError` for what is none."""
    if len(body) < _PREFIX or body[0] or int.from_bytes(body[1:_PREFIX], "big") != len(body) - _PREFIX:
        raise ProbeError("garbage instead of an answer: no single uncompressed message")
    message = body[_PREFIX:]
    status, at = 0, 0  # an absent field is 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            if field == 1:
                status = value
        elif kind == 2:
            length, at = _varint(message, at)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ProbeError("garbage instead of an answer: no protobuf message")
    if at > len(message):
        raise ProbeError("garbage instead of an answer: a message cut short")
    return status


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ProbeError("garbage instead of an answer: a message cut short")
