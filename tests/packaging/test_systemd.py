"""The systemd unit: verified by systemd's own tool, and its numbers held against the gateway's."""

import configparser
import subprocess
import sys
from pathlib import Path

from expressgateway.config.blocks import Runtime
from expressgateway.control.failures import EXIT_CONFIG
from expressgateway.control.notify import FDSTORE
from expressgateway.l4.xdp.faults import CAPABILITIES
from tests.e2e.harness import need, program
from tests.test_repository import ROOT

UNITS = ROOT / "ops" / "systemd"
INSTALLED = "/opt/expressgateway/bin/expressgateway"
MARGIN_S = 15
EXPOSURE = 20
"""Tenths of systemd's measure of what a service could do: 100 is everything, below 20 is well confined."""

needs_systemd = need("systemd-analyze")


class Unit(configparser.RawConfigParser):
    def __init__(self, name: str) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",))
        self.read(UNITS / name)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def copies(directory: Path) -> list[Path]:
    """The units, with a gateway that is there: a unit whose program is missing does not verify."""
    here = str(Path(sys.executable).with_name("expressgateway"))
    made = []
    for name in ("expressgateway.service", "expressgateway.socket"):
        made.append(directory / name)
        made[-1].write_text((UNITS / name).read_text().replace(INSTALLED, here))
    return made


def analyze(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [program("systemd-analyze"), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@needs_systemd
def test_the_units_verify(tmp_path: Path) -> None:
    assert analyze("verify", *copies(tmp_path)) == (0, "")


@needs_systemd
def test_a_mistake_in_a_unit_would_be_seen(tmp_path: Path) -> None:
    service, _ = copies(tmp_path)
    service.write_text(service.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    assert "ProtectClocks" in analyze("verify", service)[1]


@needs_systemd
def test_the_service_is_confined(tmp_path: Path) -> None:
    service, _ = copies(tmp_path)
    code, output = analyze("security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", service)
    assert code == 0, output


@needs_systemd
def test_the_drop_in_for_xdp_verifies(tmp_path: Path) -> None:
    service, socket = copies(tmp_path)
    drop_in = tmp_path / f"{service.name}.d" / "xdp.conf"
    drop_in.parent.mkdir()
    drop_in.write_text((UNITS / "xdp.conf").read_text())
    assert analyze("verify", service, socket) == (0, "")
    drop_in.write_text(drop_in.read_text().replace("ProcSubset", "ProcSubsets"))
    assert "ProcSubsets" in analyze("verify", service)[1]


def test_the_drop_in_for_xdp_has_what_a_start_asks_for() -> None:
    service = Unit("xdp.conf")["Service"]
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"]
    assert set(service["AmbientCapabilities"].split()) == set(CAPABILITIES)
    assert service["ReadWritePaths"] == str(Runtime().xdp_pin_path)


def test_the_drain_has_the_time_it_may_take() -> None:
    service, runtime = Unit("expressgateway.service")["Service"], Runtime()
    longest_s = (runtime.readiness_settle_ms + runtime.drain_timeout_ms) / 1000
    assert int(service["TimeoutStopSec"]) >= longest_s + MARGIN_S
    assert service["KillMode"] == "mixed"  # workers are told by the supervisor, not by systemd


def test_what_a_restart_cannot_mend_is_not_restarted() -> None:
    service = Unit("expressgateway.service")["Service"]
    assert service["RestartPreventExitStatus"] == str(EXIT_CONFIG)


def test_the_user_is_one_that_sysusers_makes() -> None:
    service = Unit("expressgateway.service")["Service"]
    lines = (UNITS / "expressgateway.sysusers.conf").read_text().splitlines()
    made = [line.split()[1] for line in lines if line.startswith("u ")]
    assert made == [service["User"]] == [service["Group"]]


def test_sockets_are_kept_and_an_upgrade_is_heard() -> None:
    service = Unit("expressgateway.service")["Service"]
    assert service["Environment"] == f"{FDSTORE}=1"
    assert int(service["FileDescriptorStoreMax"]) >= 1024
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "all")
