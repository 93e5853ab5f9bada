"""The OpenAPI document: valid, made of the table, and true of what is answered."""

import asyncio
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from expressgateway.config.pools import Backend
from expressgateway.control.admin import shapes
from expressgateway.control.admin.api import Api, keys_of
from expressgateway.control.admin.backends import STATES
from expressgateway.control.admin.http import Request
from expressgateway.control.admin.openapi import document
from expressgateway.control.admin.resources import TABLE
from expressgateway.control.admin.table import ROOT
from expressgateway.control.reload import RESULTS
from expressgateway.observe.logs import LEVELS
from tests.control.changing import FakeGateway


def strict(schema: Any) -> Any:
    """The schema with nothing allowed that it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and isinstance(made.get("type"), str):
        made.setdefault("additionalProperties", False)
    return made


def test_it_is_valid() -> None:
    OpenAPIV31SpecValidator(document()).validate()


def test_it_has_every_operation_and_no_other() -> None:
    described = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method in methods
        if method != "parameters"
    }
    assert described == {("GET", "/events"), *((each.method, each.path) for each in TABLE)}


def test_the_guide_names_every_path() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "admin-api.md").read_text(encoding="utf-8")
    assert [each.path for each in TABLE if f"`{each.path}`" not in guide] == []


def test_words_are_those_of_the_code() -> None:
    assert get_args(shapes.Result) == RESULTS
    assert get_args(shapes.Level) == LEVELS
    assert get_args(shapes.Settable) == STATES


def test_a_new_backend_is_described_as_in_the_file() -> None:
    properties = document()["components"]["schemas"]["NewBackend"]["properties"]
    assert set(properties) == {*Backend.model_fields, "version"}
    assert "null" not in json.dumps(properties)


def test_bodies_have_the_keys_that_are_checked() -> None:
    for each in TABLE:
        if each.body is not None and (keys := keys_of(each)) is not None:
            name = document()["paths"][each.path][each.method.lower()]["requestBody"]["content"]
            reference = name["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert set(document()["components"]["schemas"][reference]["properties"]) == set(keys)


@pytest.mark.parametrize(
    "operation", [each for each in TABLE if not each.is_write], ids=lambda each: each.name
)
def test_what_is_shown_is_as_described(operation: Any) -> None:
    path = operation.path.replace("{pool}", "web").replace("{id}", "b1")
    response = asyncio.run(Api(FakeGateway()).answer(Request("GET", ROOT + path, {})))
    described = document()["paths"][operation.path]["get"]["responses"]["200"]
    schema = described["content"]["application/json"]["schema"]
    whole = strict({**schema, "components": document()["components"]})
    if "anyOf" in schema:  # either of two
        whole = {"$ref": "#/components/schemas/Backend", "components": whole["components"]}
    Draft202012Validator(whole).validate(json.loads(response.body))
    assert ("ETag" in response.headers) == ("headers" in described)
