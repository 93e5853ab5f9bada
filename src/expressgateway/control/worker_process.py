"""One worker process as the supervisor sees it: its process, its channel, and what it last said.

A worker goes through the states STARTING, CONFIGURED, SERVING, DRAINING and DEAD, in this order and once.
`RefusedError` is a worker's answer that it cannot apply a configuration; `WorkerGoneError` says that no
answer will come. What to do about either is decided in `workers`.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from expressgateway.control.census import CensusTable
from expressgateway.control.channel import Channel, Message
from expressgateway.control.ledger import checked
from expressgateway.control.privileges import UNCHANGED_IDENTITY, Identity
from expressgateway.control.sockets import Bound
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)

# -P: a file in the directory the gateway happens to be started in must not stand in for a library's module.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "expressgateway.worker")

EXIT_GRACE_S: Final = 1.0
"""Between the end of a worker's channel and its kill, and between its exit and giving up its last words."""

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class State(Enum):
    STARTING = "starting"
    CONFIGURED = "configured"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


STARTING, CONFIGURED, SERVING, DRAINING, DEAD = State


class WorkerGoneError(Exception):
    """The worker died, or does not answer. `str()` is the rest of a sentence that begins with the worker."""


class RefusedError(Exception):
    """The worker cannot apply a configuration. `str()` is its own sentence."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A configuration as it is sent to workers."""

    version: int
    frame: bytes = field(repr=False)
    """The ``configure`` message, encoded once for all of them. Holds private keys."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What every worker process is started with."""

    listeners: Sequence[Bound]
    census: CensusTable
    identity: Identity = UNCHANGED_IDENTITY
    command: Sequence[str] = WORKER_COMMAND

    def arguments(self, index: int, channel_fd: int) -> list[str]:
        arguments = [*self.command, "--index", str(index), "--workers", str(self.census.workers)]
        arguments += ["--channel", str(channel_fd), "--census", str(self.census.fd)]
        for position, bound in enumerate(self.listeners):
            arguments += ["--listener", f"{position}={bound.members[index].fileno()}"]
        return arguments

    def popen(self, index: int, channel_fd: int) -> "subprocess.Popen[bytes]":
        fds = [channel_fd, self.census.fd, *(bound.members[index].fileno() for bound in self.listeners)]
        drops = self.identity.user is not None or self.identity.group is not None
        return subprocess.Popen(
            self.arguments(index, channel_fd),
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            user=self.identity.user,
            group=self.identity.group,
            extra_groups=[] if drops else None,
            # A Ctrl-C reaches the terminal's whole group; the workers are to hear of it from the supervisor.
            process_group=0,
        )

    def cannot(self, error: Exception) -> str:
        """Why `popen` failed, as the rest of a sentence."""
        if isinstance(error, PermissionError) and self.identity.user is not None:
            return (
                f"cannot be started as user {self.identity.user}: {error}; runtime.user needs read access to "
                "the Python interpreter and the installed package, so install them outside of /root"
            )
        return f"cannot be started: {error}"


