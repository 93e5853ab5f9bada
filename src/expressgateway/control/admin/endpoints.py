"""What the admin listener answers, and to whom.

Probes are open to everybody who reaches the listener; counters and the API need the bearer token if one is
configured. The dashboard's page holds no data and is open as well: it asks for the token and then for the
data (docs/decisions/0023). Without a token, the configuration has made sure that only this machine reaches
it - but that includes its browsers, and the pages they show. So a request must then name this machine as its
host (a page can have its own name resolve here, but not change what the browser calls it), and a write must
be one that no page of another origin can make.
"""

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, Protocol

from expressgateway.control.admin import page
from expressgateway.control.admin.answers import answered
from expressgateway.control.admin.api import Api
from expressgateway.control.admin.gateway import Resources
from expressgateway.control.admin.http import JSON, READS, Request, Response, not_allowed, rejected
from expressgateway.control.admin.live import Facts, Live
from expressgateway.observe.counters import Tally
from expressgateway.observe.logs import Limited

limited = Limited(logging.getLogger(__name__))


_PROBES: Final = ("/livez", "/healthz", "/readyz", "/startupz")
EVENTS: Final = "/api/v1/events"
_PAGES_OF_ITS_OWN: Final = ("same-origin", "none")
"""Values of Sec-Fetch-Site that tell of no other site: a page of ours, or the user."""


class Gateway(Resources, Protocol):
    """What the supervisor shows, and does."""

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

    def facts(self) -> Facts:
        """What pictures of the gateway are made of."""
        ...

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Body and content type."""
        ...


class Endpoints:
    """The paths of the admin listener. Who is not let in is counted in `rejects`."""

    __slots__ = ("_api", "_gateway", "_live", "_rejects")

    def __init__(self, gateway: Gateway, rejects: Tally) -> None:
        self._api = Api(gateway)
        self._gateway = gateway
        self._live = Live(gateway.facts)
        self._rejects = rejects

    async def answer(self, request: Request) -> Response:
        path = request.path
        if path in _PROBES:
            return self._probe(path) if request.method in READS else not_allowed(READS)
        is_api = path.startswith("/api/")
        is_page = path in page.PATHS
        if not is_api and not is_page and path != "/metrics":
            return Response.plain(404)
        if self._gateway.token_hash is None and not _names_this_machine(request):
            return rejected(421, "the Host header must name this machine, as localhost or by its address")
        if is_page:
            if request.method not in READS:
                return not_allowed(READS)
            return page.served(path, needs_token=self._gateway.token_hash is not None)
        if not self._is_allowed(request):
            return self._unauthorized(request)  # what exists there is not everybody's to know
        if is_api and path != EVENTS:
            if request.is_write and (refusal := _foreign(request)) is not None:
                return refusal
            return await self._api.answer(request)
        if request.method not in READS:
            return not_allowed(READS)
        if path == EVENTS:
            return Response(200, content_type="text/event-stream", stream=self._events)
        body, content_type = await self._gateway.metrics(request.headers.get("accept", ""))
        return Response(200, body, content_type)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """The feed, until another token is wanted than the one it was asked for with."""
        wanted = self._gateway.token_hash
        async with aclosing(self._live.feed.watch()) as events:
            async for event in events:
                if self._gateway.token_hash != wanted:
                    return
                yield event

    def _probe(self, path: str) -> Response:
        match path:
            case "/readyz":
                reason = self._gateway.unready()
                return Response.plain(200, "ready") if reason is None else Response.plain(503, reason)
            case "/startupz":
                started = self._gateway.is_started
                return Response.plain(200, "started") if started else Response.plain(503, "starting")
            case _:
                return Response.plain(200, "alive")

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
        response = answered({"error": "a valid token is needed"}, 401)
        response.headers["WWW-Authenticate"] = 'Bearer realm="expressgateway"'
        return response


def _names_this_machine(request: Request) -> bool:
    """Whether the Host header is a loopback address or `localhost`; HTTP/1.0 may come without one."""
    host = request.headers.get("host", "localhost").lower()
    name, colon, port = host.rpartition(":")
    if colon and not host.endswith("]"):
        if port and not (port.isascii() and port.isdigit()):
            return False
        host = name
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if host.removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _foreign(request: Request) -> Response | None:
    """The refusal of a write that a web page of another origin could have made."""
    headers = request.headers
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    own = tuple(f"{scheme}://{headers.get('host', '')}".lower() for scheme in ("http", "https"))
    if (site is not None and site not in _PAGES_OF_ITS_OWN) or (origin is not None and origin not in own):
        return rejected(403, "a page of another origin cannot change anything here")
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != JSON:
        return rejected(415, "a write needs Content-Type: application/json, so that no web page can make it")
    return None
