"""Policies of others: what `check` says of them is what a worker would meet."""

import sys
from pathlib import Path

import pytest

from expressgateway.config import policies
from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import load
from expressgateway.upstream.selection import SelectionError, find_policy

FAIR = """
print("hello \x1e from an import")

class Fair:
    def __init__(self, backends): ...
    def pick(self, key): ...
    def others(self, picked): ...
    def rebuilt(self, backends): ...
"""

CONFIG = """
[[listeners]]
address = "127.0.0.1:8080"
protocol = "h1"
backends = [{{ address = "127.0.0.1:3000" }}]
load_balancing.policy = "{policy}"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which Python looks for modules, though not this process."""
    directory = tmp_path / "lib"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return directory


def verdict(directory: Path, policy: str) -> str:
    path = directory / "gateway.toml"
    path.write_text(CONFIG.format(policy=policy))
    try:
        assert load(path).warnings == ()
    except ConfigError as error:
        (found,) = error.diagnostics
        assert (found.key, found.line) == ("listeners[0].load_balancing.policy", 6)
        return found.message
    return "valid"


def test_a_policy_that_can_be_had(package: Path, tmp_path: Path) -> None:
    (package / "eg_fair.py").write_text(FAIR)
    assert verdict(tmp_path, "eg_fair:Fair") == "valid"


def test_it_is_not_imported_here(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "eg_fair.py").write_text(FAIR)
    monkeypatch.syspath_prepend(package)
    assert verdict(tmp_path, "eg_fair:Fair") == "valid"
    assert "eg_fair" not in sys.modules


def test_the_current_directory_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do not search it either, however the gateway was started."""
    (tmp_path / "eg_here.py").write_text(FAIR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert verdict(tmp_path, "eg_here:Fair").endswith("ModuleNotFoundError: No module named 'eg_here'")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Fair = 1", "is not callable"),
        ("def Fair(backends): return 1", "has no pick and no others and no rebuilt"),
        ("class Fair: ...", "fails without backends: TypeError: Fair() takes no arguments"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("def", "cannot be imported: SyntaxError"),
        ("raise ValueError('a\\x1b[31m\\nb' + 'x' * 9999)", "cannot be imported: ValueError: a [31m bx"),
        ("raise SystemExit(0)", "ends the process that imports it"),
        ("import os; os._exit(0)", "ends the process that imports it"),
        ("import os; os.abort()", "ends the process that imports it"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(text: str, told: str, package: Path, tmp_path: Path) -> None:
    (package / "eg_bad.py").write_text(text)
    message = verdict(tmp_path, "eg_bad:Fair")
    assert told in message
    assert message.startswith("the balancing policy 'eg_bad:Fair'")
    assert message.isprintable()
    assert len(message) <= 300


def test_an_import_that_hangs(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "eg_slow.py").write_text("import threading; threading.Event().wait()")
    monkeypatch.setattr(policies, "PATIENCE_S", 0.5)
    assert verdict(tmp_path, "eg_slow:Fair").endswith("is not imported within 0.5 seconds")


def test_one_policy_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def note(policy: str, _: object) -> str:
        tried.append(policy)
        return ""

    monkeypatch.setattr(policies, "_try", note)
    path = tmp_path / "gateway.toml"
    text = CONFIG.format(policy="a:B")
    path.write_text(text + text.replace("8080", "8081") + text.replace("8080", "8082").replace("a:B", "ewma"))
    load(path)
    assert tried == ["a:B"]


@pytest.mark.parametrize("policy", ["os:sep", "no_such_package:X", "collections:OrderedDict"])
def test_workers_say_the_same(policy: str, tmp_path: Path) -> None:
    with pytest.raises(SelectionError) as caught:
        find_policy(policy)
    assert verdict(tmp_path, policy) == str(caught.value)
