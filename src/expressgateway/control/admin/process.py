"""The gateway as a whole, shown and acted upon: status, configuration, workers, connections; reload, drain,
certificates, log level."""

from typing import Any, Final

from expressgateway.control.admin.answers import STATUSES, answered, told
from expressgateway.control.admin.bodies import one_of
from expressgateway.control.admin.http import Response
from expressgateway.control.admin.table import Call
from expressgateway.control.reload import Outcome, aside
from expressgateway.observe.logs import LEVELS

MAX_LISTED: Final = 200
"""Connections that are listed."""

# -- showing


async def show_status(call: Call) -> Response:
    return answered(call.gateway.status())


async def show_config(call: Call) -> Response:
    return answered(call.gateway.config())


async def show_listeners(call: Call) -> Response:
    return answered({"listeners": call.gateway.listeners()})


async def show_workers(call: Call) -> Response:
    return answered({"workers": call.gateway.workers()})


async def show_certificates(call: Call) -> Response:
    return answered({"certificates": call.gateway.certificates()})


async def show_connections(call: Call) -> Response:
    return answered(await call.gateway.connections(MAX_LISTED))


async def show_log(call: Call) -> Response:
    return answered({"level": call.gateway.log_level()})


async def show_document(_: Call) -> Response:
    # Imported when asked for: it is made of the table that names this function. It takes a while once.
    from expressgateway.control.admin.openapi import document

    return answered(await aside(document))


# -- acting


async def set_log_level(call: Call) -> Response:
    level = one_of("level", call.body.get("level"), LEVELS)
    call.gateway.set_log_level(level)
    return answered({"level": call.gateway.log_level()})


async def reload(call: Call) -> Response:
    return _outcome(call, await call.gateway.reload(call.check))


async def renew(call: Call) -> Response:
    return _outcome(call, await call.gateway.renew())


async def drain(call: Call) -> Response:
    call.gateway.begin_drain(f"the admin API, from {call.request.client}")
    answer: dict[str, Any] = {
        "state": "draining",
        "note": "as SIGTERM does: unready first, then nothing is accepted, then the process ends",
    }
    return answered(answer, 202)


def _outcome(call: Call, outcome: Outcome) -> Response:
    return answered(told(outcome, call.versions.current), STATUSES[outcome.result])
