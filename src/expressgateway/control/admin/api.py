"""The API: from a request to the entry of the table that answers it. Who may ask is decided before.

What all writes have in common happens here: whether anything can be changed at present, the body's keys, and
the state that the client says it has seen (`versions`).
"""

import logging
from typing import Any

from expressgateway.config.values import listed
from expressgateway.control.admin.answers import refused
from expressgateway.control.admin.bodies import BadBodyError, check_keys, read_object, take_version
from expressgateway.control.admin.gateway import Resources
from expressgateway.control.admin.http import READS, Request, Response, not_allowed, rejected
from expressgateway.control.admin.resources import TABLE
from expressgateway.control.admin.table import Call, Operation, Routes
from expressgateway.control.admin.versions import Versions
from expressgateway.control.changes import ChangeError

log = logging.getLogger(__name__)


class Api:
    """Answers for every path below ``/api/v1``."""

    __slots__ = ("_gateway", "_routes", "_versions")

    def __init__(self, gateway: Resources) -> None:
        self._gateway = gateway
        self._routes = Routes(TABLE)
        self._versions = Versions(lambda: gateway.status()["config"]["version"])

    async def answer(self, request: Request) -> Response:
        """Never raises for what a client did."""
        found = self._routes.find(request.path)
        if found is None:
            return refused(ChangeError(404, "there is nothing at this path"))
        methods, names = found
        operation = methods.get("GET" if request.method in READS else request.method)
        if operation is None:
            return not_allowed([*(READS if "GET" in methods else ()), *(m for m in methods if m != "GET")])
        try:
            response = await operation.handler(self._call(operation, request, names))
        except BadBodyError as error:
            return rejected(400, str(error))
        except ChangeError as error:
            if request.is_write:
                log.info("%s %s from %s refused: %s", request.method, request.path, request.client, error)
            return refused(error)
        if operation.has_etag and response.status < 300:
            response.headers.setdefault("ETag", self._versions.etag)
        return response

    def _call(self, operation: Operation, request: Request, names: dict[str, str]) -> Call:
        """Raises `BadBodyError` and `ChangeError`."""
        body: dict[str, Any] = {}
        version = None
        if operation.is_write:
            if not operation.while_unready and (reason := self._gateway.unready()) is not None:
                raise ChangeError(503, f"nothing can be changed now: {reason}")
            if operation.body is not None:
                body = read_object(request.body if request.body or operation.needs_body else b"{}")
                if (keys := keys_of(operation)) is not None:
                    check_keys(body, keys)
                    if not body and operation.needs_body:
                        raise BadBodyError(f"nothing is asked for: the keys are {listed(keys)}")
                version = take_version(body)
        if_match = request.headers.get("if-match") if operation.is_write else None
        check = self._versions.precondition(if_match, version)
        check()  # what is refused already need not wait for its turn; it is asked again then
        return Call(self._gateway, self._versions, request, names, body, check)


def keys_of(operation: Operation) -> tuple[str, ...] | None:
    """The keys a body may have; None: the handler knows."""
    found = getattr(operation.body, "__required_keys__", None)
    if found is None:
        return None
    # in the order they are written; those that every body has come last
    own = [key for key in operation.body.__annotations__ if key != "version"]
    return (*own, "version")
