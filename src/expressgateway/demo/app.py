"""`expressgateway demo`: a gateway with something behind it, and the commands to try it with.

`Demo` starts the backends in this process, makes a certificate, writes a configuration into a temporary
directory, and starts the real program on it, as an operator would. What it prints comes from
`Demo.commands`, so that a test can run every line that is shown.

This module refuses to know anything about the gateway but its command line, its configuration format, its
signals and its admin listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TextIO

from expressgateway.demo.backends import BACKEND_NAMES, DemoBackends
from expressgateway.demo.certificate import CertificateFiles, make_certificate, write_certificate
from expressgateway.demo.commands import demo_commands
from expressgateway.demo.ports import Ports

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expressgateway.demo.commands import Command

__all__ = ["Demo", "DemoError", "run_demo"]

READY_TIMEOUT_S: Final = 60.0
READY_POLL_S: Final = 0.05
STOP_TIMEOUT_S: Final = 30.0
HOST: Final = "127.0.0.1"
PROGRAM: Final = (sys.executable, "-m", "expressgateway")

CONFIG: Final = """\
# The demo's configuration. After a change, send the supervisor SIGHUP: the demo has printed the command.

[[listeners]]
name = "http"
address = "{host}:{ports.http}"
protocol = "h1"
websocket = {{ enabled = true }}
{http_backends}
[[listeners]]
name = "https"
address = "{host}:{ports.https}"
protocol = "h1s"
tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}
alt_svc = {{ h3_port = {ports.h3} }}
websocket = {{ enabled = true }}
{http_backends}
[[listeners]]
name = "http3"
address = "{host}:{ports.h3}"
protocol = "quic"
websocket = {{ enabled = true, h3_extended_connect = true }}
{http_backends}
[listeners.quic]
cert_path = "{files.certificate}"
key_path = "{files.key}"
retry_secret_path = "{files.key.parent}/retry.secret"

[[listeners]]
name = "tcp"
address = "{host}:{ports.tcp}"
protocol = "tcp"
{tcp_backends}
[[listeners]]
name = "tls"
address = "{host}:{ports.tls}"
protocol = "tls"
tls = {{ cert_path = "{files.certificate}", key_path = "{files.key}" }}
{tcp_backends}
[[listeners]]
name = "udp"
address = "{host}:{ports.udp}"
protocol = "udp"
{udp_backends}
[runtime]
workers = 2
readiness_settle_ms = 0  # nobody watches the demo's readiness: stop at once
drain_timeout_ms = 2000
drain_jitter_ms = 0

