"""The dashboard's files, as the admin listener serves them: the page itself holds no data."""

from functools import cache
from importlib import resources
from typing import Final

from expressgateway.control.admin.http import Response

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/assets/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/assets/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/assets/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
PATHS: Final = frozenset(_FILES)

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Besides those that every answer has. Scripts and styles are files of ours; none stands in the page."""


def served(path: str, *, needs_token: bool) -> Response:
    """One of `PATHS`. The page is told whether it has to ask for a token."""
    name, content_type = _FILES[path]
    body = _content(name)
    if needs_token:
        body = body.replace(b'data-token="none"', b'data-token="needed"', 1)
    return Response(200, body, content_type, dict(HEADERS))


@cache  # of the four files above
def _content(name: str) -> bytes:
    return resources.files("expressgateway.control.admin").joinpath("dashboard", name).read_bytes()
