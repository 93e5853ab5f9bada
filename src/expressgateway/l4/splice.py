"""Bulk in one direction of a plain relay, moved by the kernel: socket to pipe to socket, no bytes in Python.

Taken into use when a whole bulk read came at once, and left again when the source has nothing more: small
messages are cheaper by ``recv`` and ``send``. Everything works without it (docs/decisions/0004).

While a splice is active it owns the source's readiness to read and the target's readiness to write. What the
target did not take stays in the pipe, which bounds it.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

from expressgateway.net.stream import Stream

PIPE_BYTES: Final = 1 << 18  # asked of the kernel; what it grants is the bound
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK if hasattr(os, "SPLICE_F_MOVE") else 0
_F_SETPIPE_SZ: Final = 1031
_UNABLE: Final = frozenset({errno.EINVAL, errno.ENOMEM, errno.ENOSYS})  # no fault of the connection's


def can_splice(source: Stream, target: Stream) -> bool:
    return (
        hasattr(os, "splice")
        and not source.is_tls
        and not target.is_tls
        and source.takeover is None
        and not target.is_closed
        and not target.backlog_bytes
    )


class Splice:
    """One direction under the kernel's care."""

    __slots__ = ("_is_done", "_moved", "_on_moved", "_read", "_source", "_target", "_write")

    def __init__(
        self, source: Stream, target: Stream, read: int, write: int, on_moved: Callable[[int], None]
    ) -> None:
        self._source = source
        self._target = target
        self._read = read
        self._write = write
        self._on_moved = on_moved
        self._moved = 0  # bytes in the pipe
        self._is_done = False

    @classmethod
    def begin(cls, source: Stream, target: Stream, on_moved: Callable[[int], None]) -> "Splice | None":
        """Take the direction over, or give ``None`` where no pipe is to be had."""
        try:
            read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.fcntl(write, _F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the user's pipe budget is used up: a smaller pipe does, too
        splice = cls(source, target, read, write, on_moved)
        source.take_over(splice)
        target.drain_first = splice
        return splice

    def on_readable(self) -> bool:
        """Move what the source has. False: the stream itself has to read; it is an end or an error."""
        try:
            size = os.splice(self._source.fd, self._write, PIPE_BYTES, flags=_FLAGS)
        except BlockingIOError:
            if not self._moved:
                self._leave()
            return True
        except OSError as error:
            if error.errno not in _UNABLE:
                # Reading again would not tell: the kernel reports a reset once, and then an orderly end.
                self._leave()
                self._source.fail(error.strerror or str(error))
                return True
            size = 0
        if not size:
            if not self._moved:
                self._leave()
                return False
            # The end comes after what is still in the pipe.
            self._source.pause()
            return True
        self._moved += size
        self._source.bytes_in += size
        self._on_moved(size)
        self._push()
        return True

    def on_writable(self) -> None:
        """The target can take more."""
        self._push()

    def _push(self) -> None:
        target = self._target
        while self._moved:
            try:
                size = os.splice(self._read, target.fd, self._moved, flags=_FLAGS)
            except BlockingIOError:
                self._source.pause()
                target.want_writable(True)
                return
            except OSError as error:
                target.fail(error.strerror or str(error))
                return
            self._moved -= size
            target.bytes_out += size
        target.want_writable(False)
        self._source.resume()

    @property
    def pending(self) -> int:
        return self._moved

    def _leave(self) -> None:
        """Back to plain reads; the pipe is kept for no one."""
        self._source.take_over(None)
        self._target.drain_first = None
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if not self._is_done:
            self._is_done = True
            os.close(self._read)
            os.close(self._write)
