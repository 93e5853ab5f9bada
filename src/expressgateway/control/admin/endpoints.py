"""What the admin listener answers, and to whom.

Probes are open to everybody who reaches the listener; counters and the API need the bearer token if one is
configured. Without one, the configuration has made sure that only this machine reaches it.
"""

import hashlib
import hmac
import json
import logging
from typing import Any, Protocol

from expressgateway.control.admin.http import Request, Response
from expressgateway.observe.counters import Tally
from expressgateway.observe.logs import Limited

limited = Limited(logging.getLogger(__name__))


class Gateway(Protocol):
    """What the supervisor shows."""

    @property
    def token_hash(self) -> str | None:
        """SHA-256 of the bearer token, in hexadecimal; None: no token."""
        ...

    @property
    def is_started(self) -> bool:
        """Whether it ever served."""
        ...

    def unready(self) -> str | None:
        """Why it should be sent no traffic; None: it is ready."""
        ...

    def status(self) -> dict[str, Any]: ...

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Body and content type."""
        ...


class Endpoints:
    """The paths of the admin listener. Who is not let in is counted in `rejects`."""

    __slots__ = ("_gateway", "_rejects")

    def __init__(self, gateway: Gateway, rejects: Tally) -> None:
        self._gateway = gateway
        self._rejects = rejects

    async def answer(self, request: Request) -> Response:
        match request.path:
            case "/livez" | "/healthz":
                return Response.plain(200, "alive")
            case "/readyz":
                reason = self._gateway.unready()
                return Response.plain(200, "ready") if reason is None else Response.plain(503, reason)
            case "/startupz":
                started = self._gateway.is_started
                return Response.plain(200, "started") if started else Response.plain(503, "starting")
            case "/metrics":
                if not self._is_allowed(request):
                    return self._unauthorized(request)
                body, content_type = await self._gateway.metrics(request.headers.get("accept", ""))
                return Response(200, body, content_type)
            case "/api/v1/status":
                if not self._is_allowed(request):
                    return self._unauthorized(request)
                body = json.dumps(self._gateway.status()).encode()
                return Response(200, body, "application/json")
            case path if path.startswith("/api/") and not self._is_allowed(request):
                return self._unauthorized(request)  # what exists there is not everybody's to know
            case _:
                return Response.plain(404)

    def _is_allowed(self, request: Request) -> bool:
        wanted = self._gateway.token_hash
        if wanted is None:
            return True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # The comparison takes as long for a wrong token as for the right one, and sees only its hash.
        given = hashlib.sha256(token.strip().encode("latin-1")).hexdigest()
        return hmac.compare_digest(given, wanted.lower()) and scheme.lower() == "bearer"

    def _unauthorized(self, request: Request) -> Response:
        self._rejects.add("unauthorized")
        limited.warning(
            "admin_unauthorized", request.client, "a request to the admin listener had no valid token"
        )
        return Response.plain(401, WWW_Authenticate='Bearer realm="expressgateway"')