[observability]
metrics_bind = "{host}:{ports.admin}"
"""


class DemoError(Exception):
    """The demo cannot go on. The text is a sentence for whoever started it."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Demo:
    """Backends, certificate, configuration and a running gateway, as an async context that cleans up."""

    def __init__(self, ports: Ports, program: Sequence[str] = PROGRAM) -> None:
        self.ports = ports
        self._program = program
        self._stack = contextlib.AsyncExitStack()
        self._gateway: asyncio.subprocess.Process | None = None
        self.directory = Path()
        self.files = CertificateFiles(Path(), Path())

    @property
    def config_path(self) -> Path:
        """The file the gateway was started with."""
        return self.directory / "demo.toml"

    @property
    def pid(self) -> int:
        """The supervisor's process id. Raises RuntimeError before it is started."""
        return self._started().pid

    async def __aenter__(self) -> Self:
        """Start everything, and wait until the gateway serves. Raises DemoError."""
        try:
            directory = tempfile.TemporaryDirectory(prefix="expressgateway-demo-")
            self.directory = Path(self._stack.enter_context(directory))
            self.files = write_certificate(self.directory, make_certificate("localhost"))
            backends = await self._stack.enter_async_context(DemoBackends())
            self.config_path.write_text(self._config(backends))
            self._gateway = await asyncio.create_subprocess_exec(
                *self._program,
                str(self.config_path),
                env={"LB_LOG_FORMAT": "text", **os.environ},
                # A Ctrl-C reaches the terminal's whole group; the gateway is to get it once, from us.
                process_group=0,
            )
            self._stack.push_async_callback(self._stop)
            await self._wait_until_ready()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def signal(self, number: int) -> None:
        """Pass a signal on to the gateway, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            self._started().send_signal(number)

    async def wait(self) -> int:
        """Until the gateway ends: its exit code, or 128 and the signal's number, as a shell has it."""
        code = await self._started().wait()
        return code if code >= 0 else 128 - code

    def _started(self) -> asyncio.subprocess.Process:
        if self._gateway is None:
            raise RuntimeError("the demo is not started")
        return self._gateway

    async def _stop(self) -> None:
        process = self._started()
        if process.returncode is None:
            self.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _wait_until_ready(self) -> None:
        process = self._started()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._is_ready():
                    if process.returncode is not None:
                        raise DemoError("The gateway ended before it was ready.", await self.wait() or 1)
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise DemoError(f"The gateway was not ready after {READY_TIMEOUT_S:g} seconds.") from None

    async def _is_ready(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(HOST, self.ports.admin)
            with contextlib.closing(writer):
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status = await reader.readline()
        except (OSError, ValueError):
            return False
        return status.split(b" ")[1:2] == [b"200"]

    @property
    def commands(self) -> list[Command]:
        """What is printed to be pasted."""
        return demo_commands(self.ports, self.pid, self.config_path, self.files.certificate)

    def _config(self, backends: DemoBackends) -> str:
        return CONFIG.format(
            host=HOST,
            ports=self.ports,
            files=self.files,
            http_backends=_backends([server.address for server in backends.http], 'protocol = "h1"\n'),
            tcp_backends=_backends([server.address for server in backends.tcp]),
            udp_backends=_backends([server.address for server in backends.udp]),
        )


def _backends(addresses: Sequence[tuple[str, int]], protocol: str = "") -> str:
    return "".join(
        f'[[listeners.backends]]\naddress = "{host}:{port}"\n{protocol}weight = 1  # backend {name}\n'
        for name, (host, port) in zip(BACKEND_NAMES, addresses, strict=True)
    )


async def _run(ports: Ports, out: TextIO, program: Sequence[str]) -> int:
    loop = asyncio.get_running_loop()
    demo = Demo(ports, program)
    main = asyncio.current_task()

    def stop(number: int) -> None:
        if started:
            # A second signal is passed on as well: the gateway then ends at once.
            demo.signal(number)
        elif main is not None and not main.cancelling():
            # While it is starting there is nothing to drain: leave, and let the context clean up.
            main.cancel()

    started = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A closed terminal ends the demo; to the gateway itself SIGHUP would mean a reload.
        passed_on = signal.SIGTERM if number == signal.SIGHUP else number
        loop.add_signal_handler(number, stop, passed_on)
    try:
        async with demo:
            started = True
            out.write(_page(demo))
            out.flush()
            return await demo.wait()
    except DemoError as error:
        out.write(f"{error}\n")
        return error.exit_code
    except asyncio.CancelledError:
        return 0


def _page(demo: Demo) -> str:
    lines = ["", "ExpressGateway is running. Paste these into another terminal:", ""]
    for command in demo.commands:
        lines += [f"# {command.title}", command.command, ""]
    lines += [
        f"Configuration: {demo.config_path} (after a change: kill -HUP {demo.pid})",
        f"Dashboard: http://{HOST}:{demo.ports.admin}/ (metrics: /metrics)",
        "Ctrl-C ends it.",
        "",
    ]
    return "\n".join(lines) + "\n"


def run_demo(
    base_port: int | None = None, out: TextIO | None = None, program: Sequence[str] = PROGRAM
) -> int:
    """Run the demo until a signal ends it; the gateway's exit code.

    The ports are the usual ones, or consecutive ones from `base_port` on; one that is in use is replaced,
    and that is said. Prints to `out`, else to standard output. `program` is what is started with the
    configuration's path.
    """
    out = sys.stdout if out is None else out
    wanted = Ports() if base_port is None else Ports.from_base(base_port)
    ports, sentences = wanted.with_free_ones()
    for sentence in sentences:
        out.write(f"{sentence}\n")
    out.flush()
    return asyncio.run(_run(ports, out, program))
