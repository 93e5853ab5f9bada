"""The access log of one worker: from entries to a file, without ever holding up the loop.

Theory. ``record`` keeps an entry; some dozens at a time (``AT_ONCE``) become lines of the *batch*; a batch
goes to the *writer*, a thread, when it has grown or at the next sweep. Any write may block - a disk can be
sick, a pipe's reader asleep - and a thread is the only place where that harms nobody. The lines that are not
yet written are bounded (``MAX_HELD_BYTES``); what does not fit is dropped and counted, and so is what could
not be written.

Lines of several workers never mix: a file is appended to by one system call for many whole lines; a pipe or a
socket, which other workers write to as well, by calls of at most ``ATOMIC_BYTES``. Therefore a longer line is
cut for these: a peer that could have its line torn could forge another's.

One file is written at a time. Who may write it, and that it exists, is the supervisor's business
(``control/log_files.py``).
"""

import errno
import logging
import os
import queue
import random
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from expressgateway.observe.access_format import FORMS, Entry
from expressgateway.observe.counters import Sample

log = logging.getLogger(__name__)

STDOUT: Final = "stdout"

MAX_HELD_BYTES: Final = 1 << 20  # recorded and not yet written; beyond it lines are dropped
BATCH_BYTES: Final = 128 << 10  # handed over at once
AT_ONCE: Final = 64  # entries turned into lines at once: enough to be cheap, few enough to stay in the cache
ATOMIC_BYTES: Final = 4096  # PIPE_BUF of Linux: never torn by another writer
MAX_LINE_BYTES: Final = 64 << 10  # in a file; longer lines are cut

_CUTS: Final = (1024, 256, 64)  # bytes left of each field when a line is too long, tried in this order
_RETRY_S: Final = 1.0  # between attempts to open
_AGAIN_S: Final = 0.02  # between attempts to write where a write would block
_QUIET_S: Final = 5.0  # without a loss, before the log is said to be well again

# Reasons of ``access_log_dropped``.
FULL: Final = "full"
ERROR: Final = "error"
TOO_LONG: Final = "too_long"
CLOSING: Final = "closing"


def open_log(path: str) -> int:
    """A descriptor for appending to the file, or to standard output for ``stdout``. Never creates it, never
    waits for a FIFO's reader. Raises ``OSError``.
    """
    if path == STDOUT:
        return os.dup(1)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        os.close(fd)
        raise OSError(errno.EINVAL, "neither a file nor a FIFO nor a character device")
    return fd


