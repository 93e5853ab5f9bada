"""Which certificates can be renewed, and what keeps the others back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from expressgateway.config.load import Loaded, load
from expressgateway.control import renewal
from expressgateway.control.renewal import Renewal, read_again, units, with_files
from tests.config.material import certificate, key_pem, new_key, ocsp_response, write

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = """
[[listeners]]
name = "web"
address = "127.0.0.1:8443"
protocol = "h1s"
pool = "apps"
[listeners.tls]
cert_path = "a.pem"
key_path = "a.key"
ocsp_path = "a.ocsp"
certificates = [{ cert_path = "b.pem", key_path = "b.key" }]
client_auth = "optional"
client_ca_path = "clients.pem"

[[listeners]]
name = "h3"
address = "127.0.0.1:8443"
protocol = "quic"
pool = "apps"
quic = { cert_path = "a.pem", key_path = "a.key", retry_secret_path = "retry" }

[[pools]]
name = "apps"
[[pools.backends]]
address = "127.0.0.1:9"
id = "one"
tls = true
tls_ca_path = "ca.pem"
tls_cert_path = "c.pem"
tls_key_path = "c.key"
"""


class World:
    """A configuration in a directory, and what is read again of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in "abc":
            self.pair(name)
        for name in ("clients", "ca"):
            write(directory / f"{name}.pem", certificate(new_key()))
        self.staple()
        config = write(directory / "gateway.toml", CONFIG.encode())
        self.loaded: Loaded = load(config)

    def pair(self, name: str, *, host: str = "", days: float = 90, key_of: str = "") -> None:
        """Another pair under the same names. ``key_of``: with a key that is another's."""
        key = new_key()
        names = [x509.DNSName(host or f"{name}.example")]
        ends = datetime.now(UTC) + timedelta(days=days)
        begins = ends - timedelta(days=100)
        write(self.directory / f"{name}.pem", certificate(key, names=names, begins=begins, ends=ends))
        pem = (self.directory / f"{key_of}.key").read_bytes() if key_of else key_pem(key)
        self.key = key
        write(self.directory / f"{name}.key", pem)

    def staple(self, *, days: float = 3) -> None:
        """An OCSP response for ``a``, which was made last or is new."""
        self.pair("a")
        pem = (self.directory / "a.pem").read_bytes()
        ends = datetime.now(UTC) + timedelta(days=days)
        begins = ends - timedelta(days=10)
        write(self.directory / "a.ocsp", ocsp_response(pem, self.key, begins=begins, ends=ends))

    def read(self) -> Renewal:
        return read_again(self.loaded)

    def adopt(self, found: Renewal) -> None:
        self.loaded = replace(self.loaded, material=with_files(self.loaded, found.fresh))

    def running(self, name: str) -> bytes:
        return self.loaded.material.files[str(self.directory / name)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def names(found: Renewal) -> tuple[list[str], list[str]]:
    """What is renewed and what is kept, by the names of the first files."""
    return (
        [each.unit.name.rpartition("/")[2] for each in found.fresh],
        [each.unit.name.rpartition("/")[2] for each in found.kept],
    )


def test_units_are_what_shares_files(world: World) -> None:
    found = units(world.loaded.config)
    assert [unit.name.rpartition("/")[2] for unit in found] == [
        "a.pem",
        "b.pem",
        "c.pem",
        "clients.pem",
        "ca.pem",
    ]
    assert str(found[0]).endswith('a.pem" (listener web, listener h3)')
    assert str(found[2]).endswith('c.pem" (backend one of pool apps)')
    assert [path.rpartition("/")[2] for path in found[0].paths] == ["a.pem", "a.key", "a.ocsp"]


def test_nothing_new(world: World) -> None:
    assert world.read() == Renewal()


def test_one_is_renewed_and_nothing_else(world: World) -> None:
    before = world.loaded.material.files
    world.pair("b")
    found = world.read()
    assert names(found) == (["b.pem"], [])
    world.adopt(found)
    changed = {
        path.rpartition("/")[2] for path, data in world.loaded.material.files.items() if before[path] != data
    }
    assert changed == {"b.pem", "b.key"}
    assert world.read() == Renewal()


def test_a_bad_pair_keeps_the_old_one_and_the_others_are_renewed(world: World) -> None:
    world.pair("a", key_of="c")
    world.pair("b")
    world.pair("c")
    write(world.directory / "ca.pem", certificate(new_key()))
    found = world.read()
    assert names(found) == (["b.pem", "c.pem", "ca.pem"], ["a.pem"])
    assert "does not belong to the certificate" in found.kept[0].reason


def test_half_of_a_pair_is_kept_until_the_other_half_comes(world: World) -> None:
    old_key = (world.directory / "b.key").read_bytes()
    world.pair("b")
    new = (world.directory / "b.key").read_bytes()
    write(world.directory / "b.key", old_key)
    assert names(world.read()) == ([], ["b.pem"])
    write(world.directory / "b.key", new)
    assert names(world.read()) == (["b.pem"], [])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b""), "holds no PEM"),
        (lambda path: path.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n"), "holds no PEM"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    ],
    ids=["gone", "empty", "garbage", "directory"],
)
@pytest.mark.parametrize("name", ["b.pem", "b.key", "clients.pem"])
def test_files_that_cannot_be_used(world: World, spoil: object, reason: str, name: str) -> None:
    assert callable(spoil)
    spoil(world.directory / name)
    found = world.read()
    assert not found.fresh
    assert len(found.kept) == 1
    assert reason in found.kept[0].reason


