"""Readiness: one epoll set for the worker's sockets, itself watched by the event loop.

Timers, the control channel and everything that is not the data path run on the asyncio loop as usual. The
data path's sockets are registered here instead of becoming asyncio transports, which gives it what
transports hide: a connect or an accept without a task, ``splice``, TLS on the descriptor itself, half-close
on both sides, and one flush per batch of events. The cost per event is the same (docs/decisions/0002).

Level-triggered on purpose: a handler may read as much or as little as it likes and is told again. Events are
hints; a handler learns the truth from ``recv`` and ``send``, so an event that was meant for a descriptor
closed and reused within one batch does no harm.
"""

import asyncio
import logging
import select
import time
from collections.abc import Callable
from typing import Final, Protocol

log = logging.getLogger(__name__)

IN: Final = select.EPOLLIN | select.EPOLLRDHUP
OUT: Final = select.EPOLLOUT

_BATCH: Final = 512  # events taken at once; the rest is reported again
_ROUNDS: Final = 64  # of flushes in a batch; a flush may wake others

Handler = Callable[[int], None]


class Flushable(Protocol):
    def flush(self) -> None: ...


class Reactor:
    """The worker's sockets, its coarse clock, and what waits to be flushed."""

    __slots__ = (
        "_epoll",
        "_handlers",
        "_is_flushing_later",
        "_is_running",
        "_loop",
        "_poll",
        "_woken",
        "faults",
        "now",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._handlers: dict[int, Handler] = {}
        self._woken: list[Flushable] = []
        self._is_running = False
        self._is_flushing_later = False
        self.now = time.monotonic()
        """Seconds, read once per batch of events."""
        self.faults = 0
        """Exceptions that reached the safety net: each one is a defect of ours."""
        loop.add_reader(self._epoll.fileno(), self._run)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def add(self, fd: int, events: int, handler: Handler) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor. Call it before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # closed by ``ssl``, whose wrap_socket does that when the peer is gone already

    def replace(self, fd: int, handler: Handler) -> None:
        """Give a registered descriptor another handler."""
        self._handlers[fd] = handler

    def wake(self, flushable: Flushable) -> None:
        """Flush this at the end of the batch under way, or soon if there is none."""
        self._woken.append(flushable)
        if not self._is_running and not self._is_flushing_later:
            self._is_flushing_later = True
            self._loop.call_soon(self._flush_later)

    def call_soon(self, call: Callable[..., None], *arguments: object) -> None:
        """Call it after this batch, under the same safety net: a bound method's owner is reset."""
        self._loop.call_soon(self._call, call, arguments)

    def _call(self, call: Callable[..., None], arguments: tuple[object, ...]) -> None:
        try:
            call(*arguments)
        except Exception:  # noqa: BLE001 - the safety net, as in _run
            self.fault(call)

    def _flush_later(self) -> None:
        self._is_flushing_later = False
        self._is_running = True
        try:
            self._flush()
        finally:
            self._is_running = False

    def _run(self) -> None:
        self.now = time.monotonic()
        self._is_running = True
        handlers = self._handlers
        for fd, events in self._poll(0, _BATCH):
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception:  # noqa: BLE001 - the safety net: one connection, never the worker
                    self.fault(handler)
        if self._woken:
            self._flush()
        self._is_running = False

    def _flush(self) -> None:
        for _ in range(_ROUNDS):
            woken = self._woken
            if not woken:
                return
            self._woken = []
            for flushable in woken:
                try:
                    flushable.flush()
                except Exception:  # noqa: BLE001 - as above
                    self.fault(flushable.flush)
        if self._woken and not self._is_flushing_later:
            # Somebody's flush wakes it again and again: that must not keep all others from being served.
            self._is_flushing_later = True
            self._loop.call_soon(self._flush_later)

    def fault(self, handler: Callable[..., None]) -> None:
        """For an ``except``: count and log the error, and reset whose bound method raised it."""
        self.faults += 1
        log.exception("a connection was closed after an unexpected error: this is a defect")
        owner = getattr(handler, "__self__", None)
        reset = getattr(owner, "reset", None)
        if reset is not None:
            try:
                reset()
            except Exception:
                log.exception("closing it failed as well")
