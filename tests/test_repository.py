"""What holds for the repository as a whole: licence, version, links, and that it names no one's machine."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}
# A home directory. Written so that it does not find itself.
MACHINE = re.compile(rb"(?<![\w.~-])/(?:root|home/\w+)/[\w.]")
# Written by the system's own layout, where the reader's machine has the same path.
ALLOWED: dict[str, str] = {}


def tracked() -> list[Path]:
    """The files of the repository; without git, what is there and was not generated."""
    git = shutil.which("git")
    listed = git and subprocess.run(
        [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    if listed and listed.returncode == 0:
        paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not GENERATED & set(path.parts)]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in tracked():
        content = path.read_bytes()
        name = path.relative_to(ROOT).as_posix()
        if b"\0" in content[:1024] or name in ALLOWED:
            continue
        for number, line in enumerate(content.split(b"\n"), 1):
            if MACHINE.search(line):
                found.append(f"{name}:{number}: {line.decode(errors='replace').strip()[:80]}")
    assert found == []


@pytest.mark.parametrize(
    "text", ["see ~root/tree/x", "'~root/.cache'", "=~home/someone/src", "(~root/.x)", "~root/x"]
)
def test_such_a_path_is_seen(text: str) -> None:
    assert MACHINE.search(text.replace("~", "/").encode())


@pytest.mark.parametrize(
    "text", [b"the worker/root of it", b"/workers/1", b"https://a.test/x/root/y", b"/root"]
)
def test_other_paths_are_no_fault(text: bytes) -> None:
    assert not MACHINE.search(text)


def test_the_licence_is_gpl_3() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("GNU GENERAL PUBLIC LICENSE")
    assert "Version 3, 29 June 2007" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "GPL-3.0-only"


def test_the_changelog_begins_with_the_version() -> None:
    path = ROOT / "CHANGELOG.md"
    if not path.exists():
        pytest.skip("there is no CHANGELOG.md yet")
    match = re.search(r"^##\s+\[?v?(\d+\.\d+\.\d+[^\]\s]*)", path.read_text(), re.MULTILINE)
    assert match is not None, "CHANGELOG.md has no entry with a version"
    assert match[1] == project()["version"]


def test_the_package_says_the_same_version() -> None:
    from expressgateway import __version__

    assert __version__ == project()["version"]


def test_the_readme_tells_how_to_begin() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("run", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_relative_link_of_the_documents_leads_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in tracked()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists()
    ]
    assert broken == []


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    documents = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert [name for name in sorted(documents) if f"]({name})" not in index] == []


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, object] = tomllib.load(file)["project"]
    return table
