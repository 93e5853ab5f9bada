"""The command line: the default command, usage errors, and commands that ask a running gateway."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from expressgateway import __version__
from expressgateway.cli.admin_client import TOKEN_VARIABLE
from expressgateway.cli.main import main
from expressgateway.control import supervisor
from expressgateway.control.supervisor import Options
from tests.control.gateway import Gateway
from tests.ports import free_port


def call(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), env=env)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What would have been run."""
    found: list[tuple[str, bool]] = []

    def run(path: Path, options: Options) -> int:
        found.append((str(path), options.insecure_key_permissions))
        return 0

    monkeypatch.setattr(supervisor, "run", run)
    return found


class TestRun:
    @pytest.mark.parametrize(
        ("arguments", "path", "insecure"),
        [
            ([], "config/default.toml", False),
            (["x.toml"], "x.toml", False),
            (["run", "x.toml"], "x.toml", False),
            (["run"], "config/default.toml", False),
            (["--insecure-key-permissions", "x.toml"], "x.toml", True),
            (["./check"], "check", False),
        ],
    )
    def test_default_command(
        self, runs: list[tuple[str, bool]], arguments: list[str], path: str, insecure: bool
    ) -> None:
        assert call(*arguments).exit_code == 0
        assert runs == [(path, insecure)]

    def test_exit_code_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervisor, "run", lambda path, options: 78)
        assert call("x.toml").exit_code == 78


class TestUsage:
    def test_misspelt_command(self) -> None:
        result = call("chek", "x.toml")
        assert result.exit_code == 2
        assert "'chek' is neither a command nor a file. Did you mean 'check'?" in result.output

    @pytest.mark.parametrize("arguments", [["--no-such-option"], ["x.toml", "y.toml"], ["status", "--no"]])
    def test_usage_errors_exit_2(self, arguments: list[str]) -> None:
        assert call(*arguments).exit_code == 2

    def test_version(self) -> None:
        result = call("--version")
        assert result.exit_code == 0
        assert result.output == f"expressgateway {__version__}\n"

    def test_help_names_every_command(self) -> None:
        result = call("--help")
        assert result.exit_code == 0
        for name in (
            "run",
            "check",
            "status",
            "config",
            "reload",
            "upgrade",
            "drain",
            "certificates",
            "log-level",
            "backend",
            "demo",
        ):
            assert f"  {name} " in result.output

    def test_as_a_module(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "expressgateway", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"expressgateway {__version__}\n"

    def test_command_line_alone_imports_little(self) -> None:
        script = (
            "import sys, expressgateway.cli.main as m; m.main(['--version'], standalone_mode=False);"
            "print([n for n in ('asyncio', 'pydantic', 'prometheus_client') if n in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n")


@pytest.mark.slow
class TestStatus:
    def test_of_a_running_gateway(self, tmp_path: Path) -> None:
        with Gateway(tmp_path, workers=2) as gateway:
            result = call("status", str(gateway.path))
            assert result.exit_code == 0
            assert f"serving, pid {gateway.process.pid}" in result.output
            assert f"127.0.0.1:{gateway.web}" in result.output
            assert '"state": "serving"' in call("status", str(gateway.path), "--json").output
            assert call("status", "--admin", f"127.0.0.1:{gateway.admin}", "absent.toml").exit_code == 0

    def test_token(self, tmp_path: Path) -> None:
        digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
        with Gateway(tmp_path, admin_block=f'[admin]\napi_token_hash = "{digest}"') as gateway:
            path = str(gateway.path)
            result = call("status", path, env={TOKEN_VARIABLE: "wrong"})
            assert result.exit_code == 1
            assert TOKEN_VARIABLE in result.output
            assert call("status", path, env={TOKEN_VARIABLE: "secret"}).exit_code == 0
            assert gateway.get("/metrics")[0] == 401
            assert gateway.get("/metrics", Authorization="Bearer secret")[0] == 200
            assert gateway.get("/readyz")[0] == 200
            text = gateway.get("/metrics", Authorization="Bearer secret")[1]
            assert 'admin_rejects_total{reason="unauthorized"} 2.0' in text
            assert 'admin_rejects_total{reason="timeout"} 0.0' in text
            assert gateway.wait_log("no valid token")["source"] == "127.0.0.1"

    def test_nobody_there(self, tmp_path: Path) -> None:
        path = tmp_path / "x.toml"
        path.write_text(f'[observability]\nmetrics_bind = "127.0.0.1:{free_port()}"\n')
        result = call("status", str(path))
        assert result.exit_code == 1
        assert "does not answer" in result.output

    @pytest.mark.parametrize(
        ("text", "words"),
        [("", "has no observability.metrics_bind"), ("x =", "not valid TOML"), (None, "cannot be read")],
    )
    def test_file_that_does_not_say(self, tmp_path: Path, text: str | None, words: str) -> None:
        path = tmp_path / "x.toml"
        if text is not None:
            path.write_text(text)
        result = call("status", str(path))
        assert result.exit_code == 1
        assert words in result.output


@pytest.mark.slow
class TestReload:
    def test_results_and_exit_codes(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            path = str(gateway.path)
            result = call("reload", path)
            assert (result.exit_code, "reload unchanged" in result.output) == (0, True)
            gateway.write(whim="other")
            result = call("reload", path)
            assert result.exit_code == 0
            assert "swapped: listener web (http.server_header)" in result.output
            assert "reload applied: configuration 2 is in force" in result.output
            gateway.write(whim="cannot-apply")
            result = call("reload", path)
            assert result.exit_code == 1
            assert "this worker cannot apply that" in result.output
            gateway.write(listener="unknown = 1")
            result = call("reload", path)
            assert result.exit_code == 78
            assert 'unknown key "unknown"' in result.output
            assert "configuration 2 is in force" in result.output

    def test_other_file_than_the_running_one(self, tmp_path: Path) -> None:
        with Gateway(tmp_path) as gateway:
            other = tmp_path / "other.toml"
            other.write_bytes(gateway.path.read_bytes())
            result = call("reload", str(other))
            assert result.exit_code == 1
            assert f"the gateway runs with {gateway.path}" in result.output
            assert gateway.status()["reload"]["requested"] == 0

    def test_needs_no_rights_to_signal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(pid: int, number: int) -> None:
            raise PermissionError

        with Gateway(tmp_path) as gateway, monkeypatch.context() as patched:
            patched.setattr(os, "kill", refuse)
            result = call("reload", str(gateway.path))
            patched.undo()
            assert (result.exit_code, result.output.splitlines()[-1]) == (
                0,
                "reload unchanged: configuration 1 is in force",
            )
            assert gateway.status()["reload"]["finished"] == 1
