"""The session ticket keys of every TLS listener: made here, kept across reloads and workers, rotated in time.

The keys are secrets of the supervisor and its workers; they are never logged and never written down.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from expressgateway.config.schema import Config
from expressgateway.control.channel import Message, pack_bytes
from expressgateway.control.failures import StartError
from expressgateway.net.tickets import TicketKeySchedule, pack_keys

log = logging.getLogger(__name__)

_ANY_INTERVAL_S: Final = 86_400  # of a schedule that only holds keys until the configuration says how long


class TicketKeys:
    """One schedule for each TLS listener, by name."""

    __slots__ = ("_clock", "_schedules", "_sent")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._schedules: dict[str, TicketKeySchedule] = {}
        self._sent: dict[str, object] = {}

    def planned(self, config: Config) -> dict[str, TicketKeySchedule]:
        """The schedules `config` asks for, with the keys there are. Nothing changes before `adopt`.

        Raises `StartError` for times that would need too many keys.
        """
        planned: dict[str, TicketKeySchedule] = {}
        for listener in config.listeners:
            if listener.tls is None:
                continue
            interval, overlap = (
                listener.tls.ticket_rotation_interval_seconds,
                listener.tls.ticket_rotation_overlap_seconds,
            )
            known = self._schedules.get(listener.name)
            if known is not None and (known.rotation_interval_s, known.overlap_s) == (interval, overlap):
                planned[listener.name] = known
                continue
            try:
                schedule = TicketKeySchedule(interval, overlap)
            except ValueError as error:
                raise StartError(f"the listener {listener.name!r}: {error}") from None
            if known is not None:
                schedule.restore(known.dump())
            planned[listener.name] = schedule
        return planned

    def dump(self) -> dict[str, bytes]:
        """All keys, by listener. They are secrets: only for a channel that nobody else reads."""
        return {name: schedule.dump() for name, schedule in self._schedules.items()}

    def restore(self, dumped: Mapping[str, bytes]) -> None:
        """Begin with the keys of `dump`, of the process before this one. What is no such dump is left out."""
        for name, data in dumped.items():
            schedule = TicketKeySchedule(_ANY_INTERVAL_S, _ANY_INTERVAL_S)
            try:
                schedule.restore(data)
            except ValueError as error:
                log.warning("the session ticket keys of listener %s are made anew: %s", name, error)
            else:
                self._schedules[name] = schedule

    def adopt(self, planned: dict[str, TicketKeySchedule]) -> None:
        """From now on. Every worker is to be given `messages` after this."""
        self._schedules = planned
        now = self._clock()
        self._sent = {name: schedule.keys_at(now) for name, schedule in planned.items()}

    def messages(self) -> list[Message]:
        """The ``tickets`` messages a worker needs to begin with: every listener's keys."""
        return [self._message(name) for name in self._schedules]

    def changed(self) -> list[Message]:
        """The same for listeners whose keys changed since `adopt` or the last call: for every worker."""
        now = self._clock()
        found: list[Message] = []
        for name, schedule in self._schedules.items():
            keys = schedule.keys_at(now)
            if self._sent[name] is not keys:
                self._sent[name] = keys
                found.append(self._message(name))
        return found

    def next_change_s(self) -> float:
        """Seconds until keys change; infinite without TLS listeners."""
        now = self._clock()
        for schedule in self._schedules.values():
            schedule.keys_at(now)
        changes = (schedule.next_change_at() for schedule in self._schedules.values())
        return max(0.0, min(changes, default=float("inf")) - now)

    def _message(self, name: str) -> Message:
        keys = self._schedules[name].keys_at(self._clock())
        return {"type": "tickets", "listener": name, "keys": pack_bytes(pack_keys(keys))}
