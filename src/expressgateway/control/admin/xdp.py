"""The XDP data plane, shown and taken away."""

from typing import Any, Final
from urllib.parse import parse_qs

from expressgateway.config.values import shown
from expressgateway.control.admin.answers import answered
from expressgateway.control.admin.http import Response
from expressgateway.control.admin.table import Call
from expressgateway.control.changes import ChangeError

LISTED: Final = 100
"""Flows that are listed, unless somebody asks for more."""
MAX_LISTED: Final = 10_000


async def show(call: Call) -> Response:
    return answered(await call.gateway.xdp())


async def show_flows(call: Call) -> Response:
    return answered(await call.gateway.xdp_flows(_limit(call.request.query)))


def _limit(query: str) -> int:
    """Raises `ChangeError` (422)."""
    try:
        asked = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=8)
    except ValueError:
        raise ChangeError(422, f"the query {shown(query)} cannot be read") from None
    if unknown := [name for name in asked if name != "limit"]:
        raise ChangeError(422, f"unknown parameter {shown(unknown[0])}: there is limit")
    text = asked.get("limit", [str(LISTED)])[-1]
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= MAX_LISTED):
        raise ChangeError(422, f"limit: expected a number from 1 to {MAX_LISTED}, found {shown(text)}")
    return int(text)


async def detach(call: Call) -> Response:
    was_there = await call.gateway.detach_xdp()
    answer: dict[str, Any] = {
        "state": "detached" if was_there else "off",
        "note": "the program is gone: its listeners are served in user space until the next reload or start"
        if was_there
        else "there is no XDP program of this gateway",
    }
    return answered(answer)
