"""The supervisor's part in traces: the exporter's process, and the account of what became of spans.

Workers tell spans in lines, which are passed on as they are. The exporter is a process of its own, so that
neither a collector nor the libraries that speak to it can hold up the supervisor. Of what waits for it at
most ``MAX_BACKLOG_BYTES`` is held here; what does not fit is dropped and counted. What is in a line is not
known here.
"""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

from expressgateway.config.schema import Config
from expressgateway.control.backoff import Backoff
from expressgateway.control.channel import Message
from expressgateway.control.failures import StartError
from expressgateway.control.privileges import UNCHANGED_IDENTITY, Identity, worker_identity
from expressgateway.control.worker_process import told
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)

# -P: as for workers.
EXPORTER_COMMAND: Final = (sys.executable, "-P", "-m", "expressgateway.exporter")

MAX_BACKLOG_BYTES: Final = 4 << 20
END_S: Final = 3.0
"""For the exporter to send what it has, at the end and when it is replaced by another."""

# Reasons of ``trace_spans_dropped``; workers have one more.
BACKLOG: Final = "backlog"
"""The exporter does not keep up: the collector is slow."""
REFUSED: Final = "refused"
"""The collector was not reached, or did not take them."""
LOST: Final = "lost"
"""The exporter died, could not be started, or its time was over."""


class Exporter:
    """One exporter for one collector, and its replacements until ``close``."""

    def __init__(self, traces: "Traces", command: Sequence[str], identity: Identity) -> None:
        self._traces = traces
        self._command = command
        self._identity = identity
        self._process: asyncio.subprocess.Process | None = None
        self._owed = 0  # spans that nothing was said of yet
        self._closing = asyncio.Event()
        self._living = asyncio.get_running_loop().create_task(self._live(), name="exporter of spans")

    def put(self, lines: bytes, number: int) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            self._traces.drop(LOST, number)
        elif process.stdin.transport.get_write_buffer_size() + len(lines) > MAX_BACKLOG_BYTES:
            self._traces.drop(BACKLOG, number)
        else:
            self._owed += number
            process.stdin.write(lines)

    async def close(self, timeout_s: float) -> None:
        """Have it send what it has, for at most this long. Idempotent."""
        self._closing.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await asyncio.wait({self._living}, timeout=timeout_s)
        if not self._living.done():
            self._living.cancel()
            await asyncio.wait({self._living})

    async def _live(self) -> None:
        backoff = Backoff()
        while True:
            began = time.monotonic()
            try:
                end = await self._live_once()
            except (OSError, subprocess.SubprocessError) as error:
                end = f"cannot be started: {error}"
            if self._closing.is_set():
                return
            pause_s = backoff.pause_s(time.monotonic() - began)
            log.error("the exporter of spans %s; the next one comes in %.1f seconds", end, pause_s)
            try:
                async with asyncio.timeout(pause_s):
                    await self._closing.wait()
                return
            except TimeoutError:
                pass

    async def _live_once(self) -> str:
        """From its start to its end: the rest of a sentence about that."""
        identity = self._identity
        drops = identity != UNCHANGED_IDENTITY
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            user=identity.user,
            group=identity.group,
            extra_groups=[] if drops else None,
            process_group=0,  # a terminal's Ctrl-C is not for it
        )
        if self._closing.is_set() and process.stdin is not None:
            process.stdin.close()
        try:
            await self._hear(process)
            return told(await process.wait())
        finally:
            self._process = None
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._traces.drop(LOST, self._owed)
            self._owed = 0

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        while process.stdout is not None and (line := await process.stdout.readline()):
            what, _, number = line.decode("ascii", "replace").partition(" ")
            if not number.strip().isdecimal():
                continue
            spans = int(number)
            self._owed = max(0, self._owed - spans)
            if what == "exported":
                self._traces.exported += spans
            else:
                self._traces.drop(REFUSED, spans)


class Traces:
    """See the module's text. Off until it is configured; counts over all configurations."""

    def __init__(self, command: Sequence[str] = EXPORTER_COMMAND) -> None:
        self._command = command
        self._used: tuple[tuple[str, ...], Identity] | None = None
        self._exporter: Exporter | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self.exported = 0
        self._dropped = {BACKLOG: 0, REFUSED: 0, LOST: 0}
        self._is_known = False

    def use(self, config: Config) -> None:
        """Take a configuration into use. What was told before goes where it was meant to."""
        tracing = config.observability.tracing
        wanted = None
        if tracing is not None:
            options = ("--endpoint", tracing.endpoint, "--service-name", tracing.service_name)
            try:
                wanted = ((*self._command, *options), worker_identity(config.runtime))
            except StartError as error:  # workers run with the identity they were started with
                log.error("%s", error)
                return
        if wanted == self._used:
            return
        self._used = wanted
        before, self._exporter = self._exporter, None
        if before is not None:
            leaving = asyncio.get_running_loop().create_task(before.close(END_S), name="exporter that leaves")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        if wanted is not None:
            self._is_known = True
            self._exporter = Exporter(self, *wanted)

    def take(self, message: Message) -> None:
        """What a worker tells. Raises `KeyError`, `TypeError` or `ValueError` for nonsense."""
        number, lines = int(message["number"]), str(message["lines"]).encode()
        if self._exporter is None:
            self.drop(LOST, number)
        else:
            self._exporter.put(lines, number)

    def drop(self, reason: str, number: int) -> None:
        self._dropped[reason] += number

    def samples(self) -> Iterator[Sample]:
        """Nothing before there was a collector."""
        if self._is_known:
            yield "trace_spans_exported", (), self.exported
            for reason, number in self._dropped.items():
                yield "trace_spans_dropped", (reason,), number

    async def close(self, timeout_s: float = END_S) -> None:
        """Send what there is, for at most this long, and leave no process. Idempotent."""
        if self._exporter is not None:
            await self._exporter.close(timeout_s)
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=END_S + 1.0)
