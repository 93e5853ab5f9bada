"""The OpenAPI document, made of the table that answers requests and of the types of what it answers."""

from collections.abc import Iterator, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from expressgateway import __version__
from expressgateway.config.pools import Backend
from expressgateway.config.reference import json_schema
from expressgateway.control.admin import shapes
from expressgateway.control.admin.http import JSON
from expressgateway.control.admin.resources import TABLE
from expressgateway.control.admin.table import ROOT, Operation, names_in

_SCHEMAS: Final = "#/components/schemas/"
_BEARER: Final = "token"

_ALWAYS: Final = (400, 401, 408, 421, 431)
_WRITES: Final = (403, 412, 415, 503, 504)
_BODIES: Final = (409, 411, 413, 417, 422)

_WHY: Final = {
    400: "The request, or its body, cannot be read.",
    401: "There is no token, or a wrong one.",
    403: "A page of another origin made it.",
    404: "There is no such pool or backend.",
    409: "Not as things are: the version is another, the id is taken, it is refused as a whole.",
    412: "If-Match does not name the state that is there now.",
    415: "A write needs `Content-Type: application/json`.",
    421: "Without a token, the Host header must name this machine.",
    422: "What is asked for is not valid.",
    500: "It could not be done, and what ran before runs on.",
    503: "Nothing can be changed at present; it was not made.",
    504: "It takes too long, and may still be made.",
}
_PARAMETERS: Final = {
    "pool": "Name of the pool.",
    "id": "Id of the backend, or of one of the addresses it resolves to.",
}
_ETAG: Final = {
    "description": "Names the state of everything that writes can change; for If-Match.",
    "schema": {"type": "string"},
}


_EVENTS: Final = {
    "operationId": "getEvents",
    "summary": "What the dashboard shows: server-sent events, one `history` and then one `state` a second.",
    "responses": {
        "200": {
            "description": "A stream that ends when the gateway stops, or its token is another one.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        "401": {"description": _WHY[401]},
        "503": {"description": "There are as many streams as there may be."},
    },
}
"""Not in the table: its answer does not end."""


class _Plain(GenerateJsonSchema):
    """Without titles made of names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401 - as the library has it
        return False


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1. Built once; not to be changed."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for operation in TABLE:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    for path, methods in paths.items():
        if names := names_in(path):
            methods["parameters"] = [_path_parameter(name) for name in names]
    _schema(shapes.Error, schemas)
    paths["/events"] = {"get": _EVENTS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ExpressGateway",
            "version": __version__,
            "description": "The admin API. Members that are not described here may come: ignore them.",
            "license": {"name": "GPL-3.0-only", "identifier": "GPL-3.0-only"},
        },
        "servers": [{"url": ROOT}],
        # Either: the token is asked for where one is configured.
        "security": [{_BEARER: []}, {}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {_BEARER: {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            str(status): _response(operation, status, schemas)
            for status in sorted({*operation.answers, *_refusals(operation)})
        },
    }
    if operation.is_write:
        made["parameters"] = [
            {
                "name": "If-Match",
                "in": "header",
                "description": "`*`, or an ETag that the client has seen: only if that still holds.",
                "schema": {"type": "string"},
            }
        ]
    if operation.query:
        made["parameters"] = [
            {"name": name, "in": "query", "schema": dict(schema)} for name, schema in operation.query.items()
        ]
    if operation.body is not None:
        made["requestBody"] = {
            "required": operation.needs_body,
            "content": {JSON: {"schema": _body(operation, schemas)}},
        }
    return made


def _refusals(operation: Operation) -> Iterator[int]:
    yield from _ALWAYS
    yield from operation.refusals
    if operation.is_write:
        yield from (status for status in _WRITES if status != 503 or not operation.while_unready)
    if operation.body is not None:
        yield from _BODIES


def _response(operation: Operation, status: int, schemas: dict[str, Any]) -> dict[str, Any]:
    if status not in operation.answers:
        described = _WHY.get(status, f"{HTTPStatus(status).phrase}.")
        return {"description": described, "content": {JSON: {"schema": {"$ref": f"{_SCHEMAS}Error"}}}}
    headers: dict[str, Any] = {"ETag": _ETAG} if operation.has_etag else {}
    if status == 201:
        headers["Location"] = {"description": "Path of what was made.", "schema": {"type": "string"}}
    shape = operation.answers[status]
    schema = {"type": "object"} if shape is None else _schema(shape, schemas)
    response: dict[str, Any] = {
        "description": f"{HTTPStatus(status).phrase}.",
        "content": {JSON: {"schema": schema}},
    }
    return response | ({"headers": headers} if headers else {})


def _body(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    if operation.body is Backend:
        # as the file has it: there, too, nothing is null
        new = dict(json_schema()["$defs"]["Backend"])
        write = _without_references(shapes.Write)
        schemas["NewBackend"] = {**new, "properties": {**new["properties"], **write["properties"]}}
        return {"$ref": f"{_SCHEMAS}NewBackend"}
    reference = _schema(operation.body, schemas)
    schema = schemas[reference["$ref"].removeprefix(_SCHEMAS)]
    schema["additionalProperties"] = False
    if operation.needs_body and not schema.get("required"):
        asked = [key for key in schema["properties"] if key != "version"]
        schema["anyOf"] = [{"required": [key]} for key in asked]
    return reference


def _schema(shape: Any, schemas: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - a type, or a union
    """A reference to the schema of a type, which is put among the others; a union is spelt out."""
    schema = TypeAdapter(shape).json_schema(
        ref_template=f"{_SCHEMAS}{{model}}", mode="serialization", schema_generator=_Plain
    )
    schemas.update(schema.pop("$defs", {}))
    if "$ref" in schema or "anyOf" in schema:
        return schema
    name = str(schema["title"])
    schemas[name] = schema
    return {"$ref": f"{_SCHEMAS}{name}"}


def _without_references(shape: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a type
    return TypeAdapter(shape).json_schema(schema_generator=_Plain)


def _path_parameter(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": f"{_PARAMETERS[name]} Percent-encoded.",
        "schema": {"type": "string", "minLength": 1},
    }
