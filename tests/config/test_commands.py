"""`check`, `schema`, `init` and `hash-token` as an operator meets them; and the files they generate."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from expressgateway.cli.config_commands import check, hash_token, init, schema
from expressgateway.config.reference import markdown
from expressgateway.config.starter import STARTER
from tests.config.material import write_certs

ROOT = Path(__file__).parents[2]
BAD = '[[listeners]]\nadress = "127.0.0.1:80"\nprotocol = "h2"\n'


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


class TestCheck:
    def test_valid(self, runner: CliRunner) -> None:
        result = runner.invoke(check, [str(ROOT / "config/default.toml")])
        assert (result.exit_code, result.stdout, result.stderr) == (
            0,
            f"{ROOT}/config/default.toml is valid\n",
            "",
        )

    def test_invalid(self, runner: CliRunner, tmp_path: Path) -> None:
        path = tmp_path / "a.toml"
        path.write_text(BAD)
        result = runner.invoke(check, [str(path)])
        assert (result.exit_code, result.stdout) == (78, "")
        assert f'{path}:2:1: error: listeners[0].adress: unknown key "adress"' in result.stderr
        assert result.stderr.endswith("\n2 errors\n")

    @pytest.mark.parametrize(
        "name", ["file-same-names", "policy-not-importable", "runtime-tls-ciphers-one-unknown"]
    )
    def test_what_no_worker_could_start_with(self, name: str, runner: CliRunner, tmp_path: Path) -> None:
        write_certs(tmp_path)
        path = tmp_path / "a.toml"
        path.write_text((ROOT / f"tests/config/golden/{name}.toml").read_text())
        assert runner.invoke(check, [str(path)]).exit_code == 78

    def test_json(self, runner: CliRunner, tmp_path: Path) -> None:
        path = tmp_path / "a.toml"
        path.write_text(BAD)
        result = runner.invoke(check, ["--json", str(path)])
        assert result.exit_code == 78
        assert result.stderr == ""
        assert json.loads(result.stdout)[0] == {
            "file": str(path),
            "line": 2,
            "column": 1,
            "source_line": 'adress = "127.0.0.1:80"',
            "key": "listeners[0].adress",
            "message": 'unknown key "adress" in [[listeners]]',
            "hint": 'did you mean "address"?',
            "severity": "error",
        }

    def test_json_of_a_valid_file(self, runner: CliRunner) -> None:
        result = runner.invoke(check, ["--json", str(ROOT / "config/default.toml")])
        assert (result.exit_code, json.loads(result.stdout)) == (0, [])

    def test_print(self, runner: CliRunner) -> None:
        result = runner.invoke(check, ["--print", str(ROOT / "config/default.toml")])
        assert result.exit_code == 0
        assert tomllib.loads(result.stdout)["listeners"][0]["drain_timeout_ms"] == 10000

    def test_insecure_key_permissions(self, runner: CliRunner, tmp_path: Path) -> None:
        write_certs(tmp_path)
        path = tmp_path / "a.toml"
        path.write_text(
            (ROOT / "config/examples/h1s-websocket.toml")
            .read_text()
            .replace("certs/server.key", "certs/open.key")
        )
        assert runner.invoke(check, [str(path)]).exit_code == 78
        result = runner.invoke(check, ["--insecure-key-permissions", str(path)])
        assert result.exit_code == 0
        assert "warning: listeners[0].tls.key_path" in result.stderr

    @pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--nope", "a"], ["--json", "--print", "a"]])
    def test_usage(self, runner: CliRunner, arguments: list[str]) -> None:
        assert runner.invoke(check, arguments).exit_code == 2

    def test_missing_file(self, runner: CliRunner, tmp_path: Path) -> None:
        assert runner.invoke(check, [str(tmp_path / "none")]).exit_code == 78


class TestInit:
    def test_the_file_it_writes_is_valid(self, runner: CliRunner, tmp_path: Path) -> None:
        path = tmp_path / "a.toml"
        assert runner.invoke(init, [str(path)]).exit_code == 0
        assert runner.invoke(check, [str(path)]).exit_code == 0
        assert runner.invoke(init).stdout == path.read_text()

    def test_it_overwrites_nothing_unasked(self, runner: CliRunner, tmp_path: Path) -> None:
        path = tmp_path / "a.toml"
        path.write_text("mine")
        assert runner.invoke(init, [str(path)]).exit_code == 1
        assert path.read_text() == "mine"
        assert runner.invoke(init, ["--force", str(path)]).exit_code == 0
        assert path.read_text() == STARTER

    def test_what_it_shows_as_comments_is_valid_too(self, runner: CliRunner, tmp_path: Path) -> None:
        """Every commented line that looks like TOML, taken in."""
        write_certs(tmp_path)
        body = STARTER.split("\n\n", 1)[1]
        lines = [
            line.removeprefix("# ") if " = " in line or line.startswith("# [") else line
            for line in body.split("\n")
        ]
        path = tmp_path / "a.toml"
        path.write_text("\n".join(lines))
        result = runner.invoke(check, [str(path)])
        assert (result.exit_code, result.stderr) == (0, "")


class TestHashToken:
    def test_it_hashes_what_it_reads(self, runner: CliRunner) -> None:
        result = runner.invoke(hash_token, input="s3cret\n")
        assert (result.exit_code, result.stdout) == (0, hashlib.sha256(b"s3cret").hexdigest() + "\n")

    @pytest.mark.parametrize("token", ["", "\n", "a b", "ü", "a\nb\n"])
    def test_it_refuses_what_no_client_could_send(self, runner: CliRunner, token: str) -> None:
        assert runner.invoke(hash_token, input=token).exit_code == 2


class TestSchema:
    def test_json_schema_has_a_description_for_every_key(self, runner: CliRunner) -> None:
        document = json.loads(runner.invoke(schema).stdout)
        blocks = [document, *document["$defs"].values()]
        for value in (value for block in blocks for value in block["properties"].values()):
            # a description that is the same as its table's stands there
            table = document["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert value.get("description") or table.get("description")
        assert '"null"' not in json.dumps(document)
        assert document["properties"]["listeners"]["items"] == {"$ref": "#/$defs/Listener"}
        assert "listeners.http.compression" in document["x-not-available"]

    def test_the_reference_is_current(self, runner: CliRunner) -> None:
        """`expressgateway schema --markdown > docs/configuration.md`"""
        assert runner.invoke(schema, ["--markdown"]).stdout == markdown()
        assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == markdown()

    def test_the_default_file_is_the_starter(self) -> None:
        assert (ROOT / "config/default.toml").read_text(encoding="utf-8") == STARTER
