"""Which listener has which sockets, from one configuration to the next.

A listener is the same one as before if its name, its kind and its address are: then it keeps its sockets and
its *number*, and no worker's connection notices. With the same address and another name or kind it is another
listener on the same sockets (*handed*): nothing is refused in between. All others are bound anew, or given
up.

`prepare` finds or binds what a configuration needs and takes nothing away; `adopt` makes it the one in force;
`abandon` takes it back. Sockets that were there before this process - a supervisor's before it, or systemd's
- are taken into use instead of binding.
"""

import itertools
import logging
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from expressgateway.config.schema import Config
from expressgateway.config.values import Address
from expressgateway.control.failures import StartError
from expressgateway.control.notify import KEPT, passed
from expressgateway.control.parcels import INSTEAD, Parcel
from expressgateway.control.sockets import Bound, Wanted, add_members, bind_all, listen, resolved, wanted_by
from expressgateway.net.quic.steering import spread, steer

log = logging.getLogger(__name__)

Where = tuple[bool, str, int]
"""Whether it is a datagram socket, host and port."""

_KEEPSAKE: Final = re.compile(rf"{KEPT}.*/(\d+)")
_MAX_NAME: Final = 200


@dataclass(slots=True)
class Given:
    """Bound sockets of one address that were there before this process."""

    members: list[socket.socket] = field(default_factory=list)
    """In the order in which they were bound: the kernel's."""
    lasting: int = 0
    """So many, the first ones, are a socket unit's; the others are ours."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a configuration is going to be served with."""

    bounds: tuple[Bound, ...]
    """In the order of its listeners; Mode A's comes last."""
    handed: tuple[int, ...]
    """Numbers of listeners that go, and whose sockets others have."""
    fresh: tuple[Bound, ...]
    """Of `bounds`, those that were not there before."""

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(bound.number for bound in self.bounds)


