"""The image definition: linted, and what it promises. It is not built: its base is not on every machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expressgateway.config.blocks import Runtime
from tests.e2e.harness import Gateway
from tests.ports import free_port
from tests.test_repository import ROOT

DEFINITION = ROOT / "ops" / "oci" / "Containerfile"
LINTER = Path(sys.executable).with_name("hadolint")


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, its lines joined."""
    lines = [line for line in DEFINITION.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def of_the_image(name: str) -> list[str]:
    """The arguments of the last stage's instructions of one name."""
    found = instructions()
    last = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return [arguments for word, arguments in found[last:] if word == name]


@pytest.mark.skipif(not LINTER.exists(), reason="needs hadolint")
def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run(
        [LINTER, "--failure-threshold", "style", DEFINITION], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_is_run_by_a_user_without_rights_and_stopped_by_draining() -> None:
    (user,) = of_the_image("USER")
    uid, _, gid = user.partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert of_the_image("STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(of_the_image("ENTRYPOINT")[0]) == ["expressgateway"]
    assert json.loads(of_the_image("CMD")[0]) == [f"{of_the_image('WORKDIR')[0]}/gateway.toml"]


def test_it_names_no_port_that_needs_rights() -> None:
    (ports,) = of_the_image("EXPOSE")
    assert all(int(port.partition("/")[0]) >= 1024 for port in ports.split())


def test_the_advised_stop_timeout_is_enough_for_the_default_drain() -> None:
    advised = re.search(r"--stop-timeout (\d+)", DEFINITION.read_text())
    runtime = Runtime()
    assert advised is not None
    assert int(advised[1]) * 1000 > runtime.readiness_settle_ms + runtime.drain_timeout_ms + 5000


def test_only_what_the_wheel_is_made_from_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    copied = {
        name
        for word, arguments in instructions()
        if word == "COPY" and not arguments.startswith("--from")
        for name in arguments.split()[:-1]
    }
    assert copied == {line[1:] for line in lines if line.startswith("!")}


def test_the_health_check_is_well_while_the_gateway_is_ready_and_only_then(tmp_path: Path) -> None:
    _, _, words = of_the_image("HEALTHCHECK")[0].partition("CMD ")
    command: list[str] = json.loads(words)
    routes = "routes = [{ respond = { status = 200 } }]"
    config = f"[[listeners]]\naddress = '127.0.0.1:{free_port()}'\nprotocol = 'h1'\n{routes}\n"
    gateway = Gateway(tmp_path, config)
    asked = [sys.executable, *(word.replace(":9090/", f":{gateway.admin}/") for word in command[1:])]
    assert f":{gateway.admin}/" in asked[-1]
    with gateway:
        assert subprocess.run(asked, capture_output=True, check=False, timeout=60).returncode == 0
    assert subprocess.run(asked, capture_output=True, check=False, timeout=60).returncode == 1
