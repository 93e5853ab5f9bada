"""The effective configuration, written down, is the same configuration."""

import shutil
import tomllib
from pathlib import Path

import pytest

from expressgateway.config.load import load
from expressgateway.config.render import toml
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


def test_strings_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(STARTER.replace('name = "web"', r"""name = 'a"b\c"ü'"""), encoding="utf-8")
    config = load(path).config
    assert tomllib.loads(toml(config))["listeners"][0]["name"] == config.listeners[0].name