class Worker:
    """One process. It cannot be started again; a replacement is another `Worker`."""

    __slots__ = (
        "_answers",
        "_channel",
        "_loop",
        "_next_id",
        "_pidfd",
        "_process",
        "aborted",
        "born",
        "cpu_s",
        "exited",
        "heard",
        "index",
        "open",
        "samples",
        "silent_s",
        "state",
        "stopped_accepting",
        "version",
    )

    def __init__(self, index: int, process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        self.index = index
        self._process = process
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._answers: dict[tuple[str, int], asyncio.Future[Message]] = {}
        self._next_id = 0
        self.state = STARTING
        self.version = 0
        """Of the configuration it applied last; 0 before the first."""
        self.born = time.monotonic()
        self.silent_s = 0.0
        """For how long it has said nothing, as counted by whoever watches it."""
        self.samples: list[Sample] = []
        self.open: dict[str, int] = {}
        self.aborted: dict[str, int] = {}
        self.cpu_s = 0.0
        self.exited: asyncio.Future[int] = self._loop.create_future()
        """The exit status as `subprocess` gives it: negative for a signal."""
        self.stopped_accepting: asyncio.Future[None] = self._loop.create_future()
        self.heard: asyncio.Task[None] | None = None
        """The task that reads the channel; done at its end."""
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def launch(cls, index: int, launch: Launch, tasks: asyncio.TaskGroup) -> "Worker":
        """Start a process. Raises `WorkerGoneError` if that fails."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = launch.popen(index, theirs.fileno())
            except (OSError, subprocess.SubprocessError) as error:
                ours.close()
                raise WorkerGoneError(launch.cannot(error)) from None
        try:
            channel = await Channel.open(ours)
        except BaseException:
            process.kill()
            process.wait()
            raise
        worker = cls(index, process, channel)
        worker.heard = tasks.create_task(worker._listen(), name=f"channel of worker {index}")
        return worker

    def __repr__(self) -> str:
        return f"<Worker {self.index} pid {self.pid} {self.state.value}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self.state is not DEAD

    @property
    def can_report(self) -> bool:
        return self.state in (SERVING, DRAINING)

    # -- questions

    async def configure(self, snapshot: Snapshot, timeout_s: float) -> None:
        """Have it apply a configuration. Raises `RefusedError` or `WorkerGoneError`."""
        answer = await self._ask(("configured", snapshot.version), snapshot.frame, timeout_s)
        if answer.get("error") is not None:
            raise RefusedError(str(answer["error"]))
        self.version = snapshot.version
        if self.state is STARTING:
            self.state = CONFIGURED

    async def serve(self, timeout_s: float) -> None:
        """Have it accept connections. Raises `WorkerGoneError`."""
        await self._ask(("serving", 0), {"type": "serve"}, timeout_s)
        if self.state is CONFIGURED:
            self.state = SERVING

    async def collect(self, timeout_s: float) -> None:
        """Have `samples` and `open` brought up to date. Raises `WorkerGoneError`; they are then the last."""
        self._next_id += 1
        message = {"type": "collect", "id": self._next_id}
        await self._ask(("samples", self._next_id), message, timeout_s)

    def ping(self) -> None:
        self._next_id += 1
        self._channel.send({"type": "ping", "id": self._next_id})

    def drain(self) -> None:
        self.state = DRAINING
        self._channel.send({"type": "drain"})

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def kill(self) -> None:
        """End it now. Does nothing if it is dead already."""
        if self.is_alive:
            # It cannot have been reaped, and its number reused: only `_on_exit` does that.
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self) -> int:
        """Until it is dead and its last words are read: the exit status."""
        await asyncio.wait({self.exited})  # not awaited itself: a caller that is cancelled would cancel it
        if self.heard is not None:
            await asyncio.wait({self.heard}, timeout=EXIT_GRACE_S)
        self._channel.abort()
        return self.exited.result()

    async def soon_exited(self) -> int | None:
        """The exit status of a worker that seems to be dying; None if it lives on all the same."""
        await asyncio.wait({self.exited}, timeout=EXIT_GRACE_S)
        return self.exited.result() if self.exited.done() else None

    async def _ask(self, key: tuple[str, int], message: Message | bytes, timeout_s: float) -> Message:
        if self._channel.has_ended or not self.is_alive:
            raise WorkerGoneError("is gone")
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._answers[key] = answer
        if isinstance(message, bytes):
            self._channel.send_frame(message)
        else:
            self._channel.send(message)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise WorkerGoneError(f"did not answer within {timeout_s:g} seconds") from None
        finally:
            if self._answers.get(key) is answer:
                del self._answers[key]

    # -- answers

    async def _listen(self) -> None:
        while (message := await self._channel.receive()) is not None:
            self.silent_s = 0.0
            try:
                self._on_message(message)
            except (KeyError, TypeError, ValueError) as error:
                log.error("worker %d sent nonsense (%r) and is cut off", self.index, error)
                self._channel.abort()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerGoneError("died before it answered"))
                answer.exception()  # seen: nobody may be waiting any more
        if not self.stopped_accepting.done():
            self.stopped_accepting.set_result(None)
        if self.state is not DRAINING:
            # Without a channel it cannot be led. It drains by itself, which could take minutes.
            self._loop.call_later(EXIT_GRACE_S, self.kill)

    def _on_message(self, message: Message) -> None:
        kind = message["type"]
        match kind:
            case "configured":
                self._answer((kind, int(message["version"])), message)
            case "serving":
                self._answer((kind, 0), message)
            case "samples":
                self.samples = checked(message["samples"])
                self.open = _counts(message["open"])
                self._answer((kind, int(message["id"])), message)
            case "pong":
                pass  # that it came is all it says
            case "draining":
                self.open = _counts(message["open"])
                self._has_stopped_accepting()
            case "drained":
                self.aborted = _counts(message["aborted"])
                self.open = {}
                self._has_stopped_accepting()
            case _:
                raise ValueError(f"unknown message {kind!r}")

    def _answer(self, key: tuple[str, int], message: Message) -> None:
        answer = self._answers.get(key)
        if answer is not None and not answer.done():  # else: too late
            answer.set_result(message)

    def _has_stopped_accepting(self) -> None:
        if not self.stopped_accepting.done():
            self.stopped_accepting.set_result(None)

    # -- the process

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.measure()  # a process that is dead and not yet reaped still tells its times
        status = self._process.wait()
        self.state = DEAD
        self.exited.set_result(status)

    def measure(self) -> int:
        """Update `cpu_s`; resident memory, in bytes."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return 0
        # the second field is the program's name in parentheses, which may hold anything
        fields = stat.rpartition(b")")[2].split()
        self.cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        return int(fields[21]) * _PAGE_BYTES


def _counts(value: Any) -> dict[str, int]:  # noqa: ANN401 - what JSON gave
    return {str(name): int(count) for name, count in value.items()} if isinstance(value, dict) else {}


def told(status: int) -> str:
    """An exit status as the rest of a sentence."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
