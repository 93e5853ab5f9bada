"""The wheel and the source distribution: made from the tree, installed where nothing else is, and run.

Dependencies come from the package index, as the wheel's own metadata asks for them; without an index the
test is skipped by name.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.e2e.harness import Backend, Client, Gateway, listener
from tests.ports import free_port
from tests.test_repository import ROOT, project, tracked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the index may be far away

# The tests' own paths must not lead the new environment back to the tree.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
SHIPPED = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
}
SHIPPED_FOLDERS = {"config", "docs", "ops", "src"}
MADE = {"PKG-INFO", "setup.cfg"}
"""What setuptools writes into a source distribution."""


def finish(*command: str | Path, cwd: Path | None = None) -> str:
    """Run to the end; both outputs. Skips where only the package index was missing."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, check=False, cwd=cwd, env=CLEAN
    )
    output = done.stdout + done.stderr
    if done.returncode and "Failed to establish a new connection" in output and CLEAN.get("CI") != "true":
        pytest.skip("needs the package index")
    assert done.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with both distributions; the wheel is made from the source distribution."""
    tree = tmp_path_factory.mktemp("tree")
    for path in tracked():
        if path.is_symlink():
            continue
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    output = tmp_path_factory.mktemp("dist")
    finish(sys.executable, "-m", "build", "--outdir", output, tree)
    return output


def test_the_source_distribution_has_what_builds_and_explains_it_and_nothing_else(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if "egg-info/" not in name} - MADE
    files = {path.relative_to(ROOT).as_posix() for path in tracked()}
    assert names == {file for file in files if file in SHIPPED or file.split("/")[0] in SHIPPED_FOLDERS}


def test_the_wheel_has_every_file_of_the_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    package = {
        path.relative_to(ROOT / "src").as_posix() for path in tracked() if ROOT / "src" in path.parents
    }
    assert "expressgateway/py.typed" in package
    assert package == {name for name in names if ".dist-info/" not in name}


def test_the_wheel_runs_in_an_empty_environment(built: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python, command = place / "bin" / "python", place / "bin" / "expressgateway"
    wheel = next(built.glob("*.whl"))
    finish(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel)
    assert finish(python, "-c", "import expressgateway; print(expressgateway.__file__)").startswith(
        str(place)
    )
    assert finish(command, "--version") == f"expressgateway {project()['version']}\n"

    start = tmp_path / "gateway.toml"
    start.write_text(finish(command, "init"))
    finish(command, "check", start)

    port = free_port()
    with Backend() as backend:
        gateway = Gateway(tmp_path, listener(port, backend))
        gateway.interpreter = str(python)
        gateway.environment = {**CLEAN, "LB_LOG_FORMAT": "json", "LB_LOG_LEVEL": "info"}
        with gateway, Client(port) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            assert client.response()[::2] == (200, b"backend")
        assert gateway.process.returncode == 0, gateway.log()
    run_the_demo(command)


def run_the_demo(command: Path) -> None:
    with subprocess.Popen(
        [command, "demo", "--port", str(free_port())], stdout=subprocess.PIPE, text=True, env=CLEAN
    ) as process:
        assert process.stdout is not None
        page = ""
        for line in process.stdout:
            page += line
            if line == "Ctrl-C ends it.\n":
                break
        assert re.search(r"^Configuration: \S+", page, re.MULTILINE), page
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
