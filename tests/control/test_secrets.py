"""Secrets of session cookies: made once, for nobody else to read, kept, and refused when they are none."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import Loaded, load
from expressgateway.config.material import SECRET_BYTES
from expressgateway.control.channel import unpack_bytes
from expressgateway.control.failures import StartError
from expressgateway.control.secrets import OWN, Secrets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = """
[[listeners]]
name = "web"
address = "127.0.0.1:8080"
protocol = "h1"
pool = "p"
routes = [{{ match = {{ path = "/q" }}, pool = "q" }}]
[[pools]]
name = "p"
backends = [{{ address = "127.0.0.1:9" }}]
load_balancing = {{ policy = "session_affinity", cookie = {{ {one} }} }}
[[pools]]
name = "q"
backends = [{{ address = "127.0.0.1:9" }}]
load_balancing = {{ policy = "session_affinity", cookie = {{ {other} }} }}
"""


def loaded(directory: Path, one: str | None = None, other: str | None = None) -> Loaded:
    """A configuration with two cookies, whose secrets are in these files."""

    def cookie(path: str | None) -> str:
        return f'secret_path = "{path}"' if path is not None else ""

    file = directory / "gateway.toml"
    file.write_text(CONFIG.format(one=cookie(one), other=cookie(other)))
    return load(file)


def unpacked(packed: Mapping[str, str]) -> dict[str, bytes]:
    return {name: unpack_bytes(secret) for name, secret in packed.items()}


def test_made_once_and_for_nobody_else_to_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secrets = Secrets()
    before = os.umask(0)  # whatever that is
    try:
        found = unpacked(secrets.packed(loaded(tmp_path, str(path))))
    finally:
        os.umask(before)
    assert found[str(path)] == path.read_bytes()
    assert len(path.read_bytes()) == SECRET_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # Again, by a reload and by the next start:
    made = path.stat()
    assert unpacked(secrets.packed(loaded(tmp_path, str(path)))) == found
    assert unpacked(Secrets().packed(loaded(tmp_path, str(path))))[str(path)] == found[str(path)]
    assert path.stat().st_mtime_ns == made.st_mtime_ns


def test_one_of_its_own_for_every_start(tmp_path: Path) -> None:
    secrets = Secrets()
    first = unpacked(secrets.packed(loaded(tmp_path)))
    assert list(first) == [OWN]
    assert len(first[OWN]) == SECRET_BYTES
    assert unpacked(secrets.packed(loaded(tmp_path))) == first  # a reload ends no session
    assert unpacked(Secrets().packed(loaded(tmp_path))) != first


def test_two_cookies_of_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "secret")
    found = unpacked(Secrets().packed(loaded(tmp_path, path, path)))
    assert set(found) == {OWN, path}


def test_each_file_has_its_own(tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    found = unpacked(Secrets().packed(loaded(tmp_path, one, other)))
    assert len({found[OWN], found[one], found[other]}) == 3


def test_the_file_prevails_over_what_was_made(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secrets = Secrets()
    secrets.packed(loaded(tmp_path, str(path)))
    path.write_bytes(b"o" * SECRET_BYTES)
    assert unpacked(secrets.packed(loaded(tmp_path, str(path))))[str(path)] == b"o" * SECRET_BYTES


def test_one_that_was_made_is_kept_although_its_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secrets = Secrets()
    found = unpacked(secrets.packed(loaded(tmp_path, str(path))))
    path.unlink()
    assert unpacked(secrets.packed(loaded(tmp_path, str(path)))) == found


@pytest.mark.parametrize("size", [0, 1, SECRET_BYTES - 1, SECRET_BYTES + 1, 4096])
def test_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, str(path))
    (fault,) = raised.value.diagnostics
    assert f"has {size} bytes, not {SECRET_BYTES}" in fault.text()
    assert "remove the file to have a new one made" in fault.text()
    assert path.stat().st_size == size


def test_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(bytes(SECRET_BYTES))
    path.chmod(0o644)
    with pytest.raises(ConfigError):
        loaded(tmp_path, str(path))


@pytest.mark.parametrize("where", ["absent", "file", "link", "proc"])
def test_where_none_can_be_made(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    path = {
        "absent": tmp_path / "absent" / "secret",
        "file": tmp_path / "file" / "secret",
        "link": tmp_path / "dangling",
        "proc": "/proc/secret",  # a directory in which not even root makes files
    }[where]
    with pytest.raises(StartError) as raised:
        Secrets().packed(loaded(tmp_path, str(path)))
    said = str(raised.value)
    assert said.startswith(f"the secret {path} cannot be made: ")
    assert "choose another secret_path" in said
    assert not (tmp_path / "elsewhere").exists()


def test_one_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """By another gateway that starts at the same time."""
    path = tmp_path / "secret"
    found = loaded(tmp_path, str(path))
    path.write_bytes(b"t" * SECRET_BYTES)
    with pytest.raises(StartError, match="File exists"):
        Secrets().packed(found)
    assert path.read_bytes() == b"t" * SECRET_BYTES


def test_half_a_secret_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be refused at the next start."""
    path = tmp_path / "secret"
    found = loaded(tmp_path, str(path))

    def full(descriptor: int, *_: object, **__: object) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(StartError, match="No space left"):
        Secrets().packed(found)
    monkeypatch.undo()
    assert not path.exists()
