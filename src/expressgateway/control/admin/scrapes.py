"""Answers scrapes: counts brought up to date, written, and handed to all who ask at the same time.

All of it is done in slices of ``SLICE_S``, after each of which whoever waits for this process has a turn:
probes are answered while a thousand backends are written down.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from expressgateway.control.admin.exposition import content_type, pieces, wants_openmetrics
from expressgateway.control.ledger import Ledger
from expressgateway.observe.counters import Sample

SLICE_S: Final = 0.002


class Scrapes:
    """See the module's text."""

    __slots__ = ("_collect", "_is_counting", "_ledger", "_own", "_own_counts", "_running")

    def __init__(
        self,
        ledger: Ledger,
        collect: Callable[[], Awaitable[None]],
        own: Callable[[], Iterable[Sample]],
    ) -> None:
        """``collect`` brings the workers' counts up to date. ``own``: what this process counts; it is read
        piece by piece, so that what it walks over must be copies."""
        self._ledger = ledger
        self._collect = collect
        self._own = own
        self._own_counts = ledger.join()
        self._is_counting = asyncio.Lock()
        self._running: dict[bool, asyncio.Task[bytes]] = {}  # by format: one of each at most

    async def answer(self, accept: str) -> tuple[bytes, str]:
        """Body and content type. Who asks while another is answered shares its answer."""
        is_open = wants_openmetrics(accept)
        running = self._running.get(is_open)
        if running is None or running.done():
            loop = asyncio.get_running_loop()
            running = self._running[is_open] = loop.create_task(self._scrape(is_open), name="scrape")
        # One who leaves leaves alone.
        return await asyncio.shield(running), content_type(is_open=is_open)

    async def _scrape(self, is_open: bool) -> bytes:
        try:
            async with self._is_counting:  # a round of our own counts is not to be begun inside another
                await self._collect()
                await self._count_own()
            return await self._text(is_open)
        finally:
            self._running.pop(is_open, None)

    async def _count_own(self) -> None:
        counts = self._own_counts
        pause = _Pause()
        counts.begin_round()
        for number, sample in enumerate(self._own()):
            counts.set(sample)
            if not number % 64 and pause.is_due:
                await pause.take()
        counts.end_round()

    async def _text(self, is_open: bool) -> bytes:
        pause = _Pause()
        written: list[bytes] = []
        for piece in pieces(self._ledger.tables, is_open=is_open):
            written.append(piece)
            if pause.is_due:
                await pause.take()
        return b"".join(written)


class _Pause:
    """Of long work, for others to have a turn."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_S

    @property
    def is_due(self) -> bool:
        return time.perf_counter() >= self._until

    async def take(self) -> None:
        await asyncio.sleep(0)
        self._until = time.perf_counter() + SLICE_S
