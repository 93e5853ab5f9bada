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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from expressgateway.control import parcels
from expressgateway.control.channel import Channel, FrameError, Message, encode
from expressgateway.control.ledger import Contribution
from expressgateway.control.parcels import LASTING, LISTENER, Parcel, ParcelError
from expressgateway.control.privileges import UNCHANGED_IDENTITY, Identity
from expressgateway.control.seats import Seats, seat_of
from expressgateway.control.sockets import Bound
from expressgateway.observe.stacks import SIGNAL as STACK_SIGNAL
from expressgateway.observe.stacks import Sheet

log = logging.getLogger(__name__)

# -P: a file in the directory the gateway happens to be started in must not stand in for a library's module.
WORKER_COMMAND: Final = (sys.executable, "-P", "-m", "expressgateway.worker")

CLOSE: Final = "close"
"""A drain that ends the listening."""
HAND_OVER: Final = "hand_over"
"""A drain while another worker reads the same sockets."""
KEEP: Final = "keep"
"""A drain after which somebody will read the sockets: what waits in them is left there."""

EXIT_GRACE_S: Final = 1.0
"""Between the end of a worker's channel and its kill, and between its exit and giving up its last words."""

_LOOK_S: Final = 0.05  # between two looks at what a worker writes of itself

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


class Snapshot:
    """A configuration as it is sent to workers: whole, or as what differs from the one before."""

    __slots__ = ("_difference", "_frame", "_whole", "base", "bounds", "handed", "version")

    def __init__(
        self,
        version: int,
        whole: Callable[[], Message],
        bounds: Sequence[Bound] = (),
        handed: Sequence[int] = (),
        *,
        base: int = 0,
        difference: Message | None = None,
    ) -> None:
        """``whole`` makes the ``configure`` message; ``difference`` is one for workers at version ``base``.
        ``bounds``: the listeners that it is about; ``handed``: see `socket_book.Prepared`.

        Raises `FrameError` if it is too large to be sent.
        """
        self.version = version
        self.bounds = tuple(bounds)
        self.handed = tuple(handed)
        self.base = base
        self._whole = whole
        self._difference = encode(difference) if difference is not None else None
        # Encoded once for all workers, and only if one of them needs it. Holds private keys.
        self._frame = b"" if difference is not None else encode(whole())

    def frame(self, version: int) -> bytes:
        """For a worker at this version. Raises `FrameError`."""
        if self._difference is not None and version == self.base:
            return self._difference
        if not self._frame:
            self._frame = encode(self._whole())
        return self._frame

    def __repr__(self) -> str:
        return f"<Snapshot {self.version}>"


