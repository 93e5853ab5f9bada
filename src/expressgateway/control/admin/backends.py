"""Pools and their backends, shown and changed.

Weight, addition and removal are changes of the configuration that runs and go the way of a reload; a *state*
(ready, draining, disabled) is kept beside it, survives reloads, and belongs to one address of a backend. None
is written to the operator's file, and every answer says so.
"""

from typing import Any, Final
from urllib.parse import quote

from expressgateway.config.values import shown
from expressgateway.control.admin.answers import STATUSES, answered, told
from expressgateway.control.admin.bodies import BadBodyError, one_of
from expressgateway.control.admin.http import Response
from expressgateway.control.admin.table import ROOT, Call
from expressgateway.control.admin.view import find_backend, find_pool
from expressgateway.control.changes import AddBackend, ChangeError, RemoveBackend, SetWeight
from expressgateway.control.reload import APPLIED, Outcome

STATES: Final = ("ready", "draining", "disabled")
"""What can be asked for."""

# -- showing


async def show_pools(call: Call) -> Response:
    return answered({"pools": call.gateway.pools()})


async def show_pool(call: Call) -> Response:
    return answered(_pool(call))


async def show_all(call: Call) -> Response:
    return answered(
        {
            "backends": [
                {"pool": pool["name"], **backend}
                for pool in call.gateway.pools()
                for backend in pool["backends"]
            ]
        }
    )


async def show_backends(call: Call) -> Response:
    return answered({"backends": _pool(call)["backends"]})


async def show_backend(call: Call) -> Response:
    return answered(find_backend(_pool(call), call.names["id"]))


def _pool(call: Call) -> dict[str, Any]:
    return find_pool(call.gateway.pools(), call.names["pool"])


# -- changing


async def add(call: Call) -> Response:
    pool = call.names["pool"]
    outcome = await call.gateway.change(AddBackend(pool, call.body), call.check)
    status = 201 if outcome.result == APPLIED else STATUSES[outcome.result]
    response = answered(_answer(call, outcome), status)
    if outcome.is_success and (backends := _pool(call)["backends"]):
        # It is the last one; asked for, because an id that is not given is made of the address.
        id_ = quote(backends[-1]["id"], safe="")
        response.headers["Location"] = f"{ROOT}/pools/{quote(pool, safe='')}/backends/{id_}"
    return response


async def remove(call: Call) -> Response:
    outcome = await call.gateway.change(RemoveBackend(call.names["pool"], call.names["id"]), call.check)
    return answered(_answer(call, outcome), STATUSES[outcome.result])


async def patch(call: Call) -> Response:
    pool, id_, body = call.names["pool"], call.names["id"], call.body
    if not body:
        raise BadBodyError("nothing is asked for: the keys are weight and state")
    targets: list[str] = []
    if "state" in body:
        one_of("state", body["state"], STATES)
        targets = _targets(call)
    answer: dict[str, Any] = {"result": APPLIED, "version": call.versions.current}
    if "weight" in body:
        outcome = await call.gateway.change(SetWeight(pool, id_, body["weight"]), call.check)
        answer = _answer(call, outcome)
        if not outcome.is_success:
            return answered(answer, STATUSES[outcome.result])
    if targets:
        for target in targets:
            call.gateway.set_state(
                pool, target, str(body["state"]), f"the admin API, from {call.request.client}"
            )
        call.versions.edited()
        answer |= {"result": APPLIED, "state": body["state"], "addresses": targets} | _remarks(call)
    if targets and "weight" not in body:
        answer["note"] = "not written to any file: a state survives reloads, not a restart"
    return answered(answer)


def _targets(call: Call) -> list[str]:
    """The addresses whose state is to be set. Raises `ChangeError`."""
    id_ = call.names["id"]
    backend = find_backend(_pool(call), id_)
    if "resolved" not in backend:
        return [id_]
    targets = [each["id"] for each in backend["resolved"]]
    if not targets:
        raise ChangeError(
            409,
            f"backend {shown(id_)} has no address at present, so there is nothing to set a state on; "
            "weight 0 keeps new work from every address it will have",
        )
    return targets


def _answer(call: Call, outcome: Outcome) -> dict[str, Any]:
    answer = told(outcome, call.versions.current)
    return answer | _remarks(call) if outcome.is_success else answer


def _remarks(call: Call) -> dict[str, Any]:
    remarks: dict[str, Any] = {
        "persisted": False,
        "note": f"not written to {call.gateway.status()['config']['path']}: a reload returns to what it says",
    }
    if warning := _pool(call).get("warning"):
        remarks["warning"] = warning
    return remarks
