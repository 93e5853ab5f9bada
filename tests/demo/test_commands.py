"""The commands the demo prints. That they work is shown in tests/e2e/test_demo.py; here: straight at a
backend.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from expressgateway.demo.backends import HttpBackend, TcpEcho, UdpEcho
from expressgateway.demo.commands import Command, demo_commands
from expressgateway.demo.ports import Ports

# What can be tried without a gateway: its parts stand behind the same ports.
WITHOUT_GATEWAY = ("curl -i", "/echo", "/stream", "/slow", "WebSocket", "/dev/tcp/", "SOCK_DGRAM")


def commands(ports: Ports) -> list[Command]:
    return demo_commands(ports, 4711, Path("/tmp/x/demo.toml"), Path("/tmp/x/demo.crt"))


def test_each_is_one_line_to_read_and_something_to_paste() -> None:
    for title, command, shows in commands(Ports()):
        assert title
        assert "\n" not in title
        assert command
        assert shows
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_listener_and_the_supervisor_appear() -> None:
    text = "\n".join(command.command for command in commands(Ports()))
    for part in (
        "8080",
        "8443",
        "9000",
        "9443",
        "9053",
        "9090",
        "4711",
        "/tmp/x/demo.toml",
        "/tmp/x/demo.crt",
    ):
        assert part in text


@pytest.mark.parametrize("part", WITHOUT_GATEWAY)
def test_against_a_backend_itself(part: str) -> None:
    async def main() -> None:
        http, tcp, udp = HttpBackend("one"), TcpEcho(), UdpEcho()
        for server in (http, tcp, udp):
            await server.start()
        ports = Ports(http=http.address[1], tcp=tcp.address[1], udp=udp.address[1])
        try:
            chosen = [command for command in commands(ports) if part in command.command]
            assert chosen
            for command in chosen[:1]:
                process = await asyncio.create_subprocess_shell(
                    command.command, stdout=subprocess.PIPE, executable="/bin/bash"
                )
                output, _ = await asyncio.wait_for(process.communicate(), 30)
                assert command.shows in output.decode()
        finally:
            for server in (http, tcp, udp):
                await server.close()

    asyncio.run(main())


def test_the_reload_commands_change_one_backend_and_change_it_back(tmp_path: Path) -> None:
    config = tmp_path / "demo.toml"
    before = "weight = 1  # backend one\nweight = 1  # backend two\nweight = 1  # backend one\n"
    config.write_text(before)
    out, back = (command.command for command in demo_commands(Ports(), 1, config, config)[-2:])
    subprocess.run(["bash", "-c", out.partition(";")[0]], check=True)
    assert config.read_text() == before.replace("1  # backend one", "0  # backend one")
    subprocess.run(["bash", "-c", back.partition(";")[0]], check=True)
    assert config.read_text() == before
