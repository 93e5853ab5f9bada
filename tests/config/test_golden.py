"""Bad file in, exact diagnostics out: `golden/NAME.toml` and `golden/NAME.txt`.

`UPDATE_GOLDEN=1 pytest tests/config/test_golden.py` writes the expected texts anew; read every one that
changed. Files that load give their warnings, or `valid`. `@CERTS@` in the expected text is the directory of
the certificates that the test makes.

Files named `contract-*` hold the rules of what this version refuses altogether: they are judged as if it did
not.
"""

import os
import shutil
from pathlib import Path

import pytest

from expressgateway.config import availability
from expressgateway.config.diagnose import ConfigError, report
from expressgateway.config.load import load
from tests.config.material import write_certs

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.toml"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    write_certs(directory)
    return directory


def _outcome(path: Path) -> str:
    try:
        loaded = load(path)
    except ConfigError as error:
        return report(error.diagnostics) + "\n"
    return (report(loaded.warnings) or "valid") + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("contract-"):
        monkeypatch.setattr(availability, "_ROWS", {})
    path = directory / f"{name}.toml"
    shutil.copy(GOLDEN / path.name, path)
    outcome = _outcome(path).replace(f"{directory}/certs", "@CERTS@").replace(f"{directory}/", "")
    expected = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(outcome, encoding="utf-8")
    assert outcome == expected.read_text(encoding="utf-8")


def test_there_are_enough() -> None:
    assert len(NAMES) >= 70
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == NAMES
