"""Matches: ties against a reference, and names."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expressgateway.config.matches import Match, ties
from expressgateway.config.routes import Route
from expressgateway.config.schema import Config
from expressgateway.proxy.paths import normalise

VALUES = st.sampled_from("12")
PAIRS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)
MATCHES = st.fixed_dictionaries(
    {"headers": PAIRS, "query": PAIRS},
    optional={
        "host": st.sampled_from(["a", "*.a"]),
        "path_prefix": st.sampled_from(["/", "/a"]),
        "method": st.sampled_from(["GET", "PUT"]),
    },
).map(Match.model_validate)


def _agree(one: Mapping[str, str], two: Mapping[str, str]) -> bool:
    return all(two.get(name, value) == value for name, value in one.items())


def _tie(one: Match, two: Match) -> bool:
    return (
        (one.host, one.path_prefix, one.method) == (two.host, two.path_prefix, two.method)
        and len(one.headers) == len(two.headers)
        and len(one.query) == len(two.query)
        and _agree(one.headers, two.headers)
        and _agree(one.query, two.query)
    )


@settings(max_examples=200)
@given(st.lists(MATCHES, max_size=10))
def test_ties_are_those_found_by_comparing_all_pairs(matches: list[Match]) -> None:
    found = dict(ties(matches))
    for index, match in enumerate(matches):
        partners = {earlier for earlier in range(index) if _tie(matches[earlier], match)}
        assert (found[index] in partners) if partners else (index not in found)


@given(st.lists(MATCHES, max_size=6))
def test_names_differ_as_matches_do(matches: list[Match]) -> None:
    for one in matches:
        for two in matches:
            assert (one.text() == two.text()) is (one == two)


@pytest.mark.parametrize(
    ("match", "name"),
    [
        ({}, "*"),
        ({"host": "API.example.com.", "path_prefix": "/v1"}, "api.example.com/v1/*"),
        ({"host": "*.example.com"}, "*.example.com"),
        ({"host": "[0::1]"}, "[::1]"),
        ({"method": "GET", "path": "/x"}, "GET /x"),
        ({"path_regex": "^/re$"}, "~^/re$"),
        ({"path_prefix": "/"}, "/*"),
        ({"path_prefix": "/a/"}, "/a//*"),
        ({"path": "/a/*"}, "=/a/*"),
        ({"path": "/%61%2fb"}, "/a%2Fb"),
        ({"method": "PUT"}, "PUT"),
        ({"headers": {"X-B": "c d", "x-a": ""}}, "x-a: x-b:c%20d"),
        ({"path": "/", "query": {"b=": "ü", "a": "&"}}, "/ ?a=%26 ?b%3D=%C3%BC"),
    ],
)
def test_names_made_from_matches(match: dict[str, Any], name: str) -> None:
    assert Route.model_validate({"match": match, "respond": {"status": 200}}).name == name


def test_long_names_are_cut_and_still_differ() -> None:
    one, two = (Match(path="/" + "a" * 500 + last).text() for last in "xy")
    assert len(one) == len(two) == 128
    assert one != two


def test_a_name_of_its_own_may_have_blanks_and_survives_the_way_to_the_workers() -> None:
    for name in ({"name": "the shop"}, {}):
        route = Route.model_validate(
            {"match": {"method": "GET", "path": "/x"}, "respond": {"status": 200}} | name
        )
        assert Route.model_validate_json(route.model_dump_json()) == route


@pytest.mark.parametrize("text", ["(?=a)", r"(a)\1", "a*+", "(?:a{1000}){1000}", "[a-z]{0,900}" * 20, "("])
def test_an_expression_that_could_explode_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="cannot be used") as caught:
        Match(path_regex=text)
    assert "linear time" in caught.value.errors()[0]["ctx"]["hint"]


@settings(max_examples=50)
@given(st.text("/.%2eEfF61ab", max_size=12))
@example("/%2e")
@example("/a/%2e%2E/")
def test_a_path_that_is_accepted_is_in_normalised_form(text: str) -> None:
    try:
        path = Match(path=text).path
    except ValidationError:
        return
    assert path is not None
    assert normalise(path.encode()) == path.encode()


def test_thousands_of_routes_are_compared_quickly_enough_to_be_loaded() -> None:
    matches = [Match(path_prefix="/a", headers={"x-tenant": str(number)}) for number in range(5_000)]
    matches += [Match(path_prefix="/a", headers={"x-tenant": "7"})]
    assert list(ties(matches)) == [(5_000, 7)]


def test_the_example_of_the_documentation_loads() -> None:
    text = (Path(__file__).parents[2] / "docs" / "routes.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    routes = Config.model_validate(tomllib.loads(example)).listeners[0].routes
    assert [route.name for route in routes] == [
        "api.example.com/v1/*",
        "GET *.example.com/",
        "/shop/*",
        "/healthz",
    ]
