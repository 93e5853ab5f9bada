"""One stream of events for everybody who watches: made once a second, and not at all if nobody does.

An *event* is what server-sent events call one (HTML Standard 9.2.6), ready to be written. Who is slow gets
the newest event when it is ready for one, not those it missed: nothing is queued.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
BEAT_S: Final = 5.0
"""After so long without an event a comment is sent, so that both ends know that the other is there."""

_BEAT: Final = b": still here\n\n"


def event(name: str, value: Any) -> bytes:  # noqa: ANN401 - whatever JSON can say
    """JSON in one line, which is what a field of an event has to be."""
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


class Feed:
    """`render` makes an event, `first` what a new watcher is told before that. Idle while nobody watches."""

    __slots__ = (
        "_beat_s",
        "_changed",
        "_event",
        "_first",
        "_interval_s",
        "_number",
        "_render",
        "_ticker",
        "watchers",
    )

    def __init__(
        self,
        render: Callable[[], Awaitable[bytes]],
        first: Callable[[], bytes],
        interval_s: float = INTERVAL_S,
        beat_s: float = BEAT_S,
    ) -> None:
        self._render = render
        self._first = first
        self._interval_s = interval_s
        self._beat_s = beat_s
        self._event = b""
        self._number = 0
        """Of the newest event, from 1; 0: there is none that is fresh."""
        self._changed = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self.watchers = 0

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Events without end. To be closed by who asked for it."""
        self.watchers += 1
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick(), name="events")
        try:
            yield self._first()
            seen = 0
            while True:
                changed = self._changed
                if self._number == seen and not await _within(changed, self._beat_s):
                    yield _BEAT
                    continue
                seen = self._number
                yield self._event
        finally:
            self.watchers -= 1
            if not self.watchers and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None
                self._number, self._event = 0, b""

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                self._event = await self._render()
            except Exception:
                log.exception("what is to be shown could not be made: this is a defect")
            else:
                self._number += 1
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            await asyncio.sleep(max(self._interval_s / 2, began + self._interval_s - loop.time()))


async def _within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