class SocketBook:
    """See the module's text."""

    __slots__ = ("_loose", "_numbers", "_preparing", "_surplus", "bounds", "slots")

    def __init__(self, loose: Mapping[Where, Given] | None = None, before: Sequence[Bound] = ()) -> None:
        """``loose``: sockets that were there before any supervisor, by address. ``before``: listeners of the
        supervisor before this one, as they were. All are this object's from here on."""
        self.bounds: tuple[Bound, ...] = tuple(before)
        self.slots = 0
        """How many members each has, for as many workers."""
        self._preparing = 0  # how many the configuration has that is neither adopted nor abandoned
        self._loose = dict(loose or {})
        self._surplus: list[socket.socket] = []  # that are there, and for which there is no worker
        first = max((bound.number for bound in before), default=-1) + 1
        self._numbers = itertools.count(first)

    def prepare(self, config: Config, slots: int) -> Prepared:
        """Raises `StartError`; then everything is as it was."""
        self._preparing = slots
        try:
            return self._prepare(config, slots)
        except BaseException:
            self._preparing = 0
            raise

    def _prepare(self, config: Config, slots: int) -> Prepared:
        wanted = wanted_by(config)
        left = {(bound.is_datagram, bound.wanted): bound for bound in self.bounds}
        found: dict[int, Bound] = {}
        fresh: list[Bound] = []
        handed: list[int] = []
        grown: list[tuple[Bound, int]] = []
        taken: dict[Where, Given] = {}
        inherited: list[Bound] = []
        try:
            missing: list[int] = []
            for at, one in enumerate(wanted):
                known = left.get((one.is_datagram, one.address))
                if known is None:
                    where = (one.is_datagram, *resolved(one))
                    given = self._loose.get(where)
                    if given is None:
                        missing.append(at)
                        continue
                    taken[where] = self._loose.pop(where)
                    found[at] = self._bound_to(one, given)
                    inherited.append(found[at])
                    listen(found[at])
                elif (known.name, known.kind) == (one.name, one.kind):
                    found[at] = known
                else:
                    other = Bound(
                        one.name,
                        one.is_datagram,
                        known.address,
                        [member.dup() for member in known.members],
                        next(self._numbers),
                        one.kind,
                        one.address,
                        known.is_spread,
                        known.lasting,
                    )
                    found[at] = other
                    fresh.append(other)
                    handed.append(known.number)
            for bound in found.values():
                grown.append((bound, len(bound.members)))
                _fit(bound, slots)
            made = bind_all([wanted[at] for at in missing], slots, self.bounds)
            for at, bound in zip(missing, made, strict=True):
                bound.number = next(self._numbers)
                found[at] = bound
                fresh.append(bound)
        except BaseException:
            for bound, before in grown:
                _cut(bound, before)
            for bound in fresh:
                bound.close()
            self._loose.update(taken)
            raise
        for bound in inherited:
            used = max(slots, bound.lasting)
            self._surplus += bound.members[used:]
            del bound.members[used:]
        fresh += inherited
        return Prepared(tuple(found[at] for at in range(len(wanted))), tuple(handed), tuple(fresh))

    def _bound_to(self, one: Wanted, given: Given) -> Bound:
        """A listener on sockets that are there already."""
        host, port = given.members[0].getsockname()[:2]
        bound = Bound(
            one.name,
            one.is_datagram,
            Address(str(host), int(port)),
            list(given.members),
            next(self._numbers),
            one.kind,
            one.address,
            lasting=given.lasting,
        )
        for member in bound.members:
            member.setblocking(False)
        return bound

    def adopt(self, prepared: Prepared, slots: int) -> list[Bound]:
        """From now on. Gives those that are in force no more: the caller closes them once no worker needs
        the supervisor's copies."""
        gone = [bound for bound in self.bounds if bound not in prepared.bounds]
        self.bounds = prepared.bounds
        self.slots = slots
        self._preparing = 0
        for bound in self.bounds:
            if bound.is_spread:
                spread(bound.members, bound.name, slots)
        if self._surplus:
            log.warning(
                "%d sockets of before are closed, there are fewer workers now: clients that waited there are "
                "reset",
                len(self._surplus),
            )
        if self._loose:
            named = ", ".join(f"{host}:{port}" for _, host, port in self._loose)
            log.warning("sockets that were given to this process are closed, no listener has them: %s", named)
        self._close_loose()
        return gone

    def abandon(self, prepared: Prepared) -> None:
        """It is not taken into use."""
        self._preparing = 0
        for bound in prepared.fresh:
            bound.close()
        self._shrink(self.slots)

    def _shrink(self, slots: int) -> None:
        for bound in self.bounds:
            _cut(bound, slots)

    # -- what the kernel does with what comes

    def steer(self, seats: Mapping[int, int]) -> None:
        """QUIC packets go to the member of the slot that is given for their worker's seat."""
        for bound in self.bounds:
            if bound.is_steered and len(bound.members) > 1:
                steer(bound.members, bound.name, seats)

    def keep_from(self, slots: int) -> None:
        """No new TCP connection goes to a member behind the first `slots`."""
        for bound in self.bounds:
            if not bound.is_datagram and len(bound.members) > slots and not bound.is_shared:
                bound.is_spread = spread(bound.members, bound.name, slots)

    def leave_groups(self, slots: int) -> list[Parcel]:
        """No datagram comes to a worker behind the first `slots` any more, once it has closed its member: our
        copy is closed. Gives what these workers can send through instead, from the same address; nothing if
        somebody else is to read their members."""
        parted: list[Parcel] = []
        if max(self.slots, self._preparing) > slots:
            return parted
        for bound in self.bounds:
            if bound.is_datagram:
                parted.append((f"{INSTEAD} {bound.number}", bound.members[0].fileno()))
                _cut(bound, slots)
        return parted

    def give_up(self, slots: int) -> bool:
        """The workers behind the first `slots` go, and so do the members that they read. False: somebody else
        is to read them."""
        if max(self.slots, self._preparing) > slots:
            return False
        self._shrink(slots)
        return True

    def keepsakes(self) -> dict[str, socket.socket]:
        """What systemd is to keep for the next start, by names that say which member it is. Not what a socket
        unit has anyway."""
        return {
            f"{KEPT}{_fd_name(bound.name)}/{bound.number}/{index}": member
            for bound in self.bounds
            for index, member in enumerate(bound.members[: self.slots])
            if index >= bound.lasting
        }

    def close(self) -> None:
        for bound in self.bounds:
            bound.close()
        self._close_loose()

    def _close_loose(self) -> None:
        for sock in (*self._surplus, *(one for given in self._loose.values() for one in given.members)):
            sock.close()
        self._surplus.clear()
        self._loose.clear()