class AccessLog:
    """See the module's text. Off until it is configured; counts over all configurations."""

    __slots__ = (
        "_batch",
        "_batch_bytes",
        "_batch_lines",
        "_entries",
        "_form",
        "_form_name",
        "_full",
        "_full_seen",
        "_given_bytes",
        "_is_closed",
        "_lost_before",
        "_path",
        "_random",
        "_share",
        "_too_long",
        "_trouble",
        "_trouble_at",
        "_unwritten",
        "_writer",
    )

    def __init__(self, rng: Callable[[], float] = random.random) -> None:
        """``rng``: numbers from 0 to below 1, which decide whom a sample takes."""
        self._random = rng
        self._writer = Writer()
        self._path: str | None = None
        self._share = 0.0
        self._form_name = "json"
        self._form = FORMS["json"]()
        self._entries: list[Entry] = []  # AT_ONCE at most
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._batch_lines = 0
        self._given_bytes = 0  # ever recorded, the batch included
        self._is_closed = False
        self._full = 0
        self._too_long = 0
        self._unwritten = 0
        self._trouble = ""
        self._trouble_at = 0.0
        self._full_seen = 0
        self._lost_before = 0

    # -- configuration ---------------------------------------------------------------------------------

    def configure(self, path: str | None, form: str = "json", sample: float = 1.0) -> None:
        """Take settings into use; what was recorded before goes where it was meant to. ``path``: of a file,
        ``stdout``, or None for no log. Opens nothing if the path is the same. Never fails: a file that
        cannot be opened is tried again once a second, and until then the one before is written.
        """
        if self._is_closed:
            return
        self.flush()
        if form != self._form_name:
            self._form_name, self._form = form, FORMS[form]()
        self._share = sample if path is not None else 0.0
        if path != self._path:
            self._path = path
            self._writer.use(path)

    def reopen(self) -> None:
        """Open the same path again: the file may have been moved away."""
        if self._path is not None and not self._is_closed:
            self.flush()
            self._writer.use(self._path)

    # -- the exchange's side ---------------------------------------------------------------------------

    def wants(self) -> bool:
        """Whether the exchange that ends now is to be recorded: the sample is drawn here, before there is an
        entry, so that one which is not logged costs next to nothing.
        """
        share = self._share
        return share >= 1.0 or (share > 0.0 and self._random() < share)

    def record(self, entry: Entry) -> None:
        """Add the line of an exchange that ``wants`` took. Never blocks, never raises for what peers sent."""
        entries = self._entries
        entries.append(entry)
        if len(entries) >= AT_ONCE:
            self._write_lines()
            if self._batch_bytes >= BATCH_BYTES:
                self.flush()

    def _write_lines(self) -> None:
        """Turn entries into lines of the batch, as far as there is room."""
        entries = self._entries
        if not entries:
            return
        self._entries = []
        if self._is_closed:
            self._unwritten += len(entries)
            return
        room = MAX_HELD_BYTES - (self._given_bytes - self._writer.taken_bytes)
        if room <= 0:
            self._full += len(entries)
            return
        lines = self._form.lines(entries)
        longest = self._writer.longest_bytes
        if max(map(len, lines)) > longest:
            cut = [
                line if len(line) <= longest else self._cut(entry, longest)
                for line, entry in zip(lines, entries, strict=True)
            ]
            lines = [line for line in cut if line]
        size = sum(map(len, lines))
        while size > room:
            size -= len(lines.pop())
            self._full += 1
        if not lines:
            return
        # One piece, so that the lines' memory, which is in the cache, is that of the next ones.
        self._batch.append(b"".join(lines))
        self._batch_bytes += size
        self._batch_lines += len(lines)
        self._given_bytes += size

    def _cut(self, entry: Entry, longest: int) -> bytes:
        """The line, cut so that it is no longer than this; empty, and counted, if that cannot be."""
        for length in _CUTS:
            line = self._form.cut(entry, length)
            if len(line) <= longest:
                return line
        self._too_long += 1  # by names in the configuration
        return b""

    # -- the worker's side -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand all that was recorded to the writer."""
        self._write_lines()
        if self._batch_lines:
            batch, self._batch = self._batch, []
            lines, self._batch_lines = self._batch_lines, 0
            self._batch_bytes = 0
            self._writer.put(b"".join(batch), lines)

    def sweep(self, now: float) -> None:
        """Flush, and say if the log's state has changed. ``now``: seconds of the monotonic clock."""
        self.flush()
        trouble = self._writer.failure
        if self._full != self._full_seen:
            self._full_seen = self._full
            trouble = trouble or "it is not taken as fast as it is written"
        if trouble:
            self._trouble_at = now
            if trouble != self._trouble:
                self._trouble = trouble
                self._say(logging.WARNING, f"the access log is failing: {trouble}")
        elif self._trouble and now - self._trouble_at >= _QUIET_S:
            self._trouble = ""
            lost = self._lost() - self._lost_before
            self._say(logging.INFO, f"the access log is written again; {lost} of its lines were lost")
        if not self._trouble:
            self._lost_before = self._lost()

    def _say(self, level: int, sentence: str) -> None:
        log.log(level, "%s", sentence, extra={"fields": {"path": self._path}})

    def close(self, timeout_s: float) -> int:
        """Write what there is, for at most this long, and be done; the lines that were not written. For the
        end of a drain: blocks. Idempotent.
        """
        self.flush()
        if not self._is_closed:
            self._is_closed = True
            self._share = 0.0
            self._unwritten = self._writer.end(timeout_s)
        return self._unwritten

    # -- metrics ---------------------------------------------------------------------------------------

    def dropped(self) -> dict[str, int]:
        """Lines lost, by reason."""
        writer = self._writer
        return {
            FULL: self._full,
            ERROR: writer.lost,
            TOO_LONG: self._too_long + writer.too_long,
            CLOSING: self._unwritten,
        }

    def _lost(self) -> int:
        return sum(self.dropped().values())

    def collect(self) -> Iterator[Sample]:
        """This worker's samples; none if there has never been a log."""
        writer = self._writer
        if not writer.is_started:
            return
        yield "access_log_lines", (), writer.written
        yield "access_log_errors", (), writer.errors
        for reason, number in self.dropped().items():
            yield "access_log_dropped", (reason,), number

    def __repr__(self) -> str:
        return f"<AccessLog {self._path} {self._form_name} share={self._share}>"


