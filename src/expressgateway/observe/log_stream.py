"""Standard error as a place for log lines, which never holds up who writes there.

A pipe's reader may be gone, or asleep; a write would then fail, or wait. Here a line is written if it is
taken at once, and else lost, and how many were is told with the next one that is taken. The descriptor is
shared with whoever started us, so its flags are left alone: a pipe is opened once more, a socket is written
with a flag of its own, and only where neither can be is it asked first whether it takes anything.
"""

import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from typing import Final

_PIECE_BYTES: Final = 4096  # PIPE_BUF of Linux: never torn by another writer, taken whole or not at all


class LineStream(logging.Handler):
    """See the module's text. Never raises, never waits."""

    def __init__(self, fd: int) -> None:
        """``fd`` stays its owner's."""
        super().__init__()
        self._write, self._close = _writer(fd)
        self._lost = 0
        self._is_torn = False  # the last line was not taken whole

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a line that cannot be formatted must not end what it tells of
            self._lost += 1
            return
        if self._lost:
            line = f"{self.format(_told(self._lost))}\n{line}"
        self._lost = 0 if self._put(line) else self._lost + 1

    def close(self) -> None:
        """What comes after it is lost. Idempotent."""
        close, self._close = self._close, _nothing
        self._write = _to_nobody
        close()
        super().close()

    def _put(self, line: str) -> bool:
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        if self._is_torn:
            data = b"\n" + data
        at = 0
        try:
            while at < len(data):
                done = self._write(data[at : at + _PIECE_BYTES])
                if done <= 0:
                    break
                at += done
        except OSError:  # would wait, or nobody is there
            pass
        if at:
            self._is_torn = at < len(data)
        return at == len(data)


def _told(lost: int) -> logging.LogRecord:
    sentence = "%d lines of this log were lost: nobody took them"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, sentence, (lost,), None)


def _nothing() -> None:
    """There is nothing of our own to close."""


def _to_nobody(_: bytes) -> int:
    return 0


def _writer(fd: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """What writes there at once, or gives 0 or raises ``OSError`` if it is not taken; and what ends it."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:  # it is closed
        return _to_nobody, _nothing
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL), sock.close
    if stat.S_ISREG(mode):
        return lambda data: os.write(fd, data), _nothing
    if stat.S_ISFIFO(mode):
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # it is somebody else's, or has no reader now
            pass
        else:
            return lambda data: os.write(own, data), lambda: os.close(own)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return lambda data: os.write(fd, data) if poll.poll(0) else 0, _nothing