def _cut(bound: Bound, slots: int) -> None:
    """No members behind the first ``slots``. A socket unit's stay: they are in the kernel's group anyway."""
    first = slots if bound.is_shared else max(slots, bound.lasting)
    for member in bound.members[first:]:
        member.close()
    del bound.members[first:]
    bound.lasting = min(bound.lasting, len(bound.members))


def _fit(bound: Bound, slots: int) -> None:
    """At least as many members as slots. Raises `StartError`."""
    if bound.is_datagram and bound.lasting > slots:
        # The kernel goes on to spread datagrams over all of them, and nobody reads the last ones.
        raise StartError(
            f"the listener {bound.name!r} was given {bound.lasting} sockets for {slots} workers: write its "
            f"address {slots} times in its socket unit, or set runtime.workers = {bound.lasting}"
        )
    have = len(bound.members)
    if have >= slots:
        return
    if not bound.lasting:
        add_members(bound, slots)
        return
    reuses = bound.members[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
    if reuses and not bound.is_shared:
        try:
            add_members(bound, slots)
        except StartError as error:
            # Another user's: only that one may bind more.
            log.debug("%s", error)
        else:
            return
    if bound.is_datagram:
        raise StartError(
            f"the listener {bound.name!r} was given {have} socket{'' if have == 1 else 's'} for {slots} "
            f"workers, and no more can stand beside: write its address {slots} times in its socket unit, "
            f"with ReusePort=yes, or set runtime.workers = {have}"
        )
    try:
        for index in range(slots - have):
            bound.members.append(bound.members[index % have].dup())
    except OSError as error:
        raise StartError(f"the socket of {bound.name!r} cannot be copied: {error.strerror}") from None
    bound.lasting = slots


def from_systemd(environ: Mapping[str, str], pid: int) -> dict[Where, Given]:
    """The sockets that systemd passed to this process, by address: those of socket units, and those that the
    process before left with it. Unix sockets are not ours to serve and are left alone."""
    units: dict[Where, list[socket.socket]] = {}
    left: dict[Where, list[tuple[int, socket.socket]]] = {}
    known: set[int] = set()
    for fd, name in passed(environ, pid):
        try:
            os.set_inheritable(fd, False)
            inode = os.fstat(fd).st_ino
            sock = socket.socket(fileno=fd)
        except OSError as error:
            log.warning("descriptor %d that systemd passed is no socket: %s", fd, error.strerror)
            continue
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            log.warning("descriptor %d that systemd passed is no IP socket and is not used", fd)
            sock.close()
            continue
        if inode in known:  # a second copy
            sock.close()
            continue
        known.add(inode)
        match = _KEEPSAKE.fullmatch(name)
        if match is None:
            units.setdefault(where_of(sock), []).append(sock)
        else:  # systemd gives them in any order
            left.setdefault(where_of(sock), []).append((int(match[1]), sock))
    found: dict[Where, Given] = {}
    for where in (*units, *(where for where in left if where not in units)):
        ours = sorted(left.get(where, ()), key=lambda one: one[0])
        members = [*units.get(where, ()), *(sock for _, sock in ours)]
        found[where] = Given(members, len(units.get(where, ())))
    return found


def _fd_name(name: str) -> str:
    """A listener's name as a part of FDNAME may be: short, without what separates names."""
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name)[:_MAX_NAME]


def where_of(sock: socket.socket) -> Where:
    host, port = sock.getsockname()[:2]
    return sock.type == socket.SOCK_DGRAM, str(host), int(port)


def close_all(bounds: Iterable[Bound]) -> None:
    for bound in bounds:
        bound.close()
