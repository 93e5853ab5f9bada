"""What systemd is told of this process (sd_notify(3)), if it asked: `Type=notify` in the unit.

A message is a datagram to the socket that ``NOTIFY_SOCKET`` names. Nothing here ever fails or waits for the
caller: a supervisor that nobody listens to goes on all the same. What is not taken at once is sent again for
as long as it takes, in order, and as much of it as `MAX_WAITING` says.

Descriptors can be left with systemd (FDSTORE): it gives them to the process that it starts next, as those of
a socket unit, and clients that come in between wait in their queues. That is asked for with the environment
variable ``EXPRESSGATEWAY_FDSTORE=1``, because a stop must know whether somebody keeps the sockets. systemd
has them under names (FDNAME) until it is told to forget these, over any number of starts.
"""

import array
import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, Self

log = logging.getLogger(__name__)

FDSTORE: Final = "EXPRESSGATEWAY_FDSTORE"
KEPT: Final = "kept/"
"""How the names of descriptors begin that were left with systemd, and not made by a socket unit."""
MAX_WAITING: Final = 4096
"""Messages that systemd has not taken yet; later ones are lost."""

FIRST_FD: Final = 3
"""Of those that systemd passes (SD_LISTEN_FDS_START)."""
_AGAIN_S: Final = 0.05


class Notifier:
    """See the module's text. `address` is empty where nobody wants to hear."""

    __slots__ = (
        "_address",
        "_again",
        "_is_heard",
        "_is_silent",
        "_kept",
        "_sock",
        "_waiting",
        "keeps_sockets",
        "watchdog_s",
    )

    def __init__(self, address: str, watchdog_s: float = 0.0, *, keeps_sockets: bool = False) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._sock: socket.socket | None = None
        self._waiting: deque[tuple[bytes, list[int]]] = deque()  # with copies of descriptors
        self._again: asyncio.TimerHandle | None = None
        self._is_heard = True
        self._is_silent = not address
        self._kept: dict[str, int] = {}  # inodes of sockets, by FDNAME
        self.watchdog_s = watchdog_s
        """Without a sign of life for so long this process is taken for hung; 0: nobody looks."""
        self.keeps_sockets = keeps_sockets and bool(address)
        """Whether listening sockets are left with systemd."""

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> Self:
        """As the environment of this process says."""
        watched = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        usec = environ.get("WATCHDOG_USEC", "0")
        watchdog_s = int(usec) / 1e6 if watched and usec.isdecimal() else 0.0
        found = cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s, keeps_sockets=keeps_sockets(environ))
        for fd, name in passed(environ, pid):
            if name.startswith(KEPT):
                with contextlib.suppress(OSError):
                    found._kept[name] = os.fstat(fd).st_ino
        return found

    def tell(self, *lines: str) -> None:
        """Send assignments, such as ``READY=1``."""
        self._send("\n".join(lines).encode())

    def status(self, sentence: str) -> None:
        if not self._waiting:  # the next one says more
            self.tell(f"STATUS={sentence}")

    def ready(self, sentence: str) -> None:
        self.tell("READY=1", f"STATUS={sentence}")

    def reloading(self) -> None:
        # Type=notify-reload compares the time with that of its signal.
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self.tell("STOPPING=1", "STATUS=draining")

    def follow(self, pid: int) -> None:
        """Another process is the service's main one from now on, and speaks for it: this one is silent."""
        self.tell(f"MAINPID={pid}")
        self._is_silent = True
        self.watchdog_s = 0.0

    # -- descriptors

    @property
    def kept(self) -> dict[str, int]:
        """What systemd has of ours: the sockets' inodes by FDNAME. For who takes over; see `remember`."""
        return dict(self._kept)

    def remember(self, kept: Mapping[str, int]) -> None:
        """The process before this one left these with systemd."""
        self._kept = dict(kept)

    def keep(self, sockets: Mapping[str, socket.socket]) -> None:
        """Have systemd keep copies of these sockets and of no others, by FDNAME. Says only what is new."""
        wanted = {name: os.fstat(sock.fileno()).st_ino for name, sock in sockets.items()}
        if not self.keeps_sockets:
            wanted = {}
        # Forgotten first: systemd does not take a socket under a second name.
        for name in [name for name, inode in self._kept.items() if wanted.get(name) != inode]:
            self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")
            del self._kept[name]
        for name, inode in wanted.items():
            if name in self._kept:
                continue
            sock = sockets[name]
            lines = ["FDSTORE=1", f"FDNAME={name}"]
            if sock.type == socket.SOCK_DGRAM:
                lines.append("FDPOLL=0")  # an ICMP error is no reason to drop it
            self._send("\n".join(lines).encode(), [sock.fileno()])
            self._kept[name] = inode

    async def watch(self) -> None:
        """Give signs of life, for ever."""
        while self.watchdog_s:
            if not self._waiting:
                self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 2)

    # -- sending

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        if self._is_silent or (not self._waiting and self._is_sent(message, fds)):
            return
        if len(self._waiting) < MAX_WAITING:
            with contextlib.suppress(OSError):  # no descriptors left: it is lost
                self._waiting.append((message, [os.dup(fd) for fd in fds]))
        if self._again is None:
            with contextlib.suppress(RuntimeError):  # no loop: at the next message
                self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self._send_again)

    def _send_again(self) -> None:
        self._again = None
        while self._waiting:
            message, fds = self._waiting[0]
            if not self._is_sent(message, fds):
                self._again = asyncio.get_running_loop().call_later(_AGAIN_S, self._send_again)
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)

    def _is_sent(self, message: bytes, fds: Sequence[int]) -> bool:
        """False: there is no room now."""
        try:
            if self._sock is None:
                self._sock = socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                )
            # Not `socket.send_fds`, which forgets the address.
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            self._sock.sendmsg([message], rights, 0, self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            if self._is_heard:  # it is said once, and tried on: systemd may make the socket anew
                log.warning("systemd cannot be told of this process: %s", error.strerror)
            self._is_heard = False
        else:
            self._is_heard = True
        return True

    def close(self) -> None:
        """What waits is tried once more. Idempotent."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        is_sent = True
        while self._waiting:
            message, fds = self._waiting.popleft()
            is_sent = is_sent and self._is_sent(message, fds)
            for fd in fds:
                os.close(fd)
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def keeps_sockets(environ: Mapping[str, str]) -> bool:
    """Whether listening sockets are left with systemd."""
    return environ.get(FDSTORE, "") == "1" and bool(environ.get("NOTIFY_SOCKET"))


def passed(environ: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    """The descriptors that systemd passed to this process (sd_listen_fds_with_names(3)), and their names."""
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(pid) or not count.isdecimal():
        return []
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    return [
        (FIRST_FD + index, names[index] if index < len(names) else "unknown") for index in range(int(count))
    ]
