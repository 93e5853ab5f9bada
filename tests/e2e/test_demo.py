"""`expressgateway demo` as a newcomer meets it: every command it prints is run, and shows what it should."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from expressgateway.demo.app import Demo
from expressgateway.demo.ports import Ports
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "curl", "openssl", "python3"))),
        reason="needs bash, curl, openssl and python3",
    ),
]


async def shell(command: str) -> str:
    process = await asyncio.create_subprocess_shell(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, executable="/bin/bash"
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode(errors="replace")


def test_every_printed_command_shows_what_it_promises() -> None:
    async def main() -> None:
        ports = Ports(*(free_port() for _ in fields(Ports)))
        async with Demo(ports) as demo:
            for title, command, shows in demo.commands:
                output = await shell(command)
                assert shows in output, f"{title}\n{command}\n{output}"
                if "take backend one out" in title:
                    assert "This is backend one" not in output
        assert await demo.wait() == 0

    asyncio.run(main())


def test_it_prints_them_and_ends_cleanly_on_ctrl_c() -> None:
    code = f"import sys; from expressgateway.demo.app import run_demo; sys.exit(run_demo({free_port()}))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        page = ""
        for line in process.stdout:
            page += line
            if line == "Ctrl-C ends it.\n":
                break
        assert page.endswith("Ctrl-C ends it.\n"), page
        found = re.search(r"^Configuration: (\S+)", page, re.MULTILINE)
        assert found is not None
        assert Path(found[1]).exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not Path(found[1]).parent.exists()