@dataclass(frozen=True, slots=True)
class Launch:
    """What every worker process is started with."""

    seats: Seats
    identity: Identity = UNCHANGED_IDENTITY
    command: Sequence[str] = WORKER_COMMAND

    def popen(
        self, slot: int, seat: int, channel_fd: int, parcels_fd: int, stacks_fd: int
    ) -> "subprocess.Popen[bytes]":
        given = {
            "channel": channel_fd,
            "parcels": parcels_fd,
            "census": self.seats.census.fd,
            "spares": self.seats.spares.fd,
            "reader": self.seats.reader(seat),
            "stacks": stacks_fd,
        }
        arguments = [*self.command, "--slot", str(slot), "--seat", str(seat)]
        for name, fd in given.items():
            arguments += [f"--{name}", str(fd)]
        drops = self.identity.user is not None or self.identity.group is not None
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            pass_fds=list(given.values()),
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
        "_given",
        "_knows",
        "_loop",
        "_next_id",
        "_parcels",
        "_pidfd",
        "_process",
        "_sheet",
        "aborted",
        "born",
        "counts",
        "cpu_s",
        "exited",
        "heard",
        "index",
        "on_outcomes",
        "open",
        "seat",
        "silent_s",
        "state",
        "stopped_accepting",
        "version",
    )

    def __init__(
        self,
        index: int,
        seat: int,
        process: "subprocess.Popen[bytes]",
        channel: Channel,
        parcels_sock: socket.socket,
        sheet: Sheet,
    ) -> None:
        self.index = index
        """Of its slot."""
        self.seat = seat
        self._process = process
        self._channel = channel
        self._parcels = parcels_sock
        self._sheet = sheet
        self._given: set[int] = set()  # numbers of listeners whose sockets it has been sent
        self._knows: set[int] = {seat}  # seats to which it has been sent the way
        self._loop = asyncio.get_running_loop()
        self._answers: dict[tuple[str, int], asyncio.Future[Message]] = {}
        self._next_id = 0
        self.state = STARTING
        self.on_outcomes: Callable[[Message], None] | None = None
        """Told what its backends did, and of spans: messages that come unasked."""
        self.version = 0
        """Of the configuration it applied last; 0 before the first."""
        self.born = time.monotonic()
        self.silent_s = 0.0
        """For how long it has said nothing, as counted by whoever watches it."""
        self.counts: Contribution | None = None
        """What it reports goes there."""
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
    async def launch(
        cls,
        index: int,
        seat: int,
        launch: Launch,
        tasks: asyncio.TaskGroup,
        on_outcomes: Callable[[Message], None] | None = None,
    ) -> "Worker":
        """Start a process in a slot, and on a seat. Raises `WorkerGoneError` if that fails."""
        try:
            sheet = Sheet()
        except OSError as error:
            raise WorkerGoneError(launch.cannot(error)) from None
        ours, theirs = socket.socketpair()
        sender, receiver = parcels.pair()
        with theirs, receiver:
            try:
                process = launch.popen(index, seat, theirs.fileno(), receiver.fileno(), sheet.fd)
            except (OSError, subprocess.SubprocessError) as error:
                ours.close()
                sender.close()
                sheet.close()
                raise WorkerGoneError(launch.cannot(error)) from None
        try:
            channel = await Channel.open(ours)
        except BaseException:
            sender.close()
            sheet.close()
            process.kill()
            process.wait()
            raise
        worker = cls(index, seat, process, channel, sender, sheet)
        worker.on_outcomes = on_outcomes
        worker.heard = tasks.create_task(worker._listen(), name=f"channel of worker {index}")
        return worker

    def __repr__(self) -> str:
        return f"<Worker {self.index} seat {self.seat} pid {self.pid} {self.state.value}>"

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

    async def seat_all(self, seats: Seats, *, is_moving: bool, timeout_s: float) -> None:
        """Tell it who is there. `is_moving`: another worker reads its sockets, or is about to. Raises
        `WorkerGoneError`."""
        live = seats.live
        self._send_parcels([parcel for parcel in seats.writers() if seat_of(parcel[0]) not in self._knows])
        self._knows = {*live, self.seat}
        self._next_id += 1
        message = {"type": "seats", "id": self._next_id, "live": live, "moving": is_moving}
        await self._ask(("seated", self._next_id), message, timeout_s)

    def leave_groups(self, given: Sequence[Parcel]) -> None:
        """Have it read its datagram sockets a last time, and send through these instead. It has done so when
        it answers the next question. Raises `WorkerGoneError`."""
        self._send_parcels([one for one in given if int(one[0].partition(" ")[2]) in self._given])

    def _send_parcels(self, given: list[Parcel]) -> None:
        if not given:
            return
        try:
            parcels.send(self._parcels, given)
        except ParcelError as error:
            raise WorkerGoneError(str(error.strerror)) from None
        self._channel.send({"type": "sockets"})

    async def configure(self, snapshot: Snapshot, timeout_s: float) -> None:
        """Have it apply a configuration. Raises `RefusedError` or `WorkerGoneError`."""
        missing = [bound for bound in snapshot.bounds if bound.number not in self._given]
        self._send_parcels(
            [
                (
                    f"{LASTING if self.index < bound.lasting else LISTENER} {bound.number}",
                    bound.members[self.index].fileno(),
                )
                for bound in missing
            ]
        )
        self._given.update(bound.number for bound in missing)
        try:
            frame = snapshot.frame(self.version)
        except FrameError as error:
            raise RefusedError(str(error)) from None
        answer = await self._ask(("configured", snapshot.version), frame, timeout_s)
        if answer.get("error") is not None:
            raise RefusedError(str(answer["error"]))
        self.version = snapshot.version
        if self.state is STARTING:
            self.state = CONFIGURED

    def commit(self, snapshot: Snapshot) -> None:
        """The configuration that it applied last stays."""
        self._channel.send({"type": "commit", "handed": list(snapshot.handed)})

    async def serve(self, timeout_s: float) -> None:
        """Have it accept connections. Raises `WorkerGoneError`."""
        await self._ask(("serving", 0), {"type": "serve"}, timeout_s)
        if self.state is CONFIGURED:
            self.state = SERVING

    async def collect(self, timeout_s: float) -> None:
        """Have `counts` and `open` brought up to date. Raises `WorkerGoneError`; they are then the last."""
        self._next_id += 1
        message = {"type": "collect", "id": self._next_id}
        await self._ask(("samples", self._next_id), message, timeout_s)

    async def connections(self, limit: int, timeout_s: float) -> Message:
        """What it tells of at most `limit` of its clients' connections. Raises `WorkerGoneError`."""
        self._next_id += 1
        message = {"type": "connections", "id": self._next_id, "limit": limit}
        return await self._ask(("connections", self._next_id), message, timeout_s)

    def ping(self) -> None:
        self._next_id += 1
        self._channel.send({"type": "ping", "id": self._next_id})

    def drain(self, how: str = CLOSE) -> None:
        """Have it end; one of `CLOSE`, `HAND_OVER` and `KEEP` says what becomes of its sockets."""
        self.state = DRAINING
        self._channel.send({"type": "drain", "sockets": how})

    def send(self, message: Message) -> None:
        self._channel.send(message)

    def kill(self) -> None:
        """End it now. Does nothing if it is dead already."""
        if self.is_alive:
            # It cannot have been reaped, and its number reused: only `_on_exit` does that.
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def stacks(self, patience_s: float) -> tuple[str, str]:
        """Where each of its threads is in its code; if it cannot be had, nothing, and why not."""
        if self._stat()[:1] in ([b"T"], [b"t"]):
            return "", "it is stopped, by SIGSTOP or a debugger"
        if not self.is_alive:
            return "", "it is dead"
        self._sheet.clear()
        signal.pidfd_send_signal(self._pidfd, STACK_SIGNAL)
        text = ""
        silent_s = self.silent_s
        ends = self._loop.time() + patience_s
        while self._loop.time() < ends:
            await asyncio.sleep(_LOOK_S)
            before, text = text, self._sheet.read()
            if self.silent_s < silent_s or (text and text == before):  # it speaks again; it writes no more
                break
        return text, "" if text else f"it wrote none within {patience_s:g} seconds"

    async def gone(self) -> int:
        """Until it is dead and its last words are read: the exit status."""
        await asyncio.wait({self.exited})  # not awaited itself: a caller that is cancelled would cancel it
        if self.heard is not None:
            await asyncio.wait({self.heard}, timeout=EXIT_GRACE_S)
        self._channel.abort()
        self._parcels.close()
        self._sheet.close()
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
            except (IndexError, KeyError, TypeError, ValueError) as error:
                log.error("worker %d sent nonsense (%r) and is cut off", self.index, error)
                self._channel.abort()
            if message["type"] == "samples":
                await asyncio.sleep(0)  # many may be waiting, and each is some work
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
            case "seated":
                self._answer((kind, int(message["id"])), message)
            case "samples":
                if self.counts is not None:
                    self.counts.take(message)
                if "open" in message:  # the report's last part
                    self.open = _counts(message["open"])
                    self._answer((kind, int(message["id"])), message)
            case "connections":
                self._answer((kind, int(message["id"])), message)
            case "outcomes" | "spans":
                if self.on_outcomes is not None:
                    self.on_outcomes(message)
                if kind == "spans":
                    self._channel.send({"type": "spans_taken"})
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
        fields = self._stat()
        if not fields:
            return 0
        self.cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        return int(fields[21]) * _PAGE_BYTES

    def _stat(self) -> list[bytes]:
        """What the kernel tells of the process, from its state on (proc(5)); nothing if it is gone."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_bytes()
        except OSError:
            return []
        # the second field is the program's name in parentheses, which may hold anything
        return stat.rpartition(b")")[2].split()


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
