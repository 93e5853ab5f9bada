"""The notes for those who come from nginx and HAProxy: keys that exist, examples that both programs take."""

import re
from pathlib import Path

import pytest

from expressgateway.config.availability import NOT_YET
from expressgateway.config.diagnose import blocks
from expressgateway.config.load import load
from expressgateway.config.schema import Config
from expressgateway.demo.certificate import make_certificate, write_certificate
from tests.e2e.harness import need, run
from tests.test_repository import ROOT

PAGES = {name: (ROOT / "docs" / f"migrating-from-{name}.md").read_text() for name in ("nginx", "haproxy")}


def keys() -> set[str]:
    """Every key of the schema, as a dotted path, and the value of choices: `listeners.protocol = "h1s"`."""
    return {f"{path}.{name}".lstrip(".") for path, block in blocks().items() for name in block.model_fields}


def rows(page: str) -> list[list[str]]:
    table = page.partition("<!-- keys:begin -->")[2].partition("<!-- keys:end -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def example(page: str, kind: str) -> str:
    found = re.search(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def choices(key: str) -> str:
    """The key's row in the generated reference, where its values stand."""
    path, _, name = key.rpartition(".")
    reference = (ROOT / "docs" / "configuration.md").read_text()
    heading = rf"^## [^\n]*`\[+{re.escape(path)}\]+`"
    place = re.search(rf"{heading}.*?(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL)
    assert place is not None, key
    return next(line for line in place[0].splitlines() if line.startswith(f"| `{name}` |"))


@pytest.mark.parametrize("name", PAGES)
def test_every_key_is_one_and_available(name: str) -> None:
    found = rows(PAGES[name])
    assert len(found) > 60
    known = keys()
    later = {one.key for one in NOT_YET if one.value is None}
    for cells in found:
        assert len(cells) == 3, cells
        told = re.findall(r"`([^`]+)`", cells[1])
        assert told or cells[1] == "none", cells
        for key, _, value in (one.partition(" = ") for one in told):
            assert key in known, cells
            assert not any(key == one or key.startswith(f"{one}.") for one in later), cells
            if value:
                assert f"`{value.strip(chr(34))}`" in choices(key), cells


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_one(name: str) -> None:
    from expressgateway.cli.backend_commands import backend
    from expressgateway.cli.main import main

    for words in re.findall(r"`expressgateway ((?:backend )?[a-z]+)", PAGES[name]):
        first, *rest = words.split()
        assert first in main.list_commands(None)  # type: ignore[arg-type]  # it needs no context
        assert not rest or rest[0] in backend.commands


@pytest.fixture
def site(tmp_path: Path) -> Path:
    made = write_certificate(tmp_path, make_certificate("www.example.com"), "server")
    (tmp_path / "server.pem").write_bytes(made.certificate.read_bytes() + made.key.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_our_example_is_valid(name: str, site: Path) -> None:
    path = site / "gateway.toml"
    path.write_text(example(PAGES[name], "toml"))
    loaded = load(path)
    assert isinstance(loaded.config, Config)
    assert loaded.warnings == ()


@need("nginx")
def test_nginx_takes_its_example(site: Path) -> None:
    path = site / "nginx.conf"
    # Debian's is older than `http2 on`.
    path.write_text("pid nginx.pid;\n" + example(PAGES["nginx"], "nginx").replace("http2 on;", ""))
    run("nginx", "-t", "-q", "-p", str(site), "-c", str(path))


@need("haproxy")
def test_haproxy_takes_its_example(site: Path) -> None:
    path = site / "haproxy.cfg"
    path.write_text(example(PAGES["haproxy"], "haproxy").replace("crt server.pem", f"crt {site}/server.pem"))
    run("haproxy", "-c", "-q", "-f", str(path))