class _Use:
    """An order to the writer: open this; None: close what there is."""

    __slots__ = ("path",)

    def __init__(self, path: str | None) -> None:
        self.path = path


class _End:
    """The last order."""


class _GivenUp(Exception):  # noqa: N818 - nothing is wrong: its time is over
    """What is left is not written any more."""


class Writer:
    """The thread that writes, and its queue. Each number is changed by one of the two threads only."""

    __slots__ = (
        "_ends_at",
        "_fd",
        "_file",
        "_given_lines",
        "_is_ending",
        "_is_stream",
        "_is_torn",
        "_open_failure",
        "_orders",
        "_path",
        "_queued_path",
        "_retry_at",
        "_taken_lines",
        "_thread",
        "_write_failure",
        "errors",
        "longest_bytes",
        "lost",
        "taken_bytes",
        "too_long",
        "written",
    )

    def __init__(self) -> None:
        # The worker's thread. The queue is bounded by MAX_HELD_BYTES: no batch is empty.
        self._orders: queue.SimpleQueue[tuple[bytes, int] | _Use | _End] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_ending = threading.Event()
        self._ends_at = 0.0  # when to give up, once it is ending
        self._given_lines = 0
        # Ours.
        self._path: str | None = None
        self._fd = -1
        self._file = (0, 0)  # device and number of what is open
        self._is_stream = True
        self._is_torn = False  # the last line in the file is not whole
        self._retry_at = 0.0  # when to try to open again; 0: nothing is owed
        self._open_failure = ""
        self._write_failure = ""
        self._taken_lines = 0
        self.taken_bytes = 0
        self.written = 0
        self.lost = 0
        self.too_long = 0
        self.errors = 0
        self.longest_bytes = ATOMIC_BYTES  # until it is known to be a file
        # Both: set to the path by the one when it is queued, to None by the other before it is opened.
        self._queued_path: str | None = None

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    @property
    def failure(self) -> str:
        """Why lines are lost now, or empty."""
        return self._open_failure or self._write_failure

    # -- called by the worker --------------------------------------------------------------------------

    def use(self, path: str | None) -> None:
        """Open this for all that is put from now on; None: close. Starts the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
            self._thread.start()
        elif path is not None and path == self._queued_path:
            return  # a stuck writer needs no second order to do the same
        self._queued_path = path
        self._orders.put(_Use(path))

    def put(self, batch: bytes, lines: int) -> None:
        self._given_lines += lines
        self._orders.put((batch, lines))

    def end(self, timeout_s: float) -> int:
        """Write what is queued, for at most this long; lines left over."""
        thread = self._thread
        if thread is None:
            return 0
        self._ends_at = time.monotonic() + timeout_s
        self._is_ending.set()
        self._orders.put(_End())
        thread.join(timeout_s)
        return self._given_lines - self._taken_lines

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                order = self._orders.get(timeout=_RETRY_S if self._retry_at else None)
            except queue.Empty:
                self._open()
                continue
            if isinstance(order, _End):
                self._close()
                return
            try:
                if isinstance(order, _Use):
                    self._queued_path = None
                    self._path = order.path
                    self._open()
                    continue
                if self._retry_at and time.monotonic() >= self._retry_at:
                    self._open()
                self._took(order, self._append(*order) if self._fd >= 0 else order[1])
            except _GivenUp:
                return
            except Exception:
                log.exception("the access log's writer failed: this is a defect")
                self.errors += 1
                if isinstance(order, tuple):
                    self._took(order, order[1])

    def _open(self) -> None:
        self._retry_at = 0.0
        self._open_failure = ""
        if self._path is None:
            self._close()
            return
        try:
            fd = open_log(self._path)
        except OSError as error:
            self.errors += 1
            self._open_failure = f"{self._path} cannot be opened: {error.strerror}"
            self._retry_at = time.monotonic() + _RETRY_S
            return
        before = self._file
        self._close()
        status = os.fstat(fd)
        self._fd = fd
        self._file = (status.st_dev, status.st_ino)
        self._is_torn = self._is_torn and self._file == before
        self._is_stream = not stat.S_ISREG(status.st_mode)
        self.longest_bytes = ATOMIC_BYTES if self._is_stream else MAX_LINE_BYTES

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError:  # a late EIO or ENOSPC of what was written
                self.errors += 1
        self._write_failure = ""

    def _took(self, order: tuple[bytes, int], lost: int) -> None:
        batch, lines = order
        self.lost += lost
        self._taken_lines += lines
        self.taken_bytes += len(batch)

    def _append(self, batch: bytes, lines: int) -> int:
        """Write all lines, in as few calls as may be; how many an error kept out."""
        at, size, refused = 0, len(batch), 0
        try:
            while at < size:
                end = self._piece_end(batch, at)
                if end == at:  # recorded before this turned out to be no file
                    self.too_long += 1
                    refused += 1
                    at = batch.index(b"\n", at) + 1
                    continue
                begin = b"\n" if self._is_torn else b""
                piece = batch if not begin and end - at == size else begin + batch[at:end]
                done = self._write_some(piece)
                if done == len(piece):
                    self._is_torn = False
                    at = end
                    continue
                # A short write. The line it tore is written again as a whole, on a line of its own: what
                # another worker appends in the meantime then stays whole as well.
                was_torn, before = bool(begin), at
                reached = at + max(0, done - len(begin))
                at = batch.rfind(b"\n", before, reached) + 1 or before
                self._is_torn = at != reached or done < len(begin)
                if was_torn and at == before:
                    raise OSError(errno.EIO, "not even one line is taken")
        except OSError as error:
            self.errors += 1
            self._write_failure = f"{self._path} cannot be written: {error.strerror}"
            left = batch.count(b"\n", at)
            self.written += lines - left - refused
            return left
        self._write_failure = ""
        self.written += lines - refused
        return 0

    def _piece_end(self, batch: bytes, at: int) -> int:
        """Where the whole lines end that one call may write."""
        if not self._is_stream:
            return len(batch)
        room = ATOMIC_BYTES - self._is_torn
        if len(batch) - at <= room:
            return len(batch)
        return batch.rfind(b"\n", at, at + room) + 1 or at

    def _write_some(self, piece: bytes) -> int:
        """``write``, waiting where it would block; at least 1. Raises ``OSError``, ``_GivenUp``."""
        while True:
            try:
                done = os.write(self._fd, piece)
            except BlockingIOError:
                if self._is_ending.is_set():
                    if time.monotonic() >= self._ends_at:
                        raise _GivenUp from None
                    time.sleep(_AGAIN_S)
                else:
                    self._is_ending.wait(_AGAIN_S)
                continue
            if done <= 0:
                raise OSError(errno.EIO, "nothing is taken")
            return done
