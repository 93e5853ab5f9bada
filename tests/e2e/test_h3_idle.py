"""Thousands of idle HTTP/3 connections: what one costs in memory, and that they are all still there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.harness import eventually, resident_kib
from tests.e2e.quic_site import quic_site

CONNECTIONS: Final = 2000
KIB_EACH: Final = 60  # measured: 41; most of it in the library's core
ROOT: Final = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_idle_connections(tmp_path: Path) -> None:
    runtime = f"per_ip_connection_cap = {2 * CONNECTIONS}\n"
    with quic_site(tmp_path, runtime=runtime, quic="max_idle_timeout_ms = 600000") as site:
        (pid,) = site.gateway.worker_pids()
        with site.client() as client:
            assert client.begun().get()[1] == b"backend"
        before = resident_kib(pid)
        load = [sys.executable, "-m", "bench.h3_load", "127.0.0.1", str(site.port), "/", "--idle"]
        with subprocess.Popen(
            [*load, "--connections", str(CONNECTIONS), "--seconds", "2"], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == {"open": CONNECTIONS}
            assert site.gateway.metric("connections_inflight", listener="web") == CONNECTIONS
            each = (resident_kib(pid) - before) / CONNECTIONS
            with site.client() as client:
                assert client.begun().get()[1] == b"backend"
            assert json.loads(process.stdout.read())["errors"] == 0, "all were there to the end"
        assert process.returncode == 0
        assert each < KIB_EACH, f"{each:.1f} KiB a connection"
        eventually(
            lambda: site.gateway.metric("connections_inflight", listener="web") == 0, "all closes were heard"
        )