def test_a_key_that_others_can_read(world: World) -> None:
    world.pair("b")
    (world.directory / "b.key").chmod(0o644)
    assert "can be read by group or others" in world.read().kept[0].reason
    allowed = read_again(world.loaded, insecure_key_permissions=True)
    assert (names(allowed), len(allowed.warnings)) == ((["b.pem"], []), 1)


def test_a_defect_in_reading_one_file_ends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("made for the test")

    world.pair("b")
    monkeypatch.setattr(renewal, "_expired", fail)
    assert "RuntimeError: made for the test" in world.read().kept[0].reason


class TestExpired:
    def test_is_no_successor_of_one_that_is_not(self, world: World) -> None:
        world.pair("b", days=-1)
        assert "expired on" in world.read().kept[0].reason

    def test_is_one_of_another(self, world: World) -> None:
        """Nothing is lost by it, and whoever replaced it knows why."""
        world.pair("b", days=-1)
        world.loaded = load(world.directory / "gateway.toml")
        world.pair("b", days=-0.5)
        found = world.read()
        assert names(found) == (["b.pem"], [])
        assert "expired on" in found.warnings[0]


class TestNames:
    """Of two certificates of a listener with the same names and the same kind of key, which shall it be?"""

    def test_that_another_has_already(self, world: World) -> None:
        world.pair("b", host="a.example")
        found = world.read()
        assert names(found) == ([], ["b.pem"])
        assert "for the same names" in found.kept[0].reason

    def test_that_a_later_one_has(self, world: World) -> None:
        """The one that has not changed is not to blame."""
        world.pair("a", host="b.example")
        assert names(world.read()) == ([], ["a.pem"])

    def test_that_were_swapped(self, world: World) -> None:
        world.pair("a", host="b.example")
        world.pair("b", host="a.example")
        assert names(world.read()) == (["a.pem", "b.pem"], [])

    def test_that_were_to_be_swapped_and_cannot(self, world: World) -> None:
        world.pair("a", host="b.example", key_of="c")
        world.pair("b", host="a.example")
        assert names(world.read()) == ([], ["a.pem", "b.pem"])


class TestStaples:
    def test_a_new_one(self, world: World) -> None:
        pem, key = (world.directory / "a.pem").read_bytes(), world.key
        write(world.directory / "a.ocsp", ocsp_response(pem, key))
        found = world.read()
        assert names(found) == (["a.pem"], [])
        assert found.fresh[0].is_staple

    def test_comes_with_its_certificate(self, world: World) -> None:
        world.staple()
        found = world.read()
        assert (names(found), found.fresh[0].is_staple) == ((["a.pem"], []), False)
        world.adopt(found)
        assert world.running("a.ocsp")

    def test_of_the_old_certificate_is_not_stapled_to_the_new_one(self, world: World) -> None:
        world.pair("a")
        found = world.read()
        assert names(found) == (["a.pem"], [])
        assert "about another certificate: it is not stapled" in found.warnings[0]
        world.adopt(found)
        assert world.running("a.ocsp") == b""
        assert world.running("a.pem") == (world.directory / "a.pem").read_bytes()

    def test_is_new_for_a_certificate_that_is_kept(self, world: World) -> None:
        pem, key = (world.directory / "a.pem").read_bytes(), world.key
        write(world.directory / "a.ocsp", ocsp_response(pem, key))
        world.pair("a", key_of="c")
        found = world.read()
        assert names(found) == (["a.pem"], ["a.pem"])
        assert found.fresh[0].is_staple

    @pytest.mark.parametrize("content", [None, b"", b"garbage"], ids=["gone", "empty", "garbage"])
    def test_what_is_none_ends_the_stapling(self, world: World, content: bytes | None) -> None:
        path = world.directory / "a.ocsp"
        path.unlink() if content is None else path.write_bytes(content)
        found = world.read()
        assert names(found) == (["a.pem"], [])
        assert len(found.warnings) == 1
        world.adopt(found)
        assert world.running("a.ocsp") == b""
        assert not world.read().fresh

    def test_that_has_run_out_is_no_reason_not_to_start(self, world: World) -> None:
        world.staple(days=-1)
        world.loaded = load(world.directory / "gateway.toml")
        assert "was good until" in world.loaded.warnings[0].text()
        assert world.running("a.ocsp") == b""
