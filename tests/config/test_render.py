"""The effective configuration, written down, is the same configuration."""

import shutil
import tomllib
from pathlib import Path

import pytest

from expressgateway.config.load import load
from expressgateway.config.render import REDACTED, redacted, toml
from expressgateway.config.schema import Config
from expressgateway.config.starter import STARTER
from tests.config.material import write_certs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "config").rglob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_printed_files_load_to_the_same(example: Path, tmp_path: Path) -> None:
    write_certs(tmp_path)
    shutil.copy(example, tmp_path)
    first = load(tmp_path / example.name).config
    printed = tmp_path / "printed.toml"
    printed.write_text(toml(first), encoding="utf-8")
    second = load(printed).config
    assert second == first
    assert toml(second) == toml(first)


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(STARTER + f'\n[admin]\napi_token_hash = "{"ab" * 32}"\n', encoding="utf-8")
    printed = toml(load(path).config)
    assert "abab" not in printed
    assert tomllib.loads(printed)["admin"]["api_token_hash"] == "(redacted)"


ROUTE = """
[[listeners.routes]]
pool = "web"
match.path = "/a"
match.headers = { x-api-key = "hush-1", x-team = "blue" }
match.query = { access_token = "hush/2" }
headers = { request = { set = { authorization = "Basic hush-3" }, add = { x-monkey = "tree" } } }
[[listeners.routes]]
name = "hush-1"
match = { path = "/b", headers = { cookie = "hush-4" } }
pool = "web"
[[pools]]
name = "web"
backends = [{ address = "127.0.0.1:1" }]
"""


def test_credentials_of_routes_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[[listeners]]\nname = "web"\naddress = "127.0.0.1:1"\nprotocol = "h1"\n' + ROUTE)
    first, second = redacted(load(path).config)["listeners"][0]["routes"]
    assert first["match"]["headers"] == {"x-api-key": REDACTED, "x-team": "blue"}
    assert first["match"]["query"] == {"access_token": REDACTED}
    assert first["headers"]["request"]["set"] == {"authorization": REDACTED}
    assert first["headers"]["request"]["add"] == {"x-monkey": "tree"}
    assert "hush" not in first["name"], "which was made of what is matched"
    assert second["name"] == "hush-1", "which was given"
    assert second["match"]["headers"] == {"cookie": REDACTED}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@a.example/x", "http://(redacted)@a.example/x"),
        ("http://a.example/x@y", "http://a.example/x@y"),
        ("http://a.example?x=y@z", "http://a.example?x=y@z"),
    ],
)
def test_credentials_in_a_url(text: str, shown: str) -> None:
    document = {"listeners": [{"address": "127.0.0.1:1", "name": "web", "protocol": "h1"}]}
    redirect = {"match": {"path": "/"}, "redirect": {"to": text}}
    config = Config.model_validate({"listeners": [{**document["listeners"][0], "routes": [redirect]}]})
    assert redacted(config)["listeners"][0]["routes"][0]["redirect"]["to"] == shown


def test_strings_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(STARTER.replace('name = "web"', r"""name = 'a"b\c"ü'"""), encoding="utf-8")
    config = load(path).config
    assert tomllib.loads(toml(config))["listeners"][0]["name"] == config.listeners[0].name
