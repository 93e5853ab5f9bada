"""What the gateway says when it answers by itself: status, ``Proxy-Status``, and a short text."""

from typing import Final

from expressgateway.proxy.errors import Reason, proxy_status_of, status_of
from expressgateway.proxy.service import HttpService
from expressgateway.wire.head import Field, ResponseHead

_RETRY_AFTER_S: Final = b"1"
_ALLOW: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"


def own_answer(
    service: HttpService, reason: Reason, detail: str, request_id: bytes
) -> tuple[ResponseHead, bytes]:
    """The head and the body for a reason. ``detail`` is a phrase for the client; it may quote no secret."""
    status = status_of(reason)
    detail = detail or reason.value.replace("_", " ")
    text = f"{status} {reason.value}: {detail}\nrequest {request_id.decode('ascii')}\n"
    body = text.encode("latin-1", "replace")
    headers: list[Field] = service.forwarding.own(service.wall_s())
    headers.append((b"content-type", b"text/plain; charset=utf-8"))
    headers.append((b"x-request-id", request_id))
    headers.append((b"proxy-status", proxy_status(service.proxy_status_name, reason, detail)))
    if status == 503:
        headers.append((b"retry-after", _RETRY_AFTER_S))
    elif status == 405:
        headers.append((b"allow", _ALLOW))
    return ResponseHead(status, tuple(headers), len(body)), body


def proxy_status(name: str, reason: Reason, detail: str) -> bytes:
    """RFC 9209 2: who answers, the kind of error, and the detail as a quoted string (RFC 8941 3.3.3)."""
    quoted = "".join(char if " " <= char <= "~" and char not in '"\\' else "'" for char in detail)
    return f'{name}; error={proxy_status_of(reason)}; details="{quoted}"'.encode("ascii")
