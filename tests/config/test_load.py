"""Loading: files by their paths, permissions, what is kept, and what is not touched."""

import os
import shutil
from pathlib import Path

import pytest

from expressgateway.config.diagnose import ConfigError
from expressgateway.config.load import load
from expressgateway.config.starter import STARTER
from tests.config.material import write, write_certs

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "config").rglob("*.toml"))

H1S = """\
[[listeners]]
address = "127.0.0.1:8443"
protocol = "h1s"
backends = [{ address = "127.0.0.1:3000" }]

[listeners.tls]
cert_path = "certs/server.pem"
key_path = "certs/server.key"
"""


def config_file(directory: Path, text: str = H1S) -> Path:
    write_certs(directory)
    path = directory / "gateway.toml"
    path.write_text(text, encoding="utf-8")
    return path


def messages(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [diagnostic.message for diagnostic in caught.value.diagnostics]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load_without_a_warning(example: Path, tmp_path: Path) -> None:
    write_certs(tmp_path)
    shutil.copy(example, tmp_path)
    assert load(tmp_path / example.name).warnings == ()


def test_examples_of_this_version_are_there() -> None:
    names = {"tcp", "tls", "udp", "h1", "h1s", "h1s-websocket", "routes", "canary", "sticky", "hardened"}
    names |= {"default", "quic-h3", "xdp"}
    assert names <= {path.stem for path in EXAMPLES}


def test_so_is_the_path_of_the_access_log(tmp_path: Path) -> None:
    paths = {"": "stdout", 'path = "stdout"': "stdout", 'path = "a/b.log"': f"{tmp_path}/a/b.log"}
    paths['path = "/var/log/b.log"'] = "/var/log/b.log"
    for text, expected in paths.items():
        path = tmp_path / "a.toml"
        path.write_text(f"{STARTER}\n[observability.access_log]\n{text}\n")
        log = load(path).config.observability.access_log
        assert log is not None
        assert log.path == expected


def test_paths_are_those_of_the_file_not_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file(tmp_path / "etc")
    monkeypatch.chdir(tmp_path)
    loaded = load(Path("etc/gateway.toml"))
    tls = loaded.config.listeners[0].tls
    assert tls is not None
    assert tls.cert_path == tmp_path / "etc/certs/server.pem"
    assert sorted(loaded.material.files) == [str(tls.key_path), str(tls.cert_path)]
    assert loaded.material.files[str(tls.key_path)] == tls.key_path.read_bytes()


def test_material_never_shows_what_it_holds(tmp_path: Path) -> None:
    loaded = load(config_file(tmp_path))
    assert "PRIVATE" not in f"{loaded!r} {loaded.material}"
    assert repr(loaded.material) == "Material(2 files)"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_a_key_that_others_can_read_is_refused_or_warned_about(mode: int, tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "certs/server.key").chmod(mode)
    assert messages(path) == [
        f'the key "{tmp_path}/certs/server.key" can be read by group or others (mode {mode:04o})'
    ]
    (warning,) = load(path, insecure_key_permissions=True).warnings
    assert (warning.severity, warning.key) == ("warning", "listeners[0].tls.key_path")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_key_of_its_owner_is_fine(mode: int, tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "certs/server.key").chmod(mode)
    assert load(path).warnings == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "certs/server.pem").chmod(0)
    assert messages(path) == [f'the file "{tmp_path}/certs/server.pem" cannot be read: permission denied']


def test_a_file_that_is_refused_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, to whom nothing is refused."""
    path = config_file(tmp_path)
    open_any = Path.open

    def refuse(self: Path, mode: str = "r") -> object:
        if self.suffix == ".pem":
            raise PermissionError(13, "Permission denied")
        return open_any(self, mode)

    monkeypatch.setattr(Path, "open", refuse)
    assert messages(path) == [f'the file "{tmp_path}/certs/server.pem" cannot be read: permission denied']


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    (tmp_path / "certs/server.pem").unlink()
    os.mkfifo(tmp_path / "certs/server.pem")
    assert messages(path) == [f'"{tmp_path}/certs/server.pem" is not a regular file']


def test_a_weak_key_that_openssl_would_refuse_at_start(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from tests.config.material import _NOW

    path = config_file(tmp_path)
    key = rsa.generate_private_key(65537, 1024)
    name = x509.Name([])
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(_NOW).not_valid_after(_NOW.replace(year=_NOW.year + 1))
    write(tmp_path / "certs/server.pem", built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write(tmp_path / "certs/server.key", pem)
    (message,) = messages(path)
    assert "OpenSSL refuses" in message


def test_loading_writes_nothing(tmp_path: Path) -> None:
    path = config_file(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    load(path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


class TestTheFileItself:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "none.toml")
        assert str(caught.value) == (
            f"{tmp_path}/none.toml: error: the file does not exist\n"
            "  = hint: `expressgateway init FILE` writes one to start from"
        )

    def test_directory(self, tmp_path: Path) -> None:
        assert messages(tmp_path) == ["not a regular file"]

    def test_nested_beyond_reason(self, tmp_path: Path) -> None:
        assert messages(config_file(tmp_path, "a = " + "[" * 5000)) == [
            "arrays or tables are nested too deeply"
        ]

    def test_a_number_of_thousands_of_digits(self, tmp_path: Path) -> None:
        (message,) = messages(config_file(tmp_path, "a = " + "9" * 5000))
        assert message.startswith("not valid TOML")

    def test_too_large(self, tmp_path: Path) -> None:
        assert messages(config_file(tmp_path, "#" * (16 * 1024 * 1024 + 1))) == [
            "the file is larger than 16 MiB"
        ]
